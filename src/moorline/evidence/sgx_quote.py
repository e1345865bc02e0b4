"""Intel SGX evidence: the ECDSA quote of an enclave, versions 3, 4 and 5. No trust, no crypto.

A version 3 quote is header, enclave report (384 bytes), signature section; version 4 differs in the signature section only;
version 5 puts a type (1) and a size in front of the report. `dcap_quote` says what well-formed means. Nothing may follow the
quote: Open Enclave and RA-TLS wrap it with a length of their own, and `ratls` takes that off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed
from moorline.evidence import dcap_quote
from moorline.evidence.dcap_quote import EnclaveReport, QuoteHeader, QuoteSignature, TeeType

_BODY_TYPE: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SgxQuote:
    """An SGX quote, field by field and untrusted."""

    header: QuoteHeader
    report: EnclaveReport
    signature: QuoteSignature

    def signed(self) -> bytes:
        """The bytes under the attestation key's signature: header and body, made from the fields."""
        return self.header.serialized() + _body_header(self.header.version) + self.report.serialized()


def parse_sgx_quote(data: bytes) -> SgxQuote:
    """The SGX quote in `data`, all of it. Untrusted; establishes the form only. Raises only Malformed (`quote.*`)."""
    header = dcap_quote.parse_header(data)
    if header.tee_type is not TeeType.SGX:
        raise Malformed("quote.tee_type", "not a quote of an SGX enclave", expected="SGX", got=header.tee_type.name)
    at = dcap_quote.HEADER_BYTES
    if header.version == 5:
        found = dcap_quote.parse_body_header(data, at, len(data))
        if found != (_BODY_TYPE, dcap_quote.ENCLAVE_REPORT_BYTES):
            raise Malformed("quote.body_type", "not the body of an SGX quote", expected="type 1, 384 bytes", got=found)
        at += 6
    end = at + dcap_quote.ENCLAVE_REPORT_BYTES
    report = EnclaveReport.parse(data[at:end])
    signature, end = dcap_quote.parse_signature(data, end, header.version)
    if end != len(data):
        raise Malformed("quote.trailing", "bytes follow the quote", expected=end, got=len(data))
    return SgxQuote(header=header, report=report, signature=signature)


def serialize_sgx_quote(quote: SgxQuote) -> bytes:
    """The bytes of `quote`; the inverse of `parse_sgx_quote`."""
    return quote.signed() + dcap_quote.serialize_signature(quote.signature, quote.header.version)


def _body_header(version: int) -> bytes:
    if version != 5:
        return b""
    return dcap_quote.serialize_body_header(_BODY_TYPE, dcap_quote.ENCLAVE_REPORT_BYTES)
