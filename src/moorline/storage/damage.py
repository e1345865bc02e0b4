"""A database that is damaged or full, in our words: a reader has to know whether to make room or to repair.

SQLite finds a damaged page when it reads it, and says so. Two things it does not say: that a page it has not read yet
is damaged (`judge` has it look, where the file is not too large for a start), and that the end of its write-ahead log
is gone. A frame of the log whose checksum is wrong ends the log for SQLite, as the trace of a transaction that was
never finished, and all that was committed behind it is forgotten in silence. For an authority that would be a signature
it forgets.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import struct
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from moorline.errors import Misconfigured, Unavailable
from moorline.storage.transactions import reading

_TABLE: Final = re.compile(r"\b(?:FROM|INTO|UPDATE|TABLE)\s+\"?(\w+)", re.IGNORECASE)
AT_START_BYTES: Final = 128 << 20
"""A larger file is not read as a whole at the start."""
_SQLITE: Final = "sqlite:///"
_HEADER: Final = struct.Struct(">8I")
_FRAME: Final = struct.Struct(">6I")
_MAGIC: Final = 0x377F0682
_HEADER_DAMAGED: Final = 1 << 32
_CORRUPT: Final = ("malformed", "not a database", "disk I/O error", "database corruption")


def named(context: sa.engine.ExceptionContext) -> None:
    """For the event handle_error. Raises Misconfigured("ledger.database_corrupt"), Unavailable("storage.full")."""
    says = str(context.original_exception)
    if any(word in says for word in _CORRUPT):
        found = _TABLE.search(context.statement or "")
        raise _corrupt(f"{says}, in table {found[1]}" if found else says) from None
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


def judge(url: str) -> None:
    """For an authority that starts, before it opens its database. Raises Misconfigured("ledger.database_corrupt").

    Does nothing for a database that is no SQLite file, or not there yet.
    """
    file = Path(url.removeprefix(_SQLITE))
    if not url.startswith(_SQLITE) or not file.exists():
        return
    present = _committed_in_log(file.with_name(file.name + "-wal"))
    try:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            kept = max(0, connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1])
            if present > kept:
                raise _corrupt(f"its write-ahead log is damaged behind frame {kept} of {present}")
            found = []
            if file.stat().st_size <= AT_START_BYTES:
                found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(5)")]
    except sqlite3.DatabaseError as error:
        raise _corrupt(str(error)) from None
    if found not in ([], ["ok"]):
        raise _corrupt("; ".join(found).removeprefix("*** in database main ***").strip())


def _committed_in_log(log: Path) -> int:
    """The number of the last frame that ends a transaction, as the frames say themselves (SQLite, "WAL file format").

    A log whose header is damaged counts as more than SQLite can find in it. A frame that the file ends in was being written
    when its process was killed; a log that was cut off between two frames cannot be told from one that was not written.
    """
    size = log.stat().st_size if log.exists() else 0
    if size < _HEADER.size:
        return 0
    with log.open("rb") as file:
        head = file.read(_HEADER.size)
        magic, _, page, _, *salts, _, _ = _HEADER.unpack(head)
        if magic & ~1 != _MAGIC or _sum(head[:24], big=bool(magic & 1)) != _HEADER.unpack(head)[6:]:
            return _HEADER_DAMAGED
        last, step = 0, _FRAME.size + page
        for number in range(1, (size - _HEADER.size) // step + 1):
            file.seek(_HEADER.size + (number - 1) * step)
            _, ends, *found, _, _ = _FRAME.unpack(file.read(_FRAME.size))
            if ends and found == salts:  # else of the log that was here before, overwritten so far and no further
                last = number
        return last


def _sum(data: bytes, *, big: bool) -> tuple[int, int]:
    """The checksum of a log."""
    first = second = 0
    for one, other in struct.iter_unpack(">2I" if big else "<2I", data):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second


def _corrupt(got: str) -> Misconfigured:
    return Misconfigured(
        "ledger.database_corrupt",
        "this authority's database is damaged",
        got=got,
        remedy="do not change it by hand; repair it from the others: moor ledger repair",
    )
