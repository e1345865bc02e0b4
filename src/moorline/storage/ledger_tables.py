"""The tables of an authority's database, as the migrations make them; only storage.ledger_* read and write them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


class _Bytes(sa.LargeBinary):
    """Bytes as they are: SQLite's driver takes them, and a view around each of a block's thousands only costs time."""

    cache_ok = True

    def bind_processor(self, dialect: sa.Dialect) -> Any:  # noqa: ANN401 - as SQLAlchemy has it
        return None if dialect.name == "sqlite" else super().bind_processor(dialect)  # type: ignore[no-untyped-call]


_META = sa.MetaData()
BLOCKS = sa.Table(
    "blocks",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", _Bytes),
    sa.Column("note", _Bytes),
    sa.Column("leaf", _Bytes),
    sa.Column("edge", _Bytes),
    sa.Column("seal", _Bytes),
)
RECORDS = sa.Table(
    "records",
    _META,
    sa.Column("place", _Bytes, primary_key=True),
    sa.Column("key", sa.String),
    sa.Column("value", _Bytes),
)
SUBTREES = sa.Table(
    "subtrees",
    _META,
    sa.Column("prefix", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("hash", _Bytes),
    sa.Column("key_count", sa.BigInteger),
)
PACKS = sa.Table(
    "packs",
    _META,
    sa.Column("prefix", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("pack", _Bytes),
)
# One row a block. `last` is the highest block a transaction of these could stand in, `nonces` NONCE_BYTES each.
NONCES = sa.Table(
    "block_nonces",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("last", sa.BigInteger),
    sa.Column("nonces", _Bytes),
)
# By the last block it could stand in, then by its hash: what one block writes lies side by side.
TRANSACTIONS = sa.Table(
    "applied",
    _META,
    sa.Column("valid_until", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", _Bytes, primary_key=True),
    sa.Column("height", sa.BigInteger),
    sa.Column("position", sa.BigInteger),
)
SET_CHANGES = sa.Table(
    "set_changes",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("note", _Bytes),
    sa.Column("authorities", _Bytes),
)
PROPOSED = sa.Table(
    "proposed",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", _Bytes),
    sa.Column("seal", _Bytes),
    sa.Column("first_seal", _Bytes),
)
SIGNED = sa.Table(
    "signed",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", _Bytes),
    sa.Column("time_s", sa.BigInteger),
    sa.Column("seal", _Bytes),
)
COSIGNATURES = sa.Table(
    "cosignatures",
    _META,
    sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("authority", sa.String, primary_key=True),
    sa.Column("line", sa.Text),
)
TERMS = sa.Table(
    "terms",
    _META,
    sa.Column("term", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("sequencer", sa.String),
    sa.Column("certificate", _Bytes),
)
EVIDENCE = sa.Table(
    "evidence",
    _META,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("height", sa.BigInteger),
    sa.Column("found_ms", sa.BigInteger),
    sa.Column("body", _Bytes),
)
MARKS = sa.Table("marks", _META, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.BigInteger))
