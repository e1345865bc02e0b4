"""The pools of key pairs made ahead, as rows: who takes an entry deletes it in the same step, so nobody has it twice.

Functions of one transaction; none begins or ends here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage import broker_facts as facts
from moorline.storage.compiled import Compiled

POOL: Final = sa.table("pool", *(sa.column(name) for name in ("entry", "service", "profile", "public", "wrapped")))
_OF_SERVICE: Final = (POOL.c.service == sa.bindparam("of"), POOL.c.profile == sa.bindparam("for"))
_READY: Final = Compiled(sa.select(POOL).where(*_OF_SERVICE).order_by(POOL.c.entry).limit(sa.bindparam("most")))
_SIZE: Final = sa.select(sa.func.count().label("n")).select_from(POOL).where(*_OF_SERVICE)
_SIZES: Final = Compiled(
    sa.select(POOL.c.service, POOL.c.profile, sa.func.count().label("n")).group_by(POOL.c.service, POOL.c.profile)
)
_TAKE: Final = Compiled(sa.delete(POOL).where(POOL.c.entry == sa.bindparam("one")))
_TAKE_UP_TO: Final = Compiled(sa.delete(POOL).where(*_OF_SERVICE, POOL.c.entry <= sa.bindparam("last")))
_ADD: Final = sa.insert(POOL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEntry:
    """A pre-generated key pair: SubjectPublicKeyInfo, and the private key wrapped under the token."""

    public: bytes
    wrapped: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The pool entry a launch got, and its storage key. `again` if this is a retry that got the same ones."""

    public: bytes
    wrapped: bytes
    again: bool
    storage: bytes = b""


def add(c: sa.Connection, service: str, profile: str, entries: list[PoolEntry]) -> None:
    """Store pre-generated key pairs, at least one."""
    c.execute(_ADD, [{"service": service, "profile": profile, "public": e.public, "wrapped": e.wrapped} for e in entries])


def size(c: sa.Connection, service: str, profile: str) -> int:
    """How many key pairs wait for a service and profile."""
    return int(c.execute(_SIZE, {"of": service, "for": profile}).scalar_one())


def sizes(c: sa.Connection) -> dict[tuple[str, str], int]:
    """The fill of every pool that is not empty."""
    return {(row.service, row.profile): int(row.n) for row in _SIZES.all(c, {})}


def take_one(c: sa.Connection, service: str, profile: str) -> PoolEntry | None:
    """The oldest entry, gone from here; None from an empty pool."""
    row = _READY.one(c, {"of": service, "for": profile, "most": 1})
    if row is None:
        return None
    _TAKE.run(c, {"one": row.entry})
    return PoolEntry(public=row.public, wrapped=row.wrapped)


def take_some(c: sa.Connection, service: str, profile: str, count: int) -> tuple[PoolEntry, ...]:
    """Up to `count` of the oldest entries, gone from here."""
    rows = _READY.all(c, {"of": service, "for": profile, "most": count})
    if rows:
        _TAKE_UP_TO.run(c, {"of": service, "for": profile, "last": rows[-1].entry})
    return tuple(PoolEntry(public=row.public, wrapped=row.wrapped) for row in rows)


def take(c: sa.Connection, service: str, profile: str, *, count: int, at: Instant) -> tuple[Taken, ...]:
    """Up to `count` entries, gone from here, with an audit entry."""
    entries = take_some(c, service, profile, count)
    if entries:
        facts.append(c, at, "pool-taken", {"service": service, "profile": profile, "count": len(entries)})
    return tuple(Taken(public=one.public, wrapped=one.wrapped, again=False) for one in entries)


def empty(c: sa.Connection) -> None:
    """Drop every entry."""
    c.execute(sa.delete(POOL))
