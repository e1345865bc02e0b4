"""Rows that are written whether or not they are there already, in either database's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite


def put(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, or write over those whose primary key is there already."""
    connection.execute(upsert(connection.dialect.name, table), [dict(row) for row in rows])


@lru_cache(maxsize=32)  # bounded: one entry a table and kind of database
def upsert(dialect: str, table: sa.Table) -> Any:  # noqa: ANN401 - each kind of database has its own type of it
    """The statement that does it."""
    kind = postgresql if dialect == "postgresql" else sqlite
    statement = kind.insert(table)
    keys = [column.name for column in table.primary_key]
    others = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=others)
