"""What a block writes into an authority's database, statement by statement.

A block writes hundreds of rows while all wait for it. So statements are made once, and on SQLite, whose driver takes our
values as they are, the rows of a table go to it in one call without a look at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from moorline.storage.ledger_tables import (
    BLOCKS,
    COSIGNATURES,
    NONCES,
    PROPOSED,
    RECORDS,
    SIGNED,
    SUBTREES,
    TRANSACTIONS,
)
from moorline.storage.rows import upsert

Row = tuple[Any, ...]
"""Values of one row, in the order of the table's columns."""

_HEIGHT: Final[sa.BindParameter[int]] = sa.bindparam("height")
_OLD_NONCES: Final = sa.delete(NONCES).where(NONCES.c.valid_until <= _HEIGHT)
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


def put_block(connection: sa.Connection, row: Row, transactions: Sequence[bytes]) -> None:
    """Insert a block's row and the ids of its transactions."""
    height = row[0]
    _insert(connection, BLOCKS, [row])
    _insert(connection, TRANSACTIONS, [(one, height, position) for position, one in enumerate(transactions)])


def put_state(connection: sa.Connection, *, records: list[Row], subtrees: list[Row], nonces: list[Row]) -> None:
    """Put what changed in the state."""
    put(connection, RECORDS, records)
    put(connection, SUBTREES, subtrees)
    put(connection, NONCES, nonces)


def forget(connection: sa.Connection, height: int) -> None:
    """Take out what a block committed at this height makes needless, but for its nonces."""
    for statement in _OVER:
        connection.execute(statement, {"height": height})


def forget_nonces(connection: sa.Connection, height: int) -> None:
    """Take out nonces of transactions that can stand in no later block."""
    connection.execute(_OLD_NONCES, {"height": height})


def propose(connection: sa.Connection, row: Row) -> None:
    """Record a proposal; an abandoned one at its height gives way, with its cosignatures."""
    for statement in _ABANDONED:
        connection.execute(statement, {"height": row[0]})
    _insert(connection, PROPOSED, [row])


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
