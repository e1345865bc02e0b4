"""What Intel's quotes for SGX and TDX have in common: header, enclave report, signature section. No trust, no crypto.

Formats: ECDSA quote versions 3 (Intel SGX ECDSA QuoteGenReference API, appendix A.4), 4 and 5 (Intel TDX DCAP Quote
Generation Library, appendix 3). All integers are little-endian. What makes a quote well-formed here:

1. a known version (3, 4, 5), attestation key type 2 (ECDSA P-256; no other is in use), and a TEE type that the version can
   carry;
2. every length field says exactly what is there; nothing is left over inside the signature section;
3. reserved fields are zero;
4. version 3 carries the quoting enclave's report directly, versions 4 and 5 carry it inside certification data of type 6;
5. certification data of type 1 to 5 (PPID in three encryptions, a PCK leaf, a PCK chain) with the length its type demands.

So `serialize(parse(b)) == b` for every b that parses. Everything that comes out is untrusted until `verification.sgx` or
`verification.tdx` has seen it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from moorline.errors import Malformed

HEADER_BYTES: Final = 48
ENCLAVE_REPORT_BYTES: Final = 384
MAX_QUOTE: Final = 65536
ECDSA_P256: Final = 2
QE_REPORT_DATA: Final = 6
PCK_CHAIN: Final = 5
VERSIONS: Final = (3, 4, 5)

_HEADER: Final = struct.Struct("<HHIHH16s20s")
_ENCLAVE: Final = struct.Struct("<16sI12s16sQQ32s32s32s32s64sHHH42s16s64s")
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_KIND_AND_SIZE: Final = struct.Struct("<HI")
_CERTIFICATION_SIZES: Final = {1: 36, 2: 276, 3: 404, 4: None, PCK_CHAIN: None}
"""Type to length: PPID (16, or encrypted with RSA-2048 or RSA-3072), CPUSVN 16, PCESVN 2, PCEID 2."""


class TeeType(IntEnum):
    """What the quote is about (header field TEE type)."""

    SGX = 0x00
    TDX = 0x81


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteHeader:
    """The first 48 bytes. `qe_svn` and `pce_svn` have a meaning for SGX only; TDX quotes hold zeros there."""

    version: int
    attestation_key_type: int
    tee_type: TeeType
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes

    def serialized(self) -> bytes:
        """The 48 bytes."""
        return _HEADER.pack(
            self.version,
            self.attestation_key_type,
            self.tee_type,
            self.qe_svn,
            self.pce_svn,
            self.qe_vendor_id,
            self.user_data,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveReport:
    """REPORTBODY of an enclave, 384 bytes (Intel SDM volume 3D, 38.15). `attributes` is FLAGS, `xfrm` the other half."""

    cpu_svn: bytes
    misc_select: int
    isv_ext_prod_id: bytes
    attributes: int
    xfrm: int
    mr_enclave: bytes
    mr_signer: bytes
    config_id: bytes
    isv_prod_id: int
    isv_svn: int
    config_svn: int
    isv_family_id: bytes
    report_data: bytes

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG: the host may read and write the enclave's memory."""
        return bool(self.attributes >> 1 & 1)

    @property
    def attribute_bytes(self) -> bytes:
        """FLAGS and XFRM as they stand, 16 bytes: what an identity masks and compares."""
        return self.attributes.to_bytes(8, "little") + self.xfrm.to_bytes(8, "little")

    @classmethod
    def parse(cls, data: bytes) -> EnclaveReport:
        """The report in exactly 384 bytes. Raises Malformed("quote.reserved" | "quote.truncated")."""
        if len(data) != ENCLAVE_REPORT_BYTES:
            raise Malformed("quote.truncated", "not an enclave report", expected=ENCLAVE_REPORT_BYTES, got=len(data))
        (
            cpu_svn,
            misc_select,
            zero_a,
            isv_ext_prod_id,
            attributes,
            xfrm,
            mr_enclave,
            zero_b,
            mr_signer,
            zero_c,
            config_id,
            isv_prod_id,
            isv_svn,
            config_svn,
            zero_d,
            isv_family_id,
            report_data,
        ) = _ENCLAVE.unpack(data)
        if any(zero_a) or any(zero_b) or any(zero_c) or any(zero_d):
            raise Malformed("quote.reserved", "a reserved field of an enclave report is not zero")
        return cls(
            cpu_svn=cpu_svn,
            misc_select=misc_select,
            isv_ext_prod_id=isv_ext_prod_id,
            attributes=attributes,
            xfrm=xfrm,
            mr_enclave=mr_enclave,
            mr_signer=mr_signer,
            config_id=config_id,
            isv_prod_id=isv_prod_id,
            isv_svn=isv_svn,
            config_svn=config_svn,
            isv_family_id=isv_family_id,
            report_data=report_data,
        )

    def serialized(self) -> bytes:
        """The 384 bytes, reserved fields zero."""
        return _ENCLAVE.pack(
            self.cpu_svn,
            self.misc_select,
            b"",
            self.isv_ext_prod_id,
            self.attributes,
            self.xfrm,
            self.mr_enclave,
            b"",
            self.mr_signer,
            b"",
            self.config_id,
            self.isv_prod_id,
            self.isv_svn,
            self.config_svn,
            b"",
            self.isv_family_id,
            self.report_data,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificationData:
    """How to find the PCK certificate: type 5 is the chain itself in PEM; types 1 to 4 name it or hold a part only."""

    kind: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteSignature:
    """The signature section: attestation key, its signature, the quoting enclave's report about it, certification."""

    signature: bytes
    """r and s, 32 bytes each, over header and body."""
    attestation_key: bytes
    """x and y, 32 bytes each."""
    qe_report: EnclaveReport
    qe_report_signature: bytes
    qe_auth_data: bytes
    certification: CertificationData


def tee_of(data: bytes) -> TeeType:
    """What `data` claims to be a quote of: which parser to ask. Raises Malformed (`quote.*`) for anything else."""
    return parse_header(data).tee_type


def parse_header(data: bytes) -> QuoteHeader:
    """The header at the start of `data`. Raises only Malformed (`quote.*`)."""
    if len(data) < HEADER_BYTES:
        raise Malformed("quote.truncated", "the quote ends inside its header", expected=HEADER_BYTES, got=len(data))
    if len(data) > MAX_QUOTE:
        raise Malformed("quote.too_large", "the quote is too large", expected=f"<= {MAX_QUOTE} bytes", got=len(data))
    version, key_type, tee, qe_svn, pce_svn, vendor, user_data = _HEADER.unpack_from(data)
    if version not in VERSIONS:
        raise Malformed("quote.version", "unknown version of the quote", expected="3, 4 or 5", got=version)
    if tee not in (TeeType.SGX, TeeType.TDX) or (version == 3 and tee != TeeType.SGX):
        raise Malformed(
            "quote.tee_type", "unknown kind of TEE for this version of the quote", got=f"{tee:#x}, version {version}"
        )
    if key_type != ECDSA_P256:
        raise Malformed("quote.key_type", "unknown kind of attestation key", expected="2 (ECDSA P-256)", got=key_type)
    if tee == TeeType.TDX and (qe_svn or pce_svn):
        raise Malformed("quote.reserved", "a reserved field of the quote header is not zero")
    return QuoteHeader(
        version=version,
        attestation_key_type=key_type,
        tee_type=TeeType(tee),
        qe_svn=qe_svn,
        pce_svn=pce_svn,
        qe_vendor_id=vendor,
        user_data=user_data,
    )


def parse_body_header(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The type and size (six bytes) at `at`, before `end`. Raises Malformed("quote.truncated")."""
    if at + _KIND_AND_SIZE.size > end:
        raise _truncated(at)
    kind, size = _KIND_AND_SIZE.unpack_from(data, at)
    return kind, size


def serialize_body_header(kind: int, size: int) -> bytes:
    """The six bytes in front of the body of a version 5 quote."""
    return _KIND_AND_SIZE.pack(kind, size)


def parse_signature(data: bytes, at: int, version: int) -> tuple[QuoteSignature, int]:
    """The signature section at `at` (its length field first), and where it ends. Raises only Malformed (`quote.*`)."""
    size, at = _sized(data, at, _U32, len(data))
    end = at + size
    if end > len(data):
        raise _truncated(at)
    fixed = _take(data, at, 128, end)
    at += 128
    if version != 3:
        kind, inner = parse_body_header(data, at, end)
        at += _KIND_AND_SIZE.size
        if kind != QE_REPORT_DATA:
            raise Malformed("quote.certification_type", "the quote lacks the quoting enclave's report", expected=6, got=kind)
        if at + inner != end:
            raise Malformed(
                "quote.signature_size", "certification data does not fill its section", expected=end - at, got=inner
            )
    report = EnclaveReport.parse(_take(data, at, ENCLAVE_REPORT_BYTES, end))
    at += ENCLAVE_REPORT_BYTES
    report_signature = _take(data, at, 64, end)
    auth_size, at = _sized(data, at + 64, _U16, end)
    auth_data = _take(data, at, auth_size, end)
    at += auth_size
    kind, size = parse_body_header(data, at, end)
    at += _KIND_AND_SIZE.size
    if at + size != end:
        raise Malformed("quote.signature_size", "the signature section has the wrong length", expected=end - at, got=size)
    return (
        QuoteSignature(
            signature=fixed[:64],
            attestation_key=fixed[64:],
            qe_report=report,
            qe_report_signature=report_signature,
            qe_auth_data=auth_data,
            certification=_certification(kind, data[at:end]),
        ),
        end,
    )


def serialize_signature(signature: QuoteSignature, version: int) -> bytes:
    """The signature section with its length field; the inverse of `parse_signature`."""
    certification = signature.certification
    about_key = b"".join(
        (
            signature.qe_report.serialized(),
            signature.qe_report_signature,
            _U16.pack(len(signature.qe_auth_data)),
            signature.qe_auth_data,
            _KIND_AND_SIZE.pack(certification.kind, len(certification.data)),
            certification.data,
        )
    )
    if version != 3:
        about_key = _KIND_AND_SIZE.pack(QE_REPORT_DATA, len(about_key)) + about_key
    section = signature.signature + signature.attestation_key + about_key
    return _U32.pack(len(section)) + section


def _certification(kind: int, data: bytes) -> CertificationData:
    if kind not in _CERTIFICATION_SIZES:
        raise Malformed("quote.certification_type", "unknown type of certification data", expected="1 to 5", got=kind)
    demanded = _CERTIFICATION_SIZES[kind]
    if demanded is not None and len(data) != demanded:
        raise Malformed(
            "quote.certification_size", "certification data has the wrong length", expected=demanded, got=len(data)
        )
    return CertificationData(kind=kind, data=data)


def _sized(data: bytes, at: int, form: struct.Struct, end: int) -> tuple[int, int]:
    if at + form.size > end:
        raise _truncated(at)
    (size,) = form.unpack_from(data, at)
    return size, at + form.size


def _take(data: bytes, at: int, size: int, end: int) -> bytes:
    if at + size > end:
        raise _truncated(at)
    return data[at : at + size]


def _truncated(at: int) -> Malformed:
    return Malformed("quote.truncated", "the quote ends inside a field", got=f"field at byte {at}")
