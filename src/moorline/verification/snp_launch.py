"""The launch digest of a confidential virtual machine, worked out from what it is started with (56860 8.17.2; OVMF).

A reference value of an SNP guest is not measured on a golden machine but computed:
1. the firmware image is added page by page, ending at 4 GiB (or its digest, computed before, is the start);
2. the sections of its SEV metadata follow in their order: zeroed memory, secrets page, CPUID page, and the page with the
   hashes of kernel, initrd and command line, which exists only if the firmware reserves one: OVMF then measures what it
   loads against these hashes, so that they stand for the files;
3. the save area (VMSA) of each virtual CPU is last: its first instruction, its model, its SEV features.
Each page is one step of the chain PAGE_INFO (table 67), which `launch_digest` is the only home of.

Inputs are the owner's own files, not evidence; a firmware image that cannot be read is Malformed (`snp.firmware`) all the
same, and one that ignores the kernel it is given is Refused("snp.kernel_not_measured"): a digest without the kernel would
accept any kernel. The digest says nothing about who may start the guest or what the host adds later; it is compared with
the report's MEASUREMENT.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum
from typing import Final
from uuid import UUID

from moorline.errors import Malformed, Refused

PAGE: Final = 4096
MAX_VCPUS: Final = 4096
MAX_FIRMWARE: Final = 64 << 20
_FOUR_GIB: Final = 1 << 32
_PAGE_INFO: Final = struct.Struct("<48s48sHBBBBBBQ")
_VMSA_GPA: Final = 0xFFFF_FFFF_F000

_FOOTER: Final = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
_RESET_BLOCK: Final = UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
_HASH_TABLE: Final = UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
_METADATA: Final = UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
_FOOTER_END: Final = 32  # the table ends this far before the end of the image
_ENTRY: Final = struct.Struct("<H16s")
_METADATA_HEAD: Final = struct.Struct("<4sIII")
_SECTION: Final = struct.Struct("<III")
_MAX_SECTIONS: Final = 64
_MAX_SECTION: Final = 256 << 20

_TABLE: Final = UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
_KERNEL: Final = UUID("4de79437-abd2-427f-b835-d5b172d2045b")
_INITRD: Final = UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
_COMMAND_LINE: Final = UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")


class PageType(IntEnum):
    """PAGE_TYPE of SNP_LAUNCH_UPDATE (56860 table 65). Of all but the first two, contents are not measured."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


class Hypervisor(StrEnum):
    """Who prepares the first state of the virtual CPUs: the two differ in segment attributes, RDX and order."""

    QEMU = "QEMU"
    EC2 = "EC2"


class CpuModel(Enum):
    """CPU models as QEMU names them; the value is their CPUID 1 EAX, which stands in RDX at the start."""

    EPYC_V4 = 0x00800F12
    EPYC_ROME = 0x00830F10
    EPYC_MILAN = 0x00A00F11
    EPYC_GENOA = 0x00A10F10
    EPYC_TURIN = 0x00B00F00


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectBoot:
    """What the hypervisor hands over besides the firmware. An absent initrd is measured as empty."""

    kernel: bytes
    initrd: bytes
    command_line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the firmware's SEV metadata: guest-physical address, bytes, and what it is for."""

    gpa: int
    size: int
    kind: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Firmware:
    """What an OVMF image says about itself: where secondary CPUs start, where kernel hashes go, its sections."""

    image: bytes
    reset_eip: int
    hash_table_gpa: int | None
    sections: tuple[Section, ...]


_MEMORY, _SECRETS_PAGE, _CPUID_PAGE, _SVSM_CAA, _KERNEL_HASHES = 1, 2, 3, 4, 0x10


def launch_digest(pages: Iterable[bytes], *, first_gpa: int, initial: bytes = bytes(48)) -> bytes:
    """The launch digest after SNP_LAUNCH_UPDATE of `pages` as PAGE_TYPE_NORMAL, one after the other from `first_gpa`.

    Each step is SHA-384 over PAGE_INFO: the digest so far, SHA-384 of the page, the structure's length 0x70, type, IMI flag,
    the three VMPL permission masks, zero, and the page's address (56860 table 67). Pages are exactly 4096 bytes.
    """
    so_far = initial
    for index, page in enumerate(pages):
        so_far = _update(so_far, PageType.NORMAL, first_gpa + index * PAGE, page)
    return so_far


def in_pages(data: bytes) -> list[bytes]:
    """`data` in pages of 4096 bytes, the last one filled with zeros."""
    return [data[start : start + PAGE].ljust(PAGE, b"\0") for start in range(0, len(data), PAGE)]


def firmware_digest(firmware: Firmware) -> bytes:
    """The digest after step 1 alone, which can be kept and used instead of the whole image."""
    return launch_digest(in_pages(firmware.image), first_gpa=_FOUR_GIB - len(firmware.image))


def guest_digest(
    firmware: Firmware,
    direct: DirectBoot | None,
    *,
    vcpus: int,
    model: CpuModel,
    sev_features: int,
    hypervisor: Hypervisor,
    after_firmware: bytes | None = None,
) -> bytes:
    """The 48 bytes that MEASUREMENT of the guest's report must be; numbers are those of the module's docstring.

    `sev_features` is the guest's SEV_FEATURES (bit 0 is SNP itself). `after_firmware` is `firmware_digest` of the whole
    image, where `firmware` holds only its end. Raises Refused("snp.kernel_not_measured") and Malformed("snp.launch").
    """
    if not 0 < vcpus <= MAX_VCPUS or (after_firmware is not None and len(after_firmware) != 48):
        raise Malformed("snp.launch", "no such launch", expected=f"1 to {MAX_VCPUS} CPUs, a digest of 48 bytes", got=vcpus)
    hashed = any(section.kind == _KERNEL_HASHES for section in firmware.sections)
    if direct is not None and (not hashed or firmware.hash_table_gpa is None):
        raise Refused(
            "snp.kernel_not_measured",
            "this firmware does not measure the kernel it is given",
            expected="a section for kernel hashes in the firmware's SEV metadata",
            remedy="use a firmware built for measured direct boot (OvmfPkg/AmdSev), or boot from the measured disk",
        )
    so_far = firmware_digest(firmware) if after_firmware is None else after_firmware  # 1
    for section in firmware.sections:  # 2
        if not (hypervisor is Hypervisor.EC2 and section.kind == _CPUID_PAGE):
            so_far = _measured_section(so_far, section, firmware, direct)
    if hypervisor is Hypervisor.EC2:
        for section in firmware.sections:
            if section.kind == _CPUID_PAGE:
                so_far = _update(so_far, PageType.CPUID, section.gpa, None)
    for index in range(vcpus):  # 3
        eip = 0xFFFF_FFF0 if index == 0 else firmware.reset_eip
        so_far = _update(so_far, PageType.VMSA, _VMSA_GPA, _save_area(eip, model, sev_features, hypervisor))
    return so_far


def parse_firmware(image: bytes) -> Firmware:
    """What an OVMF image (or its end, at least the last page) says about itself. Raises Malformed("snp.firmware")."""
    if not image or len(image) % PAGE or len(image) > MAX_FIRMWARE:
        raise Malformed("snp.firmware", "a firmware image is whole pages", expected=f"<= {MAX_FIRMWARE}", got=len(image))
    table = dict(_guid_table(image))
    reset = table.get(_RESET_BLOCK, b"")
    if len(reset) != 4:
        raise Malformed("snp.firmware", "the firmware does not say where secondary CPUs start (SEV-ES reset block)")
    hashes = table.get(_HASH_TABLE)
    gpa = int.from_bytes(hashes[:4], "little") if hashes is not None and len(hashes) == 8 else 0
    return Firmware(
        image=image,
        reset_eip=int.from_bytes(reset, "little"),
        hash_table_gpa=gpa or None,
        sections=tuple(_sections(image, table.get(_METADATA, b""))),
    )


def _update(so_far: bytes, kind: PageType, gpa: int, page: bytes | None) -> bytes:
    if page is not None and len(page) != PAGE:
        message = f"a page has {PAGE} bytes, this one {len(page)}"
        raise ValueError(message)
    contents = bytes(48) if page is None else hashlib.sha384(page).digest()
    return hashlib.sha384(_PAGE_INFO.pack(so_far, contents, _PAGE_INFO.size, kind, 0, 0, 0, 0, 0, gpa)).digest()


def _measured_section(so_far: bytes, section: Section, firmware: Firmware, direct: DirectBoot | None) -> bytes:
    if section.kind == _SECRETS_PAGE:
        return _update(so_far, PageType.SECRETS, section.gpa, None)
    if section.kind == _CPUID_PAGE:
        return _update(so_far, PageType.CPUID, section.gpa, None)
    if section.kind == _KERNEL_HASHES and direct is not None:
        return _update(so_far, PageType.NORMAL, section.gpa, _hashes_page(firmware, section, direct))
    if section.kind not in (_MEMORY, _SVSM_CAA, _KERNEL_HASHES):
        raise Malformed("snp.firmware", "a section of the firmware's SEV metadata is of no known kind", got=section.kind)
    for gpa in range(section.gpa, section.gpa + section.size, PAGE):
        so_far = _update(so_far, PageType.ZERO, gpa, None)
    return so_far


def _hashes_page(firmware: Firmware, section: Section, direct: DirectBoot) -> bytes:
    """The page QEMU fills with the hashes of what it loads (SevHashTable), at the offset the firmware names."""
    offset = (firmware.hash_table_gpa or 0) % PAGE
    entries = (
        (_COMMAND_LINE, direct.command_line.encode() + b"\x00"),
        (_INITRD, direct.initrd),
        (_KERNEL, direct.kernel),
    )
    body = b"".join(kind.bytes_le + struct.pack("<H", 50) + hashlib.sha256(data).digest() for kind, data in entries)
    table = _TABLE.bytes_le + struct.pack("<H", 18 + len(body)) + body
    padded = table.ljust(-(-len(table) // 16) * 16, b"\x00")
    if section.size != PAGE or offset + len(padded) > PAGE:
        raise Malformed("snp.firmware", "the firmware has no room for kernel hashes", got=section.size)
    return (bytes(offset) + padded).ljust(PAGE, b"\x00")


def _guid_table(image: bytes) -> Iterator[tuple[UUID, bytes]]:
    """The table of GUIDs at the end of the image (OVMF ResetVector), read backwards from its footer."""
    end = len(image) - _FOOTER_END - _ENTRY.size
    total, guid = _ENTRY.unpack_from(image, end)
    start = end + _ENTRY.size - total
    if UUID(bytes_le=guid) != _FOOTER or total < _ENTRY.size or start < 0:
        raise Malformed("snp.firmware", "no table of GUIDs ends this firmware image")
    while end > start:
        at = end - _ENTRY.size
        if at < start:
            raise Malformed("snp.firmware", "the table of GUIDs ends inside an entry")
        size, guid = _ENTRY.unpack_from(image, at)
        if size < _ENTRY.size or end - size < start:
            raise Malformed("snp.firmware", "an entry of the table of GUIDs has an impossible size", got=size)
        yield UUID(bytes_le=guid), image[end - size : at]
        end -= size


def _sections(image: bytes, found: bytes) -> Iterator[Section]:
    if not found:
        return
    at = len(image) - int.from_bytes(found, "little")
    if len(found) != 4 or not 0 <= at <= len(image) - _METADATA_HEAD.size:
        raise Malformed("snp.firmware", "the SEV metadata lies outside of the image")
    signature, size, version, count = _METADATA_HEAD.unpack_from(image, at)
    whole = _METADATA_HEAD.size + count * _SECTION.size
    if signature != b"ASEV" or version != 1 or count > _MAX_SECTIONS or size < whole or at + whole > len(image):
        raise Malformed("snp.firmware", "not SEV metadata of version 1", got=(version, count))
    for index in range(count):
        gpa, length, kind = _SECTION.unpack_from(image, at + _METADATA_HEAD.size + index * _SECTION.size)
        if gpa % PAGE or length % PAGE or not 0 < length <= _MAX_SECTION:
            raise Malformed("snp.firmware", "a section of the SEV metadata is not whole pages", got=(gpa, length))
        yield Section(gpa=gpa, size=length, kind=kind)


def _save_area(eip: int, model: CpuModel, sev_features: int, hypervisor: Hypervisor) -> bytes:
    """The first state of a virtual CPU (AMD APM volume 2, table B-4), as KVM and its caller set it."""
    ec2 = hypervisor is Hypervisor.EC2
    page = bytearray(PAGE)
    code = 0x9A if ec2 and eip == 0xFFFF_FFF0 else 0x9B
    data = (0, 0x93, 0xFFFF, 0)
    segments = (
        data,  # ES
        (0xF000, code, 0xFFFF, eip & 0xFFFF_0000),  # CS
        (0, 0x92 if ec2 else 0x93, 0xFFFF, 0),  # SS
        *(data, data, data),  # DS, FS, GS
        (0, 0, 0xFFFF, 0),  # GDTR
        (0, 0x82, 0xFFFF, 0),  # LDTR
        (0, 0, 0xFFFF, 0),  # IDTR
        (0, 0x83 if ec2 else 0x8B, 0xFFFF, 0),  # TR
    )
    for index, segment in enumerate(segments):
        struct.pack_into("<HHIQ", page, index * 16, *segment)
    registers = {
        0x0D0: 0x1000,  # EFER: SVME
        0x148: 0x40,  # CR4: MCE
        0x158: 0x10,  # CR0
        0x160: 0x400,  # DR7
        0x168: 0xFFFF_0FF0,  # DR6
        0x170: 0x2,  # RFLAGS
        0x178: eip & 0xFFFF,  # RIP
        0x268: 0x0007_0406_0007_0406,  # G_PAT
        0x310: 0 if ec2 else model.value,  # RDX
        0x3B0: sev_features,
        0x3E8: 0x1,  # XCR0
    }
    for offset, value in registers.items():
        struct.pack_into("<Q", page, offset, value)
    if not ec2:
        struct.pack_into("<I", page, 0x408, 0x1F80)  # MXCSR
        struct.pack_into("<H", page, 0x410, 0x37F)  # x87 FCW
    return bytes(page)
