"""Intel TDX evidence: the ECDSA quote of a trust domain, versions 4 and 5. No trust, no crypto.

Version 4 carries TDREPORT 1.0 (584 bytes); version 5 says type and size first: 2 is TDREPORT 1.0, 3 is TDREPORT 1.5 (648
bytes: 64 more, TEE_TCB_SVN_2 and MRSERVICETD). `dcap_quote` says what well-formed means.

Trailing zeros: interfaces such as configfs-tsm and the GHCI hand out a fixed buffer with the quote in front (5,006 or 8,000
bytes, say), so zeros after the quote are accepted, counted in `trailing_zeros` and reproduced by `serialize_tdx_quote`.
They are outside the signature and mean nothing. Any other trailing byte is Malformed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed
from moorline.evidence import dcap_quote
from moorline.evidence.dcap_quote import QuoteHeader, QuoteSignature, TeeType

_TD10: Final = struct.Struct("<16s48s48s8sQQ48s48s48s48s48s48s48s48s64s")
_TD15_MORE: Final = struct.Struct("<16s48s")
_BODY_SIZES: Final = {2: _TD10.size, 3: _TD10.size + _TD15_MORE.size}

ATTRIBUTE_DEBUG: Final = 1 << 0
ATTRIBUTE_SEPT_VE_DISABLE: Final = 1 << 28
ATTRIBUTE_MIGRATABLE: Final = 1 << 29
ATTRIBUTE_PKS: Final = 1 << 30
ATTRIBUTE_KEY_LOCKER: Final = 1 << 31
ATTRIBUTE_PERFMON: Final = 1 << 63
ATTRIBUTES_KNOWN: Final = (
    ATTRIBUTE_DEBUG
    | ATTRIBUTE_SEPT_VE_DISABLE
    | ATTRIBUTE_MIGRATABLE
    | ATTRIBUTE_PKS
    | ATTRIBUTE_KEY_LOCKER
    | ATTRIBUTE_PERFMON
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TdReport:
    """TDREPORT as it stands in a quote, 1.0 or 1.5. The last two fields are None in 1.0, which cannot show them."""

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: int
    xfam: int
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    tee_tcb_svn_2: bytes | None
    mr_service_td: bytes | None

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG: the host may read the domain's memory and registers."""
        return bool(self.td_attributes & ATTRIBUTE_DEBUG)

    @property
    def sept_ve_disable(self) -> bool:
        """The host cannot make the domain take an exception on pages it has taken away."""
        return bool(self.td_attributes & ATTRIBUTE_SEPT_VE_DISABLE)

    @property
    def migratable(self) -> bool:
        """The domain may be migrated by a migration TD."""
        return bool(self.td_attributes & ATTRIBUTE_MIGRATABLE)

    @property
    def pks(self) -> bool:
        """Supervisor protection keys may be used."""
        return bool(self.td_attributes & ATTRIBUTE_PKS)

    @property
    def key_locker(self) -> bool:
        """Key Locker may be used."""
        return bool(self.td_attributes & ATTRIBUTE_KEY_LOCKER)

    @property
    def perfmon(self) -> bool:
        """Performance monitoring may be used."""
        return bool(self.td_attributes & ATTRIBUTE_PERFMON)

    @property
    def unknown_attributes(self) -> int:
        """The attribute bits that are none of the above. Bits 1 to 7 mean "under debug", the others are reserved."""
        return self.td_attributes & ~ATTRIBUTES_KNOWN

    def serialized(self) -> bytes:
        """584 bytes, or 648 for 1.5."""
        body = _TD10.pack(
            self.tee_tcb_svn,
            self.mr_seam,
            self.mr_signer_seam,
            self.seam_attributes,
            self.td_attributes,
            self.xfam,
            self.mr_td,
            self.mr_config_id,
            self.mr_owner,
            self.mr_owner_config,
            *self.rtmrs,
            self.report_data,
        )
        if self.tee_tcb_svn_2 is None or self.mr_service_td is None:
            return body
        return body + _TD15_MORE.pack(self.tee_tcb_svn_2, self.mr_service_td)


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxQuote:
    """A TDX quote, field by field and untrusted. `trailing_zeros` is padding of the buffer it came in."""

    header: QuoteHeader
    report: TdReport
    signature: QuoteSignature
    trailing_zeros: int

    def signed(self) -> bytes:
        """The bytes under the attestation key's signature: header and body, made from the fields."""
        body = self.report.serialized()
        if self.header.version == 5:
            kind = 2 if len(body) == _TD10.size else 3
            body = dcap_quote.serialize_body_header(kind, len(body)) + body
        return self.header.serialized() + body


def parse_tdx_quote(data: bytes) -> TdxQuote:
    """The TDX quote in `data`, all of it. Untrusted; establishes the form only. Raises only Malformed (`quote.*`)."""
    header = dcap_quote.parse_header(data)
    if header.tee_type is not TeeType.TDX:
        raise Malformed("quote.tee_type", "not a quote of a trust domain", expected="TDX", got=header.tee_type.name)
    at, size = dcap_quote.HEADER_BYTES, _TD10.size
    if header.version == 5:
        kind, size = dcap_quote.parse_body_header(data, at, len(data))
        if _BODY_SIZES.get(kind) != size:
            raise Malformed(
                "quote.body_type", "not the body of a TDX quote", expected="2, 584 or 3, 648", got=f"{kind}, {size}"
            )
        at += 6
    if at + size > len(data):
        raise Malformed("quote.truncated", "the quote ends inside its body", expected=at + size, got=len(data))
    report = _report(data, at, size)
    signature, end = dcap_quote.parse_signature(data, at + size, header.version)
    if any(data[end:]):
        raise Malformed("quote.trailing", "bytes other than zero follow the quote", expected=end, got=len(data))
    return TdxQuote(header=header, report=report, signature=signature, trailing_zeros=len(data) - end)


def serialize_tdx_quote(quote: TdxQuote) -> bytes:
    """The bytes of `quote` with its padding; the inverse of `parse_tdx_quote`."""
    section = dcap_quote.serialize_signature(quote.signature, quote.header.version)
    return quote.signed() + section + bytes(quote.trailing_zeros)


def _report(data: bytes, at: int, size: int) -> TdReport:
    fields = _TD10.unpack_from(data, at)
    svn_2, service = _TD15_MORE.unpack_from(data, at + _TD10.size) if size > _TD10.size else (None, None)
    return TdReport(
        tee_tcb_svn=fields[0],
        mr_seam=fields[1],
        mr_signer_seam=fields[2],
        seam_attributes=fields[3],
        td_attributes=fields[4],
        xfam=fields[5],
        mr_td=fields[6],
        mr_config_id=fields[7],
        mr_owner=fields[8],
        mr_owner_config=fields[9],
        rtmrs=(fields[10], fields[11], fields[12], fields[13]),
        report_data=fields[14],
        tee_tcb_svn_2=svn_2,
        mr_service_td=service,
    )
