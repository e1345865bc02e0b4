"""What every authority of the embedded engine holds: the chain it believes, in its own database, and its checkpoint key.

A node believes a block when a quorum of the set in force before it signed and executing it again gives what was signed; it
then commits block and state in one transaction. At start the stored state is compared with the last signed note, and every
part of it again when it is read (engines.node_state): a database that was changed, by whomever, does not get past that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moorline.clock import Instant
from moorline.errors import Malformed, Misconfigured, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import blocks, checkpoint, proof
from moorline.ledger.blocks import Block, Head
from moorline.ledger.checkpoint import Checkpoint, NoteSignature, quorum_of
from moorline.ledger.engines import node_state
from moorline.ledger.genesis import Genesis
from moorline.ledger.state import Applied, State
from moorline.ledger.transactions import parse as parse_transaction
from moorline.storage.ledger_store import LedgerStore, StoredBlock
from moorline.wire import cbor, schema
from moorline.wire.schema import Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A block with the note a quorum signed; what authorities hand each other."""

    block: bytes
    note: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthoritySet:
    """Names and raw checkpoint keys."""

    authorities: dict[str, Bytes32]


class Node:
    """One authority's chain. `now_ms` is its own clock; nothing here listens or dials."""

    def __init__(
        self,
        *,
        name: str,
        genesis: Genesis,
        key: Ed25519PrivateKey,
        next_key: Ed25519PrivateKey | None = None,
        store: LedgerStore,
        now_ms: Callable[[], int],
    ) -> None:
        self.name = name
        self.genesis = genesis
        self.store = store
        self.now_ms = now_ms
        self._keys = [one for one in (key, next_key) if one is not None]
        self._state = node_state.StoredState(store, genesis.ledger_id)
        self.head, self.note = self._load()
        self._changes = [
            proof.SetChange(note=note, authorities=schema.decode(AuthoritySet, data).authorities)
            for note, data in store.set_changes()
        ]

    # Reading ---------------------------------------------------------------------------------------------------------

    def authorities(self) -> dict[str, bytes]:
        """The set in force, which signs the next block."""
        return self.head.state.authority_set()

    def prove(self, keys: Iterable[str], *, known: bytes | None = None) -> bytes:
        """A proof bundle at the head, with changes of the authority set from the one with digest `known` on, or all.

        Raises Unavailable("ledger.no_block_yet") before the first block.
        """
        changes = self._changes_before(self.head.state.height)
        return proof.make_bundle(
            note=self.signed_note(),
            changes=proof.changes_since(known, changes),
            tree=self.head.state.tree,
            value_of=self.head.state.get,
            keys=keys,
        )

    def signed_note(self) -> bytes:
        """The head's note. Raises Unavailable("ledger.no_block_yet")."""
        if self.note is None:
            raise Unavailable("ledger.no_block_yet", "no block has been signed yet", remedy="ask again shortly")
        return self.note

    def committed(self, height: int) -> bytes:
        """The encoded `Committed` at a height. Raises Refused("ledger.no_such_block")."""
        stored = self.store.block(height)
        if stored is None:
            raise Refused("ledger.no_such_block", "there is no block at this height", got=height)
        return schema.encode(Committed(block=stored.body, note=stored.note))

    def receipt(self, transaction_id: bytes) -> bytes | None:
        """The receipt of a transaction that stands in the ledger, or None."""
        where = self.store.transaction(transaction_id)
        if where is None:
            return None
        height, index = where
        stored = self.store.block(height)
        assert stored is not None, "a foreign key says that the block is there"
        block = blocks.parse(stored.body)
        ids = [parse_transaction(data).id for data in block.transactions]
        log_proof = tuple(reversed(blocks.frontier_of(height, stored.edge or b"").subtrees))
        return schema.encode(blocks.receipts(log_proof, block, note=stored.note, transaction_ids=ids)[index])

    # Signing and committing ------------------------------------------------------------------------------------------

    def now(self) -> Instant:
        """Its own clock in whole seconds."""
        return Instant(self.now_ms() // 1000)

    def cosign(self, found: Checkpoint, *, at: Instant) -> NoteSignature:
        """A cosignature by this authority, made `at`; the same twice is the same. The caller recorded its intent first."""
        return checkpoint.cosign(found, name=self.name, key=self._key(), now=at)

    def sign_as_maker(self, found: Checkpoint) -> NoteSignature:
        """The note signature of a block's maker."""
        return checkpoint.sign_note(found, name=self.name, key=self._key())

    def adopt(self, committed: Committed) -> None:
        """Believe the next block: quorum, execution, then commit. Blocks at or below the head are only compared.

        Raises NotAuthentic("ledger.quorum_missing" | "ledger.signature_invalid" | "ledger.fork"), or as
        blocks.execute_again.
        """
        note = checkpoint.parse_note(committed.note)
        block = blocks.parse(committed.block)
        if note.checkpoint.height <= self.head.state.height:
            self._compare(note, block)
            return
        authorities = self.authorities()
        signed = checkpoint.verify_note(note, authorities, quorum_of(len(authorities)))
        head, applied = blocks.execute_again(self.head, block)
        if head.checkpoint() != signed:
            raise NotAuthentic(
                "ledger.fork",
                "a quorum signed another state than this block gives",
                expected=head.state.root,
                got=signed.state_root,
                remedy="compare this authority's database and version with the others'",
            )
        self.commit(committed, head, applied)

    def commit(self, committed: Committed, head: Head, applied: Iterable[Applied]) -> None:
        """Put a block that was judged already."""
        applied = tuple(applied)
        before, after = self.authorities(), head.state.authority_set()
        encoded = schema.encode(AuthoritySet(authorities=after)) if after != before else None
        writes = self._first_records(head) | {key: value for one in applied for key, value in one.writes.items()}
        self.store.commit(
            StoredBlock(height=head.state.height, body=committed.block, note=committed.note, leaf=head.leaf, edge=head.edge),
            node_state.writes_of(head.state.tree, writes, {one.nonce_id: one.valid_until for one in applied}),
            transactions=[one.id for one in applied],
            authorities=encoded,
        )
        if encoded is not None:
            self._changes.append(proof.SetChange(note=committed.note, authorities=after))
        self.head, self.note = self._state.kept(head, writes=len(writes)), committed.note

    def _key(self) -> Ed25519PrivateKey:
        """The key the ledger has for this authority: after a rotation it is the next one, from the block after on.

        Raises Misconfigured("ledger.key_not_in_force").
        """
        wanted = self.authorities().get(self.name)
        for key in self._keys:
            if key.public_key().public_bytes_raw() == wanted:
                return key
        raise Misconfigured(
            "ledger.key_not_in_force",
            "this authority holds no key that the ledger has for it",
            expected=wanted,
            got=self.name,
            remedy="start it with the keys that are in force: moor authority take-keys, or those it was admitted with",
        )

    # Inside ----------------------------------------------------------------------------------------------------------

    def _first_records(self, head: Head) -> dict[str, bytes]:
        """With the first block the whole state is stored, the genesis' part of it included."""
        return dict(head.state.records) if head.state.height == 1 else {}

    def _changes_before(self, height: int) -> tuple[proof.SetChange, ...]:
        return tuple(change for change in self._changes if checkpoint.parse_note(change.note).checkpoint.height < height)

    def _compare(self, note: checkpoint.Note, block: Block) -> None:
        mine = self.store.block(note.checkpoint.height)
        if mine is None or checkpoint.parse_note(mine.note).checkpoint == note.checkpoint:
            return
        raise NotAuthentic(
            "ledger.fork",
            "two blocks at one height",
            expected=checkpoint.parse_note(mine.note).checkpoint.root,
            got=f"{note.checkpoint.root.hex()} at {block.header.height}",
            remedy="keep both notes: together they show which authorities lied",
        )

    def _load(self) -> tuple[Head, bytes | None]:
        first = blocks.genesis_head(self.genesis)
        try:
            stored = self.store.head()
            if stored is None:
                return first, None
            return self._state.resumed(first, stored), stored.note
        except Misconfigured:
            raise
        except MoorlineError as error:
            raise Misconfigured(
                "ledger.database_corrupt",
                "this authority's database does not lead to the state that was signed",
                got=error,
                remedy="do not change it by hand; repair it from the others: moor ledger repair",
            ) from None


def transaction_id_of(data: bytes) -> bytes | None:
    """The id of a transaction, or None if the bytes are none: then it certainly stands nowhere."""
    try:
        return parse_transaction(data).id
    except Malformed:
        return None


class Standing(Protocol):
    """What both engines' nodes say of themselves."""

    name: str
    genesis: Genesis

    @property
    def head(self) -> HasState:
        """The committed state."""
        ...


class HasState(Protocol):
    """A head of either engine."""

    @property
    def state(self) -> State:
        """The state there."""
        ...


def encode_status(node: Standing) -> bytes:
    """What GET /v1/ledger answers: public facts of the ledger as this authority sees it, CBOR."""
    return cbor.encode(
        {
            "genesis": node.genesis.encode(),
            "height": node.head.state.height,
            "time_ms": node.head.state.time_ms,
            "state_root": node.head.state.root,
            "name": node.name,
            "sequencer": node.genesis.sequencer,
        }
    )
