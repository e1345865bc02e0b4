"""A strict reader of DER (ITU-T X.690, 10): enough for vendor extensions, no more. No trust, no crypto.

1. tags of one byte; 2. definite lengths in their shortest form, of what is there; 3. a container is read to its end: what
   is left
over is Malformed; 4. INTEGER, BOOLEAN, ENUMERATED and OBJECT IDENTIFIER in their only encoding.
"""

from __future__ import annotations

from typing import Final

from moorline.errors import Malformed

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OBJECT_IDENTIFIER: Final = 0x06
ENUMERATED: Final = 0x0A
SEQUENCE: Final = 0x30


class DerReader:
    """Elements of one container, in order. Every method raises only Malformed("der.malformed")."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def empty(self) -> bool:
        """Nothing is left."""
        return self._at == len(self._data)

    def finish(self) -> None:
        """Demands that nothing is left."""
        if not self.empty:
            raise Malformed("der.malformed", "bytes follow the last element", got=f"byte {self._at}")

    def peek(self) -> int:
        """The tag of the next element."""
        if self.empty:
            raise Malformed("der.malformed", "an element is missing")
        return self._data[self._at]

    def element(self) -> tuple[int, bytes, bytes]:
        """The next element: tag, contents, and the whole of it as encoded."""
        data, start = self._data, self._at
        if start + 2 > len(data):
            raise Malformed("der.malformed", "an element is missing or cut off", got=f"byte {start}")
        tag, size, at = data[start], data[start + 1], start + 2
        if tag & 0x1F == 0x1F:
            raise Malformed("der.malformed", "a tag of several bytes", got=f"byte {start}")
        if size & 0x80:
            count = size & 0x7F
            size = int.from_bytes(data[at : at + count], "big")
            at += count
            if not 1 <= count <= 4 or at > len(data) or size < 0x80 or size < 1 << 8 * (count - 1):
                raise Malformed("der.malformed", "a length that DER does not allow", got=f"byte {start}")
        if at + size > len(data):
            raise Malformed("der.malformed", "an element is cut off", got=f"byte {start}")
        self._at = at + size
        return tag, data[at : at + size], data[start : at + size]

    def contents(self, tag: int) -> bytes:
        """The contents of the next element, which must have `tag`."""
        found, contents, _ = self.element()
        if found != tag:
            raise Malformed("der.malformed", "an element of another type", expected=hex(tag), got=hex(found))
        return contents

    def sequence(self) -> DerReader:
        """A reader of the next element, a SEQUENCE."""
        return DerReader(self.contents(SEQUENCE))

    def integer(self, tag: int = INTEGER) -> int:
        """The next element, an INTEGER (or ENUMERATED) that is not negative."""
        contents = self.contents(tag)
        if not contents or contents[0] & 0x80 or (len(contents) > 1 and contents[0] == 0 and not contents[1] & 0x80):
            raise Malformed("der.malformed", "an integer that is negative or not in its shortest form", got=contents)
        return int.from_bytes(contents, "big")

    def boolean(self) -> bool:
        """The next element, a BOOLEAN: 0x00 or 0xff."""
        contents = self.contents(BOOLEAN)
        if contents not in (b"\x00", b"\xff"):
            raise Malformed("der.malformed", "a boolean that is neither 0x00 nor 0xff", got=contents)
        return contents == b"\xff"

    def octets(self, size: int) -> bytes:
        """The next element, an OCTET STRING of `size` bytes."""
        contents = self.contents(OCTET_STRING)
        if len(contents) != size:
            raise Malformed("der.malformed", "an octet string of the wrong length", expected=size, got=len(contents))
        return contents

    def oid(self) -> str:
        """The next element, an OBJECT IDENTIFIER, dotted."""
        contents = self.contents(OBJECT_IDENTIFIER)
        if not contents or contents[-1] & 0x80 or len(contents) > 32:
            raise Malformed("der.malformed", "not an object identifier", got=contents)
        arcs: list[int] = []
        value, fresh = 0, True
        for byte in contents:
            if fresh and byte == 0x80:
                raise Malformed("der.malformed", "an arc that is not in its shortest form", got=contents)
            value, fresh = value << 7 | byte & 0x7F, not byte & 0x80
            if fresh:
                arcs.append(value)
                value = 0
        first = min(arcs[0] // 40, 2)
        return ".".join(str(arc) for arc in (first, arcs[0] - 40 * first, *arcs[1:]))


def require_whole(data: bytes, signature: bytes) -> None:
    """Demands that a signed object (certificate, CRL) ends in a BIT STRING of whole bytes and nothing follows it.

    X.509 libraries ignore how many bits of it are said to be unused. Raises only Malformed("der.malformed").
    """
    outer = DerReader(data)
    parts = outer.sequence()
    outer.finish()
    parts.contents(SEQUENCE)
    parts.contents(SEQUENCE)
    if parts.contents(BIT_STRING) != b"\x00" + signature:
        raise Malformed("der.malformed", "a signature that is not whole bytes")
    parts.finish()
