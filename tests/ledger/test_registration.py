"""What a provider does on its own: stories of the state machine, and each way to be refused."""

import secrets
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from moorline.clock import Instant, Validity
from moorline.ledger import records, state, transactions
from moorline.ledger.draft import BlockContext
from moorline.ledger.records import ContractStatus, PackageRule, RevocationKind, Status
from moorline.ledger.state import Applied, Rejected
from moorline.ledger.transactions import (
    AcceptAccess,
    AnchorLog,
    OfferAccess,
    RegisterHsm,
    RegisterIssuingCa,
    RegisterOrchestrator,
    RegisterPlatform,
    RegisterReferenceValues,
    RegisterService,
    RemoveService,
    Revoke,
    RevokeHsm,
    RevokeIssuingCa,
    RevokeOrchestrator,
    RevokePlatform,
    RotateHsm,
    RotateProviderKey,
    SenderKind,
    UpdateService,
    WithdrawAccess,
)
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

from .conftest import NOW, consortium_at, der, hsm_body
from .test_admission import record, refused

SERVICE = RegisterService(
    name="records",
    use_case="4.7",
    packages=(PackageRule(package_digest=b"p" * 32, measurement=b"m" * 48),),
    profiles=("pfs",),
    callers=("beta",),
)
PLATFORM = RegisterPlatform(
    id="h1",
    chip_id=b"c" * 64,
    product="SIMULATED Milan",
    ek_digest=b"e" * 32,
    location="EU/DE",
    tag_digest=b"t" * 32,
    simulated=True,
)


def issuing_ca(provider, *, path_length_zero=True, not_after=NOW + 86400):
    key = ec.generate_private_key(ec.SECP256R1())
    build = certificates.issuing_ca_certificate if path_length_zero else certificates.authority_certificate
    validity = Validity(not_before=Instant(NOW - 60), not_after=Instant(not_after))
    return der(build(key.public_key(), name="ca-1", issuer=provider.ca, validity=validity, serial=9))


def applied(outcome):
    assert isinstance(outcome, Applied), outcome
    return outcome


def test_everything_a_provider_registers_stands_under_its_name_and_ends_for_good(consortium, alpha):
    """verifies that: each kind is registered once, shows in the state, is revoked once and never comes back."""
    hsm = hsm_body(alpha)
    public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    cases = [
        (RegisterIssuingCa(id="ca-1", certificate=issuing_ca(alpha)), RevokeIssuingCa(id="ca-1"), "issuing-ca/alpha/ca-1"),
        (hsm, RevokeHsm(id="hsm-1"), "hsm/alpha/hsm-1"),
        (RegisterOrchestrator(id="o-1", public_key=public), RevokeOrchestrator(id="o-1"), "orchestrator/alpha/o-1"),
        (SERVICE, RemoveService(name="records"), "service/alpha/records"),
        (PLATFORM, RevokePlatform(id="h1"), "platform/alpha/h1"),
    ]
    kinds = (
        records.IssuingCaRecord,
        records.HsmRecord,
        records.OrchestratorRecord,
        records.ServiceRecord,
        records.PlatformRecord,
    )
    for (register, end, key), kind in zip(cases, kinds, strict=True):
        refused(consortium.as_provider(alpha, end), "ledger.record_unknown")
        applied(consortium.as_provider(alpha, register))
        assert record(consortium, kind, key).status is Status.ACTIVE
        refused(consortium.as_provider(alpha, register), "ledger.already_registered")
        applied(consortium.as_provider(alpha, end))
        assert record(consortium, kind, key).status in {Status.REVOKED, Status.REMOVED}
        refused(consortium.as_provider(alpha, end), "ledger.record_not_active")
        refused(consortium.as_provider(alpha, register), "ledger.already_registered")


def test_an_hsm_is_certified_by_its_provider_under_its_own_name(consortium, alpha, beta):
    good = hsm_body(alpha)
    cases = [
        ("ledger.certificate_issuer", replace(good, certificate=hsm_body(beta, trust_domain="alpha.test").certificate)),
        ("ledger.certificate_name", replace(good, certificate=hsm_body(alpha, trust_domain="beta.test").certificate)),
        ("ledger.certificate_name", replace(good, certificate=hsm_body(alpha, hsm="hsm-2").certificate)),
        ("ledger.certificate_name", replace(good, certificate=issuing_ca(alpha))),
        ("ledger.certificate_profile", replace(good, certificate=alpha.der)),
        ("ledger.key_malformed", replace(good, signing_public=b"no key")),
        ("ledger.address_malformed", replace(good, address="somewhere")),
        ("ledger.address_malformed", replace(good, est_url="http://127.0.0.1:1")),
        ("ledger.field_empty", replace(good, kem_public=b"")),
        ("ledger.name_malformed", replace(good, id="hsm/1")),
    ]
    for code, body in cases:
        refused(consortium.as_provider(alpha, body), code)
    applied(consortium.as_provider(alpha, good))
    rotate = RotateHsm(**{name: getattr(good, name) for name in RegisterHsm.__dataclass_fields__})
    refused(consortium.as_provider(alpha, rotate), "ledger.sequence")
    applied(consortium.as_provider(alpha, replace(rotate, bundle_sequence=2, address="127.0.0.1:5")))
    assert record(consortium, records.HsmRecord, "hsm/alpha/hsm-1").address == "127.0.0.1:5"


def test_an_issuing_ca_is_exactly_one_step_below_its_provider(consortium, alpha, beta):
    cases = [
        ("ledger.certificate_issuer", issuing_ca(beta)),
        ("ledger.certificate_profile", issuing_ca(alpha, path_length_zero=False)),
        ("ledger.certificate_validity", issuing_ca(alpha, not_after=NOW)),
    ]
    for code, certificate in cases:
        refused(consortium.as_provider(alpha, RegisterIssuingCa(id="ca-1", certificate=certificate)), code)


def test_a_rotated_key_takes_over_and_the_old_one_ends_when_announced(consortium, alpha):
    """verifies that: both count until the retire time, then only the new; a certificate of somebody else is refused."""
    old = alpha
    new = consortium.provider("alpha", "alpha.test")
    retire_at = consortium.now_ms // 1000 + 60
    refused(
        consortium.as_provider(old, RotateProviderKey(certificate=old.der, retire_at=retire_at)), "ledger.already_registered"
    )
    refused(consortium.as_provider(old, RotateProviderKey(certificate=new.der, retire_at=NOW)), "ledger.retire_time")
    other = consortium.provider("alpha", "other.test")
    wrong = RotateProviderKey(certificate=other.der, retire_at=retire_at)
    refused(consortium.as_provider(old, wrong), "ledger.certificate_constraints")
    refused(consortium.as_provider(new, SERVICE), "ledger.key_unknown")
    applied(consortium.as_provider(old, RotateProviderKey(certificate=new.der, retire_at=retire_at)))
    applied(consortium.as_provider(old, SERVICE))
    applied(consortium.as_provider(new, PLATFORM))
    consortium.now_ms = retire_at * 1000
    refused(consortium.as_provider(old, RemoveService(name="records")), "ledger.key_unknown")
    applied(consortium.as_provider(new, RemoveService(name="records")))
    found = record(consortium, records.ProviderRecord, "provider/alpha")
    assert found.ca_certificates_at(Instant(retire_at)) == (new.der,)


def test_access_is_offered_by_one_and_accepted_by_the_other(consortium, alpha, beta):
    applied(consortium.as_provider(alpha, SERVICE))
    offer = OfferAccess(
        contract="c-1", service="records", grantee="beta", conditions="permit(principal,action,resource);", profiles=("pfs",)
    )
    refused(consortium.as_provider(alpha, replace(offer, grantee="gamma")), "ledger.provider_unknown")
    refused(consortium.as_provider(alpha, replace(offer, service="other")), "ledger.record_unknown")
    applied(consortium.as_provider(alpha, offer))
    refused(consortium.as_provider(alpha, offer), "ledger.already_registered")
    refused(consortium.as_provider(alpha, AcceptAccess(contract="c-1")), "ledger.not_yours")
    refused(consortium.as_provider(beta, AcceptAccess(contract="c-2")), "ledger.record_unknown")
    applied(consortium.as_provider(beta, AcceptAccess(contract="c-1")))
    refused(consortium.as_provider(beta, AcceptAccess(contract="c-1")), "ledger.contract_status")
    assert record(consortium, records.ContractRecord, "contract/c-1").status is ContractStatus.ACCEPTED
    gamma = consortium.admitted("gamma", "gamma.test")
    refused(consortium.as_provider(gamma, WithdrawAccess(contract="c-1")), "ledger.not_yours")
    applied(consortium.as_provider(beta, WithdrawAccess(contract="c-1")))
    refused(consortium.as_provider(alpha, WithdrawAccess(contract="c-1")), "ledger.contract_status")
    refused(consortium.as_provider(beta, AcceptAccess(contract="c-1")), "ledger.contract_status")


def test_a_simulated_platform_needs_a_ledger_that_allows_it(tmp_path):
    strict = consortium_at(tmp_path / "strict", simulated_allowed=False)
    provider = strict.admitted("alpha", "alpha.test")
    refused(strict.as_provider(provider, PLATFORM), "ledger.simulated_refused")
    applied(strict.as_provider(provider, replace(PLATFORM, simulated=False)))


def test_one_chip_registered_twice_is_an_event(consortium, alpha, beta):
    applied(consortium.as_provider(alpha, PLATFORM))
    second = applied(consortium.as_provider(beta, replace(PLATFORM, id="b1")))
    assert "chip_registered_twice" in {event.kind for event in second.events}
    masked = replace(PLATFORM, id="h2", chip_id=bytes(64))
    applied(consortium.as_provider(alpha, masked))
    third = applied(consortium.as_provider(alpha, replace(masked, id="h3")))
    assert {event.kind for event in third.events} == {"platform_registered"}


def test_an_hsm_revokes_and_anchors_and_nothing_else(consortium, alpha):
    key = ec.generate_private_key(ec.SECP256R1())
    applied(consortium.as_provider(alpha, hsm_body(alpha, key=key)))

    def as_hsm(body, name="alpha/hsm-1", signer=key):
        return consortium.send(consortium.payload(SenderKind.HSM, name, body), keys.KeySigner(signer))

    applied(as_hsm(Revoke(kind=RevocationKind.INSTANCE, id="i-1")))
    refused(as_hsm(Revoke(kind=RevocationKind.INSTANCE, id="i-1")), "ledger.already_revoked")
    refused(as_hsm(Revoke(kind=RevocationKind.MEASUREMENT, id="aa")), "ledger.not_for_hsm")
    refused(as_hsm(Revoke(kind=RevocationKind.DEVICE, id="../beta")), "ledger.name_malformed")
    refused(as_hsm(SERVICE), "ledger.not_for_hsm")
    applied(as_hsm(AnchorLog(log="hsm-1", size=5, root=b"r" * 32)))
    refused(as_hsm(AnchorLog(log="hsm-1", size=4, root=b"r" * 32)), "ledger.sequence")
    refused(as_hsm(AnchorLog(log="hsm-1", size=5, root=b"x" * 32)), "ledger.sequence")
    refused(as_hsm(AnchorLog(log="hsm-2", size=9, root=b"r" * 32)), "ledger.not_for_hsm")
    refused(as_hsm(Revoke(kind=RevocationKind.DEVICE, id="d"), signer=alpha.ca.key), "ledger.key_unknown")
    refused(as_hsm(Revoke(kind=RevocationKind.DEVICE, id="d"), name="alpha/hsm-9"), "ledger.hsm_unknown")
    applied(consortium.as_provider(alpha, Revoke(kind=RevocationKind.MEASUREMENT, id="aa")))
    refused(consortium.as_provider(alpha, Revoke(kind=RevocationKind.VENDOR_ROOT, id="aa")), "ledger.revocation_kind")
    applied(consortium.as_provider(alpha, RevokeHsm(id="hsm-1")))
    refused(as_hsm(Revoke(kind=RevocationKind.DEVICE, id="d-2")), "ledger.hsm_unknown")


def test_services_and_reference_values_change_under_their_name(consortium, alpha):
    update = UpdateService(
        name="records", use_case="4.7", packages=(), profiles=("pfs", "no-pfs"), callers=("beta", "gamma")
    )
    refused(consortium.as_provider(alpha, update), "ledger.record_unknown")
    applied(consortium.as_provider(alpha, SERVICE))
    applied(consortium.as_provider(alpha, update))
    assert record(consortium, records.ServiceRecord, "service/alpha/records").callers == ("beta", "gamma")
    refused(consortium.as_provider(alpha, replace(update, callers=("no name",))), "ledger.name_malformed")
    for digest in (b"1" * 32, b"2" * 32):
        applied(consortium.as_provider(alpha, RegisterReferenceValues(id="fw", kind="tpm", digest=digest)))
    assert record(consortium, records.ReferenceValuesRecord, "reference-values/alpha/fw").digest == b"2" * 32


# The envelope ----------------------------------------------------------------------------------------------------------


def test_a_transaction_is_applied_once_and_in_time_and_here(consortium, alpha):
    nonce = secrets.token_bytes(32)
    applied(consortium.as_provider(alpha, SERVICE, nonce=nonce))
    refused(consortium.as_provider(alpha, PLATFORM, nonce=nonce), "ledger.nonce_used")
    beta = consortium.admitted("beta", "beta.test")
    applied(consortium.as_provider(beta, PLATFORM, nonce=nonce))  # a nonce is its sender's: nobody uses up another's
    height = consortium.state.height
    other = replace(PLATFORM, id="h2")
    refused(consortium.as_provider(alpha, other, valid_until=height), "ledger.expired")
    refused(consortium.as_provider(alpha, other, valid_until=height + 5000), "ledger.valid_too_long")
    refused(consortium.as_provider(alpha, other, ledger_id=bytes(32)), "ledger.other_ledger")
    applied(consortium.as_provider(alpha, other, valid_until=consortium.state.height + 1))


def test_the_same_transaction_twice_in_one_block_counts_once(consortium, alpha):
    payload = consortium.payload(SenderKind.PROVIDER, "alpha", PLATFORM)
    signer = keys.KeySigner(alpha.ca.key)
    outcomes = consortium.block(transactions.sign(payload, signer), transactions.sign(payload, signer))
    applied(outcomes[0])
    refused(outcomes[1], "ledger.nonce_used")


def test_nonces_are_forgotten_only_when_their_transactions_are_void(consortium, alpha):
    payload = consortium.payload(SenderKind.PROVIDER, "alpha", PLATFORM, valid_until=consortium.state.height + 3)
    data = transactions.sign(payload, keys.KeySigner(alpha.ca.key))
    applied(consortium.block(data)[0])
    codes = [consortium.block(data)[0].code for _ in range(5)]
    assert codes == ["ledger.nonce_used"] * 2 + ["ledger.expired"] * 3
    assert transactions.nonce_id_of(payload) not in consortium.state.nonces


def test_strangers_and_wrong_keys_are_refused(consortium, alpha, beta):
    stranger = consortium.provider("gamma", "gamma.test")
    refused(consortium.as_provider(stranger, SERVICE), "ledger.provider_unknown")
    payload = consortium.payload(SenderKind.PROVIDER, "alpha", SERVICE)
    refused(consortium.send(payload, keys.KeySigner(beta.ca.key)), "ledger.key_unknown")
    payload = consortium.payload(SenderKind.AUTHORITY, "authority-9", transactions.Approve(proposal="x"))
    refused(consortium.send(payload, keys.KeySigner(beta.ca.key)), "ledger.authority_unknown")
    payload = consortium.payload(SenderKind.PROVIDER, "alpha", transactions.Approve(proposal="x"))
    refused(consortium.send(payload, keys.KeySigner(alpha.ca.key)), "ledger.kind_unknown")
    before = consortium.state.root
    consortium.block(b"")
    assert consortium.state.root == before


def test_a_certificate_issued_by_a_key_that_only_looks_like_the_provider_is_refused(consortium, alpha):
    imposter = Issuer(certificate=alpha.ca.certificate, key=ec.generate_private_key(ec.SECP256R1()))
    fake = replace(alpha, ca=imposter)
    refused(consortium.as_provider(alpha, hsm_body(fake)), "ledger.certificate_issuer")


CONTEXT = BlockContext(height=9, time_ms=NOW * 1000, authorities=())


class Nothing:
    def get(self, key):
        return None

    def nonce_used(self, nonce_id):
        return False


@given(st.binary(max_size=300))
def test_any_bytes_are_answered_with_a_ledger_code(data):
    outcome = state.apply(Nothing(), data, ledger_id=bytes(32), block=CONTEXT)
    assert isinstance(outcome, Rejected)
    assert outcome.code.startswith("ledger.")


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    made = consortium_at(tmp_path_factory.mktemp("flip") / "c")
    provider = made.admitted("alpha", "alpha.test")
    payload = made.payload(SenderKind.PROVIDER, "alpha", PLATFORM)
    return made.state, transactions.sign(payload, keys.KeySigner(provider.ca.key))


@given(st.data())
def test_a_flipped_bit_is_never_applied(signed, data):
    found, good = signed
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    changed = bytearray(good)
    changed[bit // 8] ^= 1 << bit % 8
    outcome = state.execute(found, [bytes(changed)], time_ms=found.time_ms + 1).outcomes[0]
    assert isinstance(outcome, Rejected)
    assert outcome.code.startswith("ledger.")
    assert isinstance(state.execute(found, [good], time_ms=found.time_ms + 1).outcomes[0], Applied)
