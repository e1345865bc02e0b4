"""Deterministic CBOR (RFC 8949 4.2), both ways, with one meaning per byte string.

`decode` accepts exactly what `encode` produces: shortest integers, definite lengths, sorted unique keys, no trailing
bytes, no tags, no floating point, no `undefined`. Anything else is `Malformed`, on any input whatever.
"""

from __future__ import annotations

from typing import Final

import cbor2

from moorline.errors import Malformed

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 16
_INTEGER_LIMIT: Final = 1 << 64


def encode(item: object) -> bytes:
    """The one encoding of `item`, made of int, bytes, str, bool, None, list or tuple, and dict (str or int keys)."""
    # Sorting maps is most of the cost of encoding: messages of wire.schema come sorted already.
    return cbor2.dumps(item, canonical=not _plain_and_sorted(item, MAX_DEPTH))


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> object:
    """The item that `data` encodes. Input is untrusted; raises only Malformed, codes `cbor.*`."""
    if len(data) > max_bytes:
        raise Malformed("cbor.too_large", "the CBOR item is too large", expected=f"<= {max_bytes} bytes", got=len(data))
    try:
        item = cbor2.loads(data, max_depth=MAX_DEPTH, allow_indefinite=False, allow_duplicate_keys=False)
        # What is sorted and gives the same bytes when encoded as it stands is in its one encoding.
        canonical = _plain_and_sorted(item, MAX_DEPTH) and cbor2.dumps(item) == data
    except Malformed:
        raise
    except Exception as error:
        # cbor2 raises its own tree plus ValueError, TypeError, OverflowError and UnicodeDecodeError from semantic tags.
        raise Malformed("cbor.undecodable", "the bytes are not a CBOR item", got=type(error).__name__) from None
    if not canonical:
        raise Malformed(
            "cbor.not_canonical",
            "the CBOR item is not in deterministic encoding, or bytes follow it",
            expected="RFC 8949 4.2, no trailing bytes",
        )
    return item


def encode_ordered(item: object) -> bytes:
    """As `encode`, for who knows that `item` is plain and every map in it in the order of its encoded keys (wire.schema)."""
    return cbor2.dumps(item)


def decode_unordered(data: bytes, *, max_bytes: int = MAX_BYTES) -> object:
    """The item that gives `data` again when encoded as it stands, or None: then `decode` says what is wrong.

    Nobody has looked yet at the types in it, the order of its maps or how deep it is: whoever reads it has to (wire.schema).
    """
    if len(data) > max_bytes:
        return None
    try:
        item: object = cbor2.loads(data, max_depth=MAX_DEPTH, allow_indefinite=False, allow_duplicate_keys=False)
        return item if cbor2.dumps(item) == data else None
    except Exception:  # as in `decode`, which is asked next
        return None


def _plain_and_sorted(item: object, depth: int) -> bool:
    """Whether every map is in the order of its encoded keys; raises Malformed for what has no place in a message."""
    if depth == 0:
        raise Malformed("cbor.too_deep", "the CBOR item is nested too deeply", expected=f"<= {MAX_DEPTH} levels")
    kind = type(item)
    if kind is bytes or kind is str or kind is bool or item is None:
        return True
    if isinstance(item, dict):
        return _map(item, depth)
    if isinstance(item, int):
        if not -_INTEGER_LIMIT <= item < _INTEGER_LIMIT:
            raise Malformed("cbor.type_not_allowed", "an integer does not fit 64 bits", got=item.bit_length())
        return True
    if isinstance(item, list | tuple):
        ordered = True
        for element in item:
            ordered &= _plain_and_sorted(element, depth - 1)
        return ordered
    if isinstance(item, bytes | str):
        return True
    raise Malformed("cbor.type_not_allowed", "this type has no place in our messages", got=kind.__name__)


def _map(item: dict[object, object], depth: int) -> bool:
    """RFC 8949 4.2.1: by encoded key. The head of a text string says its length, so shorter keys come first."""
    ordered, size_before, before = True, 0, ""
    for key, value in item.items():
        if type(key) is not str or not key.isascii():
            return _odd_map(item, depth)
        size = len(key)
        if size < size_before or (size == size_before and key < before):
            ordered = False
        size_before, before = size, key
        kind = type(value)
        if depth == 1 or (kind is not bytes and kind is not str):
            ordered &= _plain_and_sorted(value, depth - 1)
    return ordered


def _odd_map(item: dict[object, object], depth: int) -> bool:
    """A map whose keys are not all plain text: all integers, all text, or refused."""
    kinds = {type(key) for key in item}
    if kinds not in ({int}, {str}):
        raise Malformed("cbor.type_not_allowed", "map keys are all text or all integers", got=sorted(map(str, kinds)))
    encoded = [cbor2.dumps(key) for key in item]
    ordered = encoded == sorted(encoded)
    for value in item.values():
        ordered &= _plain_and_sorted(value, depth - 1)
    return ordered
