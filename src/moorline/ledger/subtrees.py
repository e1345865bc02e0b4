"""The subtrees a state tree (ledger.tree) is stored as: which they are, their packs, and the tree joined from them. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from moorline.ledger import packs
from moorline.ledger.places import SUBTREE_BITS, bit, subtree_of
from moorline.ledger.tree_nodes import LEAVES, Inner, Leaf, Node, Packed, Packs, Source, Stored, Subtree, unpacked


def stored_form(node: Node, place: bytes, prefix: int) -> Subtree:
    """The stored form of the subtree that the place of a key lies in; the key is in the tree."""
    found = holding(node, place)
    assert found is not None, "the key is in the tree"
    return Subtree(prefix=prefix, hash=found.hash, keys=found.keys)


def stored_at(root: Node, prefix: int) -> Subtree | None:
    """The stored form of one subtree, or None if it has no key."""
    place = prefix.to_bytes(2, "big")
    node = root
    for depth in range(SUBTREE_BITS):
        if not isinstance(node, Inner):
            break
        node = node.right if bit(place, depth) else node.left
    if node is None or (isinstance(node, Leaf) and subtree_of(node.key) != prefix):
        return None
    if isinstance(node, Stored) and node.prefix != prefix:
        return None
    return Subtree(prefix=prefix, hash=node.hash, keys=node.keys)


def holding(node: Node, place: bytes) -> Node:
    """The subtree a place lies in, or what hangs higher and has it alone."""
    for depth in range(SUBTREE_BITS):
        if type(node) is not Inner:
            break
        node = node.right if place[depth >> 3] >> (7 - (depth & 7)) & 1 else node.left
    return node


def every_subtree(node: Node, depth: int, prefix: int) -> Iterator[Subtree]:
    """The stored form of every subtree below a node, in order."""
    if isinstance(node, Stored):
        yield Subtree(prefix=node.prefix, hash=node.hash, keys=node.keys)
    elif isinstance(node, Leaf):
        yield Subtree(prefix=subtree_of(node.key), hash=node.hash, keys=1)
    elif isinstance(node, Inner):
        if depth == SUBTREE_BITS:
            yield Subtree(prefix=prefix, hash=node.hash, keys=node.keys)
        else:
            yield from every_subtree(node.left, depth + 1, prefix << 1)
            yield from every_subtree(node.right, depth + 1, prefix << 1 | 1)


def pack_of(node: Node) -> bytes:
    """The pack (ledger.packs) of a subtree; what was not gone into is taken over as it is."""
    if type(node) is Inner:
        return packs.inner(node.hash, node.keys, pack_of(node.left), pack_of(node.right))
    if type(node) is Packed:
        return node.raw()
    if type(node) is Stored:
        return pack_of(node.opened())
    if node is None:
        return packs.EMPTY
    assert isinstance(node, LEAVES), "a proof is not a tree to store"
    return packs.leaf(node.key, node.value)


def joined(subtrees: list[Stored], low: int, high: int, depth: int) -> Node:
    """The tree above stored subtrees: one that has a single key hangs as high as nobody else is beside it."""
    if low == high:
        return None
    if high - low == 1 and (depth == SUBTREE_BITS or subtrees[low].keys == 1):
        return subtrees[low]
    shift = SUBTREE_BITS - 1 - depth
    middle = bisect_left(subtrees, 1, low, high, key=lambda one: one.prefix >> shift & 1)
    return Inner(joined(subtrees, low, middle, depth + 1), joined(subtrees, middle, high, depth + 1))


def released(node: Node, depth: int, prefix: int, source: tuple[Source, Packs | None]) -> Node:
    """The node with its subtrees stored; what stands above them keeps its hashes."""
    if type(node) is Inner:
        if depth == SUBTREE_BITS:
            return Stored(Subtree(prefix=prefix, hash=node.hash, keys=node.keys), *source)
        above = Inner.__new__(Inner)
        above.hash, above.keys = node.hash, node.keys
        above.left = released(node.left, depth + 1, prefix << 1, source)
        above.right = released(node.right, depth + 1, prefix << 1 | 1, source)
        return above
    if isinstance(node, Leaf):
        return Stored(Subtree(prefix=subtree_of(node.key), hash=node.hash, keys=1), *source)
    if isinstance(node, Stored):
        return Stored(Subtree(prefix=node.prefix, hash=node.hash, keys=node.keys), *source)
    assert node is None, "a proof is not a tree to store"
    return None


def verify_pack(subtree: Subtree, pack: bytes) -> None:
    """Raises NotAuthentic("ledger.state_damaged") unless the pack is that of this subtree, in all its parts."""
    left: list[Node] = [unpacked(Stored(subtree, _nothing, None), pack, _Nowhere())]
    while left:
        node = left.pop()
        if isinstance(node, Packed):
            node = node.opened()
        if isinstance(node, Inner):
            left += (node.left, node.right)


def _nothing(_: int) -> Iterable[tuple[str, bytes]]:
    return ()


class _Nowhere:
    def pack(self, _: int) -> bytes | None:
        return None

    def record(self, _: bytes) -> tuple[str, bytes] | None:
        return None
