"""The state tree: a compact sparse Merkle tree over H(key), and proofs that keys are present or absent.

Every key has one place among 2^256, found by the bits of H("moorline/state-key/v1" | key), most significant first.
A subtree with no key is 32 zero bytes; one with a single key is that key's leaf, wherever it hangs, so a path is as long
as two keys share bits and not 256; any other subtree hashes its two halves. The same keys and values therefore always give
the same root, whatever the order they came in. Nodes are immutable: an update copies one path, O(log n), and every older
root stays readable.

A proof for some keys is the tree itself with everything off their paths cut down to hashes (`prove`), in prefix order:

    0x00                                   empty
    0x01 | key digest (32) | value digest (32)     leaf
    0x02 | left | right                    inner
    0x03 | hash (32)                       cut off

`PartialTree.parse` takes any bytes; what it returns is true only under a root that was verified (ledger.light_client).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from moorline.digest import tagged, tagged_hash
from moorline.errors import Malformed, Refused

EMPTY: Final = bytes(32)
_DEPTH: Final = 256
_LEAF: Final = tagged("state-leaf")
_INNER: Final = tagged("state-inner")
MAX_PROOF_BYTES: Final = 64 * 1024


def key_digest(key: str) -> bytes:
    """The place of a key; 32 bytes."""
    return tagged_hash("state-key", key.encode())


def value_digest(value: bytes) -> bytes:
    """What a leaf says of its value; 32 bytes."""
    return tagged_hash("state-value", value)


class _Leaf:
    __slots__ = ("hash", "key", "value")

    def __init__(self, key: bytes, value: bytes) -> None:
        self.key = key
        self.value = value
        # Prefixes differ and both fields have 32 bytes, so leaf and inner inputs are unambiguous (digest.py).
        self.hash = hashlib.sha256(_LEAF + key + value).digest()


class _Inner:
    __slots__ = ("hash", "left", "right")

    def __init__(self, left: _Node, right: _Node) -> None:
        self.left = left
        self.right = right
        self.hash = hashlib.sha256(_INNER + _hash(left) + _hash(right)).digest()


class _Cut:
    __slots__ = ("hash",)

    def __init__(self, digest: bytes) -> None:
        self.hash = digest


_Node = _Leaf | _Inner | _Cut | None


def _hash(node: _Node) -> bytes:
    return EMPTY if node is None else node.hash


def _bit(digest: bytes, depth: int) -> int:
    return digest[depth >> 3] >> (7 - (depth & 7)) & 1


@dataclass(frozen=True, slots=True)
class Tree:
    """An immutable map from key digest to value digest with a root. `Tree()` is empty."""

    _root: _Node = None

    @property
    def root(self) -> bytes:
        """The 32 bytes that commit to every key and value."""
        return _hash(self._root)

    def updated(self, writes: Mapping[str, bytes]) -> Tree:
        """The tree after these keys got these values."""
        node = self._root
        for key, value in writes.items():
            node = _put(node, key_digest(key), value_digest(value), 0)
        return Tree(node)

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
    def parse(cls, data: bytes) -> PartialTree:
        """Raises only Malformed("ledger.proof_malformed")."""
        if len(data) > MAX_PROOF_BYTES:
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
        node, digest, depth = self._root, key_digest(key), 0
        while isinstance(node, _Inner):
            node = node.right if _bit(digest, depth) else node.left
            depth += 1
        if isinstance(node, _Cut):
            raise Refused("ledger.not_proven", "the proof says nothing about this key", got=key)
        return node.value if node is not None and node.key == digest else None

    def exactly_for(self, keys: Iterable[str]) -> None:
        """Raises Malformed("ledger.proof_malformed") unless this is the one encoding of the proof for `keys`."""
        if b"".join(_serialised(self._root, sorted({key_digest(key) for key in keys}), 0)) != self._data:
            raise _malformed("it shows more or less than its keys need")


def _put(node: _Node, key: bytes, value: bytes, depth: int) -> _Node:
    if node is None:
        return _Leaf(key, value)
    if isinstance(node, _Leaf):
        if node.key == key:
            return _Leaf(key, value)
        return _forked(node, _Leaf(key, value), depth)
    if isinstance(node, _Cut):
        message = "a proof is not a tree to write to"
        raise TypeError(message)
    if _bit(key, depth):
        return _Inner(node.left, _put(node.right, key, value, depth + 1))
    return _Inner(_put(node.left, key, value, depth + 1), node.right)


def _forked(one: _Leaf, other: _Leaf, depth: int) -> _Inner:
    """Two leaves that share bits up to somewhere at or below `depth`."""
    fork = depth
    while _bit(one.key, fork) == _bit(other.key, fork):
        fork += 1
    node = _Inner(other, one) if _bit(one.key, fork) else _Inner(one, other)
    for level in range(fork - 1, depth - 1, -1):
        node = _Inner(None, node) if _bit(one.key, level) else _Inner(node, None)
    return node


def _serialised(node: _Node, wanted: list[bytes], depth: int) -> Iterator[bytes]:
    if node is None:
        yield b"\x00"
    elif not wanted or isinstance(node, _Cut):
        yield b"\x03" + node.hash
    elif isinstance(node, _Leaf):
        yield b"\x01" + node.key + node.value
    else:
        yield b"\x02"
        yield from _serialised(node.left, [digest for digest in wanted if not _bit(digest, depth)], depth + 1)
        yield from _serialised(node.right, [digest for digest in wanted if _bit(digest, depth)], depth + 1)


def _parsed(data: bytes, at: int, depth: int) -> tuple[_Node, int]:
    if depth > _DEPTH or at >= len(data):
        raise _malformed("it is cut short or too deep")
    kind, body = data[at], at + 1
    if kind == 0:
        return None, body
    if kind == 1 and len(data) >= body + 64:
        return _Leaf(data[body : body + 32], data[body + 32 : body + 64]), body + 64
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
