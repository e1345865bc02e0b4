"""The state tree: a compact sparse Merkle tree over H(key), and proofs that keys are present or absent.

Every key has one place among 2^256, found by the bits of H("moorline/state-key/v1" | key), most significant first.
A subtree with no key is 32 zero bytes; one with a single key is that key's leaf, wherever it hangs, so a path is as long
as two keys share bits and not 256; any other subtree hashes its two halves. The same keys and values therefore always give
the same root, whatever the order they came in. Nodes are immutable: an update copies the paths it touches, O(log n) each,
and every older root stays readable.

A tree need not be in memory as a whole. Cut at `SUBTREE_BITS` bits it has at most 65,536 subtrees; a tree that was made by
`Tree.stored` knows their hashes, and reads a subtree from its `Source` when somebody asks for it. What was read is believed
only if it leads to the hash that is known, so a changed or torn database is found by whoever reads there. A source holds one
state: only the tree of that state, and trees made from it, may be read, and not an older one once the source has moved on.
Where a source has `Packs` too, a subtree of many keys is read along one path, and only the records that are asked for.

A proof for some keys is the tree itself with everything off their paths cut down to hashes (`prove`), in prefix order:

    0x00                                   empty
    0x01 | key digest (32) | value digest (32)     leaf
    0x02 | left | right                    inner
    0x03 | hash (32)                       cut off

`PartialTree.parse` takes any bytes; what it returns is true only under a root that was verified (ledger.light_client).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol, final

from moorline.digest import tagged, tagged_hash
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.ledger import packs

EMPTY: Final = bytes(32)
_DEPTH: Final = 256
_LEAF: Final = tagged("state-leaf")
_INNER: Final = tagged("state-inner")
_KEY: Final = tagged("state-key")
_VALUE: Final = tagged("state-value")
_sha256: Final = hashlib.sha256  # what follows runs once a key and level
MAX_PROOF_BYTES: Final = 64 * 1024
SUBTREE_BITS: Final = 16


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


class _Leaf:
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
        return _sha256(_VALUE + len(self.record).to_bytes(8, "big") + self.record).digest()


@final
class _Inner:
    __slots__ = ("hash", "keys", "left", "right")

    hash: bytes
    keys: int

    def __init__(self, left: _Node, right: _Node) -> None:
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
class _Stored:
    """A subtree that is elsewhere, and here once it was read. With one key only it may hang higher than the others."""

    __slots__ = ("_node", "_packs", "_source", "hash", "keys", "prefix")

    def __init__(self, subtree: Subtree, source: Source, packed: Packs | None) -> None:
        self.prefix, self.hash, self.keys = subtree.prefix, subtree.hash, subtree.keys
        self._source, self._packs = source, packed
        self._node: _Leaf | _Inner | None = None

    def opened(self) -> _Leaf | _Inner:
        """The subtree. Raises NotAuthentic("ledger.state_damaged") if what is stored is not what was committed to."""
        if self._node is None and self._packs is not None and self.keys >= packs.LEAST:
            pack = self._packs.pack(self.prefix)
            self._node = None if pack is None else _unpacked(self, pack, self._packs)
        return self.whole() if self._node is None else self._node

    def whole(self) -> _Leaf | _Inner:
        """As `opened`, all records read in one go if nothing was read yet."""
        if self._node is None:
            leaves: list[_AnyLeaf] = [_Leaf(name, record) for name, record in self._source(self.prefix)]
            leaves.sort(key=_place)
            node = _built(leaves, 0, len(leaves), SUBTREE_BITS)
            if not isinstance(node, (_Leaf, _Inner)) or node.hash != self.hash:
                raise _damaged(self.prefix, self.hash, EMPTY if node is None else node.hash)
            self._node = node
        return self._node


def _damaged(prefix: int, expected: bytes, got: bytes) -> NotAuthentic:
    return NotAuthentic(
        "ledger.state_damaged",
        f"records below {prefix:04x} of the stored state are not those that were signed",
        expected=expected,
        got=got,
        remedy="repair the database from the other authorities: moor ledger repair",
    )


@final
class _Packed:
    """An inner node in a pack, not gone into yet: its own hash was compared, and its children's will be."""

    __slots__ = ("_node", "_packs", "_prefix", "found", "hash", "keys", "pack", "start")

    def __init__(self, prefix: int, pack: bytes, start: int, found: packs.PackedInner, packed: Packs) -> None:
        self.hash, self.keys = found.hash, found.keys
        self.pack, self.start, self.found = pack, start, found
        self._prefix, self._packs = prefix, packed
        self._node: _Inner | None = None

    def opened(self) -> _Inner:
        """The node with its children. Raises NotAuthentic("ledger.state_damaged")."""
        if self._node is None:
            found = self.found
            left, right = self._child(found.left, found.middle), self._child(found.middle, found.end)
            if left is None and right is None:
                raise _damaged(self._prefix, self.hash, EMPTY)
            node = _Inner(left, right)
            if node.hash != self.hash or node.keys != self.keys:
                raise _damaged(self._prefix, self.hash, node.hash)
            self._node = node
        return self._node

    def raw(self) -> bytes:
        """Its part of the pack."""
        return self.pack[self.start : self.found.end]

    def _child(self, at: int, end: int) -> _Packed | _Known | None:
        try:
            found = packs.parse(self.pack, at, end)
        except Malformed:
            raise _damaged(self._prefix, self.hash, EMPTY) from None
        if type(found) is packs.PackedInner:
            return _Packed(self._prefix, self.pack, at, found, self._packs)
        return _Known(self._prefix, found, self._packs) if type(found) is packs.PackedLeaf else None


@final
class _Known:
    """A leaf known by its digests; its record is read, and compared with them, when somebody asks for it."""

    __slots__ = ("_leaf", "_packs", "_prefix", "hash", "key", "value")
    keys = 1

    def __init__(self, prefix: int, found: packs.PackedLeaf, packed: Packs) -> None:
        self.key, self.value = found.key, found.value
        self.hash = _sha256(_LEAF + found.key + found.value).digest()
        self._prefix, self._packs = prefix, packed
        self._leaf: _Leaf | None = None

    def opened(self) -> _Leaf:
        """The leaf with its record. Raises NotAuthentic("ledger.state_damaged")."""
        if self._leaf is None:
            found = self._packs.record(self.key)
            leaf = None if found is None else _Leaf(*found)
            if leaf is None or leaf.hash != self.hash:
                raise _damaged(self._prefix, self.hash, EMPTY if leaf is None else leaf.hash)
            self._leaf = leaf
        return self._leaf


def _unpacked(stored: _Stored, pack: bytes, packed: Packs) -> _Inner:
    """The top of a packed subtree. Raises NotAuthentic("ledger.state_damaged")."""
    try:
        found = packs.parse(pack, 0, len(pack))
    except Malformed:
        found = None
    if not isinstance(found, packs.PackedInner) or (found.hash, found.keys) != (stored.hash, stored.keys):
        raise _damaged(stored.prefix, stored.hash, found.hash if isinstance(found, packs.PackedInner) else EMPTY)
    return _Packed(stored.prefix, pack, 0, found, packed).opened()


def verify_pack(subtree: Subtree, pack: bytes) -> None:
    """Raises NotAuthentic("ledger.state_damaged") unless the pack is that of this subtree, in all its parts."""
    left: list[_Node] = [_unpacked(_Stored(subtree, _nothing, None), pack, _Nowhere())]
    while left:
        node = left.pop()
        if isinstance(node, _Packed):
            node = node.opened()
        if isinstance(node, _Inner):
            left += (node.left, node.right)


def _nothing(_: int) -> Iterable[tuple[str, bytes]]:
    return ()


class _Nowhere:
    def pack(self, _: int) -> bytes | None:
        return None

    def record(self, _: bytes) -> tuple[str, bytes] | None:
        return None


class _Shown:
    """A leaf of a proof: digests only."""

    __slots__ = ("hash", "key", "value")
    keys = 1

    def __init__(self, key: bytes, value: bytes) -> None:
        self.key = key
        self.value = value
        self.hash = _sha256(_LEAF + key + value).digest()


class _Cut:
    __slots__ = ("hash",)
    keys = 0

    def __init__(self, digest: bytes) -> None:
        self.hash = digest


_AnyLeaf = _Leaf | _Known | _Shown
_Node = _AnyLeaf | _Inner | _Stored | _Packed | _Cut | None
_LEAVES: Final = (_Leaf, _Known, _Shown)


def _hash(node: _Node) -> bytes:
    return EMPTY if node is None else node.hash


def _place(leaf: _AnyLeaf) -> bytes:
    return leaf.key


def _bit(digest: bytes, depth: int) -> int:
    return digest[depth >> 3] >> (7 - (depth & 7)) & 1


@dataclass(frozen=True, slots=True)
class Tree(Mapping[str, bytes]):
    """An immutable map from key to value with a root. `Tree()` is empty."""

    _root: _Node = None

    @classmethod
    def stored(cls, subtrees: Sequence[Subtree], source: Source, packed: Packs | None = None) -> Tree:
        """The tree whose subtrees, in order of their prefixes, are read from `source` when they are needed."""
        return cls(_topped([_Stored(one, source, packed) for one in subtrees], 0, len(subtrees), 0))

    @property
    def root(self) -> bytes:
        """The 32 bytes that commit to every key and value."""
        return _hash(self._root)

    def __getitem__(self, key: str) -> bytes:
        found = self.value(key)
        if found is None:
            raise KeyError(key)
        return found

    def value(self, key: str) -> bytes | None:
        """As `get`, which would raise and catch for each of the many keys that are not there."""
        leaf = _found(self._root, key_digest(key))
        if type(leaf) is _Known:
            leaf = leaf.opened()
        return leaf.record if type(leaf) is _Leaf else None

    def __len__(self) -> int:
        return 0 if self._root is None else self._root.keys

    def __iter__(self) -> Iterator[str]:
        return (leaf.name for leaf in _leaves(self._root))

    def updated(self, writes: Mapping[str, bytes]) -> Tree:
        """The tree after these keys got these values."""
        leaves: list[_AnyLeaf] = sorted((_Leaf(key, value) for key, value in writes.items()), key=_place)
        return Tree(_merged(self._root, leaves, 0, len(leaves), 0))

    def subtrees(self, keys: Iterable[str]) -> list[Subtree]:
        """The stored form of every subtree that one of `keys` lies in; all of them are in the tree."""
        places = {subtree_of(place): place for place in map(key_digest, keys)}
        return [_subtree(self._root, place, prefix) for prefix, place in sorted(places.items())]

    def packed(self, keys: Iterable[str]) -> dict[int, bytes]:
        """The pack of every subtree of `packs.LEAST` keys or more that one of `keys` lies in, by prefix."""
        places = {subtree_of(place): place for place in map(key_digest, keys)}
        nodes = {prefix: _at_subtree(self._root, place) for prefix, place in places.items()}
        return {prefix: _pack(node) for prefix, node in nodes.items() if node is not None and node.keys >= packs.LEAST}

    def subtree(self, prefix: int) -> Subtree | None:
        """The stored form of one subtree, or None if it has no key."""
        place = prefix.to_bytes(2, "big")
        node = self._root
        for depth in range(SUBTREE_BITS):
            if not isinstance(node, _Inner):
                break
            node = node.right if _bit(place, depth) else node.left
        if node is None or (isinstance(node, _Leaf) and subtree_of(node.key) != prefix):
            return None
        if isinstance(node, _Stored) and node.prefix != prefix:
            return None
        return Subtree(prefix=prefix, hash=node.hash, keys=node.keys)

    def all_subtrees(self) -> list[Subtree]:
        """The stored form of every subtree, in order."""
        return list(_all_subtrees(self._root, 0, 0))

    def released(self, source: Source, packed: Packs | None = None) -> Tree:
        """The same tree with nothing of it in memory, to be read from `source` again as needed."""
        return Tree(_released(self._root, 0, 0, (source, packed)))

    def prove(self, keys: Iterable[str]) -> bytes:
        """The proof that shows, for each of `keys`, the value's digest or its absence."""
        return b"".join(_serialised(self._root, sorted({key_digest(key) for key in keys}), 0))


class PartialTree:
    """A proof, parsed: the same tree with some parts cut off. Nothing in it is true before its root is."""

    __slots__ = ("_data", "_root")

    def __init__(self, root: _Node, data: bytes) -> None:
        self._root = root
        self._data = data

    @classmethod
    def parse(cls, data: bytes, *, max_bytes: int = MAX_PROOF_BYTES) -> PartialTree:
        """Raises only Malformed("ledger.proof_malformed")."""
        if len(data) > max_bytes:
            raise _malformed("it is too large")
        node, end = _parsed(data, 0, 0)
        if end != len(data):
            raise _malformed("bytes follow it")
        return cls(node, data)

    @property
    def root(self) -> bytes:
        """The root this proof leads to."""
        return _hash(self._root)

    def lookup(self, key: str) -> bytes | None:
        """The value digest under `key`, or None if it is shown absent. Raises Refused("ledger.not_proven") if neither."""
        node = _found(self._root, key_digest(key))
        if isinstance(node, _Cut):
            raise Refused("ledger.not_proven", "the proof says nothing about this key", got=key)
        return None if node is None else node.value

    def filled(self, records: Mapping[str, bytes]) -> Tree:
        """The tree with these records in the place of their digests: one to read and to write, where it was not cut off.

        They are those of the proof if the root is the same. What is cut off looks absent and cannot be written to
        (TypeError), so a caller has to keep to keys that the proof shows.
        """
        return Tree(self._root).updated(records)

    def exactly_for(self, keys: Iterable[str]) -> None:
        """Raises Malformed("ledger.proof_malformed") unless this is the one encoding of the proof for `keys`."""
        if b"".join(_serialised(self._root, sorted({key_digest(key) for key in keys}), 0)) != self._data:
            raise _malformed("it shows more or less than its keys need")


# Reading ---------------------------------------------------------------------------------------------------------------


def _found(node: _Node, place: bytes) -> _Leaf | _Known | _Shown | _Cut | None:
    """The leaf at a place, nothing, or the cut that hides what is there."""
    depth = 0
    while True:
        kind = type(node)
        if kind is _Inner:  # first what it mostly is
            node = node.right if place[depth >> 3] >> (7 - (depth & 7)) & 1 else node.left  # type: ignore[union-attr]
            depth += 1
        elif kind is _Stored or kind is _Packed:
            node = node.opened()  # type: ignore[union-attr]
        else:
            break
    if node is None or kind is _Cut:
        return node  # type: ignore[return-value]
    return node if node.key == place else None  # type: ignore[return-value,union-attr]


def _leaves(node: _Node) -> Iterator[_Leaf]:
    if isinstance(node, _Stored):
        node = node.whole()
    elif isinstance(node, (_Packed, _Known)):
        node = node.opened()
    if isinstance(node, _Leaf):
        yield node
    elif isinstance(node, _Inner):
        yield from _leaves(node.left)
        yield from _leaves(node.right)


def _subtree(node: _Node, place: bytes, prefix: int) -> Subtree:
    found = _at_subtree(node, place)
    assert found is not None, "the key is in the tree"
    return Subtree(prefix=prefix, hash=found.hash, keys=found.keys)


def _at_subtree(node: _Node, place: bytes) -> _Node:
    """The subtree a place lies in, or what hangs higher and has it alone."""
    for depth in range(SUBTREE_BITS):
        if type(node) is not _Inner:
            break
        node = node.right if place[depth >> 3] >> (7 - (depth & 7)) & 1 else node.left
    return node


def _pack(node: _Node) -> bytes:
    if type(node) is _Inner:
        return packs.inner(node.hash, node.keys, _pack(node.left), _pack(node.right))
    if type(node) is _Packed:
        return node.raw()
    if type(node) is _Stored:
        return _pack(node.opened())
    if node is None:
        return packs.EMPTY
    assert isinstance(node, _LEAVES), "a proof is not a tree to store"
    return packs.leaf(node.key, node.value)


def _all_subtrees(node: _Node, depth: int, prefix: int) -> Iterator[Subtree]:
    if isinstance(node, _Stored):
        yield Subtree(prefix=node.prefix, hash=node.hash, keys=node.keys)
    elif isinstance(node, _Leaf):
        yield Subtree(prefix=subtree_of(node.key), hash=node.hash, keys=1)
    elif isinstance(node, _Inner):
        if depth == SUBTREE_BITS:
            yield Subtree(prefix=prefix, hash=node.hash, keys=node.keys)
        else:
            yield from _all_subtrees(node.left, depth + 1, prefix << 1)
            yield from _all_subtrees(node.right, depth + 1, prefix << 1 | 1)


# Building --------------------------------------------------------------------------------------------------------------


def _split(leaves: Sequence[_AnyLeaf], low: int, high: int, depth: int) -> int:
    """Where, between `low` and `high` of leaves in order, the bit at `depth` turns to one."""
    byte, shift = depth >> 3, 7 - (depth & 7)
    while low < high:
        middle = (low + high) >> 1
        if leaves[middle].key[byte] >> shift & 1:
            high = middle
        else:
            low = middle + 1
    return low


def _built(leaves: Sequence[_AnyLeaf], low: int, high: int, depth: int) -> _AnyLeaf | _Inner | None:
    """The subtree of leaves `low` to `high`, which are in order, distinct and agree in their first `depth` bits."""
    if high - low <= 1:
        return leaves[low] if low < high else None
    middle = _split(leaves, low, high, depth)
    return _Inner(_built(leaves, low, middle, depth + 1), _built(leaves, middle, high, depth + 1))


def _merged(node: _Node, leaves: list[_AnyLeaf], low: int, high: int, depth: int) -> _Node:
    """`node` with leaves `low` to `high` put in or over what is there."""
    if low == high:
        return node
    if high - low == 1:
        return _with(node, leaves[low], depth)
    if type(node) is _Stored or type(node) is _Packed:
        node = node.opened()
    if node is None:
        return _built(leaves, low, high, depth)
    if type(node) is not _Inner:
        return _merged_leaf(node, leaves[low:high], depth)
    middle = _split(leaves, low, high, depth)
    return _Inner(_merged(node.left, leaves, low, middle, depth + 1), _merged(node.right, leaves, middle, high, depth + 1))


def _with(node: _Node, leaf: _AnyLeaf, depth: int) -> _Node:
    """As `_merged`, for a leaf that is alone on its path from here on: most of a path is such."""
    key, path = leaf.key, []
    while True:
        if type(node) is _Inner:
            right = key[depth >> 3] >> (7 - (depth & 7)) & 1
            path.append((node, right))
            node = node.right if right else node.left
            depth += 1
        elif type(node) is _Stored or type(node) is _Packed:
            node = node.opened()
        else:
            break
    below: _Node = leaf if node is None else _merged_leaf(node, [leaf], depth)
    for inner, right in reversed(path):
        below = _Inner(inner.left, below) if right else _Inner(below, inner.right)
    return below


def _merged_leaf(node: _Node, written: Sequence[_AnyLeaf], depth: int) -> _Node:
    """These leaves, and what was there alone if it is none of them."""
    if not isinstance(node, _LEAVES):
        message = "a proof is not a tree to write to"
        raise TypeError(message)
    chosen: list[_AnyLeaf] = [*written]
    if all(leaf.key != node.key for leaf in chosen):
        chosen = sorted((*chosen, node), key=_place)
    elif type(node) is _Known:
        node.opened()  # the tree before keeps it, and the source will have another
    return _built(chosen, 0, len(chosen), depth)


def _topped(subtrees: list[_Stored], low: int, high: int, depth: int) -> _Node:
    """The tree above stored subtrees: one that has a single key hangs as high as nobody else is beside it."""
    if low == high:
        return None
    if high - low == 1 and (depth == SUBTREE_BITS or subtrees[low].keys == 1):
        return subtrees[low]
    shift = SUBTREE_BITS - 1 - depth
    middle = bisect_left(subtrees, 1, low, high, key=lambda one: one.prefix >> shift & 1)
    return _Inner(_topped(subtrees, low, middle, depth + 1), _topped(subtrees, middle, high, depth + 1))


def _released(node: _Node, depth: int, prefix: int, source: tuple[Source, Packs | None]) -> _Node:
    """The node with its subtrees stored; what stands above them keeps its hashes."""
    if type(node) is _Inner:
        if depth == SUBTREE_BITS:
            return _Stored(Subtree(prefix=prefix, hash=node.hash, keys=node.keys), *source)
        above = _Inner.__new__(_Inner)
        above.hash, above.keys = node.hash, node.keys
        above.left = _released(node.left, depth + 1, prefix << 1, source)
        above.right = _released(node.right, depth + 1, prefix << 1 | 1, source)
        return above
    if isinstance(node, _Leaf):
        return _Stored(Subtree(prefix=subtree_of(node.key), hash=node.hash, keys=1), *source)
    if isinstance(node, _Stored):
        return _Stored(Subtree(prefix=node.prefix, hash=node.hash, keys=node.keys), *source)
    assert node is None, "a proof is not a tree to store"
    return None


# Proofs ----------------------------------------------------------------------------------------------------------------


def _serialised(node: _Node, wanted: list[bytes], depth: int) -> Iterator[bytes]:
    if node is None:
        yield b"\x00"
        return
    if not wanted or isinstance(node, _Cut):
        yield b"\x03" + node.hash
        return
    if isinstance(node, (_Stored, _Packed)):
        node = node.opened()
    if isinstance(node, _Inner):
        yield b"\x02"
        yield from _serialised(node.left, [digest for digest in wanted if not _bit(digest, depth)], depth + 1)
        yield from _serialised(node.right, [digest for digest in wanted if _bit(digest, depth)], depth + 1)
    else:
        yield b"\x01" + node.key + node.value


def _parsed(data: bytes, at: int, depth: int) -> tuple[_Node, int]:
    if depth > _DEPTH or at >= len(data):
        raise _malformed("it is cut short or too deep")
    kind, body = data[at], at + 1
    if kind == 0:
        return None, body
    if kind == 1 and len(data) >= body + 64:
        return _Shown(data[body : body + 32], data[body + 32 : body + 64]), body + 64
    if kind == 3 and len(data) >= body + 32:
        return _Cut(data[body : body + 32]), body + 32
    if kind != 2:
        raise _malformed("it holds an unknown node or is cut short")
    left, middle = _parsed(data, body, depth + 1)
    right, end = _parsed(data, middle, depth + 1)
    if (left is None and not isinstance(right, _Inner | _Cut)) or (right is None and not isinstance(left, _Inner | _Cut)):
        raise _malformed("a subtree with fewer than two keys is not an inner node")
    return _Inner(left, right), end


def _malformed(why: str) -> Malformed:
    return Malformed("ledger.proof_malformed", f"the state proof cannot be read: {why}")
