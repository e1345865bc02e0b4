"""The file `moor log export` writes: logs, their signed checkpoints and a ledger proof bundle. Format only.

An RFC 8742 sequence of CBOR byte strings, in this order: the header (deterministic CBOR); the bundle; for each log the
header names, its checkpoints by rising size, an empty string, its entries in order, an empty string; and last the SHA-256
of everything before. The digest finds damage and nothing else: who changes a file on purpose repairs it. What a file
establishes is decided by ledger.audit_export.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Final

from moorline.audit.log import MAX_ENTRY_BYTES
from moorline.errors import Malformed
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

FORMAT: Final = "moorline.audit-log"
VERSION: Final = 1
MAX_ITEM_BYTES: Final = 1 << 20
_BYTE_STRING: Final = 0x40
_MAJOR: Final = 0xE0
_LOW: Final = 0x1F
_ONE_BYTE: Final = 24
_WIDTHS: Final = {24: 1, 25: 2, 26: 4}
_DIGEST: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Whose logs these are, and which, the broker's first."""

    format: str
    version: int
    ledger_id: Bytes32
    provider: str
    hsm: str
    logs: Annotated[tuple[str, ...], Size(at_most=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedLog:
    """One log: signed checkpoints by rising size, and encoded entries. All of it untrusted."""

    log: str
    checkpoints: tuple[bytes, ...]
    entries: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A file's parts. `cut` is True if it ended before all were there; `damaged` if its digest is not that of the rest."""

    header: Header
    bundle: bytes
    logs: tuple[ExportedLog, ...]
    cut: bool
    damaged: bool


def write(*, ledger_id: bytes, provider: str, hsm: str, bundle: bytes, logs: Iterable[ExportedLog]) -> bytes:
    """The one encoding of these parts, with its digest."""
    kept = tuple(logs)
    header = Header(
        format=FORMAT,
        version=VERSION,
        ledger_id=ledger_id,
        provider=provider,
        hsm=hsm,
        logs=tuple(one.log for one in kept),
    )
    parts = [byte_string(schema.encode(header)), byte_string(bundle)]
    for one in kept:
        for items in (one.checkpoints, one.entries):
            parts.extend(byte_string(item) for item in items)
            parts.append(byte_string(b""))
    body = b"".join(parts)
    return body + byte_string(hashlib.sha256(body).digest())


def without(data: bytes, *, log: str, entry: int) -> bytes:
    """The file as somebody would make it who wants an entry gone and has no key: the entry left out, the digest repaired.

    For tests and drills: `verify` must refuse what comes out. Raises Malformed, and IndexError if there is no such entry.
    """
    found = parse(data)
    logs = []
    for one in found.logs:
        if one.log == log:
            one.entries[entry]
            logs.append(replace(one, entries=(*one.entries[:entry], *one.entries[entry + 1 :])))
        else:
            logs.append(one)
    header = found.header
    return write(ledger_id=header.ledger_id, provider=header.provider, hsm=header.hsm, bundle=found.bundle, logs=logs)


def byte_string(data: bytes) -> bytes:
    """One CBOR byte string, its length in the shortest form."""
    size = len(data)
    if size < _ONE_BYTE:
        return bytes([_BYTE_STRING | size]) + data
    low, width = next((low, width) for low, width in _WIDTHS.items() if size < 1 << 8 * width)
    return bytes([_BYTE_STRING | low]) + size.to_bytes(width, "big") + data


def split(data: bytes) -> tuple[list[bytes], bool]:
    """The byte strings of a sequence, and whether the last is cut off. Raises only Malformed("audit.file_malformed")."""
    items, _, cut = _split(data)
    return items, cut


def parse(data: bytes) -> Export:
    """The parts of a file; raises only Malformed (`audit.file_malformed`, `cbor.*`, `message.*`). Establishes nothing."""
    items, starts, cut = _split(data)
    if len(items) < 2:
        raise _malformed("the file has no header and bundle")
    header = schema.decode(Header, items[0])
    if (header.format, header.version) != (FORMAT, VERSION):
        raise _malformed("the file is of another format or version", got=f"{header.format[:40]} {header.version}")
    if not header.logs or len(set(header.logs)) != len(header.logs):
        raise _malformed("the header names no log, or one twice")
    rest = iter(items[2:])
    logs = []
    for name in header.logs:
        checkpoints, ended = _up_to_empty(rest)
        entries, ended_too = _up_to_empty(rest)
        cut = cut or not (ended and ended_too)
        logs.append(ExportedLog(log=name, checkpoints=checkpoints, entries=entries))
    digest = next(rest, None)
    if digest is not None and (len(digest) != _DIGEST or next(rest, None) is not None):
        raise _malformed("something stands where the digest should be, or after it")
    cut = cut or digest is None
    damaged = digest is not None and hashlib.sha256(memoryview(data)[: starts[-1]]).digest() != digest
    return Export(header=header, bundle=items[1], logs=tuple(logs), cut=cut, damaged=damaged)


def _up_to_empty(items: Iterator[bytes]) -> tuple[tuple[bytes, ...], bool]:
    found: list[bytes] = []
    for item in items:
        if not item:
            return tuple(found), True
        found.append(item)
    return tuple(found), False


def _split(data: bytes) -> tuple[list[bytes], list[int], bool]:
    items: list[bytes] = []
    starts: list[int] = []
    at, end = 0, len(data)
    while at < end:
        first = data[at]
        low = first & _LOW
        if first & _MAJOR != _BYTE_STRING or (low >= _ONE_BYTE and low not in _WIDTHS):
            raise _malformed("the file is not a sequence of byte strings", got=f"byte {first:#04x} at {at}")
        width = 0 if low < _ONE_BYTE else _WIDTHS[low]
        body = at + 1 + width
        size = low if width == 0 else int.from_bytes(data[at + 1 : body], "big")
        if body > end or body + size > end:
            return items, starts, True
        if size > MAX_ITEM_BYTES or (width and size < (_ONE_BYTE if width == 1 else 1 << 4 * width)):
            raise _malformed("a length is too large, or not in its shortest form", got=f"{size} at {at}")
        starts.append(at)
        items.append(data[body : body + size])
        at = body + size
    return items, starts, False


def _malformed(says: str, *, got: str | None = None) -> Malformed:
    return Malformed("audit.file_malformed", f"this is no exported log: {says}", got=got, remedy="export the log again")


assert MAX_ENTRY_BYTES <= MAX_ITEM_BYTES
