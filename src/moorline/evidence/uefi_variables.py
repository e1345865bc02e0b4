"""UEFI variables as firmware measures them (UEFI_VARIABLE_DATA, TCG PC Client PFP 10.2.6), and the keys inside them.

Secure Boot keeps its keys in lists (EFI_SIGNATURE_LIST, UEFI 32.4.1): certificates, and digests of images. Bytes come from a
boot log that anybody could write: what is read here is fact only where its digest is the event's (verification.eventlog).
Parsers need the whole structure and nothing after it, and raise only Malformed (`uefi.*`); what they read can be written
back to the same bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from uuid import UUID

from moorline.errors import Malformed

GLOBAL_VARIABLE: Final = UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
IMAGE_SECURITY_DATABASE: Final = UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
SHIM_LOCK: Final = UUID("605dab50-e046-4300-abb6-3dd810dd8b23")

CERT_X509: Final = UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
CERT_SHA256: Final = UUID("c1c41626-504c-4092-aca9-41f936934328")

MAX_SIGNATURES: Final = 4096
_MAX_NAME: Final = 256
_HEAD: Final = struct.Struct("<16sQQ")
_LIST: Final = struct.Struct("<16sIII")


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable: the GUID of who defines it, its name, its value."""

    vendor: UUID
    name: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Signature:
    """One entry of a key database: a DER certificate (`CERT_X509`), a SHA-256 of an image, or another `kind`, unread."""

    kind: UUID
    owner: UUID
    data: bytes


@dataclass(frozen=True, slots=True)
class SignatureList:
    """One EFI_SIGNATURE_LIST: entries of one kind and one size."""

    kind: UUID
    header: bytes
    size: int
    signatures: tuple[Signature, ...]


def parse_variable(data: bytes) -> Variable:
    """A measured variable from untrusted bytes. Raises Malformed("uefi.variable")."""
    if len(data) < _HEAD.size:
        raise Malformed("uefi.variable", "not a measured UEFI variable", expected=f">= {_HEAD.size} bytes", got=len(data))
    vendor, letters, size = _HEAD.unpack_from(data)
    at = _HEAD.size + 2 * letters
    if letters > _MAX_NAME or at + size != len(data):
        raise Malformed("uefi.variable", "a measured UEFI variable has the wrong length", expected=at + size, got=len(data))
    try:
        name = data[_HEAD.size : at].decode("utf-16-le")
    except UnicodeDecodeError:
        raise Malformed("uefi.variable", "the name of a UEFI variable is not UTF-16") from None
    return Variable(_uuid(vendor), name, data[at:])


def serialize_variable(variable: Variable) -> bytes:
    """The bytes that firmware measures: `serialize_variable(parse_variable(b)) == b`."""
    name = variable.name.encode("utf-16-le")
    return _HEAD.pack(variable.vendor.bytes_le, len(name) // 2, len(variable.value)) + name + variable.value


def parse_signature_lists(data: bytes) -> tuple[SignatureList, ...]:
    """The lists in the value of PK, KEK, db or dbx; none for an empty value. Raises Malformed("uefi.signature_list")."""
    lists: list[SignatureList] = []
    at = count = 0
    while at < len(data):
        if at + _LIST.size > len(data):
            raise Malformed("uefi.signature_list", "a key database ends inside a list", got=at)
        kind, total, header, size = _LIST.unpack_from(data, at)
        room = total - _LIST.size - header
        if not 16 <= size <= room or room % size or total > len(data) - at:
            raise Malformed("uefi.signature_list", "a list of keys has sizes that do not fit", got=(total, header, size))
        count += room // size
        if count > MAX_SIGNATURES:
            raise Malformed("uefi.signature_list", "too many keys", expected=f"<= {MAX_SIGNATURES}", got=count)
        body = at + _LIST.size
        lists.append(_list(_uuid(kind), data[body : body + header], size, data[body + header : at + total]))
        at += total
    return tuple(lists)


def serialize_signature_lists(lists: tuple[SignatureList, ...]) -> bytes:
    """The bytes of a key database: `serialize_signature_lists(parse_signature_lists(b)) == b`."""
    made: list[bytes] = []
    for one in lists:
        body = one.header + b"".join(entry.owner.bytes_le + entry.data for entry in one.signatures)
        made.append(_LIST.pack(one.kind.bytes_le, _LIST.size + len(body), len(one.header), one.size) + body)
    return b"".join(made)


def parse_signature(data: bytes, kind: UUID) -> Signature:
    """One EFI_SIGNATURE_DATA: owner and data. Raises Malformed("uefi.signature_list")."""
    if len(data) < 16:
        raise Malformed("uefi.signature_list", "too short for an owner and a key", got=len(data))
    return Signature(kind, _uuid(data[:16]), data[16:])


@lru_cache(maxsize=256)  # bounded: a dbx has hundreds of entries of one or two owners
def _uuid(data: bytes) -> UUID:
    return UUID(bytes_le=data)


def _list(kind: UUID, header: bytes, size: int, body: bytes) -> SignatureList:
    signatures = tuple(parse_signature(body[start : start + size], kind) for start in range(0, len(body), size))
    return SignatureList(kind, header, size, signatures)
