"""Verifies that a Nitro document counts only under the pinned root, in time and fresh, and that each rule can be broken."""

import dataclasses

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.evidence import nitro as evidence
from moorline.policy import nitro as policy
from moorline.policy.match import Exact, NotRequired, OneOf
from moorline.rats import EvidenceRoot, Outcome
from moorline.verification.nitro import aws_anchor, verify_nitro

NOW = 1_800_000_000
HOUR = 3600


def verify(enclave, document=None, **changes):
    parsed = evidence.parse_document(document or enclave.document())
    return verify_nitro(parsed, **{"nonce": enclave.nonce, "anchors": enclave.anchors, "now": NOW, **changes})


@pytest.mark.parametrize("tag", [None, 18])
def test_a_genuine_document_is_verified(enclave, tag):
    verified = verify(enclave, enclave.document(tag=tag))
    assert verified.root is EvidenceRoot.TEST
    assert not verified.value.debug
    assert verified.value.document.user_data == b"data"


def indefinite(item):
    """The same item with every string, array and map of indefinite length."""
    if isinstance(item, dict):
        return b"\xbf" + b"".join(indefinite(key) + indefinite(value) for key, value in item.items()) + b"\xff"
    if isinstance(item, list):
        return b"\x9f" + b"".join(map(indefinite, item)) + b"\xff"
    if isinstance(item, bytes):
        return b"\x5f" + cbor2.dumps(item) + b"\xff"
    if isinstance(item, str):
        return b"\x7f" + cbor2.dumps(item) + b"\xff"
    return cbor2.dumps(item)


def test_indefinite_lengths_are_read_and_the_bytes_that_came_are_what_is_signed(enclave):
    document = enclave.document(indefinite(enclave.payload()))
    assert verify(enclave, document).value.document.pcrs[0] == b"\x01" * 48
    whole = indefinite(cbor2.loads(document))
    assert evidence.parse_document(whole).module_id == "i-0-enc0"


def test_the_shipped_root_is_awss_and_the_only_one_of_hardware():
    assert aws_anchor().root is EvidenceRoot.HARDWARE


# ---------------------------------------------------------------- what an attacker tries


def test_a_root_of_ones_own(enclave):
    with pytest.raises(NotAuthentic, match="nitro.root_unknown"):
        verify(enclave, anchors=(aws_anchor(),))
    with pytest.raises(NotAuthentic, match="nitro.root_unknown"):
        verify(enclave, anchors=())


def test_the_genuine_root_in_front_of_ones_own_chain(enclave, made):
    other = made()
    payload = other.payload(cabundle=[enclave.root, *other.bundle[1:]], nonce=enclave.nonce)
    with pytest.raises(NotAuthentic, match="path.broken"):
        verify(enclave, other.document(payload))


@pytest.mark.parametrize("missing", [1, 2])
def test_a_link_that_is_missing(enclave, missing):
    bundle = [der for position, der in enumerate(enclave.bundle) if position != missing]
    with pytest.raises(NotAuthentic, match="path.broken"):
        verify(enclave, enclave.document(enclave.payload(cabundle=bundle)))


def test_an_instance_certificate_used_as_leaf(enclave):
    payload = enclave.payload(certificate=enclave.bundle[2], cabundle=enclave.bundle[:2])
    with pytest.raises(NotAuthentic, match="path.not_ca"):
        verify(enclave, enclave.document(payload))


def test_another_signer_or_algorithm(enclave):
    with pytest.raises(NotAuthentic, match="cose.signature_invalid"):
        verify(enclave, enclave.document(key=ec.generate_private_key(ec.SECP384R1())))
    with pytest.raises(NotAuthentic, match="cose.algorithm_not_allowed"):
        verify(enclave, enclave.document(algorithm=-7))


def test_time(enclave):
    with pytest.raises(NotAuthentic, match="path.expired"):
        verify(enclave, now=NOW + 4 * HOUR)
    with pytest.raises(NotAuthentic, match="path.not_yet_valid"):
        verify(enclave, now=NOW - HOUR)
    with pytest.raises(NotAuthentic, match="nitro.timestamp_outside"):
        verify(enclave, enclave.document(enclave.payload(timestamp=(NOW - HOUR) * 1000)))


@pytest.mark.parametrize(("there", "expected"), [(b"a", b"b"), (None, b"b"), (b"a", None), (b"", None)])
def test_a_nonce_that_is_not_the_expected_one(enclave, there, expected):
    with pytest.raises(NotAuthentic, match="nitro.nonce_mismatch"):
        verify(enclave, enclave.document(enclave.payload(nonce=there)), nonce=expected)


def test_no_nonce_where_none_was_expected(enclave):
    verify(enclave, enclave.document(enclave.payload(nonce=None)), nonce=None)


# ---------------------------------------------------------------- form


@pytest.mark.parametrize("name", ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"])
def test_every_mandatory_member(enclave, name):
    with pytest.raises(Malformed, match="nitro.member_missing"):
        evidence.parse_document(enclave.document(enclave.payload(**{name: ...})))


@pytest.mark.parametrize("name", ["public_key", "user_data", "nonce"])
def test_optional_members_may_be_null_or_absent(enclave, name):
    for value in (None, ...):
        assert getattr(evidence.parse_document(enclave.document(enclave.payload(**{name: value}))), name) is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"extra": 1}, "nitro.member_unknown"),
        ({"digest": "SHA256"}, "nitro.digest"),
        ({"module_id": ""}, "nitro.module_id"),
        ({"timestamp": 0}, "nitro.timestamp"),
        ({"timestamp": -1}, "nitro.timestamp"),
        ({"timestamp": "now"}, "nitro.timestamp"),
        ({"pcrs": {}}, "nitro.pcrs"),
        ({"pcrs": {32: bytes(48)}}, "nitro.pcrs"),
        ({"pcrs": {0: bytes(20)}}, "nitro.pcrs"),
        ({"pcrs": {"0": bytes(48)}}, "nitro.pcrs"),
        ({"pcrs": {index: bytes(48) for index in range(33)}}, "nitro.pcrs"),
        ({"certificate": b""}, "nitro.certificate"),
        ({"certificate": bytes(1025)}, "nitro.certificate"),
        ({"cabundle": []}, "nitro.cabundle"),
        ({"cabundle": [b""]}, "nitro.certificate"),
        ({"public_key": b""}, "nitro.member_size"),
        ({"public_key": bytes(1025)}, "nitro.member_size"),
        ({"user_data": bytes(513)}, "nitro.member_size"),
        ({"nonce": bytes(513)}, "nitro.member_size"),
        ({"nonce": "text"}, "nitro.member_size"),
    ],
)
def test_members_of_a_wrong_form(enclave, change, code):
    with pytest.raises(Malformed) as refused:
        evidence.parse_document(enclave.document(enclave.payload(**change)))
    assert refused.value.code == code


def test_bytes_behind_the_document_or_its_payload(enclave):
    with pytest.raises(Malformed, match="eat.cbor_trailing"):
        evidence.parse_document(enclave.document() + b"\x00")
    with pytest.raises(Malformed, match="eat.cbor_trailing"):
        evidence.parse_document(enclave.document(cbor2.dumps(enclave.payload()) + b"\x00"))


def test_a_certificate_that_does_not_decode(enclave):
    with pytest.raises(Malformed, match="path.certificate_malformed"):
        verify(enclave, enclave.document(enclave.payload(certificate=b"\x30\x00")))


@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_document_or_malformed(data):
    with pytest.raises(Malformed):
        evidence.parse_document(data)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_is_ever_verified(flip_enclave, data):
    enclave, document = flip_enclave
    bit = data.draw(st.integers(0, 8 * len(document) - 1))
    changed = bytearray(document)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MoorlineError):
        verify(enclave, bytes(changed))


# ---------------------------------------------------------------- policy


def strict(verified):
    document = verified.value.document
    return policy.NitroPolicy(
        debug=Exact(value=False),
        **{f"pcr{index}": Exact(document.pcrs[index]) for index in policy.NAMED_PCRS},
        other_pcrs=Exact(frozenset()),
        module_id=Exact(document.module_id),
        user_data=Exact(b"data"),
        public_key=OneOf(frozenset({b"key"})),
    )


def appraise(verified, chosen):
    return policy.appraise_nitro(verified, chosen, simulated_allowed=True)


FIELDS = [field.name for field in dataclasses.fields(policy.NitroPolicy)]


def test_an_enclave_that_is_as_demanded_is_affirmed(enclave):
    verified = verify(enclave)
    findings = appraise(verified, strict(verified))
    policy.require_nitro(findings)
    assert {finding.outcome for finding in findings} == {Outcome.MET}


def test_a_simulated_root_never_counts_in_production(enclave):
    verified = verify(enclave)
    findings = policy.appraise_nitro(verified, strict(verified), simulated_allowed=False)
    with pytest.raises(Refused, match="nitro.root"):
        policy.require_nitro(findings)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("demand", [None, Exact(None), OneOf(frozenset()), "anything"])
def test_a_demand_that_is_left_out_or_empty_refuses(enclave, name, demand):
    verified = verify(enclave)
    findings = appraise(verified, dataclasses.replace(strict(verified), **{name: demand}))
    assert [finding.code for finding in findings if finding.outcome is Outcome.NOT_MET] == [f"nitro.{name}"]
    with pytest.raises(Refused, match="nitro.policy_not_met"):
        policy.require_nitro(findings)


@pytest.mark.parametrize("pcrs", [{0: bytes(48)}, {1: b"\x01" * 48}])
def test_debug_mode_is_an_all_zero_or_absent_pcr0(enclave, pcrs):
    verified = verify(enclave, enclave.document(enclave.payload(pcrs=pcrs)))
    outcomes = {finding.code: finding.outcome for finding in appraise(verified, strict(verify(enclave)))}
    assert verified.value.debug
    assert outcomes["nitro.debug"] is Outcome.NOT_MET
    assert outcomes["nitro.pcr0"] is Outcome.NOT_MET


def test_what_the_enclave_extended_itself_is_looked_at(enclave):
    chosen = strict(verify(enclave))
    pcrs = enclave.payload()["pcrs"] | {20: b"\x14" * 48}
    verified = verify(enclave, enclave.document(enclave.payload(pcrs=pcrs)))
    refused = [one.code for one in appraise(verified, chosen) if one.outcome is Outcome.NOT_MET]
    assert refused == ["nitro.other_pcrs"]
    chosen = dataclasses.replace(chosen, other_pcrs=NotRequired("a test"))
    policy.require_nitro(appraise(verified, chosen))
