"""What the broker's database says of itself: numbers and documents by name, alarms, and entries of the secure log.

Functions of one transaction; none begins or ends here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage import audit_store
from moorline.storage.compiled import Compiled, insert_into

AUDIT_DOMAIN: Final = "broker"
COUNTER: Final = "counter"
TIME_MARK: Final = "time-mark"
HALTED: Final = "halted"

FACTS: Final = sa.table("facts", sa.column("name"), sa.column("value"))
_DOCUMENTS: Final = sa.table("documents", sa.column("name"), sa.column("value"))
_ALARMS: Final = sa.table("alarms", *(sa.column(name) for name in ("alarm", "at", "code", "says", "first", "second")))

# The statements of what is asked for many times a second are made once: building one anew costs several times its execution.
_FACT: Final = Compiled(sa.select(FACTS.c.value).where(FACTS.c.name == sa.bindparam("of")))
_FORGET_FACT: Final = Compiled(sa.delete(FACTS).where(FACTS.c.name == sa.bindparam("of")))
_KEEP_FACT: Final = insert_into(FACTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something a person must look at; `first` and `second` name what collided."""

    alarm: int
    at: Instant
    code: str
    says: str
    first: str
    second: str


def fact(c: sa.Connection, name: str) -> int:
    """A stored number; 0 if it was never set."""
    row = _FACT.one(c, {"of": name})
    return 0 if row is None else int(row.value)


def set_fact(c: sa.Connection, name: str, value: int) -> None:
    """Store a number."""
    _FORGET_FACT.run(c, {"of": name})
    _KEEP_FACT.run(c, {"name": name, "value": value})


def risen(c: sa.Connection, at: Instant) -> Instant:
    """The mark behind which time never goes back, raised to `at`."""
    mark = Instant(fact(c, TIME_MARK))
    if at <= mark:
        return mark
    set_fact(c, TIME_MARK, at)
    return at


def document(c: sa.Connection, name: str) -> bytes | None:
    """Stored bytes, or None."""
    found = c.execute(sa.select(_DOCUMENTS.c.value).where(_DOCUMENTS.c.name == name)).scalar()
    return None if found is None else bytes(found)


def set_document(c: sa.Connection, name: str, value: bytes) -> None:
    """Store bytes under a name."""
    c.execute(sa.delete(_DOCUMENTS).where(_DOCUMENTS.c.name == name))
    c.execute(sa.insert(_DOCUMENTS).values(name=name, value=value))


def alarm(c: sa.Connection, at: Instant, code: str, says: str, first: str, second: str) -> None:
    """An alarm, with its audit entry."""
    c.execute(sa.insert(_ALARMS).values(at=at, code=code, says=says, first=first, second=second))
    append(c, at, "alarm", {"code": code, "first": first, "second": second})


def alarms(c: sa.Connection, limit: int) -> tuple[Alarm, ...]:
    """The latest alarms, newest first."""
    query = sa.select(_ALARMS).order_by(_ALARMS.c.alarm.desc()).limit(limit)
    return tuple(Alarm(**row) for row in c.execute(query).mappings())


def append(c: sa.Connection, at: Instant, event: str, body: Mapping[str, object]) -> None:
    """One entry of the secure log; the first of its details is its subject."""
    audit_store.append(c, AUDIT_DOMAIN, at=at, event=event, body=body)


def append_all(c: sa.Connection, at: Instant, happened: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """As `append`, several entries (event, body) in order."""
    audit_store.append_all(c, AUDIT_DOMAIN, at=at, happened=happened)
