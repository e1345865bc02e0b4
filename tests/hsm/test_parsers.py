"""What the HSM room reads from strangers: any bytes give a value or a typed refusal, and every proof has its bad twin."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, Misconfigured, MoorlineError, NotAuthentic, Refused
from moorline.hsm import exchange, provider
from moorline.hsm.authorisation import AccessFacts, decide_access
from moorline.hsm.exchange import Expectation, Party
from moorline.services import broker_est_access, broker_sign
from moorline.storage.broker_bundles import Peer
from moorline.wire import cose, est, keys
from moorline.wire.session import LauncherTicket

NOW = Instant(1_800_000_000)
KEY = ec.derive_private_key(7, ec.SECP256R1())
OTHER = ec.derive_private_key(8, ec.SECP256R1())
ALPHA, BETA = Party(provider="alpha", hsm="hsm-1"), Party(provider="beta", hsm="hsm-1")
EXPECTED = Expectation(ledger_id=b"l" * 32, sender=ALPHA, receiver=BETA, challenge=b"c" * 32)


def csr(key=KEY) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def bundle(**changes) -> bytes:
    made = exchange.our_bundle(
        expected=EXPECTED, trust_domain="alpha.test", sequence=1, now=NOW, roots=(), issuing_cas=(), above=()
    )
    return exchange.sign_bundle(replace(made, **changes), keys.KeySigner(KEY))


TICKET = LauncherTicket(
    ledger_id=b"l" * 32, provider="alpha", ticket=b"t" * 32, measurement=b"m" * 48, chip=b"c" * 64, not_after=NOW + 1
)
SIGNED_TICKET = provider.sign_launcher_ticket(KEY, TICKET)
CSR, BUNDLE = csr(), bundle()
SIGNING_INPUT = b"eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.e30"
GOOD_SIGN = json.dumps({"key": "verifier", "messages": [base64.b64encode(SIGNING_INPUT).decode()]}).encode()


def read_ticket(data: bytes) -> LauncherTicket:
    known = (KEY.public_key(),)
    return provider.verify_launcher_ticket(data, known, ledger_id=b"l" * 32, provider="alpha", now=NOW)


READERS = {
    "csr": (est.csr_key, CSR),
    "ticket": (read_ticket, SIGNED_TICKET),
    "bundle": (lambda data: exchange.verify_bundle(data, KEY.public_key(), EXPECTED), BUNDLE),
    "sign": (broker_sign._signing_inputs, None),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=600))
def test_any_bytes(name, data):
    """verifies that: whatever arrives, the reader answers with one of our errors."""
    with pytest.raises(MoorlineError):
        READERS[name][0](data)


@pytest.mark.parametrize("name", ["csr", "ticket", "bundle"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_accepted(name, data):
    """verifies that: what is accepted is accepted whole; one flipped bit and it is not."""
    reader, good = READERS[name]
    reader(good)
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    changed = bytearray(good)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((Malformed, NotAuthentic, Refused)):
        reader(bytes(changed))


def test_a_signature_of_a_request_is_of_whole_bytes():
    """verifies that: bits that are said to be unused, which the library ignores, are refused."""
    for made in (csr() for _ in range(16)):
        unused = len(made) - len(x509.load_der_x509_csr(made).signature) - 1
        with pytest.raises((Malformed, NotAuthentic)):
            est.csr_key(made[:unused] + b"\x01" + made[unused + 1 :])
        est.csr_key(made)


def test_what_the_verifier_key_signs():
    """verifies that: a signing input with exactly our header is taken as it is."""
    assert broker_sign._signing_inputs(GOOD_SIGN) == [SIGNING_INPUT]


@settings(max_examples=200, deadline=None)
@given(header=st.text(max_size=60))
def test_any_authorization_header(header):
    """verifies that: HTTP Basic credentials are read or refused, never crashed on."""
    try:
        found = broker_est_access.basic(header)
    except Malformed:
        return
    assert found is None or isinstance(found.secret, str)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (bundle(peer_provider="gamma"), "exchange.not_for_us"),
        (bundle(challenge=b"d" * 32), "exchange.not_for_us"),
        (bundle(ledger_id=b"m" * 32), "exchange.not_for_us"),
        (bundle(provider="gamma"), "exchange.not_for_us"),
        (exchange.agree(keys.KeySigner(KEY), b"t" * 32), "cose.purpose"),
    ],
)
def test_bundles_for_others(data, code):
    """verifies that: a bundle serves one sender, one receiver, one challenge, one ledger."""
    with pytest.raises(MoorlineError) as caught:
        exchange.verify_bundle(data, KEY.public_key(), EXPECTED)
    assert caught.value.code == code


def test_proofs_and_transcripts():
    """verifies that: proof and agreement hold for their key, challenge and party, and for nothing else."""
    signer = keys.KeySigner(KEY)
    proof = exchange.prove(signer, challenge_digest=b"c" * 32, party=ALPHA)
    exchange.verify_proof(KEY.public_key(), proof, challenge_digest=b"c" * 32, party=ALPHA)
    for key, shown, challenge, party in (
        (OTHER.public_key(), proof, b"c" * 32, ALPHA),
        (KEY.public_key(), proof, b"d" * 32, ALPHA),
        (KEY.public_key(), proof, b"c" * 32, BETA),
        (KEY.public_key(), None, b"c" * 32, ALPHA),
        (KEY.public_key(), b"", b"c" * 32, ALPHA),
    ):
        with pytest.raises(NotAuthentic) as caught:
            exchange.verify_proof(key, shown, challenge_digest=challenge, party=party)
        assert caught.value.code == "exchange.proof_invalid"
    agreed = exchange.transcript(b"c" * 32, b"one", b"two")
    assert agreed != exchange.transcript(b"c" * 32, b"two", b"one")
    exchange.verify_agreed(exchange.agree(signer, agreed), KEY.public_key(), agreed)
    with pytest.raises(Refused) as refusal:
        exchange.verify_agreed(exchange.agree(signer, b"x" * 32), KEY.public_key(), agreed)
    assert refusal.value.code == "exchange.transcript_mismatch"
    with pytest.raises(NotAuthentic):
        exchange.verify_agreed(exchange.agree(signer, agreed), OTHER.public_key(), agreed)


def test_an_older_bundle_does_not_replace_a_newer_one(store):
    """verifies that: a peer's trust bundle never goes back."""
    peer = Peer(provider="beta", hsm="hsm-1", at=NOW, sequence=5, transcript=b"t" * 32, bundle=b"five")
    store.record_peer(peer)
    with pytest.raises(Refused) as caught:
        store.record_peer(replace(peer, sequence=4, bundle=b"four"))
    assert caught.value.code == "exchange.rollback"
    assert store.peers()[0].bundle == b"five"


FACTS = AccessFacts(
    device="spiffe://beta.test/device/d-1",
    device_provider="beta",
    device_trust_domain="beta.test",
    device_name="d-1",
    provider="alpha",
    service="records",
    use_case="4.7",
    profiles=("tls",),
    contract="c1",
    profile="tls",
    post_quantum=True,
    now=NOW,
)


@settings(max_examples=200, deadline=None)
@given(conditions=st.text(max_size=200))
def test_any_conditions(conditions):
    """verifies that: no text but a rule that permits lets a device in, and none crashes the broker."""
    assert not decide_access(conditions, FACTS).allowed or "permit" in conditions


@pytest.mark.parametrize(
    ("conditions", "allowed"),
    [
        ("permit(principal, action, resource);", True),
        ('permit(principal, action == Moorline::Action::"connect", resource);', True),
        ('permit(principal == Moorline::Device::"spiffe://beta.test/device/d-1", action, resource);', True),
        ('permit(principal, action, resource == Moorline::Service::"alpha/records");', True),
        ("permit(principal, action, resource) when { context.now < 1 };", False),
        ('permit(principal, action, resource) when { resource.use_case == "4.7" };', True),
        (
            'permit(principal, action, resource); forbid(principal, action, resource) when { context.contract == "c1" };',
            False,
        ),
        ("permit(principal, action, resource) when { resource.profiles.contains(context.profile) };", True),
        ('permit(principal, action, resource) when { context.profile == "no-pfs" };', False),
        ("permit(principal, action, resource) when { context.post_quantum };", True),
        ("permit(principal, action, resource) unless { context.post_quantum };", False),
        ("permit(principal, action, resource) when { context.hour == HOUR && context.weekday == WEEKDAY };", True),
        # A rule that errors next to one that permits: nobody knows what it would have said, so nobody enters.
        ("permit(principal, action, resource); forbid(principal, action, resource) when { principal.nothing };", False),
        ("", False),
    ],
)
def test_conditions(conditions, allowed):
    """verifies that: conditions decide over the attributes documented for them, and errors deny."""
    at = datetime.fromtimestamp(NOW, UTC)
    told = conditions.replace("HOUR", str(at.hour)).replace("WEEKDAY", str(at.isoweekday()))
    assert decide_access(told, FACTS).allowed is allowed


def test_the_deciding_policies_are_named():
    """verifies that: an answer names the rules it rests on, by their own ids where they have one."""
    conditions = """
        @id("ours") permit(principal, action, resource) when { principal.provider == "beta" };
        @id("nobody") forbid(principal, action, resource) when { principal.device == "d-1" };
        permit(principal, action, resource);
    """
    found = decide_access(conditions, FACTS)
    assert (found.allowed, found.policies) == (False, ("nobody",))
    found = decide_access(conditions, replace(FACTS, device_name="d-2"))
    assert (found.allowed, found.policies) == (True, ("ours", "policy2"))
    assert decide_access("permit(", FACTS).rule == "not evaluated: conditions.malformed"


def test_a_provider_key_is_never_overwritten(tmp_path):
    """verifies that: keys are made once, read back, and other files refused."""
    path = tmp_path / "key.pem"
    made = provider.make_provider_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert provider.load_provider_key(path).public_key() == made.public_key()
    with pytest.raises(Misconfigured):
        provider.make_provider_key(path)
    path.write_bytes(b"no key")
    with pytest.raises(Misconfigured):
        provider.load_provider_key(path)
    assert isinstance(cose.parse(provider.TICKET_PURPOSE, SIGNED_TICKET), cose.Sign1)
