"""Where a key stands in the state tree (ledger.tree): one place among 2^256. Pure."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

from moorline.digest import tagged, tagged_hash

SUBTREE_BITS: Final = 16
"""A tree that is stored is cut here: it has at most 65,536 subtrees."""
_KEY: Final = tagged("state-key")
_sha256: Final = hashlib.sha256  # it runs once a key


@lru_cache(maxsize=1024)  # bounded: some are read all the time, and what a block writes is looked for thrice
def key_digest(key: str) -> bytes:
    """The place of a key; 32 bytes."""
    data = key.encode()
    return _sha256(_KEY + len(data).to_bytes(8, "big") + data).digest()


def value_digest(value: bytes) -> bytes:
    """What a leaf says of its value; 32 bytes."""
    return tagged_hash("state-value", value)


def subtree_of(place: bytes) -> int:
    """Which stored subtree a place lies in: its first `SUBTREE_BITS` bits."""
    return place[0] << 8 | place[1]


def bit(digest: bytes, depth: int) -> int:
    """Which half of a tree, at this depth, a place lies in."""
    return digest[depth >> 3] >> (7 - (depth & 7)) & 1
