"""Names are exact, and positions never go back."""

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.clock import Instant, Validity
from moorline.errors import Malformed, Refused
from moorline.rats import EvidenceRoot
from moorline.storage.collateral_directory import DirectoryStore
from moorline.verification.collateral import Freshness, ItemName, Judged, advance, freshness

ROOT = ItemName.parse("intel-root-crl/root")


def judged(issued, evaluation=None, number=None, content=b"\0" * 32):
    return Judged(
        name=ROOT,
        issued=Instant(issued),
        validity=Validity(not_before=Instant(issued), not_after=Instant(issued + 10)),
        evaluation=evaluation,
        number=number,
        content=content,
        root=EvidenceRoot.TEST,
        endorses="a test",
    )


@given(
    st.one_of(
        st.text(),
        st.from_regex(
            r"(snp-vcek|snp-crl|intel-tcb-info|intel-root-crl|intel-pck-crl)(/[a-zA-Z0-9./]{0,20}){0,4}", fullmatch=True
        ),
        st.from_regex(r"intel-tcb-info/(sgx|tdx)/[0-9a-f]{12}/(standard|early|[0-9]{1,4})", fullmatch=True),
    )
)
def test_any_text_is_a_name_that_reads_back_or_malformed(text):
    try:
        name = ItemName.parse(text)
    except Malformed as error:
        assert error.code == "collateral.name"
        return
    assert str(name) == text
    file = DirectoryStore(Path("/store"))._file(name, bytes(32))
    assert PurePosixPath("/store") in file.parents
    assert ".." not in file.parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "root",
        "intel-root-crl/../root",
        "intel-root-crl/root/",
        "intel-tcb-info/sgx/00606A000000/standard",
        "intel-tcb-info/sgx/00606a000000",
        "intel-tcb-info/sgx/00606a000000/latest",
        "intel-pck-crl/platform/standard",
        "snp-crl/Milan",
        "snp-crl/milan/vcek",
        "snp-vcek/Turin/" + "0" * 128 + "/" + "0" * 16,
        "intel-tcb-info/sgx/00606a000000/standard\n",
    ],
)
def test_what_is_no_name(text):
    with pytest.raises(Malformed, match="collateral.name"):
        ItemName.parse(text)


positions = st.tuples(st.integers(0, 50), st.integers(0, 5), st.integers(0, 5))


@given(st.lists(st.tuples(positions, st.sampled_from([b"a" * 32, b"b" * 32])), max_size=30))
def test_no_sequence_of_items_ever_leads_back(sequence):
    mark = None
    reached = (0, 0, 0)
    said = {}
    for (issued, evaluation, number), content in sequence:
        offered = judged(issued, evaluation, number, content)
        position = (issued, evaluation, number)
        try:
            mark = advance(mark, offered)
        except Refused as refused:
            back = any(new < old for new, old in zip(position, reached, strict=True))
            other = position == reached and said.get(position) != content
            assert refused.code == ("collateral.rollback" if back else "collateral.contradiction")
            assert back or other
            continue
        assert all(new >= old for new, old in zip(position, reached, strict=True))
        reached = position
        said[position] = content
    assert mark is None or mark.position() == reached


def test_each_of_the_three_alone_refuses():
    mark = advance(None, judged(10, 5, 5))
    for older in (judged(9, 5, 5), judged(10, 4, 5), judged(10, 5, 4), judged(99, 4, 9), judged(9, 9, 9)):
        with pytest.raises(Refused, match="collateral.rollback"):
            advance(mark, older)
    with pytest.raises(Refused, match="collateral.contradiction"):
        advance(mark, judged(10, 5, 5, b"\1" * 32))
    assert advance(mark, judged(10, 5, 5)) == mark
    assert advance(mark, judged(11, 5, 5)).issued == 11


def test_an_item_that_lost_its_number_is_older():
    with pytest.raises(Refused, match="collateral.rollback"):
        advance(advance(None, judged(10, 5, 5)), judged(11, None, 5))


def test_freshness_includes_both_ends():
    validity = Validity(not_before=Instant(10), not_after=Instant(20))
    found = [freshness(validity, Instant(at)) for at in (9, 10, 20, 21)]
    assert found == [Freshness.NOT_YET_VALID, Freshness.CURRENT, Freshness.CURRENT, Freshness.EXPIRED]
