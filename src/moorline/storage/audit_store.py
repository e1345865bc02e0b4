"""The secure log of a service, in the table `audit` of its own database.

An entry is written in the transaction of the thing it records, on that transaction's connection: what happened and that it
happened become durable together, or not at all. Rows are only ever added. What protects them against whoever may write to
the database file is not here: checkpoints signed by the HSM key, and the ledger (services.broker_audit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa

from moorline.audit.log import encode_entry, entry_digest, first_head
from moorline.clock import Instant
from moorline.storage.compiled import Compiled, insert_into

AUDIT: Final = sa.table("audit", sa.column("number"), sa.column("data"))
LAST: Final = sa.select(AUDIT).order_by(AUDIT.c.number.desc()).limit(1)
_FIND_LAST: Final = Compiled(LAST)
_INSERT: Final = insert_into(AUDIT)
_SUBJECT_CHARS: Final = 512
_VALUE_CHARS: Final = 4096


def append(connection: sa.Connection, domain: str, *, at: Instant, event: str, body: Mapping[str, object]) -> int:
    """One entry, in the caller's transaction; its number. Bytes are written in hex; the first of `body` is its subject.

    `body` is public facts, never a secret; a long text is cut. `domain` is the service's, and the same for every entry.
    """
    return append_all(connection, domain, at=at, happened=((event, body),))


def append_all(
    connection: sa.Connection, domain: str, *, at: Instant, happened: Sequence[tuple[str, Mapping[str, object]]]
) -> int:
    """As `append`, several entries (event, body) in their order, at least one; the number of the last."""
    # The caller's transaction is the only writer (storage.transactions): nobody else continues from the same last entry.
    last = _FIND_LAST.one(connection, {})
    rows_made = following(domain, None if last is None else (last.number, last.data), at=at, happened=happened)
    _INSERT.run(connection, *rows_made)
    return int(rows_made[-1]["number"])


def following(
    domain: str, last: tuple[int, bytes] | None, *, at: Instant, happened: Sequence[tuple[str, Mapping[str, object]]]
) -> list[dict[str, Any]]:
    """The rows that continue a log whose last entry (number, data) is `last`; None for a log without any."""
    number, previous = (0, first_head(domain)) if last is None else (last[0] + 1, entry_digest(last[1]))
    rows_made = []
    for event, body in happened:
        data = _encoded(number, previous, at, event, body)
        rows_made.append({"number": number, "data": data})
        number, previous = number + 1, entry_digest(data)
    return rows_made


def _encoded(number: int, previous: bytes, at: Instant, event: str, body: Mapping[str, object]) -> bytes:
    details = {name: _text(value) for name, value in body.items()}
    return encode_entry(
        number=number,
        previous=previous,
        time=at,
        event=event,
        subject=next(iter(details.values()), "")[:_SUBJECT_CHARS],
        details=details,
    )


def entries(connection: sa.Connection, *, first: int = 0, limit: int = 1000) -> tuple[bytes, ...]:
    """Encoded entries (audit.log.LogEntry) from number `first` on, in order."""
    return tuple(data for _, data in rows(connection, first=first, limit=limit))


def rows(connection: sa.Connection, *, first: int, limit: int) -> tuple[tuple[int, bytes], ...]:
    """The same with the numbers they are kept under, for whoever must also read a log that somebody changed."""
    query = sa.select(AUDIT).where(AUDIT.c.number >= first).order_by(AUDIT.c.number).limit(limit)
    return tuple((int(row.number), bytes(row.data)) for row in connection.execute(query))


def _text(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= _VALUE_CHARS else text[: _VALUE_CHARS - 1] + "…"
