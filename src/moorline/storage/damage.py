"""A database that is damaged or full, in our words: a reader has to know whether to make room or to repair."""

from __future__ import annotations

import re
from typing import Final

import sqlalchemy as sa

from moorline.errors import Misconfigured, Unavailable
from moorline.storage.transactions import reading

_TABLE: Final = re.compile(r"\b(?:FROM|INTO|UPDATE|TABLE)\s+\"?(\w+)", re.IGNORECASE)
_CORRUPT: Final = ("malformed", "not a database", "disk I/O error", "database corruption")


def named(context: sa.engine.ExceptionContext) -> None:
    """For the event handle_error. Raises Misconfigured("ledger.database_corrupt"), Unavailable("storage.full")."""
    says = str(context.original_exception)
    if any(word in says for word in _CORRUPT):
        found = _TABLE.search(context.statement or "")
        raise Misconfigured(
            "ledger.database_corrupt",
            "this authority's database is damaged",
            got=f"{says}, in table {found[1]}" if found else says,
            remedy="stop this authority and repair from the others: moor ledger repair",
        ) from None
    if "full" in says:
        raise Unavailable(
            "storage.full", "there is no room to write", got=says, remedy="make room, and start again"
        ) from None


def pages(engine: sa.Engine) -> list[str]:
    """What SQLite's own check finds, page by page; empty if nothing, and on databases that check themselves."""
    if engine.dialect.name != "sqlite":
        return []
    with reading(engine) as connection:
        found = [str(row[0]) for row in connection.execute(sa.text("PRAGMA quick_check(5)"))]
    return [] if found == ["ok"] else found
