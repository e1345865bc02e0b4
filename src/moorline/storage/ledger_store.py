"""An authority's database: blocks, the state they made, and what this authority has put its name to.

Bytes in, bytes out; what they mean is for ledger/ to say. Each method is one transaction, durable when it returns. The
order in which the engine calls them (intent before effect) is in ledger/engines/embedded.py. A database that cannot be read
is `ledger.database_corrupt`, one that cannot be written for want of room `storage.full`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa

from moorline.storage import damage
from moorline.storage.ledger_subtrees import SubtreeReader
from moorline.storage.ledger_tables import (
    BLOCKS,
    COSIGNATURES,
    EVIDENCE,
    MARKS,
    NONCES,
    PACKS,
    PROPOSED,
    RECORDS,
    SET_CHANGES,
    SIGNED,
    SUBTREES,
    TERMS,
    TRANSACTIONS,
)
from moorline.storage.ledger_writes import Row, forget, forget_nonces, nonces_of, propose, put, put_block, put_state
from moorline.storage.transactions import Undone, again, reading, retried, writing

Ids = Sequence[tuple[bytes, int]]
"""Ids of a block's transactions, in order, each with the last block it could stand in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlock:
    """A block a quorum signed. `edge`: the log's subtrees before it, 32 bytes each; None in a database of an old version.

    `seal` is its maker's, None where it is not known.
    """

    height: int
    body: bytes
    note: bytes
    leaf: bytes
    edge: bytes | None
    seal: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSignature:
    """What this authority decided to sign at a height, when (seconds; None: not known), and the seal it was shown under."""

    height: int
    body: bytes
    time_s: int | None
    seal: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProposal:
    """A block this sequencer proposed, its seal, and the seal it first had if another sequencer made it."""

    height: int
    body: bytes
    seal: bytes | None
    first_seal: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTerm:
    """Who sequences in a term, and the certificate that says so; None while only this authority's operator has said it."""

    term: int
    sequencer: str
    certificate: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvidence:
    """Encoded evidence, its id (SHA-256, hex), the height it is about and when it was found."""

    id: str
    height: int
    found_ms: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StateWrites:
    """What a block changes: records by place (key and value), subtrees by prefix (hash and number of keys), nonces.

    `packs` are subtrees as they are read most quickly, by prefix (ledger.packs); those that have one and are not named here
    have not changed.
    """

    records: Mapping[bytes, tuple[str, bytes]]
    subtrees: Mapping[int, tuple[bytes, int]]
    nonces: Mapping[bytes, int]
    packs: Mapping[int, bytes] = field(default_factory=dict)


@retried
class LedgerStore:
    """Over an engine that `storage.database.open_database(url, "ledger")` made."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._subtrees = SubtreeReader(engine)
        sa.event.listen(engine, "handle_error", damage.named)

    def close(self) -> None:
        """Give connections back."""
        self._subtrees.close()
        self._engine.dispose()

    # What is committed ---------------------------------------------------------------------------------------------

    def head(self) -> StoredBlock | None:
        """The highest committed block."""
        query = sa.select(BLOCKS).order_by(BLOCKS.c.height.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredBlock(**row)

    def block(self, height: int) -> StoredBlock | None:
        """The committed block at a height."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(BLOCKS).where(BLOCKS.c.height == height)).mappings().one_or_none()
        return None if row is None else StoredBlock(**row)

    def lowest(self) -> int | None:
        """The lowest height there is a block of: 1, or more where the ledger was taken over from a snapshot."""
        with reading(self._engine) as connection:
            found: int | None = connection.execute(sa.select(sa.func.min(BLOCKS.c.height))).scalar()
        return found

    def leaves(self) -> list[bytes]:
        """The leaf hashes of all committed blocks, in order of height."""
        with reading(self._engine) as connection:
            return list(connection.execute(sa.select(BLOCKS.c.leaf).order_by(BLOCKS.c.height)).scalars())

    def set_changes(self) -> list[tuple[bytes, bytes]]:
        """Note and encoded authority set of every block that changed the set, in order."""
        query = sa.select(SET_CHANGES.c.note, SET_CHANGES.c.authorities).order_by(SET_CHANGES.c.height)
        with reading(self._engine) as connection:
            return [(note, authorities) for note, authorities in connection.execute(query)]

    def records(self, first: int = 0, last: int = 0xFFFF) -> list[tuple[str, bytes]]:
        """Keys and values after the highest block whose places begin with 16 bits from `first` to `last`."""
        if first == last:
            found = self._subtrees.records(first)
            if found is not None:
                return found
        query = sa.select(RECORDS.c.key, RECORDS.c.value).where(_in_subtrees(first, last))
        with reading(self._engine) as connection:
            return [(key, value) for key, value in connection.execute(query)]

    def pack(self, prefix: int) -> bytes | None:
        """One subtree as it was packed when it was written last; None for one that never was."""
        found = self._subtrees.pack(prefix)
        if found is not None:
            return found.pack
        with reading(self._engine) as connection:
            pack: bytes | None = connection.execute(sa.select(PACKS.c.pack).where(PACKS.c.prefix == prefix)).scalar()
        return pack

    def record(self, place: bytes) -> tuple[str, bytes] | None:
        """Key and value at a place."""
        query = sa.select(RECORDS.c.key, RECORDS.c.value).where(RECORDS.c.place == place)
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (row[0], row[1])

    def subtrees(self) -> list[tuple[int, bytes, int]]:
        """Prefix, hash and number of keys of every subtree of the state, in order."""
        query = sa.select(SUBTREES.c.prefix, SUBTREES.c.hash, SUBTREES.c.key_count).order_by(SUBTREES.c.prefix)
        with reading(self._engine) as connection:
            return [(prefix, digest, keys) for prefix, digest, keys in connection.execute(query)]

    def nonces(self) -> dict[bytes, int]:
        """Nonce ids still remembered, with the last block they could stand in."""
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(NONCES.c.nonces)).scalars()
            return {nonce: until for row in rows for nonce, until in nonces_of(row).items()}

    def transaction(self, transaction_id: bytes, valid_until: int) -> tuple[int, int] | None:
        """Height and position of an applied transaction, which says itself what the last block is it could stand in."""
        # 0 is what an old version's database says of all it had (migration 0003).
        query = sa.select(TRANSACTIONS.c.height, TRANSACTIONS.c.position).where(
            TRANSACTIONS.c.valid_until.in_((valid_until, 0)) & (TRANSACTIONS.c.id == transaction_id)
        )
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        return None if row is None else (row[0], row[1])

    def commit(self, block: StoredBlock, state: StateWrites, *, transactions: Ids, authorities: bytes | None) -> None:
        """Put a block a quorum signed and everything that follows from it, in one transaction.

        `authorities` is the encoded set if the block changed it.
        """
        with writing(self._engine) as connection:
            _put_commit(connection, block, state, transactions, authorities)

    def prepare(
        self,
        block: StoredBlock,
        state: StateWrites,
        *,
        transactions: Ids,
        authorities: bytes | None,
        proposal: StoredProposal | None,
    ) -> Prepared:
        """As `commit`, together with `propose` of the next block, up to the moment in which the disk is waited for.

        Nothing is durable, and nobody sees any of it, before `finish`, which has to follow.
        """

        def write(connection: sa.Connection) -> None:
            _put_commit(connection, block, state, transactions, authorities)
            if proposal is not None:
                propose(connection, (proposal.height, proposal.body, proposal.seal, proposal.first_seal))

        return Prepared(self._engine, write)

    def finish(self, prepared: Prepared) -> None:
        """What was prepared is durable when this returns, and gone if it raises. In any thread: it mostly waits."""
        prepared.finish()

    # Whole states --------------------------------------------------------------------------------------------------

    def put_state(self, state: StateWrites) -> None:
        """Put part of a state that is taken over from elsewhere; nobody believes it before `put_head`."""
        with writing(self._engine) as connection:
            put_state(connection, height=0, **_rows(state))

    def clear_state(self, prefixes: Sequence[int]) -> None:
        """Take out what there is of these subtrees."""
        with writing(self._engine) as connection:
            for prefix in prefixes:
                low, high = prefix.to_bytes(2, "big"), (prefix + 1).to_bytes(3, "big")[-2:]
                where = RECORDS.c.place >= low
                connection.execute(sa.delete(RECORDS).where(where if high == b"\0\0" else where & (RECORDS.c.place < high)))
                connection.execute(sa.delete(SUBTREES).where(SUBTREES.c.prefix == prefix))
                connection.execute(sa.delete(PACKS).where(PACKS.c.prefix == prefix))

    def put_heads(
        self,
        blocks: Sequence[tuple[StoredBlock, Ids]],
        *,
        changes: Sequence[tuple[int, bytes, bytes]],
    ) -> None:
        """Put the block that the state taken over belongs to, those before it, and the changes of the authority set."""
        with writing(self._engine) as connection:
            for block, transactions in blocks:
                put_block(connection, _row(block), transactions)
            self._put_changes(connection, changes)

    def put_set_changes(self, changes: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Put height, note and encoded set after it of blocks that changed the authority set."""
        with writing(self._engine) as connection:
            self._put_changes(connection, changes)

    def _put_changes(self, connection: sa.Connection, changes: Sequence[tuple[int, bytes, bytes]]) -> None:
        put(connection, SET_CHANGES, list(changes))

    def fill_edges(self, edges: Mapping[int, bytes]) -> None:
        """Complete blocks that an old version wrote."""
        with writing(self._engine) as connection:
            for height, edge in edges.items():
                connection.execute(sa.update(BLOCKS).where(BLOCKS.c.height == height).values(edge=edge))

    # What this authority is about to do, or did --------------------------------------------------------------------

    def proposed(self) -> StoredProposal | None:
        """The block this sequencer proposed last and has not committed."""
        query = sa.select(PROPOSED).order_by(PROPOSED.c.height.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredProposal(**row)

    def propose(self, height: int, body: bytes, *, seal: bytes | None = None, first_seal: bytes | None = None) -> None:
        """Record, before anybody sees it, that this block is proposed; an abandoned one at its height gives way."""
        with writing(self._engine) as connection:
            propose(connection, (height, body, seal, first_seal))

    def signed(self) -> StoredSignature | None:
        """The highest block this authority decided to sign."""
        query = sa.select(SIGNED).order_by(SIGNED.c.height.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredSignature(**row)

    def intend_signature(self, height: int, body: bytes, *, time_s: int | None, seal: bytes | None = None) -> None:
        """Record, before signing, what will be signed. The height is a primary key: a second block there is an error."""
        with writing(self._engine) as connection:
            connection.execute(sa.insert(SIGNED).values(height=height, body=body, time_s=time_s, seal=seal))

    def cosignatures(self, height: int) -> dict[str, str]:
        """Other authorities' signature lines collected for the proposed block."""
        query = sa.select(COSIGNATURES.c.authority, COSIGNATURES.c.line).where(COSIGNATURES.c.height == height)
        with reading(self._engine) as connection:
            return {authority: line for authority, line in connection.execute(query)}  # noqa: C416 - rows are not pairs

    def keep_cosignatures(self, height: int, lines: Mapping[str, str]) -> None:
        """Keep other authorities' signatures on the proposed block."""
        with writing(self._engine) as connection:
            put(connection, COSIGNATURES, [(height, authority, line) for authority, line in lines.items()])

    # Terms, marks, evidence ----------------------------------------------------------------------------------------

    def term(self) -> StoredTerm | None:
        """The highest term this authority has given its word in, or seen a certificate of."""
        query = sa.select(TERMS).order_by(TERMS.c.term.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredTerm(**row)

    def certified_term(self) -> StoredTerm | None:
        """The highest term that a certificate is known of."""
        query = sa.select(TERMS).where(TERMS.c.certificate.is_not(None)).order_by(TERMS.c.term.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredTerm(**row)

    def terms(self) -> list[StoredTerm]:
        """All terms, in order."""
        with reading(self._engine) as connection:
            return [StoredTerm(**row) for row in connection.execute(sa.select(TERMS).order_by(TERMS.c.term)).mappings()]

    def marks(self) -> list[tuple[str, int]]:
        """All marks."""
        with reading(self._engine) as connection:
            return [(name, value) for name, value in connection.execute(sa.select(MARKS.c.name, MARKS.c.value))]

    def put_term(self, term: StoredTerm) -> None:
        """Record a word given (once a term: another sequencer for it is an error), or the certificate of a term."""
        values = {"term": term.term, "sequencer": term.sequencer, "certificate": term.certificate}
        with writing(self._engine) as connection:
            if term.certificate is None:
                connection.execute(sa.insert(TERMS).values(**values))
            else:
                put(connection, TERMS, [(term.term, term.sequencer, term.certificate)])

    def mark(self, name: str) -> int | None:
        """A number kept under a name."""
        with reading(self._engine) as connection:
            return connection.execute(sa.select(MARKS.c.value).where(MARKS.c.name == name)).scalar()

    def set_mark(self, name: str, value: int) -> None:
        """Keep a number under a name."""
        with writing(self._engine) as connection:
            put(connection, MARKS, [(name, value)])

    def keep_evidence(self, evidence: StoredEvidence) -> None:
        """Keep evidence for good; the same twice is kept once."""
        row = {"id": evidence.id, "height": evidence.height, "found_ms": evidence.found_ms, "body": evidence.body}
        with writing(self._engine) as connection:
            if connection.execute(sa.select(EVIDENCE.c.id).where(EVIDENCE.c.id == evidence.id)).scalar() is None:
                connection.execute(sa.insert(EVIDENCE).values(**row))

    def evidence(self, *, height: int | None = None) -> list[StoredEvidence]:
        """All evidence, or all about one height; oldest first."""
        query = sa.select(EVIDENCE).order_by(EVIDENCE.c.found_ms, EVIDENCE.c.id)
        if height is not None:
            query = query.where(EVIDENCE.c.height == height)
        with reading(self._engine) as connection:
            return [StoredEvidence(**row) for row in connection.execute(query).mappings()]

    def damaged_pages(self) -> list[str]:
        """What SQLite's own check finds; empty if nothing, and on other databases, which check themselves."""
        return damage.pages(self._engine)


class Prepared:
    """A transaction that is written and not committed. One connection is its own until `finish`."""

    def __init__(self, engine: sa.Engine, write: Callable[[sa.Connection], None]) -> None:
        self._engine, self._write = engine, write
        with contextlib.ExitStack() as stack:
            write(stack.enter_context(writing(engine)))
            self._open = stack.pop_all()

    def finish(self) -> None:
        """Commit; where the database undid it (storage.transactions), write it again."""
        try:
            self._open.close()
        except Undone:
            again(self._anew)

    def _anew(self) -> None:
        with writing(self._engine) as connection:
            self._write(connection)


def _put_commit(
    connection: sa.Connection,
    block: StoredBlock,
    state: StateWrites,
    transactions: Ids,
    authorities: bytes | None,
) -> None:
    put_block(connection, _row(block), transactions)
    if authorities is not None:
        put(connection, SET_CHANGES, [(block.height, block.note, authorities)])
    forget_nonces(connection, block.height)
    put_state(connection, height=block.height, **_rows(state))
    forget(connection, block.height)


def _row(block: StoredBlock) -> Row:
    return (block.height, block.body, block.note, block.leaf, block.edge, block.seal)


def _rows(state: StateWrites) -> dict[str, list[Row]]:
    return {
        "records": [(place, key, value) for place, (key, value) in state.records.items()],
        "subtrees": [(prefix, digest, keys) for prefix, (digest, keys) in state.subtrees.items()],
        "packs": list(state.packs.items()),
        "nonces": list(state.nonces.items()),
    }


def _in_subtrees(first: int, last: int) -> sa.ColumnElement[bool]:
    where = RECORDS.c.place >= first.to_bytes(2, "big")
    return where if last == 0xFFFF else where & (RECORDS.c.place < (last + 1).to_bytes(2, "big"))
