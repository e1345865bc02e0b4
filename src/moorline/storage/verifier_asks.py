"""Hosts that are asked to show at once what they are: on suspicion, on a change of use, or because a verifier pulls.

A question has a number, and these rise. A challenge carries the number of the newest question that was open for its host
when it was given, so evidence answers the questions up to that number and none that came later: what a host quoted before it
was asked is no answer. An answer ends the question, whatever it says; a question that nobody answered in its time ends the
verdict (`UNANSWERED`), since a host that hides when it is asked is worth no more than one that fell silent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Unavailable
from moorline.storage import audit_store, verifier_events

OPEN_MAX: Final = 8
"""Questions open for one host at a time."""
UNANSWERED: Final = "host.ask_unanswered"
_ASKS: Final = sa.table(
    "asks", *(sa.column(name) for name in ("number", "host", "reason", "says", "asked_by", "at", "until"))
)
_NEWEST: Final = sa.select(_ASKS.c.host, sa.func.max(_ASKS.c.number)).group_by(_ASKS.c.host)
_NEWEST_NAMED: Final = _NEWEST.where(_ASKS.c.host.in_(sa.bindparam("names", expanding=True)))


class Reason(StrEnum):
    """Why a host is asked (SEC009 5.1.2)."""

    SUSPICION = "suspicion"
    CHANGE_OF_USE = "change_of_use"
    PERIOD = "period"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question to one host: why, in whose words, by whom; from when, and until when it has to be answered."""

    host: str
    reason: Reason
    says: str
    asked_by: str
    at: Instant
    until: Instant


def put(connection: sa.Connection, ask: Ask) -> int:
    """Open a question; its number. Raises Unavailable("host.asked_too_often")."""
    here = sa.select(sa.func.count()).select_from(_ASKS).where(_ASKS.c.host == ask.host)
    if int(connection.execute(here).scalar() or 0) >= OPEN_MAX:
        raise Unavailable(
            "host.asked_too_often",
            "this host has not answered the questions before",
            expected=f"< {OPEN_MAX} open questions",
            remedy="wait for its answer",
            retry_after_s=5,
        )
    values = {
        "host": ask.host,
        "reason": ask.reason.value,
        "says": ask.says,
        "asked_by": ask.asked_by,
        "at": ask.at,
        "until": ask.until,
    }
    number = int(connection.execute(sa.insert(_ASKS).values(values).returning(_ASKS.c.number)).scalar_one())
    if ask.reason is not Reason.PERIOD:  # what a person or service wanted to know is part of the record
        body = {"host": ask.host, "number": number, "reason": ask.reason.value, "says": ask.says, "asked_by": ask.asked_by}
        audit_store.append(connection, verifier_events.AUDIT_DOMAIN, at=ask.at, event="host-asked", body=body)
    return number


def newest(connection: sa.Connection, hosts: Iterable[str] | None = None) -> dict[str, int]:
    """The number of the newest open question of each host that has one; of all hosts, or of these."""
    found = connection.execute(_NEWEST) if hosts is None else connection.execute(_NEWEST_NAMED, {"names": list(hosts)})
    return {host: int(number) for host, number in found}


def is_open(connection: sa.Connection, number: int) -> bool:
    """Whether a question still waits for its answer."""
    return connection.execute(sa.select(_ASKS.c.number).where(_ASKS.c.number == number)).scalar() is not None


def answered(connection: sa.Connection, up_to: Mapping[str, int]) -> None:
    """These hosts have answered their questions up to a number."""
    for host, number in up_to.items():
        connection.execute(sa.delete(_ASKS).where(_ASKS.c.host == host, _ASKS.c.number <= number))


def overdue(connection: sa.Connection, *, at: Instant) -> tuple[str, ...]:
    """The hosts that let a question's time pass."""
    query = sa.select(_ASKS.c.host).where(_ASKS.c.until <= at).distinct().order_by(_ASKS.c.host)
    return tuple(row.host for row in connection.execute(query))


def give_up(connection: sa.Connection, host: str, *, at: Instant) -> None:
    """End the questions to a host whose time has passed."""
    connection.execute(sa.delete(_ASKS).where(_ASKS.c.host == host, _ASKS.c.until <= at))
