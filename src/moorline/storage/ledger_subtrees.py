"""Reads one subtree of the state at a time, as often as a block touches one that is not in memory.

A state of a million records is read a hundred times a block. On SQLite one connection is kept for that, and each read is one
statement on a snapshot of its own, without the transaction around it that reading several things would take.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

_BETWEEN: Final = "SELECT key, value FROM records WHERE place >= ? AND place < ?"
_FROM: Final = "SELECT key, value FROM records WHERE place >= ?"
_PACK: Final = "SELECT pack FROM packs WHERE prefix = ?"


@dataclass(frozen=True, slots=True)
class FoundPack:
    """What was looked for; `pack` is None where there is none."""

    pack: bytes | None


class SubtreeReader:
    """For the thread that made it, and for SQLite."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: sa.PoolProxiedConnection | None = None
        self._between, self._from = _BETWEEN, _FROM

    def records(self, prefix: int) -> list[tuple[str, bytes]] | None:
        """Keys and values whose places begin with these 16 bits; None where the ordinary way has to be gone.

        That is on another database, and where this one errs: the ordinary way says how.
        """
        low = prefix.to_bytes(2, "big")
        if prefix == 0xFFFF:
            return self._rows(self._from, (low,))
        return self._rows(self._between, (low, (prefix + 1).to_bytes(2, "big")))

    def pack(self, prefix: int) -> FoundPack | None:
        """The packed subtree; None where the ordinary way has to be gone, as for `records`."""
        rows = self._rows(_PACK, (prefix,))
        return None if rows is None else FoundPack(rows[0][0] if rows else None)

    def _rows(self, statement: str, parameters: tuple[object, ...]) -> list[Any] | None:
        if self._engine.dialect.name != "sqlite":
            return None
        try:
            if self._connection is None:
                self._connection = self._engine.raw_connection()
            cursor = self._connection.cursor()
            cursor.execute(statement, parameters)
            return list(cursor.fetchall())  # to the end: a statement that is open would hold its snapshot
        except (sqlite3.Error, SQLAlchemyError):
            self.close()
            return None

    def close(self) -> None:
        """Give the connection back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
