"""Verifies that a CCA token counts only if platform key, realm key and challenge hold together."""

import dataclasses
import hashlib

import cbor2
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.evidence import cca as evidence
from moorline.policy import cca as policy
from moorline.policy.match import Exact, NotRequired, OneOf
from moorline.rats import EvidenceRoot, Outcome
from moorline.verification.cca import CpakAnchor, verify_cca, verify_key_attestation, verify_platform


def verify(world, token=None, **changes):
    parsed = evidence.parse_token(token or world.token())
    return verify_cca(parsed, **{"challenge": world.challenge, "anchors": world.anchors, **changes})


def test_a_genuine_token_is_verified(any_cca):
    verified = verify(any_cca)
    assert verified.root is EvidenceRoot.HARDWARE
    assert verified.value.realm.initial_measurement == b"\x02" * 32
    assert verified.value.platform.state is evidence.Lifecycle.SECURED
    assert verified.value.platform.legacy is any_cca.legacy


def test_a_platform_token_by_itself_is_verified(cca, signed):
    claims = cca.platform_claims() | {10: b"\x09" * 32}
    token = evidence.parse_platform_token(signed(claims, cca.cpak, algorithm=-35))
    assert verify_platform(token, challenge=b"\x09" * 32, anchors=cca.anchors).value.profile == evidence.PROFILE
    with pytest.raises(NotAuthentic, match="cca.platform_challenge_mismatch"):
        verify_platform(token, challenge=b"\x08" * 32, anchors=cca.anchors)


# ---------------------------------------------------------------- what an attacker tries


def test_a_realm_under_the_attackers_key_behind_a_genuine_platform_token(any_cca, signed):
    attacker = ec.generate_private_key(ec.SECP384R1())
    realm = signed(any_cca.realm_claims() | {44237: any_cca.key_claim(attacker)}, attacker, algorithm=-35)
    with pytest.raises(NotAuthentic, match="cca.realm_binding"):
        verify(any_cca, any_cca.token(realm_token=realm))


def test_a_platform_signed_by_nobody_we_know(cca, signed):
    stranger = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(NotAuthentic, match="cose.signature_invalid"):
        verify(cca, cca.token(platform_token=signed(cca.platform_claims(), stranger, algorithm=-35)))


def test_a_realm_token_signed_by_another_key_than_it_names(cca, signed):
    stranger = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(NotAuthentic, match="cose.signature_invalid"):
        verify(cca, cca.token(realm_token=signed(cca.realm_claims(), stranger, algorithm=-35)))


def test_a_token_for_another_challenge(cca):
    with pytest.raises(NotAuthentic, match="cca.challenge_mismatch"):
        verify(cca, challenge=b"\x00" * 64)


def test_an_expected_challenge_is_neither_padded_nor_cut(cca):
    with pytest.raises(Malformed, match="cca.expected_challenge"):
        verify(cca, challenge=cca.challenge[:32])


def test_without_an_endorsed_key_there_is_no_verdict(cca):
    with pytest.raises(Unavailable, match="cca.cpak_unknown"):
        verify(cca, anchors=())


@pytest.mark.parametrize("identity", [{"instance_id": b"\x01" + bytes(32)}, {"implementation_id": bytes(32)}])
def test_the_key_of_another_platform_is_not_tried(cca, identity):
    anchor = dataclasses.replace(cca.anchors[0], **identity)
    with pytest.raises(Unavailable, match="cca.cpak_unknown"):
        verify(cca, anchors=(anchor,))


def test_either_of_two_endorsed_keys_will_do(cca):
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    der = other.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    wrong = CpakAnchor(key=der, instance_id=None, implementation_id=None, root=EvidenceRoot.TEST)
    assert verify(cca, anchors=(wrong, *cca.anchors)).root is EvidenceRoot.HARDWARE


def test_the_algorithm_is_the_keys_and_not_the_tokens(cca, signed):
    p256 = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(NotAuthentic, match="cose.key_curve"):
        verify(cca, cca.token(platform_token=signed(cca.platform_claims(), p256, algorithm=-7)))


def test_a_realm_signs_with_es384_only(cca, signed):
    with pytest.raises(NotAuthentic, match="cose.algorithm_not_allowed"):
        verify(cca, cca.token(realm_token=signed(cca.realm_claims(), cca.rak, algorithm=-7)))


def test_a_realm_key_off_the_curve(legacy_cca):
    point = b"\x04" + b"\x11" * 96
    realm = legacy_cca.realm_claims() | {44237: point}
    platform = legacy_cca.platform_claims() | {10: hashlib.sha256(point).digest()}
    with pytest.raises(NotAuthentic, match="cose.key_unusable"):
        verify(legacy_cca, legacy_cca.token(platform=platform, realm=realm))


@pytest.mark.parametrize("key", [b"not a key", None])
def test_an_endorsed_key_that_is_none(cca, key):
    if key is None:
        public = rsa.generate_private_key(65537, 2048).public_key()
        key = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(NotAuthentic, match="cose.key_unusable"):
        verify(cca, anchors=(dataclasses.replace(cca.anchors[0], key=key),))


def test_a_signature_that_is_cut(cca, signed):
    whole = cbor2.loads(signed(cca.realm_claims(), cca.rak, algorithm=-35))
    cut = cbor2.dumps(cbor2.CBORTag(18, [*list(whole.value)[:3], whole.value[3][:-1]]))
    with pytest.raises(NotAuthentic, match="cose.signature_invalid"):
        verify(cca, cca.token(realm_token=cut))


# ---------------------------------------------------------------- form


@pytest.mark.parametrize("key", [265, 10, 2396, 256, 2401, 2395, 2402, 2399])
def test_every_platform_claim_is_mandatory(cca, key):
    claims = cca.platform_claims()
    del claims[key]
    with pytest.raises(Malformed, match="eat.claim_missing"):
        evidence.parse_token(cca.token(platform=claims))


@pytest.mark.parametrize("key", [10, 44235, 44236, 44237, 44238, 44239, 44240])
def test_every_realm_claim_is_mandatory(any_cca, key):
    claims = any_cca.realm_claims()
    del claims[key]
    with pytest.raises(Malformed, match="eat.claim_missing"):
        evidence.parse_token(any_cca.token(realm=claims))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({265: "http://arm.com/PSA-SSD/1.0.0"}, "cca.platform_profile"),
        ({265: b"x"}, "eat.claim_type"),
        ({10: bytes(31)}, "eat.claim_length"),
        ({2396: bytes(33)}, "eat.claim_length"),
        ({256: bytes(32)}, "eat.claim_length"),
        ({256: b"\x02" + bytes(32)}, "cca.instance_id"),
        ({2401: "text"}, "eat.claim_type"),
        ({2395: 0x7000}, "cca.lifecycle"),
        ({2395: 0x10000}, "eat.claim_type"),
        ({2395: -1}, "eat.claim_type"),
        ({2395: True}, "eat.claim_type"),
        ({2402: "md5"}, "cca.hash_algorithm"),
        ({2399: []}, "eat.claim_type"),
        ({2399: [{2: bytes(32)}]}, "eat.claim_missing"),
        ({2399: [{2: bytes(20), 5: bytes(32)}]}, "eat.claim_length"),
        ({2399: [7]}, "eat.claims"),
        ({2400: ""}, "eat.claim_type"),
    ],
)
def test_platform_claims_of_a_wrong_form(cca, change, code):
    with pytest.raises(Malformed) as refused:
        evidence.parse_token(cca.token(platform=cca.platform_claims() | change))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({265: "tag:arm.com,2099:realm#9"}, "cca.realm_profile"),
        ({10: bytes(32)}, "eat.claim_length"),
        ({44235: bytes(63)}, "eat.claim_length"),
        ({44238: bytes(20)}, "eat.claim_length"),
        ({44239: [bytes(32)] * 3}, "cca.extensible_measurements"),
        ({44239: [bytes(32)] * 3 + [b""]}, "cca.extensible_measurements"),
        ({44236: "sha-1"}, "cca.hash_algorithm"),
        ({44237: b"\x04" + bytes(96)}, "eat.cbor_trailing"),
        ({44237: cbor2.dumps({1: 2, -1: 1, -2: bytes(32), -3: bytes(32)})}, "cca.realm_key"),
        ({44237: cbor2.dumps({1: 2, -1: 2, -2: bytes(48)})}, "eat.claim_missing"),
    ],
)
def test_realm_claims_of_a_wrong_form(cca, change, code):
    with pytest.raises(Malformed) as refused:
        evidence.parse_token(cca.token(realm=cca.realm_claims() | change))
    assert refused.value.code == code


def test_a_legacy_realm_key_is_a_point(legacy_cca):
    with pytest.raises(Malformed, match="cca.realm_key"):
        evidence.parse_token(legacy_cca.token(realm=legacy_cca.realm_claims() | {44237: bytes(97)}))


@pytest.mark.parametrize(
    "whole",
    [
        {44234: b"", 44241: b""},
        cbor2.CBORTag(400, {44234: b"", 44241: b""}),
        cbor2.CBORTag(399, {44234: b""}),
        cbor2.CBORTag(399, {44234: b"", 44241: b"", 1: 2}),
        cbor2.CBORTag(399, {44234: [263, b""], 44241: [263, b""]}),
        cbor2.CBORTag(907, {44234: b"", 44241: b""}),
        cbor2.CBORTag(907, {44234: [264, b""], 44241: [263, b""]}),
        cbor2.CBORTag(907, {44234: [263, b"", 1], 44241: [263, b""]}),
    ],
)
def test_a_collection_is_exactly_two_tokens(whole):
    with pytest.raises(Malformed, match="cca.not_token"):
        evidence.parse_token(cbor2.dumps(whole))


def test_unknown_claims_are_listed_and_mean_nothing(cca):
    token = evidence.parse_token(cca.token(platform=cca.platform_claims() | {9999: "new"}))
    assert token.platform.claims.unknown_claims == (9999,)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_token_or_malformed(data):
    for parse in (
        evidence.parse_token,
        evidence.parse_platform_token,
        evidence.parse_realm_token,
        evidence.parse_platform_claims_json,
        evidence.parse_key_attestation,
    ):
        with pytest.raises(Malformed):
            parse(data)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_ever_verified(flip_world, data):
    world, token = flip_world
    bit = data.draw(st.integers(0, 8 * len(token) - 1))
    changed = bytearray(token)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MoorlineError):
        verify(world, bytes(changed))


# ---------------------------------------------------------------- Parsec's key attestation


def key_attestation(world, nonce=b"\x09" * 8):
    kat = cbor2.dumps(cbor2.CBORTag(601, {10: nonce, 8: {1: {1: 2, -1: 1, -2: bytes(32), -3: bytes(32)}}}))
    world.challenge = hashlib.sha512(kat).digest()
    return b"\xa2\x63kat" + kat + b"\x63pat" + world.token()


def test_a_key_is_vouched_for_by_its_realm(cca):
    bundle = evidence.parse_key_attestation(key_attestation(cca))
    assert verify_key_attestation(bundle, nonce=b"\x09" * 8, anchors=cca.anchors).value.public_key[0] == 4


def test_a_key_attestation_with_another_nonce_or_key(cca):
    data = key_attestation(cca)
    bundle = evidence.parse_key_attestation(data)
    with pytest.raises(NotAuthentic, match="cca.key_nonce_mismatch"):
        verify_key_attestation(bundle, nonce=b"\x08" * 8, anchors=cca.anchors)
    changed = evidence.parse_key_attestation(data.replace(b"\x48" + b"\x09" * 8, b"\x48" + b"\x08" * 8))
    with pytest.raises(NotAuthentic, match="cca.challenge_mismatch"):
        verify_key_attestation(changed, nonce=b"\x08" * 8, anchors=cca.anchors)


# ---------------------------------------------------------------- policy


def strict(verified):
    platform, realm = verified.value.platform, verified.value.realm
    return policy.CcaPolicy(
        platform_profile=Exact(evidence.PROFILE),
        implementation_id=Exact(platform.implementation_id),
        instance_id=OneOf(frozenset({platform.instance_id})),
        lifecycle=Exact(evidence.Lifecycle.SECURED),
        platform_config=Exact(platform.config),
        platform_components=Exact(frozenset(map(policy.reference_of, platform.components))),
        initial_measurement=Exact(realm.initial_measurement),
        extensible_measurements=Exact(realm.extensible_measurements),
        personalization=Exact(realm.personalization),
        realm_profile=Exact("tag:arm.com,2023:realm#1.0.0"),
        realm_key=Exact(realm.point),
    )


def appraise(verified, chosen):
    return policy.appraise_cca(verified, chosen, simulated_allowed=False)


FIELDS = [field.name for field in dataclasses.fields(policy.CcaPolicy)]


def test_a_realm_that_is_as_demanded_is_affirmed(cca):
    verified = verify(cca)
    findings = appraise(verified, strict(verified))
    policy.require_cca(findings)
    assert {finding.outcome for finding in findings} == {Outcome.MET}
    assert len(findings) == len(FIELDS) + 1


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("demand", [None, Exact(None), OneOf(frozenset()), "anything"])
def test_a_demand_that_is_left_out_or_empty_refuses(cca, name, demand):
    verified = verify(cca)
    findings = appraise(verified, dataclasses.replace(strict(verified), **{name: demand}))
    assert [finding.code for finding in findings if finding.outcome is Outcome.NOT_MET] == [f"cca.{name}"]
    with pytest.raises(Refused, match="cca.policy_not_met"):
        policy.require_cca(findings)


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_not_asked_says_so(cca, name):
    verified = verify(cca)
    findings = appraise(verified, dataclasses.replace(strict(verified), **{name: NotRequired("a test")}))
    assert [finding.code for finding in findings if finding.outcome is Outcome.NOT_APPRAISED] == [f"cca.{name}"]


@pytest.mark.parametrize(
    ("change", "code"),
    [({2395: 0x4000}, "cca.lifecycle"), ({2399: [{2: bytes(32), 5: bytes(32)}]}, "cca.platform_components")],
)
def test_a_platform_under_debug_or_with_other_firmware_refuses(cca, change, code):
    chosen = strict(verify(cca))
    verified = verify(cca, cca.token(platform=cca.platform_claims() | change))
    assert code in [finding.code for finding in appraise(verified, chosen) if finding.outcome is Outcome.NOT_MET]


@pytest.mark.parametrize("root", [EvidenceRoot.TEST, EvidenceRoot.SOFTWARE, EvidenceRoot.NONE])
def test_only_hardware_counts_unless_simulation_is_allowed(cca, root):
    verified = verify(cca, anchors=(dataclasses.replace(cca.anchors[0], root=root),))
    assert appraise(verified, strict(verified))[0].outcome is Outcome.NOT_MET
    allowed = policy.appraise_cca(verified, strict(verified), simulated_allowed=True)[0].outcome
    assert allowed is (Outcome.MET if root is EvidenceRoot.TEST else Outcome.NOT_MET)


def test_no_findings_are_a_refusal():
    with pytest.raises(Refused, match="cca.policy_not_met"):
        policy.require_cca(())


def test_a_policy_has_a_name_that_changes_with_it(cca):
    chosen = strict(verify(cca))
    assert policy.policy_digest(chosen) == policy.policy_digest(chosen)
    other = dataclasses.replace(chosen, realm_key=NotRequired("a test"))
    assert policy.policy_digest(other) != policy.policy_digest(chosen)
