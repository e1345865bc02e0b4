"""DER elements, written: what CMP messages, CMS and leaf certificates are made of here. Pure; tags of one byte."""

from __future__ import annotations

from typing import Final

from cryptography import x509
from cryptography.hazmat import asn1

SEQUENCE: Final = 0x30
SET: Final = 0x31
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OID: Final = 0x06
UTF8: Final = 0x0C
TIME: Final = 0x18


def tlv(tag: int, content: bytes) -> bytes:
    """One DER element of a one-byte tag."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def tagged(number: int, content: bytes) -> bytes:
    """[number] EXPLICIT, or IMPLICIT of something constructed."""
    return tlv(0xA0 | number, content)


def integer(value: int) -> bytes:
    """INTEGER."""
    return tlv(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def sequence(*parts: bytes) -> bytes:
    """SEQUENCE of elements."""
    return tlv(SEQUENCE, b"".join(parts))


def set_of(*parts: bytes) -> bytes:
    """SET OF: DER puts the encodings in order (X.690 11.6)."""
    return tlv(SET, b"".join(sorted(parts)))


def octets(value: bytes) -> bytes:
    """OCTET STRING."""
    return tlv(OCTET_STRING, value)


def bits(value: bytes) -> bytes:
    """BIT STRING of whole bytes."""
    return tlv(BIT_STRING, b"\x00" + value)


def oid(dotted: str) -> bytes:
    """OBJECT IDENTIFIER."""
    return bytes(asn1.encode_der(x509.ObjectIdentifier(dotted)))
