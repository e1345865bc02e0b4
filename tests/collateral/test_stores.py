"""One suite for the port, run on the folder and on the database: hold, give back, never go back, even for two at once."""

import concurrent.futures
import dataclasses

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant, Validity
from moorline.errors import Malformed, Misconfigured, Refused
from moorline.rats import EvidenceRoot
from moorline.storage.collateral_directory import DirectoryStore
from moorline.storage.collateral_intake import Offered, Taken, root_first, take
from moorline.storage.collateral_store import Put, StoredItem, open_collateral
from moorline.verification.anchors import AnchorSet
from moorline.verification.collateral import ItemName, Judged, needs_of
from moorline.verification.collateral_judging import Anchors, packed_crl

ROOT = ItemName.parse("intel-root-crl/root")


@pytest.fixture(params=["store", "store.sqlite"])
def path(tmp_path, request):
    return tmp_path / request.param


@pytest.fixture
def store(path):
    return open_collateral(path, create=True)


def item(position, data=b"data", name=ROOT):
    issued, evaluation, number = position
    found = Judged(
        name=name,
        issued=Instant(issued),
        validity=Validity(not_before=Instant(issued), not_after=Instant(issued + 10)),
        evaluation=evaluation,
        number=number,
        content=data.ljust(32, b"\0"),
        root=EvidenceRoot.TEST,
        endorses="a test",
    )
    return StoredItem(judged=found, source="https://vendor.test/x", fetched=Instant(issued), data=data)


def test_what_is_put_is_given_back_also_to_the_next_process(store, path):
    put = item((5, 17, 1 << 159), b"one")
    assert store.put(put) is Put.STORED
    assert store.put(put) is Put.UNCHANGED
    for one in (store, open_collateral(path, create=False)):
        assert one.get(ROOT) == put
        assert one.names() == (ROOT,)
        assert one.items() == (put,)
        assert one.mark(ROOT).position() == (5, 17, 1 << 159)
    assert store.get(ItemName.parse("intel-pck-crl/platform")) is None


@pytest.mark.parametrize("older", [(4, 17, 3), (5, 16, 3), (5, 17, 2), (9, 16, 9), (9, None, 9)])
def test_nothing_older_ever_replaces_what_was_held(store, path, older):
    held = item((5, 17, 3), b"new")
    store.put(held)
    with pytest.raises(Refused, match="collateral.rollback"):
        open_collateral(path, create=False).put(item(older, b"old"))
    assert store.get(ROOT) == held
    store.drop(ROOT)
    assert store.get(ROOT) is None
    with pytest.raises(Refused, match="collateral.rollback"):
        store.put(item(older, b"old"))
    assert store.names() == ()


def test_two_contents_at_one_position_are_refused(store):
    store.put(item((5, 17, 3), b"one"))
    with pytest.raises(Refused, match="collateral.contradiction"):
        store.put(item((5, 17, 3), b"two"))
    assert store.get(ROOT).data == b"one"


def test_two_that_store_at_once_end_at_the_newest(store, path):
    def put(number):
        try:
            open_collateral(path, create=False).put(item((100 + number, 17, number), b"%d" % number))
        except Refused as refused:
            return refused.code
        return "stored"

    store.put(item((1, 17, 0)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(put, [7, 3, 9, 1, 8, 2, 6, 4]))
    assert store.get(ROOT).data == b"9"
    assert store.mark(ROOT).number == 9
    assert set(results) <= {"stored", "collateral.rollback"}


def test_there_is_no_store_where_none_was_made(path):
    with pytest.raises(Misconfigured, match="collateral.no_store"):
        open_collateral(path, create=False)


def test_a_file_that_was_changed_by_hand_is_noticed(tmp_path):
    store = open_collateral(tmp_path / "s", create=True)
    store.put(item((5, 17, 3), b"one"))
    (file,) = (tmp_path / "s" / "intel-root-crl").iterdir()
    file.write_bytes(b"two")
    with pytest.raises(Malformed, match="collateral.store_damaged"):
        store.get(ROOT)


class DyingStore(DirectoryStore):
    """Dies after the file is written, before the index is."""

    def _write(self, index):
        raise InterruptedError


def test_a_folder_that_died_between_file_and_index_holds_the_old_state(tmp_path):
    store = open_collateral(tmp_path / "s", create=True)
    old = item((5, 17, 3), b"one")
    store.put(old)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            DyingStore(tmp_path / "s").put(item((6, 17, 4), b"two"))
        assert store.get(ROOT) == old
        assert store.mark(ROOT).number == 3
    store.put(item((7, 17, 5), b"three"))
    assert store.get(ROOT).data == b"three"
    assert len(list((tmp_path / "s" / "intel-root-crl").iterdir())) == 1


def test_an_index_that_is_none_is_malformed(tmp_path):
    (tmp_path / "collateral.cbor").write_bytes(b"\xff")
    with pytest.raises(Malformed):
        open_collateral(tmp_path, create=False).names()


# ---------------------------------------------------------------- taking items in


def offer(world, name, data=None):
    return Offered(name=name, data=data or world.item(name), source="test", fetched=world.now)


def test_everything_is_taken_once_the_root_crl_is_there(world, store):
    name = world.name("intel-tcb-info/sgx/FMSPC/standard")
    first = take(offer(world, name), store, anchors=world.anchors, now=world.now)
    assert (first.taken, first.error.code) == (Taken.UNDECIDED, "collateral.root_crl_missing")
    for one in world.names():
        assert take(offer(world, one), store, anchors=world.anchors, now=world.now).taken is Taken.STORED
    assert set(store.names()) == set(world.names())


def test_an_authentic_older_statement_is_refused_though_it_is_still_valid(world, store):
    name = world.name("intel-tcb-info/sgx/FMSPC/standard")
    take(offer(world, ROOT), store, anchors=world.anchors, now=world.now)
    world.intel.issued = world.now - 2 * 86400
    old = world.item(name)
    world.intel.issued = world.now - 86400
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).taken is Taken.STORED
    again = take(offer(world, name, old), store, anchors=world.anchors, now=world.now)
    assert (again.taken, again.error.code) == (Taken.REFUSED, "collateral.rollback")
    assert again.judged is not None


def test_an_evaluation_never_goes_back_even_with_a_newer_date(world, store):
    name = world.name("intel-tcb-info/tdx/FMSPC/standard")
    take(offer(world, ROOT), store, anchors=world.anchors, now=world.now)
    world.intel.standard = 18
    take(offer(world, name), store, anchors=world.anchors, now=world.now)
    world.intel.standard, world.intel.issued = 17, world.now - 10
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).error.code == "collateral.rollback"


@pytest.mark.parametrize(("field", "value"), [("crl_from", -2), ("crl_number", 4)])
def test_a_crl_never_goes_back(world, store, field, value):
    name = world.name("snp-crl/Milan/vcek")
    take(offer(world, name), store, anchors=world.anchors, now=world.now)
    setattr(world.amd, field, world.now + value * 86400 if value < 0 else value)
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).error.code == "collateral.rollback"


def test_a_crl_that_forgets_a_revocation_at_the_same_position_is_refused(world, store):
    name = world.name("snp-crl/Milan/vcek")
    world.amd.revoked = (77,)
    take(offer(world, name), store, anchors=world.anchors, now=world.now)
    world.amd.revoked = ()
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).error.code == "collateral.contradiction"


def test_a_crl_signed_anew_with_the_same_content_is_the_same(world, store):
    name = world.name("snp-crl/Milan/vcek")
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).taken is Taken.STORED
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).taken is Taken.STORED


def test_a_chip_under_an_authority_that_a_held_crl_revokes_is_refused(world, store):
    from cryptography import x509

    world.amd.revoked = (x509.load_der_x509_certificate(world.amd.maker.ask).serial_number,)
    take(offer(world, world.name("snp-crl/Milan/vcek")), store, anchors=world.anchors, now=world.now)
    refused = take(offer(world, world.amd.vcek_name), store, anchors=world.anchors, now=world.now)
    assert (refused.taken, refused.error.code) == (Taken.REFUSED, "snp.revoked")
    late = Instant(world.now + 30 * 86400)  # that CRL has expired: it decides nothing any more
    assert take(offer(world, world.amd.vcek_name), store, anchors=world.anchors, now=late).taken is Taken.STORED


def test_a_chip_under_an_authority_that_came_after_this_package_needs_its_chain(world, store):
    """AMD may issue a new ASK under the same root: the chain it serves is judged and then stands between."""
    known = world.anchors.snp.snp[0]
    bare = Anchors(snp=AnchorSet(snp=(dataclasses.replace(known, intermediates=()),)), intel=world.anchors.intel, tpm=())
    refused = take(offer(world, world.amd.vcek_name), store, anchors=bare, now=world.now)
    assert refused.error.code == "snp.anchor_unknown"
    names = root_first([world.amd.vcek_name, world.name("snp-chain/Milan/vcek")])
    assert [take(offer(world, one), store, anchors=bare, now=world.now).taken for one in names] == [Taken.STORED] * 2


def test_appraisal_gets_one_file_for_each_need_in_a_form_it_knows(world, store):
    for one in world.names():
        take(offer(world, one), store, anchors=world.anchors, now=world.now)
    files = store.endorsements(needs_of(world.intel.quote("tdx")))
    assert [file.hint for file in files] == ["pcs-response-json", "pcs-response-json", "pcs-response-json", "crl-der"]
    from moorline.verification.intel_collateral import Collateral
    from moorline.verification.intel_endorsements import assemble

    endorsements = assemble([(file.hint, file.data) for file in files])
    verified = world.intel.fakes["tdx"].verify(endorsements=endorsements, collateral=Collateral.FULL)
    assert verified.value.platform.tcb_evaluation == 17
    assert verified.value.platform.revocation_checked


def test_a_stored_item_can_be_replaced_by_a_later_one_with_the_same_bytes(store):
    one = item((5, 17, 3))
    store.put(one)
    later = dataclasses.replace(one, fetched=Instant(99))
    assert store.put(later) is Put.UNCHANGED
    assert store.get(ROOT).fetched == 99


# ---------------------------------------------------------------- makers of TPMs


@pytest.mark.parametrize(("field", "value"), [("start", -2), ("number", 4)])
def test_a_tpm_makers_list_never_goes_back(world, store, field, value):
    name = world.tpm.name("ca")
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).taken is Taken.STORED
    setattr(world.tpm, field, value)
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).error.code == "collateral.rollback"
    store.drop(name)
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).error.code == "collateral.rollback"


def test_a_tpm_makers_list_that_forgets_a_revocation_at_the_same_position_is_refused(world, store):
    name = world.tpm.name("ca")
    world.tpm.revoked = (world.tpm.maker.die,)
    take(offer(world, name), store, anchors=world.anchors, now=world.now)
    world.tpm.revoked = ()
    assert take(offer(world, name), store, anchors=world.anchors, now=world.now).error.code == "collateral.contradiction"


def test_the_list_of_an_authority_that_a_held_list_revokes_is_refused(world, store):
    maker = world.tpm.maker
    revoking = packed_crl(maker.crl("root", maker.ca), maker.root.public_bytes(Encoding.PEM).decode())
    take(offer(world, world.tpm.name("root"), revoking), store, anchors=world.anchors, now=world.now)
    refused = take(offer(world, world.tpm.name("ca")), store, anchors=world.anchors, now=world.now)
    assert (refused.taken, refused.error.code) == (Taken.REFUSED, "ek.revoked")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"start": -9, "end": -1}, "ek.crl_stale"),
        ({"start": 1, "end": 9}, "ek.crl_not_yet_valid"),
        ({"key": "stranger"}, "ek.crl_signature"),
        ({"delta": True}, "ek.crl_partial"),
    ],
)
def test_a_tpm_makers_list_that_does_not_count_is_not_stored(world, store, intel_keys, options, code):
    chosen = {name: intel_keys[value] if name == "key" else value for name, value in options.items()}
    name = world.tpm.name("ca")
    outcome = take(offer(world, name, world.tpm.item(name, **chosen)), store, anchors=world.anchors, now=world.now)
    assert outcome.error.code == code
    assert store.names() == ()


def test_a_tpm_makers_list_under_another_authoritys_name_is_refused(world, store):
    root, ca = world.tpm.name("root"), world.tpm.name("ca")
    outcome = take(offer(world, root, world.tpm.item(ca)), store, anchors=world.anchors, now=world.now)
    assert outcome.error.code == "collateral.other_item"
