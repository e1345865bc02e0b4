"""What the state tree (ledger.tree) consists of: leaves and inner nodes, here, stored elsewhere, or of a proof. Pure.

Nodes never change but for what they remember of what they read. What is read is compared with the hash that is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, final

from moorline.digest import tagged
from moorline.errors import Malformed, NotAuthentic
from moorline.ledger import packs
from moorline.ledger.places import SUBTREE_BITS, key_digest

EMPTY: Final = bytes(32)
_LEAF: Final = tagged("state-leaf")
_INNER: Final = tagged("state-inner")
_VALUE: Final = tagged("state-value")
_sha256: Final = hashlib.sha256  # what follows runs once a key and level

Source = Callable[[int], Iterable[tuple[str, bytes]]]
"""Reads one subtree: every key in it with its value, in any order. What it gives is compared with the subtree's hash."""


class Packs(Protocol):
    """Reads what a subtree of many keys consists of (ledger.packs), and single records. All of it is compared."""

    def pack(self, prefix: int) -> bytes | None:
        """The pack of one subtree, None if there is none: then the source is asked for all of it."""
        ...

    def record(self, place: bytes) -> tuple[str, bytes] | None:
        """Key and value at a place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Subtree:
    """What is kept of a stored subtree: which one, its hash, how many keys it has."""

    prefix: int
    hash: bytes
    keys: int


class Leaf:
    """A key with its value. The value's digest is made anew when a proof needs it: memory is worth more."""

    __slots__ = ("hash", "key", "name", "record")
    keys = 1

    def __init__(self, name: str, record: bytes) -> None:
        self.name = name
        self.record = record
        self.key = key_digest(name)
        # Prefixes differ and both fields have 32 bytes, so leaf and inner inputs are unambiguous (digest.py).
        self.hash = _sha256(_LEAF + self.key + self.value).digest()

    @property
    def value(self) -> bytes:
        """The value's digest."""
        return _sha256(_VALUE + len(self.record).to_bytes(8, "big") + self.record).digest()


@final
class Inner:
    """Two halves and the hash of both; at least one is not empty."""

    __slots__ = ("hash", "keys", "left", "right")

    hash: bytes
    keys: int

    def __init__(self, left: Node, right: Node) -> None:
        self.left = left
        self.right = right
        if left is None:
            assert right is not None, "a subtree has a key"
            self.keys = right.keys
            self.hash = _sha256(_INNER + EMPTY + right.hash).digest()
        elif right is None:
            self.keys = left.keys
            self.hash = _sha256(_INNER + left.hash + EMPTY).digest()
        else:
            self.keys = left.keys + right.keys
            self.hash = _sha256(_INNER + left.hash + right.hash).digest()


@final
class Stored:
    """A subtree that is elsewhere, and here once it was read. With one key only it may hang higher than the others."""

    __slots__ = ("_node", "_packs", "_source", "hash", "keys", "prefix")

    def __init__(self, subtree: Subtree, source: Source, packed: Packs | None) -> None:
        self.prefix, self.hash, self.keys = subtree.prefix, subtree.hash, subtree.keys
        self._source, self._packs = source, packed
        self._node: Leaf | Inner | None = None

    def opened(self) -> Leaf | Inner:
        """The subtree. Raises NotAuthentic("ledger.state_damaged") if what is stored is not what was committed to."""
        if self._node is None and self._packs is not None and self.keys >= packs.LEAST:
            pack = self._packs.pack(self.prefix)
            self._node = None if pack is None else unpacked(self, pack, self._packs)
        return self.whole() if self._node is None else self._node

    def whole(self) -> Leaf | Inner:
        """As `opened`, all records read in one go if nothing was read yet."""
        if self._node is None:
            leaves: list[AnyLeaf] = [Leaf(name, record) for name, record in self._source(self.prefix)]
            leaves.sort(key=place_of)
            node = built(leaves, 0, len(leaves), SUBTREE_BITS)
            if not isinstance(node, (Leaf, Inner)) or node.hash != self.hash:
                raise _damaged(self.prefix, self.hash, EMPTY if node is None else node.hash)
            self._node = node
        return self._node


@final
class Packed:
    """An inner node in a pack, not gone into yet: its own hash was compared, and its children's will be."""

    __slots__ = ("_node", "_packs", "_prefix", "found", "hash", "keys", "pack", "start")

    def __init__(self, prefix: int, pack: bytes, start: int, found: packs.PackedInner, packed: Packs) -> None:
        self.hash, self.keys = found.hash, found.keys
        self.pack, self.start, self.found = pack, start, found
        self._prefix, self._packs = prefix, packed
        self._node: Inner | None = None

    def opened(self) -> Inner:
        """The node with its children. Raises NotAuthentic("ledger.state_damaged")."""
        if self._node is None:
            found = self.found
            left, right = self._child(found.left, found.middle), self._child(found.middle, found.end)
            if left is None and right is None:
                raise _damaged(self._prefix, self.hash, EMPTY)
            node = Inner(left, right)
            if node.hash != self.hash or node.keys != self.keys:
                raise _damaged(self._prefix, self.hash, node.hash)
            self._node = node
        return self._node

    def raw(self) -> bytes:
        """Its part of the pack."""
        return self.pack[self.start : self.found.end]

    def _child(self, at: int, end: int) -> Packed | Known | None:
        try:
            found = packs.parse(self.pack, at, end)
        except Malformed:
            raise _damaged(self._prefix, self.hash, EMPTY) from None
        if type(found) is packs.PackedInner:
            return Packed(self._prefix, self.pack, at, found, self._packs)
        return Known(self._prefix, found, self._packs) if type(found) is packs.PackedLeaf else None


@final
class Known:
    """A leaf known by its digests; its record is read, and compared with them, when somebody asks for it."""

    __slots__ = ("_leaf", "_packs", "_prefix", "hash", "key", "value")
    keys = 1

    def __init__(self, prefix: int, found: packs.PackedLeaf, packed: Packs) -> None:
        self.key, self.value = found.key, found.value
        self.hash = _sha256(_LEAF + found.key + found.value).digest()
        self._prefix, self._packs = prefix, packed
        self._leaf: Leaf | None = None

    def opened(self) -> Leaf:
        """The leaf with its record. Raises NotAuthentic("ledger.state_damaged")."""
        if self._leaf is None:
            found = self._packs.record(self.key)
            leaf = None if found is None else Leaf(*found)
            if leaf is None or leaf.hash != self.hash:
                raise _damaged(self._prefix, self.hash, EMPTY if leaf is None else leaf.hash)
            self._leaf = leaf
        return self._leaf


def unpacked(stored: Stored, pack: bytes, packed: Packs) -> Inner:
    """The top of a packed subtree. Raises NotAuthentic("ledger.state_damaged")."""
    try:
        found = packs.parse(pack, 0, len(pack))
    except Malformed:
        found = None
    if not isinstance(found, packs.PackedInner) or (found.hash, found.keys) != (stored.hash, stored.keys):
        raise _damaged(stored.prefix, stored.hash, found.hash if isinstance(found, packs.PackedInner) else EMPTY)
    return Packed(stored.prefix, pack, 0, found, packed).opened()


def _damaged(prefix: int, expected: bytes, got: bytes) -> NotAuthentic:
    return NotAuthentic(
        "ledger.state_damaged",
        f"records below {prefix:04x} of the stored state are not those that were signed",
        expected=expected,
        got=got,
        remedy="repair the database from the other authorities: moor ledger repair",
    )


class Shown:
    """A leaf of a proof: digests only."""

    __slots__ = ("hash", "key", "value")
    keys = 1

    def __init__(self, key: bytes, value: bytes) -> None:
        self.key = key
        self.value = value
        self.hash = _sha256(_LEAF + key + value).digest()


class Cut:
    """What a proof leaves out: its hash only."""

    __slots__ = ("hash",)
    keys = 0

    def __init__(self, digest: bytes) -> None:
        self.hash = digest


AnyLeaf = Leaf | Known | Shown
Node = AnyLeaf | Inner | Stored | Packed | Cut | None
LEAVES: Final = (Leaf, Known, Shown)


def hash_of(node: Node) -> bytes:
    """The hash of a node or of nothing."""
    return EMPTY if node is None else node.hash


def place_of(leaf: AnyLeaf) -> bytes:
    """The place of a leaf, to order leaves by."""
    return leaf.key


def split(leaves: Sequence[AnyLeaf], low: int, high: int, depth: int) -> int:
    """Where, between `low` and `high` of leaves in order, the bit at `depth` turns to one."""
    byte, shift = depth >> 3, 7 - (depth & 7)
    while low < high:
        middle = (low + high) >> 1
        if leaves[middle].key[byte] >> shift & 1:
            high = middle
        else:
            low = middle + 1
    return low


def built(leaves: Sequence[AnyLeaf], low: int, high: int, depth: int) -> AnyLeaf | Inner | None:
    """The subtree of leaves `low` to `high`, which are in order, distinct and agree in their first `depth` bits."""
    if high - low <= 1:
        return leaves[low] if low < high else None
    middle = split(leaves, low, high, depth)
    return Inner(built(leaves, low, middle, depth + 1), built(leaves, middle, high, depth + 1))
