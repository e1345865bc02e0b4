"""The ACPI table that says where a confidential guest's event log is (CCEL). No trust, no crypto.

ACPI 6.5, 5.2.34: 36 bytes of common header, then type and subtype of the TEE, two reserved bytes, length and address of the
log area. The log itself has the crypto-agile format of `eventlog`; for TDX, index 0 is MRTD and 1 to 4 are RTMR 0 to 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed

TDX: Final = 2
_TABLE: Final = struct.Struct("<4sIBB6s8sI4sIBBHQQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class CcelTable:
    """The table, untrusted: the host's firmware wrote it. `kind` 2 is TDX, 1 SEV."""

    revision: int
    kind: int
    subtype: int
    log_length: int
    log_address: int


def parse_ccel_table(data: bytes) -> CcelTable:
    """The table in exactly 56 bytes with its checksum. Raises Malformed("ccel.table")."""
    if len(data) != _TABLE.size or data[:4] != b"CCEL":
        raise Malformed("ccel.table", "not a CCEL table", expected=f"{_TABLE.size} bytes", got=len(data))
    fields = _TABLE.unpack(data)
    if fields[1] != len(data) or sum(data) % 256:
        raise Malformed("ccel.table", "length or checksum of the CCEL table is wrong", got=fields[1])
    if fields[11]:
        raise Malformed("ccel.table", "a reserved field of the CCEL table is not zero")
    return CcelTable(revision=fields[2], kind=fields[9], subtype=fields[10], log_length=fields[12], log_address=fields[13])
