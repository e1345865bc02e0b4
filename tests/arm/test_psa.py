"""Verifies that a PSA token counts only under an endorsed key and in one generation of claims."""

import dataclasses
import datetime as dt

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.evidence import psa as evidence
from moorline.policy import psa as policy
from moorline.policy.match import Exact, NotRequired, OneOf
from moorline.rats import EvidenceRoot, Outcome
from moorline.verification.psa import CertifiedIak, verify_psa

NOW = Instant(1_800_000_000)


def verify(world, token=None, **changes):
    parsed = evidence.parse_token(token or world.token())
    return verify_psa(parsed, **{"nonce": world.nonce, "anchors": world.anchors, "now": NOW, **changes})


def test_a_genuine_token_is_verified(any_psa):
    verified = verify(any_psa)
    assert verified.root is EvidenceRoot.HARDWARE
    assert verified.value.state is evidence.Lifecycle.SECURED
    assert verified.value.from_secure_side
    assert verified.value.measurements_of("part-1") == (b"\x01" * 32,)


def test_a_mac_is_verified_and_never_rests_on_hardware(any_psa):
    verified = verify(any_psa, any_psa.mac_token(), anchors=any_psa.mac_anchors)
    assert verified.root is EvidenceRoot.SOFTWARE


# ---------------------------------------------------------------- what an attacker tries


def test_a_public_key_used_as_a_symmetric_one(psa):
    """The classic confusion of algorithms: a MAC under bytes that everybody knows."""
    with pytest.raises(Unavailable, match="psa.iak_unknown"):
        verify(psa, psa.mac_token(), anchors=psa.anchors)
    with pytest.raises(Unavailable, match="psa.iak_unknown"):
        verify(psa, anchors=psa.mac_anchors)


def test_another_key_another_mac_another_nonce(psa):
    stranger = type(psa)(mac_key=b"\x78" * 32)
    with pytest.raises(NotAuthentic, match="cose.signature_invalid"):
        verify(psa, stranger.token())
    with pytest.raises(NotAuthentic, match="cose.signature_invalid"):
        verify(psa, stranger.mac_token(), anchors=psa.mac_anchors)
    with pytest.raises(NotAuthentic, match="psa.nonce_mismatch"):
        verify(psa, nonce=bytes(32))


def test_a_short_symmetric_key_is_no_key(psa):
    with pytest.raises(NotAuthentic, match="cose.key_unusable"):
        verify(psa, psa.mac_token(), anchors=(dataclasses.replace(psa.mac_anchors[0], key=b"short"),))


def test_a_symmetric_key_is_never_shown(psa):
    assert psa.mac_key.hex() not in repr(psa.mac_anchors)
    assert repr(psa.mac_key) not in repr(psa.mac_anchors)


@pytest.mark.parametrize("identity", [{"instance_id": b"\x01" + bytes(32)}, {"implementation_id": bytes(32)}])
def test_the_key_of_another_device_is_not_tried(psa, identity):
    with pytest.raises(Unavailable, match="psa.iak_unknown"):
        verify(psa, anchors=(dataclasses.replace(psa.anchors[0], **identity),))


def test_an_algorithm_left_to_the_carrier_is_refused(psa):
    for protected in (b"", b"\xa0"):
        with pytest.raises(Malformed, match="eat.algorithm_missing"):
            verify(psa, psa.token(protected=protected))
        with pytest.raises(Malformed, match="eat.algorithm_missing"):
            verify(psa, psa.token(protected=protected, unprotected={1: -7}))


def test_a_truncated_mac_algorithm_is_not_taken(psa):
    message = cbor2.loads(psa.mac_token()).value
    short = cbor2.dumps(cbor2.CBORTag(17, [cbor2.dumps({1: 4}), {}, message[2], message[3][:8]]))
    with pytest.raises(NotAuthentic, match="cose.algorithm_not_allowed"):
        verify(psa, short, anchors=psa.mac_anchors)


# ---------------------------------------------------------------- form


@pytest.mark.parametrize("key", [265, 2394, 2395, 2396, 2399, 10, 256])
def test_every_claim_of_rfc9783_is_mandatory(psa, key):
    claims = psa.claims()
    del claims[key]
    with pytest.raises(Malformed, match="eat.claim_missing"):
        evidence.parse_token(psa.token(claims))


@pytest.mark.parametrize("key", [-75001, -75002, -75003, -75004, -75006, -75008, -75009])
def test_every_claim_of_the_first_profile_is_mandatory(psa, key):
    psa.first_generation = True
    claims = psa.claims()
    del claims[key]
    with pytest.raises(Malformed, match="eat.claim_missing"):
        evidence.parse_token(psa.token(claims))


def test_the_first_profile_may_leave_out_its_name(psa):
    psa.first_generation = True
    claims = psa.claims()
    del claims[-75000]
    assert evidence.parse_token(psa.token(claims)).claims.profile == evidence.IOT_PROFILE_1


def test_a_device_may_say_that_it_measured_nothing(psa):
    psa.first_generation = True
    claims = psa.claims()
    del claims[-75006]
    assert evidence.parse_token(psa.token(claims | {-75007: 1})).claims.components == ()
    with pytest.raises(Malformed, match="eat.claim_type"):
        evidence.parse_token(psa.token(claims | {-75007: 2}))
    with pytest.raises(Malformed, match="psa.software_components"):
        evidence.parse_token(psa.token(psa.claims() | {-75007: 1}))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({265: "tag:example.org,2025:other"}, "psa.profile"),
        ({-75008: bytes(32)}, "psa.mixed_claims"),
        ({10: bytes(33)}, "eat.claim_length"),
        ({2394: "one"}, "eat.claim_type"),
        ({2394: 1 << 31}, "eat.claim_type"),
        ({2395: 0x3100}, "psa.lifecycle"),
        ({2396: bytes(31)}, "eat.claim_length"),
        ({256: b"\x02" + bytes(32)}, "psa.instance_id"),
        ({2397: bytes(7)}, "eat.claim_length"),
        ({2398: "1234567890123"}, "psa.certification_reference"),
        ({2399: []}, "eat.claim_type"),
        ({2399: [{2: bytes(32)}]}, "eat.claim_missing"),
        ({2400: ""}, "eat.claim_type"),
    ],
)
def test_claims_of_a_wrong_form(psa, change, code):
    with pytest.raises(Malformed) as refused:
        evidence.parse_token(psa.token(psa.claims() | change))
    assert refused.value.code == code


def test_indefinite_lengths_are_not_for_psa(psa):
    payload = b"\xbf" + cbor2.dumps(psa.claims())[1:] + b"\xff"
    with pytest.raises(Malformed, match="eat.cbor_indefinite"):
        evidence.parse_token(psa.token(payload))


@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_token_or_malformed(data):
    for parse in (evidence.parse_token, evidence.parse_claims):
        with pytest.raises(Malformed):
            parse(data)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_ever_verified(flip_device, data):
    world, tokens = flip_device
    token = data.draw(st.sampled_from(tokens))
    bit = data.draw(st.integers(0, 8 * len(token) - 1))
    changed = bytearray(token)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MoorlineError):
        verify(world, bytes(changed), anchors=(*world.anchors, *world.mac_anchors))


# ---------------------------------------------------------------- keys in certificates


def certificate(key, subject, issuer_key, issuer, *, ca, path_length=None, critical=None, years=(2020, 2040)):
    name, above = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer))
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(above)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(dt.datetime(years[0], 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(years[1], 1, 1, tzinfo=dt.UTC))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca,
                crl_sign=ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if critical is not None:
        builder = builder.add_extension(critical, critical=True)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@pytest.fixture
def pki(psa):
    root, middle = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def make(*, anchor=None, leaf_years=(2020, 2040), middle_ca=True, path_length=None, critical=None, stranger=False):
        top = certificate(root, "root", root, "root", ca=True, path_length=path_length)
        between = certificate(middle, "middle", root, "root", ca=middle_ca)
        signer = ec.generate_private_key(ec.SECP256R1()) if stranger else middle
        leaf = certificate(psa.iak, "iak", signer, "middle", ca=False, critical=critical, years=leaf_years)
        anchors = (top,) if anchor is None else anchor
        return (CertifiedIak(path=(leaf, between), anchors=anchors, root=EvidenceRoot.HARDWARE),)

    return make


def test_a_certified_key_is_verified(psa, pki):
    assert verify(psa, anchors=pki()).root is EvidenceRoot.HARDWARE


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"anchor": ()}, "psa.no_anchor"),
        ({"stranger": True}, "path.broken"),
        ({"middle_ca": False}, "path.not_ca"),
        ({"path_length": 0}, "path.anchor"),
        ({"critical": x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")}, "path.critical"),
        ({"leaf_years": (2020, 2021)}, "path.expired"),
        ({"leaf_years": (2038, 2040)}, "path.not_yet_valid"),
    ],
)
def test_each_rule_of_a_path(psa, pki, change, code):
    with pytest.raises(NotAuthentic) as refused:
        verify(psa, anchors=pki(**change))
    assert refused.value.code == code


def test_an_anchor_is_a_self_signed_ca(psa, pki):
    good = pki()[0]
    for anchor in (good.path[1], good.path[0]):
        with pytest.raises(NotAuthentic, match="path.anchor"):
            verify(psa, anchors=(dataclasses.replace(good, anchors=(anchor,)),))


def test_a_certificate_that_does_not_decode(psa, pki):
    good = pki()[0]
    with pytest.raises(Malformed, match="path.certificate_malformed"):
        verify(psa, anchors=(dataclasses.replace(good, path=(b"\x30\x03\x02\x01\x01", good.path[1])),))


# ---------------------------------------------------------------- policy


def strict(verified):
    claims = verified.value
    return policy.PsaPolicy(
        profile=Exact(claims.profile),
        implementation_id=Exact(claims.implementation_id),
        instance_id=OneOf(frozenset({claims.instance_id})),
        lifecycle=Exact(evidence.Lifecycle.SECURED),
        software_components=Exact(frozenset(map(policy.reference_of, claims.components))),
        caller=Exact(3),
        certification_reference=Exact("1234567890123-12345"),
    )


def appraise(verified, chosen):
    return policy.appraise_psa(verified, chosen, simulated_allowed=False)


FIELDS = [field.name for field in dataclasses.fields(policy.PsaPolicy)]


def test_a_device_that_is_as_demanded_is_affirmed(psa):
    verified = verify(psa)
    findings = appraise(verified, strict(verified))
    policy.require_psa(findings)
    assert {finding.outcome for finding in findings} == {Outcome.MET}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("demand", [None, Exact(None), OneOf(frozenset()), "anything"])
def test_a_demand_that_is_left_out_or_empty_refuses(psa, name, demand):
    verified = verify(psa)
    findings = appraise(verified, dataclasses.replace(strict(verified), **{name: demand}))
    assert [finding.code for finding in findings if finding.outcome is Outcome.NOT_MET] == [f"psa.{name}"]
    with pytest.raises(Refused, match="psa.policy_not_met"):
        policy.require_psa(findings)


def test_a_device_that_measured_nothing_meets_only_a_policy_that_does_not_ask(psa):
    psa.first_generation = True
    claims = psa.claims()
    del claims[-75006]
    verified = verify(psa, psa.token(claims | {-75007: 1}))
    chosen = dataclasses.replace(strict(verified), software_components=Exact(frozenset()))
    outcomes = {finding.code: finding.outcome for finding in appraise(verified, chosen)}
    assert outcomes["psa.software_components"] is Outcome.NOT_MET
    chosen = dataclasses.replace(chosen, software_components=NotRequired("a test"))
    outcomes = {finding.code: finding.outcome for finding in appraise(verified, chosen)}
    assert outcomes["psa.software_components"] is Outcome.NOT_APPRAISED


def test_the_non_secure_side_and_a_shared_secret_refuse(psa):
    chosen = strict(verify(psa))
    outside = verify(psa, psa.token(psa.claims() | {2394: -1}))
    assert "psa.caller" in [one.code for one in appraise(outside, chosen) if one.outcome is Outcome.NOT_MET]
    shared = verify(psa, psa.mac_token(), anchors=psa.mac_anchors)
    assert appraise(shared, chosen)[0].outcome is Outcome.NOT_MET
