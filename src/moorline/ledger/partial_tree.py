"""A proof for some keys as a tree that has only them (ledger.tree). Pure.

`PartialTree.parse` takes any bytes; what it returns is true only under a root that was verified (ledger.light_client).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moorline.errors import Refused
from moorline.ledger.places import key_digest
from moorline.ledger.tree import Tree
from moorline.ledger.tree_nodes import Cut, Node, hash_of
from moorline.ledger.tree_paths import leaf_at
from moorline.ledger.tree_proof import MAX_PROOF_BYTES, decoded, encoded, malformed


class PartialTree:
    """A proof, parsed: the same tree with some parts cut off. Nothing in it is true before its root is."""

    __slots__ = ("_data", "_root")

    def __init__(self, root: Node, data: bytes) -> None:
        self._root = root
        self._data = data

    @classmethod
    def parse(cls, data: bytes, *, max_bytes: int = MAX_PROOF_BYTES) -> PartialTree:
        """Raises only Malformed("ledger.proof_malformed")."""
        if len(data) > max_bytes:
            raise malformed("it is too large")
        return cls(decoded(data), data)

    @property
    def root(self) -> bytes:
        """The root this proof leads to."""
        return hash_of(self._root)

    def lookup(self, key: str) -> bytes | None:
        """The value digest under `key`, or None if it is shown absent. Raises Refused("ledger.not_proven") if neither."""
        node = leaf_at(self._root, key_digest(key))
        if isinstance(node, Cut):
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
        if encoded(self._root, keys) != self._data:
            raise malformed("it shows more or less than its keys need")
