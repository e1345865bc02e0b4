"""An authority's database: blocks, the state they made, and what this authority has put its name to.

Bytes in, bytes out; what they mean is for ledger/ to say. Each method is one transaction, durable when it returns. The
order in which the engine calls them (intent before effect) is in ledger/engines/embedded.py. A database that cannot be read
is `ledger.database_corrupt`, one that cannot be written for want of room `storage.full`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from moorline.storage import damage
from moorline.storage.rows import put
from moorline.storage.transactions import reading, retried, writing


class _Bytes(sa.LargeBinary):
    """Bytes as they are: SQLite's driver takes them, and a view around each of a block's thousands only costs time."""

    cache_ok = True

    def bind_processor(self, dialect: sa.Dialect) -> Any:  # noqa: ANN401 - as SQLAlchemy has it
        return None if dialect.name == "sqlite" else super().bind_processor(dialect)  # type: ignore[no-untyped-call]


_META = sa.MetaData()
_BLOCKS = sa.Table(
    "blocks",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", _Bytes),
    sa.Column("note", _Bytes),
    sa.Column("leaf", _Bytes),
    sa.Column("edge", _Bytes),
    sa.Column("seal", _Bytes),
)
_RECORDS = sa.Table(
    "records",
    _META,
    sa.Column("place", _Bytes, primary_key=True),
    sa.Column("key", sa.String),
    sa.Column("value", _Bytes),
)
_SUBTREES = sa.Table(
    "subtrees",
    _META,
    sa.Column("prefix", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("hash", _Bytes),
    sa.Column("key_count", sa.BigInteger),
)
_NONCES = sa.Table("nonces", _META, sa.Column("nonce", _Bytes, primary_key=True), sa.Column("valid_until", sa.BigInteger))
_TRANSACTIONS = sa.Table(
    "transactions",
    _META,
    sa.Column("id", _Bytes, primary_key=True),
    sa.Column("height", sa.BigInteger),
    sa.Column("position", sa.BigInteger),
)
_SET_CHANGES = sa.Table(
    "set_changes",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("note", _Bytes),
    sa.Column("authorities", _Bytes),
)
_PROPOSED = sa.Table(
    "proposed",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", _Bytes),
    sa.Column("seal", _Bytes),
    sa.Column("first_seal", _Bytes),
)
_SIGNED = sa.Table(
    "signed",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", _Bytes),
    sa.Column("time_s", sa.BigInteger),
    sa.Column("seal", _Bytes),
)
_COSIGNATURES = sa.Table(
    "cosignatures",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("authority", sa.String, primary_key=True),
    sa.Column("line", sa.Text),
)
_TERMS = sa.Table(
    "terms",
    _META,
    sa.Column("term", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("sequencer", sa.String),
    sa.Column("certificate", _Bytes),
)
_EVIDENCE = sa.Table(
    "evidence",
    _META,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("height", sa.BigInteger),
    sa.Column("found_ms", sa.BigInteger),
    sa.Column("body", _Bytes),
)
_MARKS = sa.Table("marks", _META, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.BigInteger))


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
    """What a block changes: records by place (key and value), subtrees by prefix (hash and number of keys), nonces."""

    records: Mapping[bytes, tuple[str, bytes]]
    subtrees: Mapping[int, tuple[bytes, int]]
    nonces: Mapping[bytes, int]


@retried
class LedgerStore:
    """Over an engine that `storage.database.open_database(url, "ledger")` made."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        sa.event.listen(engine, "handle_error", damage.named)

    def close(self) -> None:
        """Give connections back."""
        self._engine.dispose()

    # What is committed ---------------------------------------------------------------------------------------------

    def head(self) -> StoredBlock | None:
        """The highest committed block."""
        query = sa.select(_BLOCKS).order_by(_BLOCKS.c.height.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredBlock(**row)

    def block(self, height: int) -> StoredBlock | None:
        """The committed block at a height."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(_BLOCKS).where(_BLOCKS.c.height == height)).mappings().one_or_none()
        return None if row is None else StoredBlock(**row)

    def lowest(self) -> int | None:
        """The lowest height there is a block of: 1, or more where the ledger was taken over from a snapshot."""
        with reading(self._engine) as connection:
            found: int | None = connection.execute(sa.select(sa.func.min(_BLOCKS.c.height))).scalar()
        return found

    def leaves(self) -> list[bytes]:
        """The leaf hashes of all committed blocks, in order of height."""
        with reading(self._engine) as connection:
            return list(connection.execute(sa.select(_BLOCKS.c.leaf).order_by(_BLOCKS.c.height)).scalars())

    def set_changes(self) -> list[tuple[bytes, bytes]]:
        """Note and encoded authority set of every block that changed the set, in order."""
        query = sa.select(_SET_CHANGES.c.note, _SET_CHANGES.c.authorities).order_by(_SET_CHANGES.c.height)
        with reading(self._engine) as connection:
            return [(note, authorities) for note, authorities in connection.execute(query)]

    def records(self, first: int = 0, last: int = 0xFFFF) -> list[tuple[str, bytes]]:
        """Keys and values after the highest block whose places begin with 16 bits from `first` to `last`."""
        query = sa.select(_RECORDS.c.key, _RECORDS.c.value).where(_in_subtrees(first, last))
        with reading(self._engine) as connection:
            return [(key, value) for key, value in connection.execute(query)]

    def subtrees(self) -> list[tuple[int, bytes, int]]:
        """Prefix, hash and number of keys of every subtree of the state, in order."""
        query = sa.select(_SUBTREES.c.prefix, _SUBTREES.c.hash, _SUBTREES.c.key_count).order_by(_SUBTREES.c.prefix)
        with reading(self._engine) as connection:
            return [(prefix, digest, keys) for prefix, digest, keys in connection.execute(query)]

    def nonces(self) -> dict[bytes, int]:
        """Nonce ids still remembered, with the last block they could stand in."""
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(_NONCES.c.nonce, _NONCES.c.valid_until))
            return {nonce: until for nonce, until in rows}  # noqa: C416 - rows are not pairs

    def transaction(self, transaction_id: bytes) -> tuple[int, int] | None:
        """Height and position of an applied transaction."""
        query = sa.select(_TRANSACTIONS.c.height, _TRANSACTIONS.c.position).where(_TRANSACTIONS.c.id == transaction_id)
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (row[0], row[1])

    def commit(
        self, block: StoredBlock, state: StateWrites, *, transactions: Sequence[bytes], authorities: bytes | None
    ) -> None:
        """Put a block a quorum signed and everything that follows from it, in one transaction.

        `authorities` is the encoded set if the block changed it.
        """
        with writing(self._engine) as connection:
            _put_block(connection, block, transactions)
            if authorities is not None:
                put(connection, _SET_CHANGES, [{"height": block.height, "note": block.note, "authorities": authorities}])
            connection.execute(sa.delete(_NONCES).where(_NONCES.c.valid_until <= block.height))
            _put_state(connection, state)
            connection.execute(sa.delete(_PROPOSED).where(_PROPOSED.c.height <= block.height))
            connection.execute(sa.delete(_COSIGNATURES).where(_COSIGNATURES.c.height <= block.height))
            # What was signed at this height stays until the next one is: it answers a repeated request.
            connection.execute(sa.delete(_SIGNED).where(_SIGNED.c.height < block.height))

    # Whole states --------------------------------------------------------------------------------------------------

    def put_state(self, state: StateWrites) -> None:
        """Put part of a state that is taken over from elsewhere; nobody believes it before `put_head`."""
        with writing(self._engine) as connection:
            _put_state(connection, state)

    def clear_state(self, prefixes: Sequence[int]) -> None:
        """Take out what there is of these subtrees."""
        with writing(self._engine) as connection:
            for prefix in prefixes:
                low, high = prefix.to_bytes(2, "big"), (prefix + 1).to_bytes(3, "big")[-2:]
                where = _RECORDS.c.place >= low
                connection.execute(
                    sa.delete(_RECORDS).where(where if high == b"\0\0" else where & (_RECORDS.c.place < high))
                )
                connection.execute(sa.delete(_SUBTREES).where(_SUBTREES.c.prefix == prefix))

    def put_heads(
        self, blocks: Sequence[tuple[StoredBlock, Sequence[bytes]]], *, changes: Sequence[tuple[int, bytes, bytes]]
    ) -> None:
        """Put the block that the state taken over belongs to, those before it, and the changes of the authority set."""
        with writing(self._engine) as connection:
            for block, transactions in blocks:
                _put_block(connection, block, transactions)
            self._put_changes(connection, changes)

    def put_set_changes(self, changes: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Put height, note and encoded set after it of blocks that changed the authority set."""
        with writing(self._engine) as connection:
            self._put_changes(connection, changes)

    def _put_changes(self, connection: sa.Connection, changes: Sequence[tuple[int, bytes, bytes]]) -> None:
        rows = [{"height": height, "note": note, "authorities": after} for height, note, after in changes]
        if rows:
            put(connection, _SET_CHANGES, rows)

    def fill_edges(self, edges: Mapping[int, bytes]) -> None:
        """Complete blocks that an old version wrote."""
        with writing(self._engine) as connection:
            for height, edge in edges.items():
                connection.execute(sa.update(_BLOCKS).where(_BLOCKS.c.height == height).values(edge=edge))

    # What this authority is about to do, or did --------------------------------------------------------------------

    def proposed(self) -> StoredProposal | None:
        """The block this sequencer proposed last and has not committed."""
        query = sa.select(_PROPOSED).order_by(_PROPOSED.c.height.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredProposal(**row)

    def propose(self, height: int, body: bytes, *, seal: bytes | None = None, first_seal: bytes | None = None) -> None:
        """Record, before anybody sees it, that this block is proposed; an abandoned one at its height gives way."""
        with writing(self._engine) as connection:
            connection.execute(sa.delete(_PROPOSED).where(_PROPOSED.c.height == height))
            connection.execute(sa.delete(_COSIGNATURES).where(_COSIGNATURES.c.height == height))
            connection.execute(sa.insert(_PROPOSED).values(height=height, body=body, seal=seal, first_seal=first_seal))

    def signed(self) -> StoredSignature | None:
        """The highest block this authority decided to sign."""
        query = sa.select(_SIGNED).order_by(_SIGNED.c.height.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredSignature(**row)

    def intend_signature(self, height: int, body: bytes, *, time_s: int | None, seal: bytes | None = None) -> None:
        """Record, before signing, what will be signed. The height is a primary key: a second block there is an error."""
        with writing(self._engine) as connection:
            connection.execute(sa.insert(_SIGNED).values(height=height, body=body, time_s=time_s, seal=seal))

    def cosignatures(self, height: int) -> dict[str, str]:
        """Other authorities' signature lines collected for the proposed block."""
        query = sa.select(_COSIGNATURES.c.authority, _COSIGNATURES.c.line).where(_COSIGNATURES.c.height == height)
        with reading(self._engine) as connection:
            return {authority: line for authority, line in connection.execute(query)}  # noqa: C416 - rows are not pairs

    def keep_cosignatures(self, height: int, lines: Mapping[str, str]) -> None:
        """Keep other authorities' signatures on the proposed block."""
        with writing(self._engine) as connection:
            rows = [{"height": height, "authority": authority, "line": line} for authority, line in lines.items()]
            put(connection, _COSIGNATURES, rows)

    # Terms, marks, evidence ----------------------------------------------------------------------------------------

    def term(self) -> StoredTerm | None:
        """The highest term this authority has given its word in, or seen a certificate of."""
        query = sa.select(_TERMS).order_by(_TERMS.c.term.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredTerm(**row)

    def certified_term(self) -> StoredTerm | None:
        """The highest term that a certificate is known of."""
        query = sa.select(_TERMS).where(_TERMS.c.certificate.is_not(None)).order_by(_TERMS.c.term.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredTerm(**row)

    def terms(self) -> list[StoredTerm]:
        """All terms, in order."""
        with reading(self._engine) as connection:
            return [StoredTerm(**row) for row in connection.execute(sa.select(_TERMS).order_by(_TERMS.c.term)).mappings()]

    def marks(self) -> list[tuple[str, int]]:
        """All marks."""
        with reading(self._engine) as connection:
            return [(name, value) for name, value in connection.execute(sa.select(_MARKS.c.name, _MARKS.c.value))]

    def put_term(self, term: StoredTerm) -> None:
        """Record a word given (once a term: another sequencer for it is an error), or the certificate of a term."""
        values = {"term": term.term, "sequencer": term.sequencer, "certificate": term.certificate}
        with writing(self._engine) as connection:
            if term.certificate is None:
                connection.execute(sa.insert(_TERMS).values(**values))
            else:
                put(connection, _TERMS, [values])

    def mark(self, name: str) -> int | None:
        """A number kept under a name."""
        with reading(self._engine) as connection:
            return connection.execute(sa.select(_MARKS.c.value).where(_MARKS.c.name == name)).scalar()

    def set_mark(self, name: str, value: int) -> None:
        """Keep a number under a name."""
        with writing(self._engine) as connection:
            put(connection, _MARKS, [{"name": name, "value": value}])

    def keep_evidence(self, evidence: StoredEvidence) -> None:
        """Keep evidence for good; the same twice is kept once."""
        row = {"id": evidence.id, "height": evidence.height, "found_ms": evidence.found_ms, "body": evidence.body}
        with writing(self._engine) as connection:
            if connection.execute(sa.select(_EVIDENCE.c.id).where(_EVIDENCE.c.id == evidence.id)).scalar() is None:
                connection.execute(sa.insert(_EVIDENCE).values(**row))

    def evidence(self) -> list[StoredEvidence]:
        """All evidence, oldest first."""
        query = sa.select(_EVIDENCE).order_by(_EVIDENCE.c.found_ms, _EVIDENCE.c.id)
        with reading(self._engine) as connection:
            return [StoredEvidence(**row) for row in connection.execute(query).mappings()]

    def damaged_pages(self) -> list[str]:
        """What SQLite's own check finds; empty if nothing, and on other databases, which check themselves."""
        return damage.pages(self._engine)


def _in_subtrees(first: int, last: int) -> sa.ColumnElement[bool]:
    where = _RECORDS.c.place >= first.to_bytes(2, "big")
    return where if last == 0xFFFF else where & (_RECORDS.c.place < (last + 1).to_bytes(2, "big"))


def _put_block(connection: sa.Connection, block: StoredBlock, transactions: Sequence[bytes]) -> None:
    connection.execute(
        sa.insert(_BLOCKS).values(
            height=block.height,
            body=block.body,
            note=block.note,
            leaf=block.leaf,
            edge=block.edge,
            seal=block.seal,
        )
    )
    if transactions:
        rows = [{"id": one, "height": block.height, "position": i} for i, one in enumerate(transactions)]
        connection.execute(sa.insert(_TRANSACTIONS), rows)


def _put_state(connection: sa.Connection, state: StateWrites) -> None:
    if state.records:
        rows = [{"place": place, "key": key, "value": value} for place, (key, value) in state.records.items()]
        put(connection, _RECORDS, rows)
    if state.subtrees:
        found = state.subtrees.items()
        put(connection, _SUBTREES, [{"prefix": one, "hash": digest, "key_count": keys} for one, (digest, keys) in found])
    if state.nonces:
        put(connection, _NONCES, [{"nonce": nonce, "valid_until": until} for nonce, until in state.nonces.items()])
