"""How far each receiver of pushed events has been told (services.verifier_push).

A receiver that is new begins at the newest event there is: what stands already it asks for. From then on its cursor moves
only when it has accepted an event, one by one and in order, so that a crash on either side repeats one event at worst.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage import verifier_events
from moorline.storage.steps import reached
from moorline.storage.transactions import reading, retried, writing

_DELIVERIES: Final = sa.table("deliveries", *(sa.column(name) for name in ("receiver", "cursor", "failures", "code", "at")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One receiver: `cursor` of the last event it accepted; how often it failed since, the last time by `code` at `at`."""

    receiver: str
    cursor: int
    failures: int
    code: str
    at: Instant


@retried
class Deliveries:
    """The receivers' cursors in a verifier's database. Every method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def begin(self, receiver: str, *, at: Instant) -> Delivery:
        """What is known of a receiver; one that is new begins now, at the newest event."""
        with writing(self._engine) as connection:
            query = sa.select(_DELIVERIES).where(_DELIVERIES.c.receiver == receiver)
            row = connection.execute(query).mappings().one_or_none()
            if row is not None:
                return Delivery(**row)
            newest = verifier_events.newest_cursor(connection)
            new = Delivery(receiver=receiver, cursor=newest, failures=0, code="", at=at)
            connection.execute(sa.insert(_DELIVERIES).values(receiver=receiver, cursor=newest, failures=0, code="", at=at))
        return new

    def accepted(self, receiver: str, cursor: int, *, at: Instant) -> None:
        """The receiver has taken the event with this cursor; a process that says so late moves nothing back."""
        values = {"cursor": cursor, "failures": 0, "code": "", "at": at}
        with writing(self._engine) as connection:
            mine = sa.and_(_DELIVERIES.c.receiver == receiver, _DELIVERIES.c.cursor < cursor)
            connection.execute(sa.update(_DELIVERIES).where(mine).values(values))
        reached("verifier.event.accepted")

    def failed(self, receiver: str, failures: int, code: str, *, at: Instant) -> None:
        """The receiver could not be told, for the `failures`th time in a row."""
        values = {"failures": failures, "code": code, "at": at}
        with writing(self._engine) as connection:
            connection.execute(sa.update(_DELIVERIES).where(_DELIVERIES.c.receiver == receiver).values(values))

    def all(self) -> tuple[Delivery, ...]:
        """All receivers there ever were, by name."""
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(_DELIVERIES).order_by(_DELIVERIES.c.receiver)).mappings()
            return tuple(Delivery(**row) for row in rows)
