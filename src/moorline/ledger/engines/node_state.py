"""The state an authority keeps in its database: opened in a moment whatever its size, read where it is needed, and verified.

The database holds each record and, for each of up to 65,536 subtrees of the state tree, its hash. At start these hashes
have to lead to the state root that a quorum signed. A record is read with the whole subtree it is in, which has to lead to
the subtree's hash: so no record is believed that is not under the signed root, and memory holds only what was touched. A
state of up to `AT_ONCE` keys is verified as a whole at start; `StoredState.scrub` is for going through a larger one later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from moorline.audit import merkle
from moorline.errors import NotAuthentic
from moorline.ledger import blocks, checkpoint
from moorline.ledger.blocks import Head
from moorline.ledger.nonces import Nonces
from moorline.ledger.places import key_digest
from moorline.ledger.state import State
from moorline.ledger.subtrees import verify_pack
from moorline.ledger.tree import Tree
from moorline.ledger.tree_nodes import Subtree
from moorline.storage.ledger_store import LedgerStore, StateWrites, StoredBlock

AT_ONCE: Final = 20_000
KEPT_BYTES: Final = 128 << 20
"""How much of the state stays in memory before all of it is let go."""
_RECORD_BYTES: Final = 700
_PATH_BYTES: Final = 3000
"""What a record, and the nodes along a path, take in memory beside their bytes, about."""


class StoredState:
    """The state in one authority's database."""

    def __init__(self, store: LedgerStore, ledger_id: bytes) -> None:
        self._store, self._ledger_id = store, ledger_id
        self._held = 0

    def read(self, prefix: int) -> list[tuple[str, bytes]]:
        """The records of one subtree, as `tree.Source`."""
        found = self._store.records(prefix, prefix)
        self._held += _RECORD_BYTES * len(found)
        return found

    def pack(self, prefix: int) -> bytes | None:
        """One subtree as `tree.Packs` has it."""
        found = self._store.pack(prefix)
        self._held += 0 if found is None else len(found) + _PATH_BYTES
        return found

    def record(self, place: bytes) -> tuple[str, bytes] | None:
        """One record as `tree.Packs` has it."""
        self._held += _RECORD_BYTES
        return self._store.record(place)

    def resumed(self, first: Head, stored: StoredBlock) -> Head:
        """The head that was stored. Raises NotAuthentic("ledger.wrong_state_root" | "ledger.state_damaged")."""
        self._complete(first)
        edge = stored.edge
        if edge is None:  # it was completed just now
            again = self._store.head()
            edge = b"" if again is None else again.edge or b""
        header = blocks.parse(stored.body).header
        state = State(
            ledger_id=self._ledger_id,
            height=header.height,
            time_ms=header.time_ms,
            tree=self._tree(),
            nonces=Nonces.of(self._store.nonces(), height=header.height),
        )
        note = checkpoint.parse_note(stored.note)
        if state.root != note.checkpoint.state_root:
            raise NotAuthentic(
                "ledger.wrong_state_root",
                "the stored state is not the signed one",
                expected=note.checkpoint.state_root,
                got=state.root,
            )
        if len(state.tree) <= AT_ONCE:
            for _ in state.tree:
                pass  # reading it verifies it
        head = blocks.resumed_head(state, header, edge)
        if head.checkpoint() != note.checkpoint:
            raise NotAuthentic(
                "ledger.wrong_state_root",
                "the stored log or authorities are not the signed ones",
                got=head.checkpoint().root,
            )
        return head

    def scrub(self, tree: Tree, prefix: int) -> int:
        """Read one stored subtree of the head's `tree` and verify it; how many keys it has.

        Raises NotAuthentic("ledger.state_damaged").
        """
        found = tree.subtree(prefix)
        if found is None:
            return 0
        pack = self._store.pack(prefix)
        if pack is not None:
            verify_pack(found, pack)
        return len(list(Tree.stored([found], self._store_read)))

    def _store_read(self, prefix: int) -> list[tuple[str, bytes]]:
        return self._store.records(prefix, prefix)

    def kept(self, head: Head, *, writes: int) -> Head:
        """The head, just committed, with its state let go from memory if much of it is there."""
        self._held += writes * (_RECORD_BYTES + _PATH_BYTES)
        if self._held <= KEPT_BYTES:
            return head
        self._held = 0
        state = head.state
        light = State(
            ledger_id=state.ledger_id,
            height=state.height,
            time_ms=state.time_ms,
            tree=state.tree.released(self.read, self),
            nonces=state.nonces,
        )
        return replace(head, state=light)

    def _tree(self) -> Tree:
        rows = self._store.subtrees()
        return Tree.stored(
            [Subtree(prefix=prefix, hash=digest, keys=keys) for prefix, digest, keys in rows], self.read, self
        )

    def _complete(self, first: Head) -> None:
        """What a database of the version before lacks: hashes of subtrees, and edges of the log."""
        head = self._store.head()
        if head is None or head.edge is not None:
            return
        tree = Tree().updated(dict(self._store.records()))
        self._store.put_state(
            StateWrites(records={}, nonces={}, subtrees={one.prefix: (one.hash, one.keys) for one in tree.all_subtrees()})
        )
        frontier, edges = merkle.Frontier().appended(first.leaf), {}
        for height, leaf in enumerate(self._store.leaves(), start=1):
            edges[height] = b"".join(frontier.subtrees)
            frontier = frontier.appended(leaf)
        self._store.fill_edges(edges)


def writes_of(tree: Tree, writes: Mapping[str, bytes], nonces: Mapping[bytes, int]) -> StateWrites:
    """What the database has to hold after `writes` made `tree`."""
    return StateWrites(
        records={key_digest(key): (key, value) for key, value in writes.items()},
        subtrees={one.prefix: (one.hash, one.keys) for one in tree.subtrees(writes)},
        packs=tree.packed(writes),
        nonces=nonces,
    )
