"""Each kind of item is stored only if it is authentic, not revoked, current, and what its name says."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Unavailable
from moorline.rats import EvidenceRoot
from moorline.verification import collateral_judging as forms
from moorline.verification.collateral import ItemKind, ItemName, missing, needs_of
from moorline.verification.collateral_judging import Anchors, Held, judge


def judged(world, name, data=None, *, now=None, root_crl="held"):
    return judge(
        name,
        world.item(name) if data is None else data,
        anchors=world.anchors,
        held=Held(root_crl=world.root_crl if root_crl == "held" else root_crl),
        now=now or world.now,
    )


def test_every_kind_of_item_is_judged(world):
    for name in world.names():
        found = judged(world, name)
        assert found.name == name
        assert found.root is EvidenceRoot.TEST
        assert found.issued <= world.now <= found.validity.not_after


def test_positions_are_those_of_the_vendors(world):
    assert judged(world, world.name("intel-tcb-info/sgx/FMSPC/standard")).evaluation == 17
    assert judged(world, world.name("intel-tcb-info/sgx/FMSPC/early")).evaluation == 19
    assert judged(world, world.name("intel-evaluations/sgx")).evaluation == 19
    assert judged(world, world.name("snp-crl/Milan/vcek")).number == 5
    assert judged(world, world.name("intel-root-crl/root")).number == 1


@pytest.mark.parametrize(
    ("claimed", "given"),
    [
        ("intel-tcb-info/tdx/FMSPC/standard", "intel-tcb-info/sgx/FMSPC/standard"),
        ("intel-tcb-info/sgx/000000000000/standard", "intel-tcb-info/sgx/FMSPC/standard"),
        ("intel-tcb-info/sgx/FMSPC/17", "intel-tcb-info/sgx/FMSPC/18"),
        ("intel-enclave-identity/tdx/standard", "intel-enclave-identity/sgx/standard"),
        ("intel-evaluations/tdx", "intel-evaluations/sgx"),
        ("intel-pck-crl/processor", "intel-pck-crl/platform"),
        ("snp-chain/Milan/vlek", "snp-chain/Milan/vcek"),
    ],
)
def test_an_item_under_another_name_is_refused(world, claimed, given):
    with pytest.raises(NotAuthentic) as refused:
        judged(world, world.name(claimed), world.item(world.name(given)))
    assert refused.value.code == "collateral.other_item"


def test_a_chip_under_the_name_of_another_is_refused(world):
    other = ItemName(kind=ItemKind.SNP_VCEK, subject=f"Milan/{bytes(64).hex()}/{world.amd.chip.tcb.raw():016x}")
    with pytest.raises(NotAuthentic) as refused:
        judged(world, other, world.amd.chip.vcek)
    assert refused.value.code == "collateral.other_item"


def test_a_crl_of_another_product_line_is_refused(world):
    with pytest.raises(NotAuthentic) as refused:
        judged(world, world.name("snp-crl/Genoa/vcek"), world.amd.crl())
    assert refused.value.code == "snp.crl_invalid"


@pytest.mark.parametrize(("days", "words"), [(-1000, ("not_yet_valid", "stale")), (10_000, ("expired", "stale"))])
def test_items_out_of_their_time_are_refused_each_with_its_code(world, days, words):
    now = Instant(world.now + days * 86400)
    codes = {}
    for name in world.names():
        with pytest.raises(NotAuthentic) as refused:
            judged(world, name, now=now)
        codes[str(name)] = refused.value.code
    assert all(code.endswith(words) for code in codes.values()), codes


def test_without_the_root_crl_nothing_of_intels_is_judged(world):
    with pytest.raises(Unavailable) as undecided:
        judged(world, world.name("intel-tcb-info/sgx/FMSPC/standard"), root_crl=None)
    assert undecided.value.code == "collateral.root_crl_missing"
    judged(world, world.name("intel-root-crl/root"), root_crl=None)
    judged(world, world.amd.vcek_name, root_crl=None)


@pytest.mark.parametrize(
    ("serial", "name"),
    [(4, "intel-tcb-info/sgx/FMSPC/standard"), (4, "intel-evaluations/sgx"), (2, "intel-pck-crl/platform")],
)
def test_a_revoked_signer_is_refused(world, serial, name):
    world.intel.any.revoked["root"].append(serial)
    with pytest.raises(NotAuthentic) as refused:
        judged(world, world.name(name))
    assert refused.value.code == "intel.revoked"


def test_the_authority_of_a_pck_crl_is_one_by_its_certificate(world):
    name = world.name("intel-pck-crl/platform")
    good = world.item(name)
    world.intel.any.is_ca["ca"] = False
    with pytest.raises(NotAuthentic) as refused:
        judged(world, name, world.item(name))
    assert refused.value.code == "intel.chain_role"
    world.intel.any.is_ca["ca"] = True
    world.intel.any.names["ca"] = "Intel SGX PCK Other CA"
    with pytest.raises(NotAuthentic) as refused:
        judged(world, name, world.item(name))
    assert refused.value.code == "intel.chain_role"
    world.intel.any.names["ca"] = "Intel SGX PCK Platform CA"
    judged(world, name, good)


def test_roots_that_nobody_named_open_nothing(world):
    strangers = Anchors(snp=type(world.amd.anchors)(snp=()), intel=type(world.intel.anchors)(anchors=()), tpm=())
    for name in world.names():
        with pytest.raises(NotAuthentic):
            judge(name, world.item(name), anchors=strangers, held=Held(root_crl=world.root_crl), now=world.now)


@pytest.fixture
def goods(world):
    """Every item once: signatures are random, and a property must see the same bytes each time."""
    return {name: world.item(name) for name in world.names()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flip_any_bit_and_no_item_is_stored(world, goods, data):
    """An item may still be the same one: base64 and JSON have several texts for one content. Then it says the same."""
    name = data.draw(st.sampled_from(sorted(goods)))
    good = goods[name]
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    try:
        found = judged(world, name, bytes(bad))
    except (Malformed, NotAuthentic, Unavailable):
        return
    assert found.content == judged(world, name, good).content


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), junk=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
def test_any_bytes_are_an_item_or_an_error_of_ours(world, data, junk):
    name = data.draw(st.sampled_from(world.names()))
    with pytest.raises(MoorlineError):
        judged(world, name, junk)


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.pop("issuer_chain"),
        lambda members: members.update(more="x"),
        lambda members: members.update(crl_data_base64="?"),
        lambda members: members.update(crl_data_base64=7),
    ],
)
def test_an_item_of_another_form_is_malformed(world, change):
    name = world.name("intel-pck-crl/platform")
    members = json.loads(world.item(name))
    change(members)
    with pytest.raises(Malformed) as malformed:
        judged(world, name, json.dumps(members).encode())
    assert malformed.value.code == "collateral.item_malformed"


def test_an_item_that_is_too_large_is_not_looked_at(world):
    with pytest.raises(Malformed) as malformed:
        judged(world, world.name("intel-root-crl/root"), bytes(forms.MAX_ITEM + 1))
    assert malformed.value.code == "collateral.item_too_large"


# ---------------------------------------------------------------- needs


@pytest.mark.parametrize("tee", ["sgx", "tdx"])
def test_a_quote_names_what_it_needs(world, tee):
    needs = needs_of(world.intel.quote(tee))
    assert [str(need.items[0]) for need in needs] == [
        f"intel-tcb-info/{tee}/{world.intel.fmspc}/standard",
        f"intel-enclave-identity/{tee}/standard",
        "intel-pck-crl/platform",
        "intel-root-crl/root",
    ]
    held = {world.name("intel-root-crl/root"), world.name(f"intel-enclave-identity/{tee}/standard")}
    assert [str(need.items[0]).partition("/")[0] for need in missing(needs, held)] == ["intel-tcb-info", "intel-pck-crl"]


def test_other_evidence_needs_nothing_from_a_store():
    assert needs_of(b"\xd2\x84\x43") == ()
    assert needs_of(b"") == ()
