"""A subtree of the state tree in a row of bytes: its shape and digests, to be read along one path only. Pure.

Records are not in it. Where a subtree holds many keys, reading all of them to look at one would cost as many hashes as it
has keys; along a path it costs as many as the path is long. In prefix order:

    0x00                                                                             empty
    0x01 | key digest (32) | value digest (32)                                       leaf
    0x02 | hash (32) | number of keys (4) | length of the left half (4) | left | right    inner

A pack is never believed: each hash in it is compared with what is below it when somebody goes there (ledger.tree_nodes).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from moorline.errors import Malformed

LEAST: Final = 4
"""Subtrees with fewer keys are not packed: their records are read."""
_LEAF_BYTES: Final = 65
_HEAD: Final = struct.Struct(">B32sII")
_HEAD_BYTES: Final = _HEAD.size
_INNER: Final = b"\x02"
_LEAF: Final = b"\x01"
EMPTY: Final = b"\x00"


class PackedInner(NamedTuple):  # made ten times a transaction: a frozen dataclass takes four times as long
    """Two halves, each from where it begins to where it ends; `hash` and `keys` are claims."""

    hash: bytes
    keys: int
    left: int
    middle: int
    end: int


class PackedLeaf(NamedTuple):
    """Digests of key and value; a claim."""

    key: bytes
    value: bytes


def leaf(key: bytes, value: bytes) -> bytes:
    """The pack of one key."""
    return _LEAF + key + value


def inner(digest: bytes, keys: int, left: bytes, right: bytes) -> bytes:
    """The pack of two halves."""
    return _HEAD.pack(_INNER[0], digest, keys, len(left)) + left + right


def parse(pack: bytes, at: int, end: int) -> PackedInner | PackedLeaf | None:
    """What stands from `at` to `end`, None if that is empty. Raises only Malformed("ledger.pack_malformed")."""
    kind, begin = pack[at : at + 1], at + _HEAD_BYTES
    if kind == _INNER and begin <= end <= len(pack):
        _, digest, keys, length = _HEAD.unpack_from(pack, at)
        middle = begin + length
        if middle <= end:
            return PackedInner(digest, keys, begin, middle, end)
    if kind == _LEAF and end - at == _LEAF_BYTES and end <= len(pack):
        return PackedLeaf(pack[at + 1 : at + 33], pack[at + 33 : end])
    if kind == EMPTY and end - at == 1:
        return None
    raise Malformed("ledger.pack_malformed", "a packed subtree cannot be read", got=kind)
