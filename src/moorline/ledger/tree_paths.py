"""Paths through the state tree (ledger.tree): a key is found at the end of one, and written by copying it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moorline.ledger.tree_nodes import (
    LEAVES,
    AnyLeaf,
    Cut,
    Inner,
    Known,
    Leaf,
    Node,
    Packed,
    Shown,
    Stored,
    built,
    place_of,
    split,
)


def leaf_at(node: Node, place: bytes) -> Leaf | Known | Shown | Cut | None:
    """The leaf at a place, nothing, or the cut that hides what is there."""
    depth = 0
    while True:
        kind = type(node)
        if kind is Inner:  # first what it mostly is
            node = node.right if place[depth >> 3] >> (7 - (depth & 7)) & 1 else node.left  # type: ignore[union-attr]
            depth += 1
        elif kind is Stored or kind is Packed:
            node = node.opened()  # type: ignore[union-attr]
        else:
            break
    if node is None or kind is Cut:
        return node  # type: ignore[return-value]
    return node if node.key == place else None  # type: ignore[return-value,union-attr]


def leaves_below(node: Node) -> Iterator[Leaf]:
    """Every leaf with its record, in order; what is stored elsewhere is read."""
    if isinstance(node, Stored):
        node = node.whole()
    elif isinstance(node, (Packed, Known)):
        node = node.opened()
    if isinstance(node, Leaf):
        yield node
    elif isinstance(node, Inner):
        yield from leaves_below(node.left)
        yield from leaves_below(node.right)


def merged(node: Node, leaves: list[AnyLeaf], low: int, high: int, depth: int) -> Node:
    """`node` with leaves `low` to `high` put in or over what is there."""
    if low == high:
        return node
    if high - low == 1:
        return _with(node, leaves[low], depth)
    if type(node) is Stored or type(node) is Packed:
        node = node.opened()
    if node is None:
        return built(leaves, low, high, depth)
    if type(node) is not Inner:
        return _merged_leaf(node, leaves[low:high], depth)
    middle = split(leaves, low, high, depth)
    return Inner(merged(node.left, leaves, low, middle, depth + 1), merged(node.right, leaves, middle, high, depth + 1))


def _with(node: Node, leaf: AnyLeaf, depth: int) -> Node:
    """As `merged`, for a leaf that is alone on its path from here on: most of a path is such."""
    key, path = leaf.key, []
    while True:
        if type(node) is Inner:
            right = key[depth >> 3] >> (7 - (depth & 7)) & 1
            path.append((node, right))
            node = node.right if right else node.left
            depth += 1
        elif type(node) is Stored or type(node) is Packed:
            node = node.opened()
        else:
            break
    below: Node = leaf if node is None else _merged_leaf(node, [leaf], depth)
    for inner, right in reversed(path):
        below = Inner(inner.left, below) if right else Inner(below, inner.right)
    return below


def _merged_leaf(node: Node, written: Sequence[AnyLeaf], depth: int) -> Node:
    """These leaves, and what was there alone if it is none of them."""
    if not isinstance(node, LEAVES):
        message = "a proof is not a tree to write to"
        raise TypeError(message)
    chosen: list[AnyLeaf] = [*written]
    if all(leaf.key != node.key for leaf in chosen):
        chosen = sorted((*chosen, node), key=place_of)
    elif type(node) is Known:
        node.opened()  # the tree before keeps it, and the source will have another
    return built(chosen, 0, len(chosen), depth)
