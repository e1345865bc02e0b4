"""The DER elements of CMP messages. Pure.

`cryptography.hazmat.asn1` reads them: it takes definite lengths in their shortest form only.
Everything read is untrusted. Every reader raises Malformed("cmp.malformed") and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat import asn1

from moorline.errors import Malformed
from moorline.wire.der import BIT_STRING, INTEGER, OCTET_STRING, OID, SEQUENCE, tlv

_ITEMS: Final = 64


@asn1.sequence
class _Items:
    values: list[asn1.TLV]


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One DER element: its tag byte and content."""

    tag: int
    content: bytes

    @property
    def der(self) -> bytes:
        """The element as it was read: DER has one encoding."""
        return tlv(self.tag, self.content)

    @property
    def number(self) -> int | None:
        """N of a context tag [n] that is constructed; None for other tags."""
        return self.tag & 0x1F if self.tag & 0xE0 == 0xA0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """An AlgorithmIdentifier: OID (dotted) and the DER of its parameters, empty if there are none."""

    oid: str
    parameters: bytes


def children(content: bytes) -> list[Element]:
    """The elements one after the other in `content`, 64 at most."""
    try:
        found = asn1.decode_der(_Items, tlv(SEQUENCE, tlv(SEQUENCE, content))).values
        made = [Element(tag=_tag(one.tag_bytes), content=bytes(one.data)) for one in found]
    except Malformed:
        raise
    except Exception as error:  # the decoder raises ValueError and others on odd bytes
        raise malformed(type(error).__name__) from None
    if len(made) > _ITEMS:
        raise malformed(f"{len(made)} elements in one")
    return made


def _tag(tag: bytes) -> int:
    if len(tag) != 1:
        raise malformed("a tag above 30")
    return tag[0]


def single(data: bytes, tag: int) -> Element:
    """The one element that `data` is, of this tag."""
    found = children(data)
    if len(found) != 1 or found[0].tag != tag:
        raise malformed(f"not one element of tag {tag:#x}")
    return found[0]


def first(content: bytes) -> Element:
    """The first of one or more elements."""
    found = children(content)
    if not found:
        raise malformed("an empty sequence where something belongs")
    return found[0]


def only(outer: Element, tag: int | None = None) -> Element:
    """The one element within another, of this tag if one is named."""
    found = children(outer.content)
    if len(found) != 1 or (tag is not None and found[0].tag != tag):
        raise malformed(f"not one element within {outer.tag:#x}")
    return found[0]


def expected(element: Element, tag: int) -> bytes:
    """The content of an element of this tag."""
    if element.tag != tag:
        raise malformed(f"tag {element.tag:#x} where {tag:#x} belongs")
    return element.content


def by_number(parts: list[Element]) -> dict[int, Element]:
    """Optional fields [n] by their numbers, which rise."""
    named: dict[int, Element] = {}
    for part in parts:
        number = part.number
        if number is None or number in named or (named and number < max(named)):
            raise malformed("optional fields are out of order")
        named[number] = part
    return named


def octets_of(named: dict[int, Element], number: int) -> bytes | None:
    """The OCTET STRING in field [number]; None if it is left out."""
    return only(named[number], OCTET_STRING).content if number in named else None


def integer_of(element: Element) -> int:
    """An INTEGER of at most 20 bytes."""
    content = expected(element, INTEGER)
    if not 0 < len(content) <= 20:
        raise malformed("an integer of odd length")
    return int.from_bytes(content, "big", signed=True)


def bits_of(element: Element) -> bytes:
    """A BIT STRING of whole bytes."""
    content = expected(element, BIT_STRING)
    if not content or content[0] != 0:
        raise malformed("a bit string that is not whole bytes")
    return content[1:]


def oid_of(element: Element) -> str:
    """An OBJECT IDENTIFIER, dotted."""
    content = expected(element, OID)
    try:
        return str(asn1.decode_der(x509.ObjectIdentifier, tlv(OID, content)).dotted_string)
    except Exception as error:  # as in children
        raise malformed(type(error).__name__) from None


def algorithm_of(element: Element) -> Algorithm:
    """An AlgorithmIdentifier."""
    parts = children(expected(element, SEQUENCE))
    if not parts or len(parts) > 2:
        raise malformed("an algorithm identifier")
    return Algorithm(oid=oid_of(parts[0]), parameters=parts[1].der if len(parts) == 2 else b"")


def malformed(got: str) -> Malformed:
    """What every reader here raises."""
    return Malformed("cmp.malformed", "the bytes are not a CMP message of this profile", got=got)
