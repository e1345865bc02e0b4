"""CBOR and COSE as other people's tokens use them: Arm CCA, PSA (RFC 9783) and AWS Nitro. No trust, no crypto.

`wire.cbor` reads our own messages and knows one encoding per value. These tokens follow their own standards, so the reader
here takes what those standards allow and nothing else:

1. one item, nothing behind it (RFC 8949 5.3.1), at most `max_bytes` long, `max_depth` deep, and of 4,096 items;
2. integers of 64 bits, byte strings, text in valid UTF-8, arrays, maps, true, false, null, and tags; no floating point, no
   `undefined`, no other simple value, no interpretation of any tag;
3. map keys are integers or text, and none comes twice (RFC 8949 5.6: two readers could take different values);
4. `Encoding.PREFERRED` refuses indefinite lengths and integers or lengths that are not in shortest form (RFC 9783 5.2.1 and
   draft-ffm-rats-cca-token demand both of Attesters); `Encoding.ANY` accepts both, which AWS leaves open;
5. signed bytes are never encoded again: a signature is checked over the bytes that came.

Everything raised is Malformed, on any bytes whatever.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from moorline.errors import Malformed

MAX_DEPTH: Final = 8
MAX_ITEMS: Final = 4096
MAX_TOKEN: Final = 64 * 1024

TAG_MAC0: Final = 17
TAG_SIGN1: Final = 18

_HEADER_ALGORITHM: Final = 1
_HEADER_CRITICAL: Final = 2


@dataclass(frozen=True, slots=True)
class Tag:
    """A tagged item; what the tag means is for the caller to say."""

    number: int
    value: Item


Item: TypeAlias = int | bytes | str | bool | Tag | list["Item"] | dict["int | str", "Item"] | None


class Encoding(Enum):
    """How free the sender is (rule 4)."""

    PREFERRED = "preferred"
    ANY = "any"


def decode(data: bytes, *, encoding: Encoding, max_bytes: int = MAX_TOKEN, max_depth: int = MAX_DEPTH) -> Item:
    """The one item in `data`, by the rules of this module. Raises only Malformed (`eat.cbor_*`)."""
    if len(data) > max_bytes:
        raise Malformed("eat.cbor_too_large", "the token is too large", expected=f"<= {max_bytes} bytes", got=len(data))
    reader = _Reader(data, preferred=encoding is Encoding.PREFERRED)
    item = reader.item(max_depth)
    if reader.at != len(data):
        raise Malformed("eat.cbor_trailing", "bytes follow the token", expected=reader.at, got=len(data))
    return item


def map_with_bytes(data: bytes, *, encoding: Encoding, max_bytes: int = MAX_TOKEN) -> dict[int | str, tuple[Item, bytes]]:
    """The map in `data`, each value with the bytes it was read from, for formats that hash one member inside another.

    Raises only Malformed (`eat.*`); the map itself has a definite length.
    """
    whole = decode(data, encoding=encoding, max_bytes=max_bytes)
    if not isinstance(whole, dict) or data[0] == _INDEFINITE_MAP:
        raise Malformed("eat.claims", "not a map of definite length", got=type(whole).__name__)
    reader = _Reader(data, preferred=encoding is Encoding.PREFERRED)
    reader.head()
    parts: dict[int | str, tuple[Item, bytes]] = {}
    for key in whole:  # in the order of the bytes
        reader.item(MAX_DEPTH)
        start = reader.at
        parts[key] = (reader.item(MAX_DEPTH), data[start : reader.at])
    return parts


_INDEFINITE_MAP: Final = 0xBF
_BREAK: Final = 0xFF
_INDEFINITE: Final = 31
_SIMPLE: Final[dict[int, bool | None]] = {20: False, 21: True, 22: None}


class _Reader:
    """A cursor over one byte string. `at` is the offset of the next byte."""

    __slots__ = ("at", "data", "items", "preferred")

    def __init__(self, data: bytes, *, preferred: bool) -> None:
        self.data = data
        self.at = 0
        self.items = 0
        self.preferred = preferred

    def item(self, depth: int) -> Item:
        """The next item."""
        if depth == 0:
            raise Malformed("eat.cbor_depth", "the token is nested too deeply")
        self.items += 1
        if self.items > MAX_ITEMS:
            raise Malformed("eat.cbor_items", "the token has too many items", expected=f"<= {MAX_ITEMS}")
        major, argument = self.head()
        if major < 2:
            number = self._definite(argument)
            return number if major == 0 else -1 - number
        if major < 4:
            string = self._string(argument, major)
            return string if major == 2 else _text(string)
        return self._compound(major, argument, depth)

    def _compound(self, major: int, argument: int | None, depth: int) -> Item:
        if major == 4:
            return self._array(argument, depth)
        if major == 5:
            return self._map(argument, depth)
        if major == 6:
            return Tag(self._definite(argument), self.item(depth - 1))
        if argument not in _SIMPLE:
            raise Malformed("eat.cbor_type", "no such simple or floating-point value belongs into a token", got=argument)
        return _SIMPLE[argument]

    def head(self) -> tuple[int, int | None]:
        """Major type and argument; None for an indefinite length."""
        first = self._take(1)[0]
        major, info = first >> 5, first & 0x1F
        if info < 24 or major == 7:
            # Simple values above 23 and floats: `item` refuses every argument that is not false, true or null.
            return major, info
        if info == _INDEFINITE:
            if self.preferred:
                raise Malformed("eat.cbor_indefinite", "indefinite lengths are not allowed in this token (RFC 9783 5.2.1)")
            return major, None
        if info > 27:
            raise Malformed("eat.cbor_reserved", "a reserved kind of length", got=info)
        size = 1 << (info - 24)
        argument = int.from_bytes(self._take(size), "big")
        least = 24 if size == 1 else 1 << (4 * size)
        if self.preferred and argument < least:
            raise Malformed("eat.cbor_not_shortest", "a number is not in its shortest form (RFC 8949 4.1)", got=argument)
        return major, argument

    def _definite(self, argument: int | None) -> int:
        if argument is None:
            raise Malformed("eat.cbor_reserved", "an integer or tag has no indefinite form")
        return argument

    def _take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise Malformed("eat.cbor_truncated", "the token ends within an item", expected=end, got=len(self.data))
        part = self.data[self.at : end]
        self.at = end
        return part

    def _string(self, argument: int | None, major: int) -> bytes:
        if argument is not None:
            return self._take(argument)
        parts: list[bytes] = []
        while not self._broken():
            self.items += 1
            if self.items > MAX_ITEMS:
                raise Malformed("eat.cbor_items", "the token has too many items", expected=f"<= {MAX_ITEMS}")
            kind, size = self.head()
            if kind != major or size is None:
                raise Malformed("eat.cbor_chunk", "a chunk of a string is not a string of its kind (RFC 8949 3.2.3)")
            part = self._take(size)
            if major == 3:
                _text(part)
            parts.append(part)
        return b"".join(parts)

    def _array(self, argument: int | None, depth: int) -> list[Item]:
        if argument is None:
            items: list[Item] = []
            while not self._broken():
                items.append(self.item(depth - 1))
            return items
        self._plausible(argument)
        return [self.item(depth - 1) for _ in range(argument)]

    def _map(self, argument: int | None, depth: int) -> dict[int | str, Item]:
        entries: dict[int | str, Item] = {}
        if argument is None:
            while not self._broken():
                self._entry(entries, depth)
            return entries
        self._plausible(2 * argument)
        for _ in range(argument):
            self._entry(entries, depth)
        return entries

    def _entry(self, entries: dict[int | str, Item], depth: int) -> None:
        key = self.item(depth - 1)
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise Malformed("eat.cbor_key", "a map key is an integer or a text", got=type(key).__name__)
        if key in entries:
            raise Malformed("eat.cbor_duplicate", "a map has one key twice (RFC 8949 5.6)", got=key)
        entries[key] = self.item(depth - 1)

    def _broken(self) -> bool:
        if self.at < len(self.data) and self.data[self.at] == _BREAK:
            self.at += 1
            return True
        return False

    def _plausible(self, items: int) -> None:
        """Every item takes a byte: an array that claims more than is left never gets a list of that length."""
        if items > len(self.data) - self.at:
            raise Malformed("eat.cbor_truncated", "an array or map claims more items than bytes are left", got=items)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("eat.cbor_utf8", "a text is not valid UTF-8") from None


# ---------------------------------------------------------------- COSE_Sign1 and COSE_Mac0 (RFC 9052)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cose:
    """A COSE_Sign1 or COSE_Mac0, untrusted. `protected`, `payload` and `signature` are the bytes that came.

    `tag` is 17 or 18, None where the message was untagged. `signature` is the tag of a MAC as well.
    """

    tag: int | None
    algorithm: int
    protected: bytes
    unprotected: dict[int | str, Item]
    payload: bytes
    signature: bytes


def parse_cose(data: bytes, *, encoding: Encoding, tags: frozenset[int | None], max_bytes: int = MAX_TOKEN) -> Cose:
    """The COSE message in `data`. `tags` says which tags the token's standard has, None for untagged.

    The algorithm has to stand in the protected header: a token without one (an empty protected header is seen in the wild)
    leaves it to whoever carries the token, and is refused (RFC 9052 3.1, "MUST be authenticated"). An algorithm or a list of
    critical headers (nothing is understood beyond these tokens' standards) outside is refused too. Raises only Malformed.
    """
    return cose_of(decode(data, encoding=encoding, max_bytes=max_bytes), encoding=encoding, tags=tags)


def cose_of(item: Item, *, encoding: Encoding, tags: frozenset[int | None]) -> Cose:
    """As `parse_cose`, of an item that stands inside another."""
    tag = item.number if isinstance(item, Tag) else None
    parts = item.value if isinstance(item, Tag) else item
    if tag not in tags:
        raise Malformed("eat.cose_tag", "not the COSE message expected here", expected=sorted(map(str, tags)), got=tag)
    if not isinstance(parts, list) or len(parts) != 4:
        raise Malformed("eat.cose_shape", "a COSE message is an array of four (RFC 9052 4.2)")
    protected, unprotected, payload, signature = parts
    if not (isinstance(protected, bytes) and isinstance(payload, bytes) and isinstance(signature, bytes)):
        raise Malformed("eat.cose_shape", "protected header, payload and signature are byte strings")
    if not isinstance(unprotected, dict):
        raise Malformed("eat.cose_shape", "the unprotected header is a map")
    header = decode(protected, encoding=encoding) if protected else {}
    if not isinstance(header, dict):
        raise Malformed("eat.cose_shape", "the protected header is a map")
    if _HEADER_CRITICAL in header or _HEADER_CRITICAL in unprotected:
        raise Malformed("eat.cose_critical", "a header that must be understood is not (RFC 9052 3.1)")
    algorithm = header.get(_HEADER_ALGORITHM)
    if algorithm is None or _HEADER_ALGORITHM in unprotected:
        raise Malformed("eat.algorithm_missing", "the protected header does not name the algorithm (RFC 9052 3.1)")
    if isinstance(algorithm, bool) or not isinstance(algorithm, int):
        raise Malformed("eat.algorithm_missing", "the algorithm is not a registered number", got=type(algorithm).__name__)
    if set(header) & set(unprotected):
        raise Malformed("eat.cose_shape", "a header stands in both places (RFC 9052 3)")
    return Cose(
        tag=tag, algorithm=algorithm, protected=protected, unprotected=unprotected, payload=payload, signature=signature
    )


# ---------------------------------------------------------------- claims


class Claims:
    """A map of claims, read by name and type. `names` is for messages. Readers raise only Malformed (`eat.claim_*`)."""

    __slots__ = ("entries", "names")

    def __init__(self, item: Item, names: dict[int, str]) -> None:
        if not isinstance(item, dict):
            raise Malformed("eat.claims", "claims are a map", got=type(item).__name__)
        self.entries = item
        self.names = names

    def __contains__(self, key: int) -> bool:
        return key in self.entries

    def unknown(self) -> tuple[int | str, ...]:
        """The keys nobody has a name for, in their order: shown, never interpreted."""
        return tuple(key for key in self.entries if key not in self.names)

    def required(self, key: int) -> Item:
        """The claim, of any type."""
        if key not in self.entries:
            raise Malformed("eat.claim_missing", "a mandatory claim is missing", expected=f"{self._name(key)} ({key})")
        return self.entries[key]

    def octets(self, key: int, sizes: tuple[int, ...] = ()) -> bytes:
        """A byte string, of one of `sizes` if any are given."""
        value = self.required(key)
        if not isinstance(value, bytes):
            raise self._wrong(key, "a byte string", value)
        if sizes and len(value) not in sizes:
            raise Malformed(
                "eat.claim_length",
                f"{self._name(key)} has the wrong length",
                expected=" or ".join(map(str, sizes)),
                got=len(value),
            )
        return value

    def text(self, key: int) -> str:
        """A text, not empty."""
        value = self.required(key)
        if not isinstance(value, str) or not value:
            raise self._wrong(key, "a text, not empty", value)
        return value

    def number(self, key: int, *, low: int, high: int) -> int:
        """An integer between `low` and `high`, both included."""
        value = self.required(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, f"an integer from {low} to {high}", value)
        return value

    def array(self, key: int) -> list[Item]:
        """An array, not empty."""
        value = self.required(key)
        if not isinstance(value, list) or not value:
            raise self._wrong(key, "an array, not empty", value)
        return value

    def _name(self, key: int) -> str:
        return self.names.get(key, "claim")

    def _wrong(self, key: int, expected: str, value: Item) -> Malformed:
        shown = value if isinstance(value, int | str) else type(value).__name__
        return Malformed("eat.claim_type", f"{self._name(key)} has the wrong type or value", expected=expected, got=shown)
