"""Checkpoints, bundles and the light client: what a quorum signed, recently, and nothing else."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import checkpoint, fetching, light_client, proof, records, standing, transactions
from moorline.ledger.checkpoint import Checkpoint, Note, authority_set_digest
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.ledger.records import RevocationKind
from moorline.ledger.transactions import AdmitAuthority, RetireAuthority, SuspendProvider
from moorline.services.ledger_view import LedgerView

from .conftest import NAMES, consortium_at, hsm_body
from .test_admission import new_authority
from .test_registration import SERVICE, applied, issuing_ca


def checkpoint_of(state):
    return Checkpoint(
        ledger_id=state.ledger_id,
        size=state.height + 1,
        root=b"r" * 32,
        height=state.height,
        time_ms=state.time_ms,
        state_root=state.root,
        authorities=authority_set_digest(state.authority_set()),
    )


def note_of(consortium, state, names=NAMES[:3], **changes):
    found = replace(checkpoint_of(state), **changes)
    maker = consortium.authorities[names[0]]
    signatures = [checkpoint.sign_note(found, name=maker.name, key=maker.checkpoint)]
    for name in names:
        key = consortium.authorities[name].checkpoint
        signatures.append(checkpoint.cosign(found, name=name, key=key, now=found.time))
    return Note(checkpoint=found, signatures=tuple(signatures)).encode()


def bundle_of(consortium, keys, *, state=None, note=None, changes=()):
    state = state or consortium.state
    return proof.make_bundle(
        note=note or note_of(consortium, state), changes=changes, tree=state.tree, value_of=state.get, keys=keys
    )


def now_of(consortium):
    return Instant(consortium.state.time_ms // 1000)


def verified(consortium, bundle, **arguments):
    return verify_bundle(bundle, consortium.made.trust, **({"now": now_of(consortium)} | arguments))


def test_present_and_absent_records_are_proven(consortium, alpha):
    state = verified(consortium, bundle_of(consortium, ["provider/alpha", "provider/beta"]))
    assert records.parse(records.ProviderRecord, state.record("provider/alpha")).trust_domain == "alpha.test"
    state.absent("provider/beta")
    for call, key, code in (
        (state.record, "provider/beta", "ledger.absent"),
        (state.absent, "provider/alpha", "ledger.present"),
        (state.record, "provider/gamma", "ledger.not_proven"),
        (state.absent, "provider/gamma", "ledger.not_proven"),
    ):
        with pytest.raises(Refused) as caught:
            call(key)
        assert caught.value.code == code
    with pytest.raises(TypeError):
        ProvenState(state.checkpoint, {})


def test_a_quorum_of_distinct_known_authorities_must_sign(consortium, alpha):
    """verifies that: two of four, one signing twice, a stranger under a known name, and the maker's line do not count."""
    keys = ["provider/alpha"]
    two = note_of(consortium, consortium.state, NAMES[:2])
    lines = two.split(b"\n\n")[1].split(b"\n")[:-1]
    twice = two + lines[1] + b"\n"
    stranger = consortium_at(consortium.made.directory / "other")
    foreign = note_of(stranger, consortium.state, NAMES[:3])
    for note in (two, twice, foreign):
        with pytest.raises(NotAuthentic) as caught:
            verified(consortium, bundle_of(consortium, keys, note=note))
        assert caught.value.code in {"ledger.quorum_missing", "ledger.signature_unknown"}
    extra = two + note_of(stranger, consortium.state, NAMES[2:3]).split(b"\n\n")[1]
    with pytest.raises(NotAuthentic, match="ledger.signature_unknown"):
        verified(consortium, bundle_of(consortium, keys, note=extra))
    third = two + note_of(consortium, consortium.state, NAMES[2:3]).split(b"\n\n")[1]
    assert verified(consortium, bundle_of(consortium, keys, note=third)).height == consortium.state.height
    other_block = note_of(consortium, replace(consortium.state, height=9), NAMES[:3])
    moved = note_of(consortium, consortium.state, NAMES[:3]).split(b"\n\n")[0] + b"\n\n" + other_block.split(b"\n\n")[1]
    with pytest.raises(NotAuthentic, match="ledger.signature_invalid"):
        verified(consortium, bundle_of(consortium, keys, note=moved))
    enough = note_of(consortium, consortium.state, NAMES)
    assert verified(consortium, bundle_of(consortium, keys, note=enough)).height == consortium.state.height


def test_old_future_foreign_and_rolled_back_proofs_are_refused(consortium, alpha):
    keys = ["provider/alpha"]
    bundle = bundle_of(consortium, keys)
    now = now_of(consortium)
    verified(consortium, bundle, now=Instant(now + 30))
    verified(consortium, bundle, now=Instant(now - 5))
    older = verified(consortium, bundle).checkpoint
    higher = replace(older, height=older.height + 1, size=older.size + 1)
    twin = replace(older, state_root=bytes(32))
    cases = [
        ("ledger.proof_stale", {"now": Instant(now + 31)}),
        ("ledger.proof_from_future", {"now": Instant(now - 6)}),
        ("ledger.rollback", {"highest": higher}),
        ("ledger.fork", {"highest": twin}),
    ]
    for code, arguments in cases:
        with pytest.raises(MoorlineError) as caught:
            verified(consortium, bundle, **arguments)
        assert caught.value.code == code
    verified(consortium, bundle, highest=older)
    other = replace(consortium.made.trust, ledger_id=bytes(32))
    with pytest.raises(Refused, match="ledger.other_ledger"):
        verify_bundle(bundle, other, now=now)


def test_a_bundle_that_lies_about_a_value_is_refused(consortium, alpha, beta):
    """verifies that: another value, a hidden record, another state's proof and too much proof are all refused."""
    keys = ["provider/alpha", "provider/gamma"]
    good = proof.parse_bundle(bundle_of(consortium, keys))
    alpha_entry, gamma_entry = good.records
    beta_value = consortium.state.get("provider/beta")
    wider = consortium.state.tree.prove([*keys, "provider/beta"])
    older_tree = consortium.state.tree.updated({"provider/alpha": b"x"}).prove(keys)
    lies = [
        replace(good, records=(replace(alpha_entry, value=beta_value), gamma_entry)),
        replace(good, records=(replace(alpha_entry, value=None), gamma_entry)),
        replace(good, records=(alpha_entry, replace(gamma_entry, value=beta_value))),
        replace(good, records=(alpha_entry,)),
        replace(good, tree=wider),
        replace(good, tree=older_tree),
        replace(good, records=(gamma_entry, alpha_entry)),
        replace(good, version=2),
    ]
    for lie in lies:
        with pytest.raises((NotAuthentic, Malformed)) as caught:
            verified(consortium, proof.schema.encode(lie))
        assert caught.value.code in {"ledger.proof_invalid", "ledger.proof_malformed", "ledger.bundle_malformed"}


def test_bundles_are_deterministic_and_bounded(consortium, alpha):
    one = bundle_of(consortium, ["provider/alpha", "provider/beta"])
    assert one == bundle_of(consortium, ["provider/beta", "provider/alpha", "provider/beta"])
    with pytest.raises(Malformed, match="ledger.proof_too_large"):
        bundle_of(consortium, [f"provider/p{number}" for number in range(65)])


def test_a_client_follows_changes_of_the_authority_set(consortium):
    """verifies that: each change is signed by the set before it; a client provisioned later skips what it knows."""
    action = new_authority(consortium, "authority-5", consortium.made.directory)
    assert isinstance(action, AdmitAuthority)
    first_trust = consortium.made.trust
    changes = []

    def change(body, deciders, signers):
        applied(consortium.decide(body, deciders))
        note = note_of(consortium, consortium.state, signers)
        changes.append(proof.SetChange(note=note, authorities=consortium.state.authority_set()))

    change(action, NAMES[:3], NAMES[:3])
    change(RetireAuthority(name="authority-1"), (*NAMES[:3], "authority-5"), (*NAMES[1:4], "authority-5"))
    consortium.block()
    new_set = (*NAMES[1:3], "authority-5")
    note = note_of(consortium, consortium.state, new_set)
    bundle = bundle_of(consortium, ["authority/authority-5"], note=note, changes=tuple(changes))
    assert verified(consortium, bundle).height == consortium.state.height

    later = LedgerTrust.parse(replace(first_trust, authorities=consortium.state.authority_set()).encode())
    assert verify_bundle(bundle, later, now=now_of(consortium))
    for bad in (
        (),
        tuple(changes[:1]),
        tuple(reversed(changes)),
        (changes[0], replace(changes[1], authorities=first_trust.authorities)),
    ):
        with pytest.raises(NotAuthentic):
            verified(consortium, bundle_of(consortium, ["authority/authority-5"], note=note, changes=bad))


def test_a_trust_file_with_a_weak_quorum_is_malformed(consortium):
    trust = consortium.made.trust
    assert LedgerTrust.parse(trust.encode()) == trust
    for bad in (replace(trust, quorum=2), replace(trust, quorum=5), replace(trust, authorities={}, quorum=0)):
        with pytest.raises(Malformed, match="ledger.trust_malformed"):
            LedgerTrust.parse(bad.encode())


# The trusting period -----------------------------------------------------------------------------------------------------


def known_at(consortium, at, period_s=100):
    return replace(consortium.made.trust, known_s=at, trusting_period_s=period_s)


def test_a_set_known_too_long_ago_proves_nothing(consortium, alpha):
    """verifies that: within the period a head is believed, one second beyond it is refused by code, whoever signed."""
    bundle, now = bundle_of(consortium, ["provider/alpha"]), now_of(consortium)
    assert verify_bundle(bundle, known_at(consortium, now - 100), now=now)
    for signers in (NAMES[:3], NAMES):
        bundle = bundle_of(consortium, ["provider/alpha"], note=note_of(consortium, consortium.state, signers))
        with pytest.raises(Refused, match=r"ledger.trust_expired") as caught:
            verify_bundle(bundle, known_at(consortium, now - 101), now=now)
        assert "moor ledger trust --renew" in caught.value.remedy


def test_who_saw_the_ledger_since_goes_on_from_there(consortium, alpha):
    """verifies that: the highest checkpoint renews the set it names, and only that one: departed authorities that make up
    another way on from the old set are refused."""
    old = known_at(consortium, now_of(consortium), period_s=15)
    changes = []
    action = new_authority(consortium, "authority-5", consortium.made.directory)
    applied(consortium.decide(action, NAMES[:3]))
    changes.append(
        proof.SetChange(note=note_of(consortium, consortium.state, NAMES[:3]), authorities=consortium.state.authority_set())
    )
    signers = (*NAMES[:3], "authority-5")
    seen = checkpoint.parse_note(note_of(consortium, consortium.state, signers)).checkpoint
    consortium.block()
    bundle = bundle_of(
        consortium, ["provider/alpha"], note=note_of(consortium, consortium.state, signers), changes=tuple(changes)
    )
    now = Instant(old.known_s + 16)
    arguments = {"now": now, "highest": seen}
    trust = replace(old, max_age_s=60, trusting_period_s=max(15, now - seen.time))
    with pytest.raises(Refused, match=r"ledger.trust_expired"):
        verify_bundle(bundle, replace(trust, known_s=0), now=now)
    assert verify_bundle(bundle, replace(trust, known_s=0), **arguments)
    forged = replace(seen, authorities=bytes(32))
    with pytest.raises(Refused, match=r"ledger.trust_expired"):
        verify_bundle(bundle, replace(trust, known_s=0), now=now, highest=forged)
    # The old four go on as if nobody had joined, and pretend in an unsigned change to have come by the set that was seen.
    pretence = proof.SetChange(note=changes[0].note, authorities=changes[0].authorities)
    marker = proof.SetChange(note=note_of(consortium, consortium.state), authorities=trust.authorities)
    other = note_of(consortium, consortium.state, NAMES, authorities=authority_set_digest(trust.authorities))
    for made_up in ((), (pretence, marker)):
        forged = bundle_of(consortium, ["provider/alpha"], note=other, changes=made_up)
        with pytest.raises(Refused, match=r"ledger.trust_expired"):
            verify_bundle(forged, replace(trust, known_s=0), **arguments)


def test_a_trust_is_renewed_from_a_verified_head(consortium, alpha):
    """verifies that: the new file names the authorities in force, as of the head's time; an expired one is not renewed."""
    old = consortium.made.trust
    action = new_authority(consortium, "authority-5", consortium.made.directory)
    applied(consortium.decide(action, NAMES[:3]))
    change = proof.SetChange(
        note=note_of(consortium, consortium.state, NAMES[:3]), authorities=consortium.state.authority_set()
    )
    changing = bundle_of(consortium, ["provider/alpha"], note=change.note)
    with pytest.raises(Unavailable, match=r"ledger.set_changing"):
        light_client.renewed(changing, old, now=now_of(consortium))
    consortium.block()
    note = note_of(consortium, consortium.state, (*NAMES[:3], "authority-5"))
    bundle = bundle_of(consortium, ["provider/alpha"], note=note, changes=(change,))
    now = now_of(consortium)
    found = light_client.renewed(bundle, old, now=now)
    assert (found.authorities, found.quorum, found.known_s) == (consortium.state.authority_set(), 4, now)
    assert verify_bundle(bundle, replace(found, trusting_period_s=1), now=now)
    with pytest.raises(Refused, match=r"ledger.trust_expired"):
        light_client.renewed(bundle, replace(old, known_s=0), now=now)


# Standing --------------------------------------------------------------------------------------------------------------


def test_what_is_active_is_returned_and_what_is_not_is_refused(consortium, alpha, beta):
    """verifies that: a reading needs its own keys, refuses absence and any status but active, follows its provider."""
    applied(consortium.as_provider(alpha, hsm_body(alpha)))
    ca = transactions.RegisterIssuingCa(id="ca-1", certificate=issuing_ca(alpha))
    applied(consortium.as_provider(alpha, ca))
    applied(consortium.as_provider(alpha, SERVICE))
    terms = "permit(principal, action, resource);"
    offer = transactions.OfferAccess(contract="c-1", service="records", grantee="beta", conditions=terms, profiles=("pfs",))
    applied(consortium.as_provider(alpha, offer))
    device = {"provider": "alpha", "issuing_ca": "ca-1", "device": "d-1", "serial": 255}
    instance = {"provider": "alpha", "issuing_ca": "ca-1", "service": "records", "instance": "i-1", "serial": 255}
    keys = (
        *standing.hsm_keys("alpha", "hsm-1"),
        *standing.hsm_keys("alpha", "hsm-2"),
        *standing.contract_keys("c-1", provider="alpha", service="records", grantee="beta"),
        *standing.device_keys(**device),
        *standing.instance_keys(**instance),
    )

    def now_proven():
        return verified(consortium, bundle_of(consortium, keys))

    def code_of(read, *arguments, **named):
        with pytest.raises(Refused) as caught:
            read(now_proven(), *arguments, **named)
        return caught.value.code

    assert standing.active_hsm(now_proven(), "alpha", "hsm-1").id == "hsm-1"
    assert standing.standing_device(now_proven(), **device).id == "ca-1"
    assert standing.standing_instance(now_proven(), **instance)[1].name == "records"
    assert code_of(standing.active_hsm, "alpha", "hsm-2") == "ledger.hsm_not_active"
    assert code_of(standing.active_hsm, "alpha", "hsm-3") == "ledger.not_proven"
    assert code_of(standing.active_platform, "alpha", "h1") == "ledger.not_proven"
    assert code_of(standing.active_contract, "c-1") == "ledger.contract_not_active"
    applied(consortium.as_provider(beta, transactions.AcceptAccess(contract="c-1")))
    assert standing.active_contract(now_proven(), "c-1").grantee == "beta"

    applied(consortium.as_provider(alpha, transactions.Revoke(kind=RevocationKind.DEVICE, id="d-1")))
    applied(consortium.as_provider(alpha, transactions.Revoke(kind=RevocationKind.CERTIFICATE, id="ff")))
    assert code_of(standing.standing_device, **device) == "ledger.revoked"
    assert code_of(standing.standing_instance, **instance) == "ledger.revoked"
    applied(consortium.as_provider(alpha, transactions.RevokeHsm(id="hsm-1")))
    assert code_of(standing.active_hsm, "alpha", "hsm-1") == "ledger.hsm_not_active"
    applied(consortium.decide(SuspendProvider(name="beta")))
    assert code_of(standing.active_contract, "c-1") == "ledger.provider_not_active"
    applied(consortium.decide(SuspendProvider(name="alpha")))
    assert code_of(standing.active_issuing_ca, "alpha", "ca-1") == "ledger.provider_not_active"
    assert code_of(standing.active_service, "alpha", "records") == "ledger.provider_not_active"


def test_what_a_retired_key_signed_is_retired_with_it(consortium, alpha):
    applied(consortium.as_provider(alpha, hsm_body(alpha)))
    retire_at = consortium.now_ms // 1000 + 10
    new = consortium.provider("alpha", "alpha.test")
    applied(consortium.as_provider(alpha, transactions.RotateProviderKey(certificate=new.der, retire_at=retire_at)))
    keys = standing.hsm_keys("alpha", "hsm-1")
    assert standing.active_hsm(verified(consortium, bundle_of(consortium, keys)), "alpha", "hsm-1")
    consortium.now_ms = retire_at * 1000
    consortium.block()
    with pytest.raises(Refused, match="ledger.issuer_retired"):
        standing.active_hsm(verified(consortium, bundle_of(consortium, keys)), "alpha", "hsm-1")


# Bytes -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    made = consortium_at(tmp_path_factory.mktemp("flip") / "c")
    made.admitted("alpha", "alpha.test")
    return made, bundle_of(made, ["provider/alpha", "provider/beta"])


def lies_in(made, changed):
    """What a changed bundle makes a client believe that is not so. A changed absent key may be another, truly absent."""
    try:
        state = verified(made, changed)
    except (Malformed, NotAuthentic, Refused):
        return []
    entries = proof.parse_bundle(changed).records
    return [entry.key for entry in entries if made.state.get(entry.key) != entry.value or state.height != made.state.height]


@given(st.data())
def test_a_flipped_bit_never_makes_a_lie_believed(fixed, data):
    made, bundle = fixed
    bit = data.draw(st.integers(0, len(bundle) * 8 - 1))
    changed = bytearray(bundle)
    changed[bit // 8] ^= 1 << bit % 8
    assert lies_in(made, bytes(changed)) == []


def test_a_bit_flipped_in_a_present_record_is_refused(fixed):
    made, _ = fixed
    bundle = bundle_of(made, ["provider/alpha"])
    for bit in range(0, len(bundle) * 8, 7):
        changed = bytearray(bundle)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Malformed, NotAuthentic, Refused)):
            verified(made, bytes(changed))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_bundle_a_note_a_trust_file_or_malformed(data):
    for parse in (proof.parse_bundle, checkpoint.parse_note, light_client.LedgerTrust.parse):
        with pytest.raises(Malformed):
            parse(data)


@given(st.data())
def test_any_text_is_a_note_or_malformed(fixed, data):
    made, _ = fixed
    good = note_of(made, made.state).decode()
    at = data.draw(st.integers(0, len(good)))
    changed = good[:at] + data.draw(st.text(alphabet="ab0 \n+=—", max_size=3)) + good[at + data.draw(st.integers(0, 2)) :]
    try:
        note = checkpoint.parse_note(changed.encode())
    except Malformed as error:
        assert error.code == "ledger.note_malformed"
    else:
        assert note.encode() == changed.encode()


def test_the_checkpoint_is_a_c2sp_signed_note(consortium):
    """verifies that: our notes can be checked with nothing but the C2SP documents and an Ed25519 implementation."""
    import base64
    import hashlib

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    text = note_of(consortium, consortium.state, NAMES[:3]).decode()
    body, _, lines = text.partition("\n\n")
    body += "\n"
    for number, line in enumerate(lines.splitlines()):
        dash, name, blob64 = line.split(" ")
        blob, key = base64.b64decode(blob64), consortium.made.trust.authorities[name]
        kind, message, signature = (
            (b"\x01", body.encode(), blob[4:])
            if number == 0
            else (b"\x04", f"cosignature/v1\ntime {int.from_bytes(blob[4:12], 'big')}\n{body}".encode(), blob[12:])
        )
        assert dash == "—"
        assert blob[:4] == hashlib.sha256(name.encode() + b"\n" + kind + key).digest()[:4]
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)


class Answers:
    """A ledger that answers each question when it is let, so that answers can overtake one another."""

    def __init__(self, bundles):
        self.bundles, self.let = bundles, [asyncio.Event() for _ in bundles]
        self.asked = 0

    async def prove(self, _keys, *, height=0):
        number = self.asked
        self.asked += 1
        await self.let[number].wait()
        return self.bundles[number]

    async def aclose(self):
        """Nothing is open."""


async def test_answers_that_overtake_one_another_are_no_rollback_and_an_old_one_afterwards_is(
    consortium, alpha, monkeypatch
):
    """verifies that: a broker's two questions at once may be answered in any order; going back later is refused."""
    older = bundle_of(consortium, ["provider/alpha"])
    consortium.block()
    newer = bundle_of(consortium, ["provider/alpha"])
    monkeypatch.setattr(fetching, "PATIENCE_S", 0)
    ledger = Answers([older, newer, older])
    store = SimpleNamespace(document=lambda _name: None, set_document=lambda _name, _value: None)
    view = LedgerView(ledger, consortium.made.trust, store, SimpleNamespace(now=lambda: now_of(consortium)))
    first, second = (asyncio.create_task(view.proven(("provider/alpha",))) for _ in range(2))
    ledger.let[1].set()
    height = (await second)[1].height
    ledger.let[0].set()
    assert (await first)[1].height == height - 1
    ledger.let[2].set()
    with pytest.raises(Refused, match="ledger.rollback"):
        await view.state(("provider/alpha",))
