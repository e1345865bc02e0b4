"""What every authority of the embedded engine holds: the chain it believes, in its own database, and its checkpoint key.

A node believes a block when a quorum of the set in force before it signed and executing it again gives what was signed; it
then commits block and state in one transaction. At start the stored state is compared with the last signed note, and every
part of it again when it is read (engines.node_state): a database that was changed, by whomever, does not get past that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from moorline.clock import Instant
from moorline.errors import Malformed, Misconfigured, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import blocks, checkpoint, evidence, misconduct, proof, seals, snapshot, terms
from moorline.ledger.blocks import Block, Head
from moorline.ledger.checkpoint import Checkpoint, NoteSignature, quorum_of
from moorline.ledger.engines import node_state
from moorline.ledger.engines.conduct import Conduct, checked_request
from moorline.ledger.finding import Finding, Kind
from moorline.ledger.genesis import Genesis
from moorline.ledger.places import SUBTREE_BITS, key_digest, subtree_of
from moorline.ledger.seals import Seal
from moorline.ledger.state import Applied, State
from moorline.ledger.transactions import parse as parse_transaction
from moorline.ledger.verified import Verified
from moorline.storage.ledger_store import (
    LedgerStore,
    StateWrites,
    StoredBlock,
    StoredEvidence,
    StoredProposal,
    StoredSignature,
)
from moorline.wire import cbor, schema
from moorline.wire.schema import Bytes32, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A block with the note a quorum signed; what authorities hand each other.

    `edge` is that of the log before it, `seal` its maker's; null where an authority does not know it.
    """

    block: bytes
    note: bytes
    edge: Annotated[bytes, Size(at_most=64 * 32)] | None = None
    seal: Annotated[bytes, Size(at_most=512)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthoritySet:
    """Names and raw checkpoint keys."""

    authorities: dict[str, Bytes32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _After:
    """A block that was judged, and what the database has to hold after it; `changed` is the set if it is another."""

    head: Head
    block: StoredBlock
    writes: StateWrites
    transactions: list[tuple[bytes, int]]
    changed: dict[str, bytes] | None

    @property
    def authorities(self) -> bytes | None:
        return None if self.changed is None else schema.encode(AuthoritySet(authorities=self.changed))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Executed:
    """What the block `body` gave on the head `on`."""

    on: Head
    body: bytes
    after: Head
    applied: tuple[Applied, ...]


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
        self.conduct = Conduct(store, genesis)
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger-disk")
        self._written: tuple[Future[None], _After] | None = None
        self._executed: _Executed | None = None
        self._set: tuple[Head, dict[str, bytes]] | None = None
        self.verified = Verified()
        """Signatures that held when a transaction came in or its block was cosigned; the block's commit needs them again."""
        self.on_evidence: Callable[[Finding], None] = lambda _: None
        """Told of new evidence; a service logs it."""
        self.reload()

    def reload(self) -> None:
        """Take head and state from the database."""
        self.settle()
        self._last: StoredBlock | None = None
        self.head, self.note = self._load()
        self._changes = [
            proof.SetChange(note=note, authorities=schema.decode(AuthoritySet, data).authorities)
            for note, data in self.store.set_changes()
        ]
        known = self._changes[-1].authorities if self._changes else self.genesis.trust().authorities
        if (
            self.note is not None and known != self.authorities()
        ):  # the head itself changed the set; a snapshot cannot say so
            after = AuthoritySet(authorities=self.authorities())
            self.store.put_set_changes([(self.head.state.height, self.note, schema.encode(after))])
            self._changes.append(proof.SetChange(note=self.note, authorities=after.authorities))

    def last(self) -> Committed | None:
        """The block of the head, None before the first."""
        if self._last is None or self._last.height != self.head.state.height:
            self._last = self.store.head()
        found = self._last
        return None if found is None else Committed(block=found.body, note=found.note, edge=found.edge, seal=found.seal)

    # Reading ---------------------------------------------------------------------------------------------------------

    def authorities(self) -> dict[str, bytes]:
        """The set in force, which signs the next block."""
        if self._set is None or self._set[0] is not self.head:
            self._set = (self.head, self.head.state.authority_set())
        return dict(self._set[1])

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

    def blank(self) -> bool:
        """True if this authority knows of no block, and of none it made or signed: it is new, or lost its disk."""
        return self.note is None and self.store.signed() is None and self.store.proposed() is None

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
        return schema.encode(Committed(block=stored.body, note=stored.note, edge=stored.edge, seal=stored.seal))

    def manifest(self) -> bytes:
        """The manifest of a snapshot of the head (ledger.snapshot). Raises Unavailable("ledger.no_block_yet")."""
        self.settle()
        stored = self.store.head()
        return snapshot.make(
            note=self.signed_note(),
            block=b"" if stored is None else stored.body,
            edge=self.head.edge,
            changes=self._changes_before(self.head.state.height),
            subtrees=self.head.state.tree.all_subtrees(),
        )

    def chunk(self, first: int) -> bytes:
        """A piece of the head's state, from subtree `first` on."""
        return snapshot.chunk(first, self._subtrees_from(first))

    def _subtrees_from(self, first: int) -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
        step = 256
        for start in range(first, 1 << SUBTREE_BITS, step):
            last = min(start + step, 1 << SUBTREE_BITS) - 1
            found: dict[int, list[tuple[str, bytes]]] = {}
            for key, value in self.store.records(start, last):
                found.setdefault(subtree_of(key_digest(key)), []).append((key, value))
            yield from sorted(found.items())

    def scrub(self, prefix: int) -> int:
        """Read one subtree of the stored state and verify it; how many keys it has.

        Raises NotAuthentic("ledger.state_damaged").
        """
        self.settle()  # the database may be a block ahead, and its subtrees with it
        return self._state.scrub(self.head.state.tree, prefix)

    def receipt(self, transaction_id: bytes, valid_until: int) -> bytes | None:
        """The receipt of a transaction that stands in the ledger, or None."""
        where = self.store.transaction(transaction_id, valid_until)
        if where is None:
            return None
        height, index = where
        stored = self.store.block(height)
        assert stored is not None, "a block and the ids of its transactions are written together"
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

    def seal(self, header: blocks.Header, *, term: int, attempt: int) -> Seal:
        """The seal on a block this authority proposes."""
        return seals.seal(
            header, ledger_id=self.genesis.ledger_id, term=term, attempt=attempt, name=self.name, key=self._key()
        )

    def promise(self, request: bytes) -> bytes:
        """The word of its operator, if given, with what it holds above its head; an encoded `terms.Promise`."""
        wanted = checked_request(request, self.conduct)
        self.settle()
        height, signed = self.head.state.height, self.store.signed()
        held = signed if signed is not None and signed.height == height + 1 else None
        word = terms.give(
            ledger_id=self.genesis.ledger_id,
            term=wanted.term,
            sequencer=wanted.sequencer,
            name=self.name,
            height=height,
            held=terms.NOTHING_HELD if held is None else blocks.digest(blocks.parse(held.body).header),
            key=self._key(),
        )
        return schema.encode(
            terms.Promise(
                word=word,
                block=None if held is None else held.body,
                seal=None if held is None else held.seal,
                line=None if held is None else self._line_on(held),
            )
        )

    def _line_on(self, held: StoredSignature) -> str:
        head, _ = blocks.execute_again(self.head, blocks.parse(held.body))
        at = self.now() if held.time_s is None else Instant(held.time_s)
        return self.cosign(head.checkpoint(), at=at).line()

    def sign_as_maker(self, found: Checkpoint) -> NoteSignature:
        """The note signature of a block's maker."""
        return checkpoint.sign_note(found, name=self.name, key=self._key())

    def adopt(self, committed: Committed) -> None:
        """Believe the next block: quorum, execution, then commit. Blocks at or below the head are only compared.

        Raises NotAuthentic("ledger.quorum_missing" | "ledger.signature_invalid" | "ledger.fork"), or as
        blocks.execute_again.
        """
        self.settle()
        note = checkpoint.parse_note(committed.note)
        block = blocks.parse(committed.block)
        if note.checkpoint.height <= self.head.state.height:
            self._compare(note, block, committed.seal)
            return
        authorities = self.authorities()
        signed = checkpoint.verify_note(note, authorities, quorum_of(len(authorities)))
        self._accuse_maker(block, committed.seal)
        head, applied = self.execute(block, committed.block)
        if head.checkpoint() != signed:
            raise NotAuthentic(
                "ledger.fork",
                "a quorum signed another state than this block gives",
                expected=head.state.root,
                got=signed.state_root,
                remedy="compare this authority's database and version with the others'",
            )
        self.commit(committed, head, applied)

    def _accuse_maker(self, block: Block, seal: bytes | None) -> None:
        """Its maker may have shown this authority another block at this height before."""
        signed = self.store.signed()
        if signed is not None and signed.height == block.header.height and seal is not None:
            self.accuse_proposals(signed, block.header, schema.decode(Seal, seal))

    def execute(self, block: Block, body: bytes) -> tuple[Head, tuple[Applied, ...]]:
        """What executing a block, whose bytes are `body`, on the head gives; raises as blocks.execute_again.

        What this authority executed to cosign it is not executed once more on the same head to commit it.
        """
        known = self._executed
        if known is None or known.on is not self.head or known.body != body:
            after, applied = blocks.execute_again(self.head, block, verified=self.verified)
            known = self._executed = _Executed(on=self.head, body=body, after=after, applied=applied)
        return known.after, known.applied

    def commit(self, committed: Committed, head: Head, applied: Iterable[Applied]) -> None:
        """Put a block that was judged already."""
        self.settle()
        after = self._after(committed, head, applied)
        self.store.commit(after.block, after.writes, transactions=after.transactions, authorities=after.authorities)
        self._goes_on_from(after)

    def begin_commit(
        self, committed: Committed, head: Head, applied: Iterable[Applied], *, proposal: StoredProposal | None
    ) -> None:
        """As `commit`, with what is proposed next in the same transaction; the disk is waited for beside (`settled`).

        Until then everybody sees the head before, and nothing of the block may leave this process.
        """
        self.settle()
        after = self._after(committed, head, applied)
        prepared = self.store.prepare(
            after.block, after.writes, transactions=after.transactions, authorities=after.authorities, proposal=proposal
        )
        self._written = (self._disk.submit(self.store.finish, prepared), after)

    async def settled(self) -> None:
        """Returns when what was begun is durable and the head. Raises as the store.

        A task that is cancelled here waits all the same: what was given to the disk cannot be taken back.
        """
        try:
            if self._written is not None:
                done, _ = await asyncio.wait([asyncio.wrap_future(self._written[0])])
                _ = [one.exception() for one in done]  # looked at here; `settle` raises it
        finally:
            self.settle()

    def settle(self) -> None:
        """Wait for what `begin_commit` has given to the disk, if anything, and go on from it. Raises as the store."""
        if self._written is not None:
            (written, after), self._written = self._written, None
            written.result()
            self._goes_on_from(after)

    def _after(self, committed: Committed, head: Head, applied: Iterable[Applied]) -> _After:
        applied = tuple(applied)
        before, authorities = self.authorities(), head.state.authority_set()
        writes = self._first_records(head) | {key: value for one in applied for key, value in one.writes.items()}
        return _After(
            head=head,
            block=StoredBlock(
                height=head.state.height,
                body=committed.block,
                note=committed.note,
                leaf=head.leaf,
                edge=head.edge,
                seal=committed.seal,
            ),
            writes=node_state.writes_of(head.state.tree, writes, {one.nonce_id: one.valid_until for one in applied}),
            transactions=[(one.id, one.valid_until) for one in applied],
            changed=authorities if authorities != before else None,
        )

    def _goes_on_from(self, after: _After) -> None:
        if after.changed is not None:
            self._changes.append(proof.SetChange(note=after.block.note, authorities=after.changed))
        self.head, self.note = self._state.kept(after.head, writes=len(after.writes.records)), after.block.note
        self._last, self._executed = after.block, None

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

    def _compare(self, note: checkpoint.Note, block: Block, seal: bytes | None) -> None:
        mine = self.store.block(note.checkpoint.height)
        if mine is None or checkpoint.parse_note(mine.note).checkpoint == note.checkpoint:
            return
        if mine.seal is not None and seal is not None:
            theirs = (block.header, schema.decode(Seal, seal))
            self._keep(self._of_proposals((blocks.parse(mine.body).header, schema.decode(Seal, mine.seal)), theirs))
        self._keep(
            evidence.of_heads(self.genesis.ledger_id, mine.note, note.encode(), self._changes_before(block.header.height))
        )
        raise NotAuthentic(
            "ledger.fork",
            "two blocks at one height",
            expected=checkpoint.parse_note(mine.note).checkpoint.root,
            got=f"{note.checkpoint.root.hex()} at {block.header.height}",
            remedy="see moor ledger evidence: it names who lied",
        )

    def accuse_proposals(self, signed: StoredSignature, header: blocks.Header, seal: Seal) -> None:
        """Keep as evidence, if it is, that a sequencer sealed another block than the one this authority signed."""
        if signed.seal is not None:
            mine = (blocks.parse(signed.body).header, schema.decode(Seal, signed.seal))
            self._keep(self._of_proposals(mine, (header, seal)))

    def accuse(self, kind: Kind, body: bytes, *, height: int) -> None:
        """Keep as evidence, if it is, what a block at this height shows by itself (ledger.misconduct): one of a kind."""
        if self.accused(kind, height):
            return
        changes = self._changes_before(height)
        self._keep(misconduct.encode(kind, body, ledger_id=self.genesis.ledger_id, changes=changes))

    def accused(self, kind: Kind, height: int) -> bool:
        """Whether evidence of this kind is kept about this height already."""
        return any(evidence.kind_of(one.body) is kind for one in self.store.evidence(height=height))

    def _of_proposals(self, mine: tuple[blocks.Header, Seal], theirs: tuple[blocks.Header, Seal]) -> bytes | None:
        if mine[0] == theirs[0] or mine[0].height != theirs[0].height:
            return None
        changes = self._changes_before(mine[0].height)
        return evidence.of_proposals(self.genesis.ledger_id, mine, theirs, changes)

    def _keep(self, found: bytes | None) -> None:
        """Keep evidence that names somebody; halt if it shows that the ledger has forked."""
        if found is None:
            return
        try:
            finding = evidence.verify(found, self.genesis.trust())
        except MoorlineError:  # it proves nothing: a new attempt, signatures that do not hold
            return
        self.store.keep_evidence(
            StoredEvidence(id=evidence.identify(found), height=finding.height, found_ms=self.now_ms(), body=found)
        )
        if finding.forked:
            self.conduct.halt(finding.height)
        self.on_evidence(finding)

    def _load(self) -> tuple[Head, bytes | None]:
        first = blocks.genesis_head(self.genesis)
        try:
            stored = None if self.store.mark("taking_over") else self.store.head()
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
    following = node.conduct.following if isinstance(node, Node) else None
    return cbor.encode(
        {
            "genesis": node.genesis.encode(),
            "height": node.head.state.height,
            "time_ms": node.head.state.time_ms,
            "state_root": node.head.state.root,
            "name": node.name,
            "sequencer": node.genesis.sequencer if following is None else following.sequencer,
            "term": 0 if following is None else following.term,
        }
    )
