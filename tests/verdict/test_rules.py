"""Breaks rules that no other test breaks by itself."""

import pytest
from software_tpm import SoftwareTpm

from moorline.errors import Malformed, Unavailable
from moorline.evidence.tpm_quote import parse_quote
from moorline.policy import intel_case
from moorline.verification.intel_pck import production_intel_anchors


@pytest.fixture(scope="module")
def message():
    return SoftwareTpm().quote(bytes(32), {0: bytes(32)})[0]


def test_an_attestation_of_another_type_is_no_quote(message):
    certify = message[:4] + b"\x80\x17" + message[6:]
    with pytest.raises(Malformed, match=r"tpm\.attest_type"):
        parse_quote(certify)


def test_a_quote_is_read_whole(message):
    parse_quote(message)
    with pytest.raises(Malformed, match=r"tpm\.trailing_bytes"):
        parse_quote(message + b"\x00")
    for end in range(len(message)):
        with pytest.raises(Malformed, match=r"tpm\."):
            parse_quote(message[:end])


def test_no_time_leaves_intel_evidence_undecided(shared):
    quote = min((shared / "vectors" / "tdx").glob("*/quote.bin")).read_bytes()
    with pytest.raises(Unavailable, match=r"intel\.no_time"):
        intel_case.verify_case(
            evidence=[intel_case.CaseFile(name="it", hint="tdx-quote", data=quote)],
            endorsements=[],
            at=None,
            inputs={"collateral": "none"},
            anchors=production_intel_anchors(),
        )
