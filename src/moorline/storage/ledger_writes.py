"""What a block writes into an authority's database, statement by statement.

A block writes hundreds of rows while all wait for it. So statements are made once, and on SQLite, whose driver takes our
values as they are, the rows of a table go to it in one call without a look at each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from moorline.storage.ledger_tables import (
    BLOCKS,
    COSIGNATURES,
    NONCES,
    PACKS,
    PROPOSED,
    RECORDS,
    SIGNED,
    SUBTREES,
    TRANSACTIONS,
)
from moorline.storage.rows import upsert

Row = tuple[Any, ...]
"""Values of one row, in the order of the table's columns."""

_NONCE_BYTES: Final = 32
_UNTIL_BYTES: Final = 8
_HEIGHT: Final[sa.BindParameter[int]] = sa.bindparam("height")
_OLD_NONCES: Final = sa.delete(NONCES).where(NONCES.c.last <= _HEIGHT)
# What was signed at this height stays until the next one is: it answers a repeated request.
_OVER: Final = (
    sa.delete(PROPOSED).where(PROPOSED.c.height <= _HEIGHT),
    sa.delete(COSIGNATURES).where(COSIGNATURES.c.height <= _HEIGHT),
    sa.delete(SIGNED).where(SIGNED.c.height < _HEIGHT),
)
_ABANDONED: Final = (
    sa.delete(PROPOSED).where(PROPOSED.c.height == _HEIGHT),
    sa.delete(COSIGNATURES).where(COSIGNATURES.c.height == _HEIGHT),
)


def put_block(connection: sa.Connection, row: Row, transactions: Sequence[tuple[bytes, int]]) -> None:
    """Insert a block's row, and of each of its transactions id and last block it could stand in."""
    height = row[0]
    _insert(connection, BLOCKS, [row])
    rows = [(until, one, height, position) for position, (one, until) in enumerate(transactions)]
    _insert(connection, TRANSACTIONS, rows)


def put_state(
    connection: sa.Connection, *, height: int, records: list[Row], subtrees: list[Row], packs: list[Row], nonces: list[Row]
) -> None:
    """Put what changed in the state; the nonces are those of the block at this height."""
    put(connection, RECORDS, records)
    put(connection, SUBTREES, subtrees)
    put(connection, PACKS, packs)
    if nonces:
        together = b"".join([nonce + until.to_bytes(_UNTIL_BYTES, "big") for nonce, until in nonces])
        put(connection, NONCES, [(height, max(until for _, until in nonces), together)])


def nonces_of(together: bytes) -> Mapping[bytes, int]:
    """What a row of nonces holds: each with the last block its transaction could stand in."""
    starts = range(0, len(together), _NONCE_BYTES + _UNTIL_BYTES)
    pairs = (
        (together[at : at + _NONCE_BYTES], together[at + _NONCE_BYTES : at + _NONCE_BYTES + _UNTIL_BYTES]) for at in starts
    )
    return {nonce: int.from_bytes(until, "big") for nonce, until in pairs}


def forget(connection: sa.Connection, height: int) -> None:
    """Take out what a block committed at this height makes needless, but for its nonces."""
    for statement in _OVER:
        _at(connection, statement, height)


def forget_nonces(connection: sa.Connection, height: int) -> None:
    """Take out nonces of blocks whose transactions can stand in no later block."""
    _at(connection, _OLD_NONCES, height)


def propose(connection: sa.Connection, row: Row) -> None:
    """Record a proposal; an abandoned one at its height gives way, with its cosignatures."""
    for statement in _ABANDONED:
        _at(connection, statement, row[0])
    _insert(connection, PROPOSED, [row])


def _at(connection: sa.Connection, statement: sa.Delete, height: int) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_delete_text(statement), (height,))
    else:
        connection.execute(statement, {"height": height})


@lru_cache(maxsize=16)  # bounded: one entry a statement of this module
def _delete_text(statement: sa.Delete) -> str:
    return str(statement.compile(dialect=sqlite.dialect()))


def put(connection: sa.Connection, table: sa.Table, rows: list[Row]) -> None:
    """Insert rows, or write over those whose primary key is there already."""
    _many(connection, table, rows, over=True)


def _insert(connection: sa.Connection, table: sa.Table, rows: list[Row]) -> None:
    _many(connection, table, rows, over=False)


def _many(connection: sa.Connection, table: sa.Table, rows: list[Row], *, over: bool) -> None:
    if not rows:
        return
    dialect = connection.dialect.name
    if dialect == "sqlite":
        connection.exec_driver_sql(_text(table, over=over), rows)
    else:
        names = [column.name for column in table.columns]
        connection.execute(_statement(dialect, table, over=over), [dict(zip(names, row, strict=True)) for row in rows])


@lru_cache(maxsize=32)  # bounded: one entry a table
def _text(table: sa.Table, *, over: bool) -> str:
    return str((upsert("sqlite", table) if over else sa.insert(table)).compile(dialect=sqlite.dialect()))


def _statement(dialect: str, table: sa.Table, *, over: bool) -> sa.Executable:
    found: sa.Executable = upsert(dialect, table) if over else sa.insert(table)
    return found
