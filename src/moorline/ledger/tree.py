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

A proof for some keys is the tree itself with everything off their paths cut down to hashes (`prove`; ledger.tree_proof), and
whoever gets it reads it as a `PartialTree` (ledger.partial_tree).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moorline.ledger import packs
from moorline.ledger.places import key_digest, subtree_of
from moorline.ledger.subtrees import every_subtree, holding, joined, pack_of, released, stored_at, stored_form
from moorline.ledger.tree_nodes import AnyLeaf, Known, Leaf, Node, Packs, Source, Stored, Subtree, hash_of, place_of
from moorline.ledger.tree_paths import leaf_at, leaves_below, merged
from moorline.ledger.tree_proof import encoded


@dataclass(frozen=True, slots=True)
class Tree(Mapping[str, bytes]):
    """An immutable map from key to value with a root. `Tree()` is empty."""

    _root: Node = None

    @classmethod
    def stored(cls, subtrees: Sequence[Subtree], source: Source, packed: Packs | None = None) -> Tree:
        """The tree whose subtrees, in order of their prefixes, are read from `source` when they are needed."""
        return cls(joined([Stored(one, source, packed) for one in subtrees], 0, len(subtrees), 0))

    @property
    def root(self) -> bytes:
        """The 32 bytes that commit to every key and value."""
        return hash_of(self._root)

    def __getitem__(self, key: str) -> bytes:
        found = self.value(key)
        if found is None:
            raise KeyError(key)
        return found

    def value(self, key: str) -> bytes | None:
        """As `get`, which would raise and catch for each of the many keys that are not there."""
        leaf = leaf_at(self._root, key_digest(key))
        if type(leaf) is Known:
            leaf = leaf.opened()
        return leaf.record if type(leaf) is Leaf else None

    def __len__(self) -> int:
        return 0 if self._root is None else self._root.keys

    def __iter__(self) -> Iterator[str]:
        return (leaf.name for leaf in leaves_below(self._root))

    def updated(self, writes: Mapping[str, bytes]) -> Tree:
        """The tree after these keys got these values."""
        leaves: list[AnyLeaf] = sorted((Leaf(key, value) for key, value in writes.items()), key=place_of)
        return Tree(merged(self._root, leaves, 0, len(leaves), 0))

    def subtrees(self, keys: Iterable[str]) -> list[Subtree]:
        """The stored form of every subtree that one of `keys` lies in; all of them are in the tree."""
        places = {subtree_of(place): place for place in map(key_digest, keys)}
        return [stored_form(self._root, place, prefix) for prefix, place in sorted(places.items())]

    def packed(self, keys: Iterable[str]) -> dict[int, bytes]:
        """The pack of every subtree of `packs.LEAST` keys or more that one of `keys` lies in, by prefix."""
        places = {subtree_of(place): place for place in map(key_digest, keys)}
        nodes = {prefix: holding(self._root, place) for prefix, place in places.items()}
        return {prefix: pack_of(node) for prefix, node in nodes.items() if node is not None and node.keys >= packs.LEAST}

    def subtree(self, prefix: int) -> Subtree | None:
        """The stored form of one subtree, or None if it has no key."""
        return stored_at(self._root, prefix)

    def all_subtrees(self) -> list[Subtree]:
        """The stored form of every subtree, in order."""
        return list(every_subtree(self._root, 0, 0))

    def released(self, source: Source, packed: Packs | None = None) -> Tree:
        """The same tree with nothing of it in memory, to be read from `source` again as needed."""
        return Tree(released(self._root, 0, 0, (source, packed)))

    def prove(self, keys: Iterable[str]) -> bytes:
        """The proof that shows, for each of `keys`, the value's digest or its absence."""
        return encoded(self._root, keys)
