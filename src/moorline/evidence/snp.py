"""AMD SEV-SNP evidence: the attestation report and the certificate table that travels with it. No trust, no crypto.

Formats: ATTESTATION_REPORT versions 2, 3 and 5 (SEV Secure Nested Paging Firmware ABI, document 56860, revision 1.58, 7.3
and tables 8, 22, 23, 24), 1184 bytes, and the certificate table of the GHCB specification (document 56421, 4.1.8.1) as
Linux hands it out in configfs-tsm `auxblob`.

What makes a report well-formed here:

1. exactly 1184 bytes, and a version whose layout we know (2, 3, 5): a longer or newer report could hide meaning;
2. every field and bit that the ABI calls reserved is zero, and bit 17 of the guest policy is one;
3. the signing key selector is VCEK, VLEK or none; the VMPL is 0 to 3, or all ones (a report the host asked for);
4. nothing follows the two 72-byte integers of the signature but zeros.

So `serialize_report(parse_report(b)) == b` for every b that parses, and no byte of a report is outside some field.
Everything that comes out is untrusted until `verification.snp.verify_snp` has seen it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from moorline.errors import Malformed

REPORT_BYTES: Final = 1184
SIGNED_BYTES: Final = 0x2A0
REPORT_DATA_BYTES: Final = 64
ECDSA_P384_SHA384: Final = 1
HOST_REQUESTED: Final = 0xFFFFFFFF
"""VMPL of a report that the hypervisor asked for, not the guest (56860, 8.26 SNP_HV_REPORT_REQ)."""

_KNOWN_VERSIONS: Final = (2, 3, 5)
_FIXED: Final = struct.Struct("<IIQ16s16sIIQQII64s48s32s48s48s32s32sQBBB21s64sQBBBBBBBBQQQ152s72s72s368s")
_ZERO_21: Final = bytes(21)
_ZERO_152: Final = bytes(152)
_ZERO_368: Final = bytes(368)
_POLICY_ONE: Final = 1 << 17
_POLICY_KNOWN: Final = (1 << 26) - 1
_PLATFORM_KNOWN: Final = 0b1011_1111
_SIGNER_KNOWN: Final = 0b1_1111


class Product(StrEnum):
    """The product lines that have a root of their own, as KDS spells them. Siena and Bergamo are Genoa (57230, 3.1)."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"


class SigningKey(StrEnum):
    """Which key of the chip signed (56860, table 23, SIGNING_KEY)."""

    VCEK = "VCEK"
    VLEK = "VLEK"
    NONE = "NONE"


_SIGNING_KEYS: Final = {0: SigningKey.VCEK, 1: SigningKey.VLEK, 7: SigningKey.NONE}


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbVersion:
    """Security version numbers of one TCB (56860, table 3). `fmc` exists from Turin on and is None before."""

    boot_loader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None

    @classmethod
    def parse(cls, raw: int, product: Product) -> TcbVersion:
        """The components of `raw` in the layout of `product`; raises Malformed if a reserved byte is not zero.

        The layout is not written in the report: version 2 does not even name the product. Only after the certificate
        has said what the chip is can the number be read.
        """
        part = raw.to_bytes(8, "little")
        if product is Product.TURIN:
            fmc, boot_loader, tee, snp, reserved = part[0], part[1], part[2], part[3], part[4:7]
        else:
            fmc, boot_loader, tee, snp, reserved = None, part[0], part[1], part[6], part[2:6]
        if any(reserved):
            raise Malformed("snp.tcb_reserved", "reserved bytes of a TCB version are not zero", got=part)
        return cls(boot_loader=boot_loader, tee=tee, snp=snp, microcode=part[7], fmc=fmc)

    def raw(self) -> int:
        """The number as it stands in a report; the inverse of `parse`."""
        if self.fmc is not None:
            layout = bytes((self.fmc, self.boot_loader, self.tee, self.snp, 0, 0, 0, self.microcode))
        else:
            layout = bytes((self.boot_loader, self.tee, 0, 0, 0, 0, self.snp, self.microcode))
        return int.from_bytes(layout, "little")

    def at_least(self, minimum: TcbVersion) -> bool:
        """True if no component is below its minimum. TCBs of different layouts are never comparable: False."""
        if (self.fmc is None) != (minimum.fmc is None):
            return False
        mine = (self.boot_loader, self.tee, self.snp, self.microcode, self.fmc or 0)
        least = (minimum.boot_loader, minimum.tee, minimum.snp, minimum.microcode, minimum.fmc or 0)
        return all(have >= want for have, want in zip(mine, least, strict=True))

    def __str__(self) -> str:
        fmc = "" if self.fmc is None else f"fmc {self.fmc} "
        return f"{fmc}bootloader {self.boot_loader} tee {self.tee} snp {self.snp} microcode {self.microcode}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPolicy:
    """The guest policy (56860, table 8), chosen at launch and enforced by the firmware ever after."""

    raw: int

    @property
    def abi(self) -> tuple[int, int]:
        """The least firmware ABI the guest accepts, (major, minor)."""
        return (self.raw >> 8 & 0xFF, self.raw & 0xFF)

    @property
    def smt(self) -> bool:
        """The guest may run where SMT is on."""
        return bool(self.raw >> 16 & 1)

    @property
    def migrate_ma(self) -> bool:
        """A migration agent may be associated: it can read the guest's memory."""
        return bool(self.raw >> 18 & 1)

    @property
    def debug(self) -> bool:
        """The host may decrypt the guest's memory."""
        return bool(self.raw >> 19 & 1)

    @property
    def single_socket(self) -> bool:
        """The guest may run on one socket only."""
        return bool(self.raw >> 20 & 1)

    @property
    def cxl_allow(self) -> bool:
        """CXL memory may be populated."""
        return bool(self.raw >> 21 & 1)

    @property
    def mem_aes_256_xts(self) -> bool:
        """Memory must be encrypted with AES-256-XTS."""
        return bool(self.raw >> 22 & 1)

    @property
    def rapl_dis(self) -> bool:
        """Running Average Power Limit must be off."""
        return bool(self.raw >> 23 & 1)

    @property
    def ciphertext_hiding_dram(self) -> bool:
        """Ciphertext hiding for DRAM must be on."""
        return bool(self.raw >> 24 & 1)

    @property
    def page_swap_disable(self) -> bool:
        """The hypervisor cannot swap or move the guest's pages."""
        return bool(self.raw >> 25 & 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpReport:
    """ATTESTATION_REPORT, field by field and untrusted. Names as in 56860 table 22.

    TCB versions stay raw numbers: their layout depends on a product that only the certificate can name. The CPUID fields
    are None in version 2, the mitigation vectors before version 5. `signature_r` and `signature_s` are as they stand, up to
    72 bytes long.
    """

    version: int
    guest_svn: int
    policy: GuestPolicy
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algo: int
    current_tcb: int
    platform_info: int
    signer_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: int
    cpuid_fam_id: int | None
    cpuid_mod_id: int | None
    cpuid_step: int | None
    chip_id: bytes
    committed_tcb: int
    current_version: tuple[int, int, int]
    """(major, minor, build)"""
    committed_version: tuple[int, int, int]
    launch_tcb: int
    launch_mit_vector: int | None
    current_mit_vector: int | None
    signature_r: int
    signature_s: int

    @property
    def author_key_en(self) -> bool:
        """`author_key_digest` holds the digest of the key that certified the ID key."""
        return bool(self.signer_info & 1)

    @property
    def mask_chip_key(self) -> bool:
        """The firmware was told not to sign: the signature is zero."""
        return bool(self.signer_info >> 1 & 1)

    @property
    def signing_key(self) -> SigningKey:
        """Which key signed."""
        return _SIGNING_KEYS[self.signer_info >> 2 & 0b111]

    @property
    def smt_en(self) -> bool:
        """SMT is on in this platform (PLATFORM_INFO bit 0)."""
        return bool(self.platform_info & 1)

    @property
    def tsme_en(self) -> bool:
        """Transparent SME is on (bit 1)."""
        return bool(self.platform_info >> 1 & 1)

    @property
    def ecc_en(self) -> bool:
        """Memory has error correction, which makes aliasing harder (bit 2)."""
        return bool(self.platform_info >> 2 & 1)

    @property
    def alias_check_complete(self) -> bool:
        """The firmware found no aliased memory since reset: the mitigation of BadRAM, CVE-2024-21944 (bit 5)."""
        return bool(self.platform_info >> 5 & 1)


def parse_report(data: bytes) -> SnpReport:
    """The report in `data`. Input is untrusted; establishes only the form (see module). Raises only Malformed."""
    if len(data) != REPORT_BYTES:
        raise Malformed("snp.report_size", "not an SNP attestation report", expected=f"{REPORT_BYTES} bytes", got=len(data))
    (
        version,
        guest_svn,
        policy,
        family_id,
        image_id,
        vmpl,
        signature_algo,
        current_tcb,
        platform_info,
        signer_info,
        reserved_4c,
        report_data,
        measurement,
        host_data,
        id_key_digest,
        author_key_digest,
        report_id,
        report_id_ma,
        reported_tcb,
        family,
        model,
        stepping,
        reserved_18b,
        chip_id,
        committed_tcb,
        current_build,
        current_minor,
        current_major,
        reserved_1eb,
        committed_build,
        committed_minor,
        committed_major,
        reserved_1ef,
        launch_tcb,
        launch_mit,
        current_mit,
        reserved_208,
        r,
        s,
        reserved_330,
    ) = _FIXED.unpack(data)
    if version not in _KNOWN_VERSIONS:
        raise Malformed("snp.report_version", "unknown version of the attestation report", expected="2, 3 or 5", got=version)
    has_cpuid, has_vectors = version >= 3, version >= 5
    reserved_zero = (
        reserved_4c == reserved_1eb == reserved_1ef == 0
        and reserved_18b == _ZERO_21
        and reserved_208 == _ZERO_152
        and reserved_330 == _ZERO_368
        and (has_cpuid or family == model == stepping == 0)
        and (has_vectors or launch_mit == current_mit == 0)
        and platform_info & ~_PLATFORM_KNOWN == 0
        and signer_info & ~_SIGNER_KNOWN == 0
        and policy & ~_POLICY_KNOWN == 0
    )
    if not reserved_zero:
        raise Malformed("snp.report_reserved", "a reserved field or bit of the report is not zero", got=f"version {version}")
    if not policy & _POLICY_ONE:
        raise Malformed("snp.report_policy", "bit 17 of the guest policy must be one (56860 table 8)", got=hex(policy))
    if signer_info >> 2 not in _SIGNING_KEYS:
        raise Malformed("snp.report_signing_key", "unknown signing key selector", expected="0, 1 or 7", got=signer_info >> 2)
    if vmpl > 3 and vmpl != HOST_REQUESTED:
        raise Malformed("snp.report_vmpl", "no such privilege level", expected="0 to 3, or all ones", got=vmpl)
    return SnpReport(
        version=version,
        guest_svn=guest_svn,
        policy=GuestPolicy(raw=policy),
        family_id=family_id,
        image_id=image_id,
        vmpl=vmpl,
        signature_algo=signature_algo,
        current_tcb=current_tcb,
        platform_info=platform_info,
        signer_info=signer_info,
        report_data=report_data,
        measurement=measurement,
        host_data=host_data,
        id_key_digest=id_key_digest,
        author_key_digest=author_key_digest,
        report_id=report_id,
        report_id_ma=report_id_ma,
        reported_tcb=reported_tcb,
        cpuid_fam_id=family if has_cpuid else None,
        cpuid_mod_id=model if has_cpuid else None,
        cpuid_step=stepping if has_cpuid else None,
        chip_id=chip_id,
        committed_tcb=committed_tcb,
        current_version=(current_major, current_minor, current_build),
        committed_version=(committed_major, committed_minor, committed_build),
        launch_tcb=launch_tcb,
        launch_mit_vector=launch_mit if has_vectors else None,
        current_mit_vector=current_mit if has_vectors else None,
        signature_r=int.from_bytes(r, "little"),
        signature_s=int.from_bytes(s, "little"),
    )


def serialize_report(report: SnpReport) -> bytes:
    """The 1184 bytes of `report`, reserved fields zero; the inverse of `parse_report`."""
    current_major, current_minor, current_build = report.current_version
    committed_major, committed_minor, committed_build = report.committed_version
    return _FIXED.pack(
        report.version,
        report.guest_svn,
        report.policy.raw,
        report.family_id,
        report.image_id,
        report.vmpl,
        report.signature_algo,
        report.current_tcb,
        report.platform_info,
        report.signer_info,
        0,
        report.report_data,
        report.measurement,
        report.host_data,
        report.id_key_digest,
        report.author_key_digest,
        report.report_id,
        report.report_id_ma,
        report.reported_tcb,
        report.cpuid_fam_id or 0,
        report.cpuid_mod_id or 0,
        report.cpuid_step or 0,
        _ZERO_21,
        report.chip_id,
        report.committed_tcb,
        current_build,
        current_minor,
        current_major,
        0,
        committed_build,
        committed_minor,
        committed_major,
        0,
        report.launch_tcb,
        report.launch_mit_vector or 0,
        report.current_mit_vector or 0,
        _ZERO_152,
        report.signature_r.to_bytes(72, "little"),
        report.signature_s.to_bytes(72, "little"),
        _ZERO_368,
    )


def product_of_cpuid(family: int, model: int) -> Product | None:
    """The product line of a CPUID family and model, None if unknown (56860 1.58; models as in AMD's KDS tables)."""
    if family == 0x19 and model <= 0x0F:
        return Product.MILAN
    if family == 0x19 and (0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF):
        return Product.GENOA
    if family == 0x1A and model <= 0x11:
        return Product.TURIN
    return None


# ---------------------------------------------------------------- certificate table (GHCB 4.1.8.1)

VCEK_GUID: Final = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
VLEK_GUID: Final = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
ASK_GUID: Final = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
ARK_GUID: Final = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
CRL_GUID: Final = UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")

_ENTRY: Final = struct.Struct("<16sII")
_MAX_ENTRIES: Final = 16
_MAX_TABLE: Final = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateTable:
    """What the host chose to hand to the guest: pairs of GUID and bytes, in order. Untrusted, possibly empty."""

    entries: tuple[tuple[UUID, bytes], ...]

    def first(self, guid: UUID) -> bytes | None:
        """The bytes under `guid`, or None."""
        return next((data for name, data in self.entries if name == guid), None)


def parse_certificate_table(data: bytes) -> CertificateTable:
    """The table in `data`; the host is not trusted with it. Raises only Malformed.

    Entries must lie behind the header and inside the data, must not overlap and must have different GUIDs, so that no two
    readers can see different certificates. Bytes between and behind entries (hosts pad to whole pages) are ignored: nothing
    signs the table. No bytes at all are the empty table.
    """
    if len(data) > _MAX_TABLE:
        raise Malformed("snp.table_size", "the certificate table is too large", expected=f"<= {_MAX_TABLE}", got=len(data))
    if not data:
        return CertificateTable(entries=())
    headers: list[tuple[bytes, int, int]] = []
    cursor = 0
    while True:
        if cursor + _ENTRY.size > len(data) or len(headers) > _MAX_ENTRIES:
            raise Malformed("snp.table_unterminated", "the certificate table has no end", expected="an all-zero entry")
        guid, offset, length = _ENTRY.unpack_from(data, cursor)
        cursor += _ENTRY.size
        if not any(guid) and offset == 0 and length == 0:
            break
        headers.append((guid, offset, length))
    end = cursor
    for _, offset, length in sorted(headers, key=lambda header: header[1]):
        if offset < end or length == 0 or offset + length > len(data):
            raise Malformed("snp.table_range", "an entry of the certificate table lies outside or on another", got=offset)
        end = offset + length
    if len({guid for guid, _, _ in headers}) != len(headers):
        raise Malformed("snp.table_duplicate", "two entries of the certificate table have one GUID")
    return CertificateTable(entries=tuple((UUID(bytes=guid), data[start : start + size]) for guid, start, size in headers))


def serialize_certificate_table(table: CertificateTable) -> bytes:
    """The table with its entries packed in order behind the header; `parse_certificate_table` gives it back."""
    offset = (len(table.entries) + 1) * _ENTRY.size
    header = b""
    for guid, data in table.entries:
        header += _ENTRY.pack(guid.bytes, offset, len(data))
        offset += len(data)
    return header + bytes(_ENTRY.size) + b"".join(data for _, data in table.entries)
