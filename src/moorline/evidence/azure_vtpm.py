"""The vTPM of an Azure confidential guest: HCL report, runtime claims, quote, and their envelopes. No trust, no crypto.

The paravisor (HCL) asks the processor for a report whose report data is the hash of its runtime claims; the claims name the
attestation key of the vTPM. What makes it well-formed: the header says HCLA and sizes that agree with one another and
with the bytes; behind the claims are zeros; the claims are JSON without duplicate members, naming exactly one HCLAkPub
(RSA).

Everything that comes out is untrusted until `verification.vtpm` has seen it.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from moorline.errors import Malformed

_HEADER: Final = struct.Struct("<4s7I")
_RUNTIME: Final = struct.Struct("<5I")
_HARDWARE_BYTES: Final = 0x4A0
_REPORT_REQUEST: Final = 2
_CLAIMS_AT: Final = _HEADER.size + _HARDWARE_BYTES + _RUNTIME.size
_MAX_REPORT: Final = 16 * 1024
_MAX_ENVELOPE: Final = 256 * 1024
_SIGNATURE_BYTES: Final = 256


class ReportKind(IntEnum):
    """Which processor's report is inside (IGVM request data, report type)."""

    SNP = 2
    TDX = 4


class ClaimsHash(IntEnum):
    """Which hash of the runtime claims stands in the report data."""

    SHA256 = 1
    SHA384 = 2
    SHA512 = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HclReport:
    """An HCL report. `hardware` is the SNP report (1184 bytes) or TD report (1024); `claims` is the JSON as it came."""

    kind: ReportKind
    claims_hash: ClaimsHash
    hardware: bytes
    claims: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeClaims:
    """What the claims say: the vTPM's attestation key (RSA numbers, big-endian) and 64 bytes of the guest's, or None."""

    modulus: bytes
    exponent: bytes
    user_data: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmQuote:
    """A quote of the vTPM: TPMS_ATTEST, a bare RSASSA signature, and the SHA-256 PCRs by index (none where none came)."""

    message: bytes
    signature: bytes
    pcrs: Mapping[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureEvidence:
    """One guest's evidence. `td_quote` is there for TDX; `vcek` is DER, if the envelope brought it."""

    hcl: bytes
    quote: VtpmQuote
    td_quote: bytes | None
    vcek: bytes | None


def parse_hcl_report(data: bytes) -> HclReport:
    """The HCL report in `data`, untrusted. Raises only Malformed (`azure.hcl_*`)."""
    if not _CLAIMS_AT < len(data) <= _MAX_REPORT:
        raise Malformed("azure.hcl_size", "not an HCL report", expected=f"more than {_CLAIMS_AT} bytes", got=len(data))
    magic, version, size, request, status, *reserved = _HEADER.unpack_from(data)
    if magic != b"HCLA" or version not in (1, 2):
        raise Malformed("azure.hcl_header", "not an HCL report", expected="HCLA, version 1 or 2", got=f"{magic!r} {version}")
    if request != _REPORT_REQUEST or status or any(reserved):
        raise Malformed("azure.hcl_header", "the HCL report is no report, or a reserved field is not zero", got=status)
    data_size, runtime_version, kind, claims_hash, claims_size = _RUNTIME.unpack_from(data, _HEADER.size + _HARDWARE_BYTES)
    end = _CLAIMS_AT + claims_size
    if end > len(data) or data_size != _RUNTIME.size + claims_size or size != end:
        raise Malformed("azure.hcl_size", "the sizes in the HCL report disagree", expected=end, got=f"{size} {data_size}")
    if runtime_version != 1:
        raise Malformed("azure.hcl_header", "unknown version of the runtime data", expected=1, got=runtime_version)
    if any(data[end:]):
        raise Malformed("azure.hcl_trailing", "bytes follow the claims of the HCL report")
    try:
        report_kind, hashed = ReportKind(kind), ClaimsHash(claims_hash)
    except ValueError:
        raise Malformed(
            "azure.hcl_kind", "an unknown report or hash in the HCL report", got=f"{kind} {claims_hash}"
        ) from None
    width = 1184 if report_kind is ReportKind.SNP else 1024
    return HclReport(
        kind=report_kind,
        claims_hash=hashed,
        hardware=data[_HEADER.size : _HEADER.size + width],
        claims=data[_CLAIMS_AT:end],
    )


def parse_runtime_claims(data: bytes) -> RuntimeClaims:
    """The runtime claims, untrusted. Raises only Malformed("azure.claims")."""
    document = _json(data)
    keys = document.get("keys")
    if not isinstance(keys, list):
        raise Malformed("azure.claims", "the runtime claims name no keys")
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == "HCLAkPub"]
    if len(found) != 1 or found[0].get("kty") != "RSA":
        raise Malformed("azure.claims", "the runtime claims do not name exactly one attestation key", got=len(found))
    user_data = document.get("user-data")
    return RuntimeClaims(
        modulus=_base64url(found[0].get("n")),
        exponent=_base64url(found[0].get("e")),
        user_data=None if user_data is None else _hex(user_data),
    )


def parse_quote_json(data: bytes) -> VtpmQuote:
    """A quote in JSON: members in hexadecimal, or as lists of numbers."""
    return _quote(_json(data))


def parse_quote_bincode(data: bytes) -> VtpmQuote:
    """A quote in Rust's bincode: two byte vectors behind lengths of eight bytes, then PCRs as arrays behind their number."""
    message_at = 8 + _SIGNATURE_BYTES
    if len(data) < message_at + 8 or int.from_bytes(data[:8], "little") != _SIGNATURE_BYTES:
        raise Malformed("azure.quote", "not a quote in bincode")
    size = int.from_bytes(data[message_at : message_at + 8], "little")
    pcrs_at = message_at + 8 + size
    if size > 4096 or len(data) < pcrs_at + 8:
        raise Malformed("azure.quote", "not a quote in bincode", got=size)
    count = int.from_bytes(data[pcrs_at : pcrs_at + 8], "little")
    values = data[pcrs_at + 8 :]
    if count > 32 or len(values) != 32 * count:
        raise Malformed("azure.quote", "the PCRs of the quote are not whole", expected=32 * count, got=len(values))
    return VtpmQuote(
        message=data[message_at + 8 : pcrs_at],
        signature=data[8:message_at],
        pcrs={index: values[32 * index : 32 * index + 32] for index in range(count)},
    )


def parse_envelope(data: bytes) -> AzureEvidence:
    """The JSON that Trustee's attesters send, all versions, SNP and TDX. Raises only Malformed."""
    if len(data) > _MAX_ENVELOPE:
        raise Malformed("azure.envelope", "the evidence is too large", expected=f"<= {_MAX_ENVELOPE}", got=len(data))
    document = _json(data)
    quote = document.get("tpm_quote", document.get("quote"))
    report = document.get("hcl_report", document.get("report"))
    if not isinstance(quote, dict) or report is None:
        raise Malformed("azure.envelope", "the evidence lacks quote or HCL report")
    td_quote, vcek = document.get("td_quote"), document.get("vcek")
    return AzureEvidence(
        hcl=_octets(report),
        quote=_quote(quote),
        td_quote=None if td_quote is None else _octets(td_quote),
        vcek=None if vcek is None else _certificate(vcek),
    )


def _quote(document: Mapping[str, object]) -> VtpmQuote:
    pcrs = document.get("pcrs")
    if not isinstance(pcrs, list) or len(pcrs) > 32:
        raise Malformed("azure.quote", "the quote has no list of PCRs")
    values = {index: _hex(value) for index, value in enumerate(pcrs)}
    if any(len(value) != 32 for value in values.values()):
        raise Malformed("azure.quote", "a PCR is not 32 bytes")
    return VtpmQuote(message=_hex(document.get("message")), signature=_hex(document.get("signature")), pcrs=values)


def _json(data: bytes) -> dict[str, object]:
    try:
        document = json.loads(data, object_pairs_hook=_no_duplicates)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed("azure.claims", "not JSON", got=type(error).__name__) from None
    if not isinstance(document, dict):
        raise Malformed("azure.claims", "not a JSON object")
    return document


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise Malformed("azure.claims", "a JSON object has one member twice")
    return dict(pairs)


def _hex(value: object) -> bytes:
    """Hexadecimal, or a list of numbers as the first version had."""
    if isinstance(value, list):
        return _numbers(value)
    try:
        return bytes.fromhex(value) if isinstance(value, str) else _numbers(value)
    except ValueError:
        raise Malformed("azure.octets", "not hexadecimal") from None


def _octets(value: object) -> bytes:
    """Base64url, or a list of numbers as the first version had."""
    return _numbers(value) if isinstance(value, list) else _base64url(value)


def _numbers(value: object) -> bytes:
    if not isinstance(value, list) or any(isinstance(one, bool) or not isinstance(one, int) for one in value):
        raise Malformed("azure.octets", "not a list of bytes", got=type(value).__name__)
    try:
        return bytes(value)
    except ValueError:
        raise Malformed("azure.octets", "a number of the list is no byte") from None


def _base64url(value: object) -> bytes:
    if not isinstance(value, str):
        raise Malformed("azure.octets", "not base64url", got=type(value).__name__)
    try:
        return base64.b64decode(value.rstrip("=") + "=" * (-len(value.rstrip("=")) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("azure.octets", "not base64url") from None


def _certificate(value: object) -> bytes:
    """PEM or base64url of DER."""
    if isinstance(value, str) and value.startswith("-----BEGIN CERTIFICATE-----"):
        body = value.split("-----")[2]
        return _base64url("".join(body.split()).translate(str.maketrans("+/", "-_")))
    return _base64url(value)
