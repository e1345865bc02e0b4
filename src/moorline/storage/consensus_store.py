"""The database of an authority of the CometBFT engine: the state, the blocks that made it, and the headers that prove it.

Bytes in, bytes out; what they mean is for ledger/ to say. Each method is one transaction. What it holds is made of blocks
that CometBFT keeps, on its own disk and synchronised, before it shows them to us: a commit that a power cut takes away is
given again (`open_consensus`). Only `restore`, whose blocks CometBFT does not have, is durable when it returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from moorline.storage import damage
from moorline.storage.database import open_database
from moorline.storage.rows import put
from moorline.storage.transactions import durably, reading, retried, writing

_META = sa.MetaData()
_BLOCKS = sa.Table(
    "consensus_blocks",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time_ms", sa.BigInteger),
    sa.Column("app_hash", sa.LargeBinary),
    sa.Column("body", sa.LargeBinary),
)
_ANCHORS = sa.Table(
    "consensus_anchors",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("anchor", sa.LargeBinary),
)
_SET_CHANGES = sa.Table(
    "consensus_set_changes",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("authorities", sa.LargeBinary),
)
_TRANSACTIONS = sa.Table(
    "consensus_transactions",
    _META,
    sa.Column("id", sa.LargeBinary, primary_key=True),
    sa.Column("height", sa.BigInteger),
    sa.Column("position", sa.BigInteger),
)
_RECORDS = sa.Table(
    "consensus_records", _META, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.LargeBinary)
)
_NONCES = sa.Table(
    "consensus_nonces", _META, sa.Column("nonce", sa.LargeBinary, primary_key=True), sa.Column("valid_until", sa.BigInteger)
)
_MISBEHAVIOUR = sa.Table(
    "consensus_misbehaviour",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("address", sa.LargeBinary, primary_key=True),
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("authority", sa.String),
    sa.Column("seen_at", sa.BigInteger),
)
_EVIDENCE = sa.Table(
    "consensus_evidence",
    _META,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("kind", sa.String),
    sa.Column("height", sa.BigInteger),
    sa.Column("seen_at", sa.BigInteger),
    sa.Column("body", sa.LargeBinary),
)
_ALL = (_BLOCKS, _ANCHORS, _SET_CHANGES, _TRANSACTIONS, _RECORDS, _NONCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHead:
    """A committed block. `body` holds its transactions; None for the block of a snapshot, which came without them."""

    height: int
    time_ms: int
    app_hash: bytes
    body: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Misbehaviour:
    """A validator that broke the rules at `height`, as the block at `seen_at` has it.

    `authority` is "" if none had its key.
    """

    height: int
    address: bytes
    kind: str
    authority: str
    seen_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvidence:
    """Encoded evidence, its id (SHA-256, hex) and kind, the height it is about, and that of the block it was found in."""

    id: str
    kind: str
    height: int
    seen_at: int
    body: bytes


def open_consensus(url: str) -> ConsensusStore:
    """The store at `url`. Raises as storage.database.open_database.

    A commit waits for no disk: after a power cut the application says in Info how far it is, and CometBFT, which wrote each
    block to a synchronised file before it asked for its execution (0.38: consensus/state.go, finalizeCommit), gives it all
    blocks after that. SQLite stays whole in itself either way (WAL, synchronous=NORMAL).
    """
    return ConsensusStore(open_database(url, "consensus", replayed=True))


@retried
class ConsensusStore:
    """Over an engine that `storage.database.open_database(url, "consensus")` made."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        sa.event.listen(engine, "handle_error", damage.named)

    def close(self) -> None:
        """Give connections back."""
        self._engine.dispose()

    # What is committed ---------------------------------------------------------------------------------------------

    def head(self) -> StoredHead | None:
        """The highest committed block."""
        return self._block(sa.select(_BLOCKS).order_by(_BLOCKS.c.height.desc()).limit(1))

    def block(self, height: int) -> StoredHead | None:
        """The committed block at a height."""
        return self._block(sa.select(_BLOCKS).where(_BLOCKS.c.height == height))

    def _block(self, query: sa.Select[tuple[object, ...]]) -> StoredHead | None:
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredHead(**row)

    def next_body(self, after: int) -> int | None:
        """The height of the first block above `after` that came with its transactions."""
        query = sa.select(sa.func.min(_BLOCKS.c.height)).where(_BLOCKS.c.height > after, _BLOCKS.c.body.is_not(None))
        with reading(self._engine) as connection:
            found: int | None = connection.execute(query).scalar()
        return found

    def records(self) -> dict[str, bytes]:
        """The state after the highest block; empty before the first."""
        with reading(self._engine) as connection:
            return {key: value for key, value in connection.execute(sa.select(_RECORDS.c.key, _RECORDS.c.value))}  # noqa: C416 - rows are not pairs

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
        self,
        block: StoredHead,
        *,
        writes: Mapping[str, bytes],
        nonces: Mapping[bytes, int],
        transactions: Sequence[bytes],
        authorities: bytes | None,
        misbehaviour: Sequence[Misbehaviour] = (),
    ) -> None:
        """Put a decided block and everything that follows from it.

        `authorities` is the set it leads to, if it changed it.
        """
        with writing(self._engine) as connection:
            connection.execute(
                sa.insert(_BLOCKS).values(
                    height=block.height, time_ms=block.time_ms, app_hash=block.app_hash, body=block.body
                )
            )
            self._write_state(connection, block.height, writes, nonces)
            if transactions:
                rows = [{"id": one, "height": block.height, "position": i} for i, one in enumerate(transactions)]
                connection.execute(sa.insert(_TRANSACTIONS), rows)
            if authorities is not None:
                connection.execute(sa.insert(_SET_CHANGES).values(height=block.height, authorities=authorities))
            for one in misbehaviour:
                put(connection, _MISBEHAVIOUR, [{name: getattr(one, name) for name in Misbehaviour.__slots__}])

    def _write_state(
        self, connection: sa.Connection, height: int, writes: Mapping[str, bytes], nonces: Mapping[bytes, int]
    ) -> None:
        if writes:
            put(connection, _RECORDS, [{"key": key, "value": value} for key, value in writes.items()])
        connection.execute(sa.delete(_NONCES).where(_NONCES.c.valid_until <= height))
        if nonces:
            rows = [{"nonce": nonce, "valid_until": until} for nonce, until in nonces.items()]
            connection.execute(sa.insert(_NONCES), rows)

    def misbehaviour(self) -> list[Misbehaviour]:
        """Everything that was ever put on the chain against a validator, oldest first."""
        query = sa.select(_MISBEHAVIOUR).order_by(_MISBEHAVIOUR.c.seen_at, _MISBEHAVIOUR.c.height)
        with reading(self._engine) as connection:
            return [Misbehaviour(**row) for row in connection.execute(query).mappings()]

    def keep_evidence(self, evidence: StoredEvidence) -> None:
        """Keep evidence for good; the same twice is kept once."""
        with writing(self._engine) as connection:
            put(connection, _EVIDENCE, [{name: getattr(evidence, name) for name in StoredEvidence.__slots__}])

    def evidence(self) -> list[StoredEvidence]:
        """All evidence, oldest first."""
        query = sa.select(_EVIDENCE).order_by(_EVIDENCE.c.seen_at, _EVIDENCE.c.id)
        with reading(self._engine) as connection:
            return [StoredEvidence(**row) for row in connection.execute(query).mappings()]

    def damaged_pages(self) -> list[str]:
        """What SQLite's own check finds; empty if nothing, and on other databases, which check themselves."""
        return damage.pages(self._engine)

    # What proves it ------------------------------------------------------------------------------------------------

    def keep_anchor(self, height: int, anchor: bytes) -> None:
        """Keep the header of a height with its commit."""
        with writing(self._engine) as connection:
            put(connection, _ANCHORS, [{"height": height, "anchor": anchor}])

    def anchor(self, height: int) -> bytes | None:
        """The header of a height with its commit."""
        with reading(self._engine) as connection:
            found: bytes | None = connection.execute(
                sa.select(_ANCHORS.c.anchor).where(_ANCHORS.c.height == height)
            ).scalar()
        return found

    def last_anchor(self) -> tuple[int, bytes] | None:
        """The highest header kept."""
        query = sa.select(_ANCHORS.c.height, _ANCHORS.c.anchor).order_by(_ANCHORS.c.height.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (row[0], row[1])

    def set_changes(self) -> list[tuple[int, bytes]]:
        """Height and encoded authority set of every block that changed the set, in order."""
        query = sa.select(_SET_CHANGES.c.height, _SET_CHANGES.c.authorities).order_by(_SET_CHANGES.c.height)
        with reading(self._engine) as connection:
            return [(height, authorities) for height, authorities in connection.execute(query)]

    # Beginning elsewhere ---------------------------------------------------------------------------------------------

    def restore(
        self,
        block: StoredHead,
        *,
        records: Mapping[str, bytes],
        nonces: Mapping[bytes, int],
        set_changes: Sequence[tuple[int, bytes]],
        anchors: Mapping[int, bytes],
    ) -> None:
        """Put a state that was taken from others in the place of everything there is. Durable when it returns."""
        with durably(self._engine) as connection:
            for table in _ALL:
                connection.execute(sa.delete(table))
            connection.execute(
                sa.insert(_BLOCKS).values(height=block.height, time_ms=block.time_ms, app_hash=block.app_hash, body=None)
            )
            self._write_state(connection, block.height, records, nonces)
            if set_changes:
                rows = [{"height": height, "authorities": authorities} for height, authorities in set_changes]
                connection.execute(sa.insert(_SET_CHANGES), rows)
            if anchors:
                rows = [{"height": height, "anchor": anchor} for height, anchor in anchors.items()]
                connection.execute(sa.insert(_ANCHORS), rows)
