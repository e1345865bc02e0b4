"""A proof that keys are in a state tree (ledger.tree) or absent, as bytes: all off their paths is cut down to hashes. Pure.

In prefix order:

    0x00                                   empty
    0x01 | key digest (32) | value digest (32)     leaf
    0x02 | left | right                    inner
    0x03 | hash (32)                       cut off
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from moorline.errors import Malformed
from moorline.ledger.places import bit, key_digest
from moorline.ledger.tree_nodes import Cut, Inner, Node, Packed, Shown, Stored

MAX_PROOF_BYTES: Final = 64 * 1024
_DEPTH: Final = 256


def encoded(root: Node, keys: Iterable[str]) -> bytes:
    """The one encoding of what shows each of `keys`, or its absence."""
    return b"".join(_serialised(root, sorted({key_digest(key) for key in keys}), 0))


def _serialised(node: Node, wanted: list[bytes], depth: int) -> Iterator[bytes]:
    if node is None:
        yield b"\x00"
        return
    if not wanted or isinstance(node, Cut):
        yield b"\x03" + node.hash
        return
    if isinstance(node, (Stored, Packed)):
        node = node.opened()
    if isinstance(node, Inner):
        yield b"\x02"
        yield from _serialised(node.left, [digest for digest in wanted if not bit(digest, depth)], depth + 1)
        yield from _serialised(node.right, [digest for digest in wanted if bit(digest, depth)], depth + 1)
    else:
        yield b"\x01" + node.key + node.value


def decoded(data: bytes) -> Node:
    """The root of a proof; nothing in it is true. Raises only Malformed("ledger.proof_malformed")."""
    node, end = _parsed(data, 0, 0)
    if end != len(data):
        raise malformed("bytes follow it")
    return node


def _parsed(data: bytes, at: int, depth: int) -> tuple[Node, int]:
    if depth > _DEPTH or at >= len(data):
        raise malformed("it is cut short or too deep")
    kind, body = data[at], at + 1
    if kind == 0:
        return None, body
    if kind == 1 and len(data) >= body + 64:
        return Shown(data[body : body + 32], data[body + 32 : body + 64]), body + 64
    if kind == 3 and len(data) >= body + 32:
        return Cut(data[body : body + 32]), body + 32
    if kind != 2:
        raise malformed("it holds an unknown node or is cut short")
    left, middle = _parsed(data, body, depth + 1)
    right, end = _parsed(data, middle, depth + 1)
    if (left is None and not isinstance(right, Inner | Cut)) or (right is None and not isinstance(left, Inner | Cut)):
        raise malformed("a subtree with fewer than two keys is not an inner node")
    return Inner(left, right), end


def malformed(why: str) -> Malformed:
    """What to raise for a proof that is not one."""
    return Malformed("ledger.proof_malformed", f"the state proof cannot be read: {why}")
