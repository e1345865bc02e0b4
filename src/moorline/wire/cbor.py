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
    _only_plain(item, MAX_DEPTH)
    return cbor2.dumps(item, canonical=True)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> object:
    """The item that `data` encodes. Input is untrusted; raises only Malformed, codes `cbor.*`."""
    if len(data) > max_bytes:
        raise Malformed("cbor.too_large", "the CBOR item is too large", expected=f"<= {max_bytes} bytes", got=len(data))
    try:
        item = cbor2.loads(data, max_depth=MAX_DEPTH, allow_indefinite=False, allow_duplicate_keys=False)
        _only_plain(item, MAX_DEPTH)
        canonical = cbor2.dumps(item, canonical=True)
    except Malformed:
        raise
    except Exception as error:
        # cbor2 raises its own tree plus ValueError, TypeError, OverflowError and UnicodeDecodeError from semantic tags.
        raise Malformed("cbor.undecodable", "the bytes are not a CBOR item", got=type(error).__name__) from None
    if canonical != data:
        raise Malformed(
            "cbor.not_canonical",
            "the CBOR item is not in deterministic encoding, or bytes follow it",
            expected="RFC 8949 4.2, no trailing bytes",
        )
    return item


def _only_plain(item: object, depth: int) -> None:
    if depth == 0:
        raise Malformed("cbor.too_deep", "the CBOR item is nested too deeply", expected=f"<= {MAX_DEPTH} levels")
    if item is None or isinstance(item, bool | bytes | str):
        return
    if isinstance(item, int):
        if not -_INTEGER_LIMIT <= item < _INTEGER_LIMIT:
            raise Malformed("cbor.type_not_allowed", "an integer does not fit 64 bits", got=item.bit_length())
    elif isinstance(item, list | tuple):
        for element in item:
            _only_plain(element, depth - 1)
    elif isinstance(item, dict):
        kinds = {type(key) for key in item}
        if not (kinds <= {str} or kinds <= {int}):
            raise Malformed("cbor.type_not_allowed", "map keys are all text or all integers", got=sorted(map(str, kinds)))
        for value in item.values():
            _only_plain(value, depth - 1)
    else:
        raise Malformed("cbor.type_not_allowed", "this type has no place in our messages", got=type(item).__name__)
