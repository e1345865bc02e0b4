"""An authority's database: blocks, the state they made, and what this authority has put its name to.

Bytes in, bytes out; what they mean is for ledger/ to say. Each method is one transaction, durable when it returns. The
order in which the engine calls them (intent before effect) is in ledger/engines/embedded.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

_META = sa.MetaData()
_BLOCKS = sa.Table(
    "blocks",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary),
    sa.Column("note", sa.LargeBinary),
    sa.Column("leaf", sa.LargeBinary),
    sa.Column("authorities", sa.LargeBinary),
)
_RECORDS = sa.Table("records", _META, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.LargeBinary))
_NONCES = sa.Table(
    "nonces", _META, sa.Column("nonce", sa.LargeBinary, primary_key=True), sa.Column("valid_until", sa.BigInteger)
)
_TRANSACTIONS = sa.Table(
    "transactions",
    _META,
    sa.Column("id", sa.LargeBinary, primary_key=True),
    sa.Column("height", sa.BigInteger),
    sa.Column("position", sa.BigInteger),
)
_PROPOSED = sa.Table(
    "proposed",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary),
)
_SIGNED = sa.Table(
    "signed",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary),
    sa.Column("line", sa.Text),
)
_COSIGNATURES = sa.Table(
    "cosignatures",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("authority", sa.String, primary_key=True),
    sa.Column("line", sa.Text),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlock:
    """A block a quorum signed. `authorities` is the encoded set if the block changed it."""

    height: int
    body: bytes
    note: bytes
    leaf: bytes
    authorities: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSignature:
    """What this authority decided to sign at a height, and its signature line once made."""

    height: int
    body: bytes
    line: str | None


class LedgerStore:
    """Over an engine that `storage.database.open_database(url, "ledger")` made."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def close(self) -> None:
        """Give connections back."""
        self._engine.dispose()

    # What is committed ---------------------------------------------------------------------------------------------

    def head(self) -> StoredBlock | None:
        """The highest committed block."""
        query = sa.select(_BLOCKS).order_by(_BLOCKS.c.height.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredBlock(**row)

    def block(self, height: int) -> StoredBlock | None:
        """The committed block at a height."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(_BLOCKS).where(_BLOCKS.c.height == height)).mappings().one_or_none()
        return None if row is None else StoredBlock(**row)

    def leaves(self) -> list[bytes]:
        """The leaf hashes of all committed blocks, in order of height."""
        with self._engine.connect() as connection:
            return list(connection.execute(sa.select(_BLOCKS.c.leaf).order_by(_BLOCKS.c.height)).scalars())

    def set_changes(self) -> list[tuple[bytes, bytes]]:
        """Note and encoded authority set of every block that changed the set, in order."""
        query = (
            sa.select(_BLOCKS.c.note, _BLOCKS.c.authorities)
            .where(_BLOCKS.c.authorities.is_not(None))
            .order_by(_BLOCKS.c.height)
        )
        with self._engine.connect() as connection:
            return [(note, authorities) for note, authorities in connection.execute(query)]

    def records(self) -> dict[str, bytes]:
        """The state after the highest block; empty before the first."""
        with self._engine.connect() as connection:
            return {key: value for key, value in connection.execute(sa.select(_RECORDS.c.key, _RECORDS.c.value))}  # noqa: C416 - rows are not pairs

    def nonces(self) -> dict[bytes, int]:
        """Nonce ids still remembered, with the last block they could stand in."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_NONCES.c.nonce, _NONCES.c.valid_until))
            return {nonce: until for nonce, until in rows}  # noqa: C416 - rows are not pairs

    def transaction(self, transaction_id: bytes) -> tuple[int, int] | None:
        """Height and position of an applied transaction."""
        query = sa.select(_TRANSACTIONS.c.height, _TRANSACTIONS.c.position).where(_TRANSACTIONS.c.id == transaction_id)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (row[0], row[1])

    def commit(
        self,
        block: StoredBlock,
        *,
        writes: Mapping[str, bytes],
        nonces: Mapping[bytes, int],
        transactions: Sequence[bytes],
    ) -> None:
        """Put a block a quorum signed and everything that follows from it, in one transaction."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.insert(_BLOCKS).values(
                    height=block.height,
                    body=block.body,
                    note=block.note,
                    leaf=block.leaf,
                    authorities=block.authorities,
                )
            )
            if writes:
                connection.execute(sa.delete(_RECORDS).where(_RECORDS.c.key.in_(list(writes))))
                connection.execute(sa.insert(_RECORDS), [{"key": key, "value": value} for key, value in writes.items()])
            connection.execute(sa.delete(_NONCES).where(_NONCES.c.valid_until <= block.height))
            if nonces:
                connection.execute(
                    sa.insert(_NONCES), [{"nonce": nonce, "valid_until": until} for nonce, until in nonces.items()]
                )
            if transactions:
                rows = [{"id": one, "height": block.height, "position": i} for i, one in enumerate(transactions)]
                connection.execute(sa.insert(_TRANSACTIONS), rows)
            connection.execute(sa.delete(_PROPOSED).where(_PROPOSED.c.height <= block.height))
            connection.execute(sa.delete(_COSIGNATURES).where(_COSIGNATURES.c.height <= block.height))
            # What was signed at this height stays until the next one is: it answers a repeated request.
            connection.execute(sa.delete(_SIGNED).where(_SIGNED.c.height < block.height))

    # What this authority is about to do, or did --------------------------------------------------------------------

    def proposed(self) -> tuple[int, bytes] | None:
        """The block this sequencer proposed last and has not committed."""
        query = sa.select(_PROPOSED.c.height, _PROPOSED.c.body).order_by(_PROPOSED.c.height.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else (row[0], row[1])

    def propose(self, height: int, body: bytes) -> None:
        """Record, before anybody sees it, that this block is proposed; an abandoned one at its height gives way."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_PROPOSED).where(_PROPOSED.c.height == height))
            connection.execute(sa.delete(_COSIGNATURES).where(_COSIGNATURES.c.height == height))
            connection.execute(sa.insert(_PROPOSED).values(height=height, body=body))

    def signed(self) -> StoredSignature | None:
        """The highest block this authority decided to sign."""
        query = sa.select(_SIGNED).order_by(_SIGNED.c.height.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else StoredSignature(**row)

    def intend_signature(self, height: int, body: bytes) -> None:
        """Record, before signing, what will be signed. The height is a primary key: a second block there is an error."""
        with self._engine.begin() as connection:
            connection.execute(sa.insert(_SIGNED).values(height=height, body=body))

    def record_signature(self, height: int, line: str) -> None:
        """Keep the signature that was made, so that a repeated request gets the same."""
        with self._engine.begin() as connection:
            connection.execute(sa.update(_SIGNED).where(_SIGNED.c.height == height).values(line=line))

    def cosignatures(self, height: int) -> dict[str, str]:
        """Other authorities' signature lines collected for the proposed block."""
        query = sa.select(_COSIGNATURES.c.authority, _COSIGNATURES.c.line).where(_COSIGNATURES.c.height == height)
        with self._engine.connect() as connection:
            return {authority: line for authority, line in connection.execute(query)}  # noqa: C416 - rows are not pairs

    def keep_cosignature(self, height: int, authority: str, line: str) -> None:
        """Keep another authority's signature on the proposed block."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.delete(_COSIGNATURES).where(_COSIGNATURES.c.height == height, _COSIGNATURES.c.authority == authority)
            )
            connection.execute(sa.insert(_COSIGNATURES).values(height=height, authority=authority, line=line))
