"""Quotes: parsed exactly, verified against every rule, and refused for each single change."""

import json
from itertools import pairwise

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import example, given, settings
from hypothesis import strategies as st
from software_tpm import SoftwareTpm

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.evidence import tpm_quote, tpm_structures
from moorline.evidence.tpm_quote import ClockInfo
from moorline.rats import EvidenceRoot
from moorline.verification.tpm_quote import AttestationKey, attestation_key, verify_progress, verify_quote

NONCE = bytes(range(32))
PCRS = {index: bytes([index]) * 32 for index in (0, 4, 10)}
SELECTION = (0, 4, 10)
ONE = SoftwareTpm()


def verify(quoted, signature, *, by=ONE, pcrs=PCRS, nonce=NONCE, bank=tpm_structures.ALG_SHA256, selection=SELECTION):
    key = attestation_key(by.public, EvidenceRoot.TEST)
    return verify_quote(quoted, signature, pcrs, key=key, qualifying=nonce, bank=bank, selection=selection)


def test_a_quote_of_the_enrolled_key_establishes_its_values():
    verified = verify(*ONE.quote(NONCE, PCRS))
    assert verified.value.pcrs == PCRS
    assert verified.root is EvidenceRoot.TEST


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"nonce": bytes(32)}, "tpm.nonce_mismatch"),
        ({"nonce": NONCE[:-1]}, "tpm.nonce_mismatch"),
        ({"nonce": b"short"}, "tpm.nonce_too_short"),
        ({"selection": (0, 4)}, "tpm.selection_mismatch"),
        ({"selection": (0, 4, 10, 11)}, "tpm.selection_mismatch"),
        ({"bank": tpm_structures.ALG_SHA384}, "tpm.selection_mismatch"),
        ({"pcrs": PCRS | {4: bytes(32)}}, "tpm.pcr_digest_mismatch"),
        ({"pcrs": {0: PCRS[0], 4: PCRS[4]}}, "tpm.selection_mismatch"),
        ({"pcrs": PCRS | {4: bytes(31)}}, "tpm.selection_mismatch"),
        ({"by": SoftwareTpm()}, "tpm.signature_invalid"),
    ],
)
def test_each_single_change_is_refused_by_its_own_rule(change, code):
    quoted, signature = ONE.quote(NONCE, PCRS)
    with pytest.raises(MoorlineError) as refused:
        verify(quoted, signature, **change)
    assert refused.value.code == code


def test_a_second_bank_in_the_quote_is_refused():
    both = (tpm_structures.select(tpm_structures.ALG_SHA256, SELECTION), tpm_structures.select(tpm_structures.ALG_SHA1, ()))
    with pytest.raises(NotAuthentic) as refused:
        verify(*ONE.quote(NONCE, PCRS, selections=both))
    assert refused.value.code == "tpm.selection_mismatch"


def test_the_scheme_comes_from_enrolment_and_not_from_the_blob():
    quoted, signature = ONE.quote(NONCE, PCRS)
    parsed = tpm_structures.parse_signature(signature)
    other = tpm_structures.Signature(tpm_structures.ALG_ECDSA, tpm_structures.ALG_SHA1, parsed.first, parsed.second)
    with pytest.raises(NotAuthentic) as refused:
        verify(quoted, tpm_structures.serialize_signature(other))
    assert refused.value.code == "tpm.scheme_mismatch"


@pytest.mark.parametrize("attributes", [0x40472, 0x10472, 0x50470, 0x50462, 0x70472])
def test_a_key_that_could_sign_anything_else_is_no_attestation_key(attributes):
    with pytest.raises(Refused) as refused:
        attestation_key(SoftwareTpm(attributes=attributes).public, EvidenceRoot.TEST)
    assert refused.value.code == "ak.attributes"


def test_counters_only_go_forward():
    steps = [
        ClockInfo(100, 1, 0, safe=True),
        ClockInfo(100, 1, 0, safe=True),
        ClockInfo(200, 1, 1, safe=True),
        ClockInfo(300, 2, 0, safe=True),
        ClockInfo(5, 3, 0, safe=False),
    ]
    assert verify_progress(None, steps[0])
    assert [verify_progress(before, now) for before, now in pairwise(steps)] == [False, False, True, True]
    for before, now in pairwise(reversed(steps[1:])):
        with pytest.raises(NotAuthentic) as refused:
            verify_progress(before, now)
        assert refused.value.code == "tpm.clock_regressed"
    with pytest.raises(NotAuthentic):
        verify_progress(ClockInfo(100, 1, 0, safe=True), ClockInfo(50, 2, 0, safe=True))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_flipped_bit_is_accepted(data):
    quoted, signature = (bytearray(part) for part in ONE.quote(NONCE, PCRS))
    part = data.draw(st.sampled_from([quoted, signature]))
    bit = data.draw(st.integers(0, len(part) * 8 - 1))
    part[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(MoorlineError):
        verify(bytes(quoted), bytes(signature))


PARSERS = [
    (tpm_quote.parse_quote, tpm_quote.serialize_quote),
    (tpm_quote.parse_nv_certification, tpm_quote.serialize_nv_certification),
    (tpm_structures.parse_public, tpm_structures.serialize_public),
    (tpm_structures.parse_signature, tpm_structures.serialize_signature),
]
STARTS = [b"", b"\xffTCG\x80\x18", b"\xffTCG\x80\x14", b"\x00\x23\x00\x0b", b"\x00\x01\x00\x0b", b"\x00\x18\x00\x0b"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=200))
@example(b"", ONE.public)
@example(b"", ONE.public + b"\x00")
@example(b"", ONE.quote(NONCE, PCRS)[0])
def test_any_bytes_are_a_value_or_malformed(start, rest):
    for parse, serialize in PARSERS:
        try:
            parsed = parse(start + rest)
        except Malformed:
            continue
        assert serialize(parsed) == start + rest


def given_key(path):
    key = serialization.load_pem_public_key(path.read_bytes())
    return AttestationKey(
        name=b"given",
        key=key,
        scheme=tpm_structures.ALG_RSASSA,
        hash_algorithm=tpm_structures.ALG_SHA256,
        root=EvidenceRoot.VIRTUAL,
    )


def test_keylime_quote(shared):
    case = shared / "vectors/tpm/keylime-quote-sha1"
    facts = json.loads((case / "case.json").read_text())
    quoted, signature = (case / "quote.bin").read_bytes(), (case / "sig.bin").read_bytes()
    parsed = tpm_quote.parse_quote(quoted)
    assert parsed.extra_data.hex() == facts["facts"]["extra_data"]
    assert list(parsed.selections[0].indices) == facts["facts"]["pcr_selection"]
    public = tpm_structures.parse_public((case / "ak_pub.tpm2b.bin").read_bytes()[2:])
    assert public.name == (case / "ak_name.bin").read_bytes()
    # tpm2-tools writes C structures: selections (132 bytes), then lists of eight digests of at most 64 bytes each.
    digests = (case / "pcrs.bin").read_bytes()[132 + 4 + 4 :]
    pcrs = {index: digests[at * 66 + 2 :][:32] for at, index in enumerate((15, 16, 22))}
    verified = verify_quote(
        quoted,
        signature,
        pcrs,
        key=given_key(case / "ak_pub.pem"),
        qualifying=bytes.fromhex(facts["inputs"]["nonce_hex"]),
        bank=tpm_structures.ALG_SHA256,
        selection=(15, 16, 22),
    )
    assert verified.value.clock.reset_count == facts["facts"]["reset_count"]


def test_trustee_quote_over_all_pcrs(shared):
    case = shared / "vectors/tpm/trustee-tpm-evidence"
    facts = json.loads((case / "case.json").read_text())
    values = json.loads((case / "pcrs_sha256.json").read_text())
    verified = verify_quote(
        (case / "quote.bin").read_bytes(),
        (case / "sig.bin").read_bytes(),
        {index: bytes.fromhex(value) for index, value in enumerate(values)},
        key=given_key(case / "ak_pub.pem"),
        qualifying=bytes.fromhex(facts["inputs"]["nonce_hex"]),
        bank=tpm_structures.ALG_SHA256,
        selection=tuple(range(24)),
    )
    assert verified.value.clock.reset_count == 2


@pytest.mark.parametrize(("number", "bank"), [(0, 0x04), (1, 0x0B), (2, 0x0C)])
@pytest.mark.parametrize(("nonce", "code"), [("9009", None), ("9010", "tpm.nonce_mismatch")])
def test_gce_quotes_of_three_banks(shared, number, bank, nonce, code):
    case = shared / "vectors/tpm/gce-cos-85-nonce9009"
    values = json.loads((case / f"quote{number}.pcrs.json").read_text())["pcrs"]
    pcrs = {int(index): bytes.fromhex(value) for index, value in values.items()}
    key = attestation_key((case / "ak_pub.tpmt_public.bin").read_bytes(), EvidenceRoot.VIRTUAL)
    try:
        verify_quote(
            (case / f"quote{number}.attest.bin").read_bytes(),
            (case / f"quote{number}.sig.bin").read_bytes(),
            pcrs,
            key=key,
            qualifying=bytes.fromhex(nonce),
            bank=bank,
            selection=tuple(sorted(pcrs)),
            minimum_nonce=2,
        )
    except NotAuthentic as refused:
        assert refused.code == code
    else:
        assert code is None
