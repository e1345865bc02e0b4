"""Verdicts gained and lost: events with a durable cursor (PROTOCOLS.md 8), written where the verdict is written.

A host stands from its first affirming result until that result is withdrawn or its lease runs out; `standings` holds the
hosts that stand. Each change of it is one event, in the same transaction, so that no crash makes an event without its
change or a change without its event, and nothing is told twice. Cursors rise with commits: SQLite has one writer at a time.
The same transaction writes the change into the secure log.

`patience_until` is when this verifier has been up for a whole lease. Before that a lease that ran out says nothing about
its host, which could not renew it while the verifier was away; the result itself has expired all the same, and whoever
asks for it is told so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Conflict
from moorline.storage import audit_store

AUDIT_DOMAIN: Final = "verifier"
LOST: Final = "verdict_lost"
GAINED: Final = "verdict_gained"
RAN_OUT: Final = "result.expired"

_EVENTS: Final = sa.table(
    "events", *(sa.column(name) for name in ("cursor", "host", "at", "kind", "code", "result_expires"))
)
_STANDINGS: Final = sa.table("standings", sa.column("host"), sa.column("expires"))


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictEvent:
    """One change. `code` says why a verdict was lost and is empty for one gained; `result_expires` is of that result."""

    cursor: int
    host: str
    at: Instant
    kind: str
    code: str
    result_expires: Instant


def lost(connection: sa.Connection, host: str, code: str, *, at: Instant) -> None:
    """The host stands no more, because of `code`; nothing if it did not stand."""
    expires = connection.execute(sa.select(_STANDINGS.c.expires).where(_STANDINGS.c.host == host)).scalar()
    if expires is None:
        return
    connection.execute(sa.delete(_STANDINGS).where(_STANDINGS.c.host == host))
    _tell(connection, host, at, LOST, code, expires)


def gained(connection: sa.Connection, host: str, expires: Instant, *, at: Instant, patience_until: Instant) -> None:
    """The host stands until `expires`. One whose lease ran out meanwhile lost its verdict before it gained this one."""
    before = connection.execute(sa.select(_STANDINGS.c.expires).where(_STANDINGS.c.host == host)).scalar()
    if before is not None and before <= at and patience_until <= at:
        lost(connection, host, RAN_OUT, at=at)
        before = None
    if before is None:
        connection.execute(sa.insert(_STANDINGS).values(host=host, expires=expires))
        _tell(connection, host, at, GAINED, "", expires)
    else:
        connection.execute(sa.update(_STANDINGS).where(_STANDINGS.c.host == host).values(expires=expires))


def gained_first(connection: sa.Connection, gained_now: Sequence[tuple[str, Instant, Instant]]) -> None:
    """As `gained`, for many hosts that did not stand: name, when, and until when each stands. A fleet may begin at once."""
    if not gained_now:
        return
    connection.execute(sa.insert(_STANDINGS), [{"host": host, "expires": expires} for host, _, expires in gained_now])
    told = [
        {"host": host, "at": at, "kind": GAINED, "code": "", "result_expires": expires} for host, at, expires in gained_now
    ]
    connection.execute(sa.insert(_EVENTS), told)
    for at, group in groupby(told, key=itemgetter("at")):
        happened = [_happened(one) for one in group]
        audit_store.append_all(connection, AUDIT_DOMAIN, at=at, happened=happened)


def ran_out(connection: sa.Connection, *, at: Instant, latest: Instant) -> tuple[str, ...]:
    """The hosts that still stand by a lease that has run out, or that ends after `latest`, as none does.

    The second are leases given by a clock that has gone back since, to hosts that have not attested again.
    """
    over = sa.or_(_STANDINGS.c.expires <= at, _STANDINGS.c.expires > latest)
    query = sa.select(_STANDINGS.c.host).where(over).order_by(_STANDINGS.c.host)
    return tuple(row.host for row in connection.execute(query))


def page(connection: sa.Connection, *, after: int, limit: int) -> tuple[tuple[VerdictEvent, ...], int]:
    """Events after a cursor in order, and the newest cursor there is.

    Raises Conflict("events.cursor_unknown") for a cursor this database has not reached: it is older than its reader.
    """
    newest = newest_cursor(connection)
    if after > newest:
        raise Conflict(
            "events.cursor_unknown",
            "no event has this cursor; the verifier's database was restored",
            expected=f"<= {newest}",
            got=after,
            remedy="look at what stands now (GET /v1/hosts) and go on from `newest`",
        )
    query = sa.select(_EVENTS).where(_EVENTS.c.cursor > after).order_by(_EVENTS.c.cursor).limit(limit)
    return tuple(VerdictEvent(**row) for row in connection.execute(query).mappings()), newest


def newest_cursor(connection: sa.Connection) -> int:
    """The newest cursor, 0 if there was no event yet."""
    return int(connection.execute(sa.select(sa.func.max(_EVENTS.c.cursor))).scalar() or 0)


def _tell(connection: sa.Connection, host: str, at: Instant, kind: str, code: str, expires: Any) -> None:  # noqa: ANN401 - a column
    values = {"host": host, "at": at, "kind": kind, "code": code, "result_expires": expires}
    connection.execute(sa.insert(_EVENTS).values(values))
    audit_store.append_all(connection, AUDIT_DOMAIN, at=at, happened=[_happened(values)])


def _happened(event: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
    """What the secure log says of an event."""
    return event["kind"].replace("_", "-"), {name: event[name] for name in ("host", "code", "result_expires")}
