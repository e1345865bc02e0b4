"""A broker's time: its machine's clock, and never earlier than the latest time that any broker of this database acted on.

A clock that is set back must not make an expired launch, lease or epoch good again. The mark is in the database (it is
raised by every consumption and every few seconds), so it holds over restarts and for all processes that share it. While the
clock is behind the mark, time stands still at the mark; an alarm says so once, and if it is the mark that was wrong (the
clock had been set far ahead), the operator accepts the present one (POST /v1/clock): what was leased until then is void.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Final

import structlog

from moorline.clock import Clock, Instant
from moorline.errors import MoorlineError
from moorline.storage.broker_store import BrokerStore

MARK_EVERY_S: Final = 5.0
_TOLERATED_S: Final = 30
_LOG: Final = structlog.stdlib.get_logger("broker")


class RisingClock:
    """A clock over another one that does not go back behind the store's mark."""

    def __init__(self, clock: Clock, store: BrokerStore) -> None:
        self._clock, self._store = clock, store
        self._turn = threading.Lock()
        self._told = False
        self._mark = store.mark_time(Instant(0))

    def now(self) -> Instant:
        """The present, or the mark if that is later."""
        with self._turn:
            self._mark = max(self._mark, self._clock.now())
            return self._mark

    def machine_now(self) -> Instant:
        """What the machine says, right or wrong."""
        return self._clock.now()

    def mark(self) -> None:
        """Raise the store's mark and take what other processes made of it; tell the operator of a clock set back."""
        at = self._clock.now()
        mark = self._store.mark_time(at)
        with self._turn:
            self._mark = mark
            tell = mark - at > _TOLERATED_S and not self._told
            self._told = mark - at > _TOLERATED_S
        if tell:
            says = "the clock was set back; time stands still until it has caught up"
            self._store.raise_alarm(
                code="broker.clock_set_back", says=says, first=f"mark {mark}", second=f"clock {at}", at=mark
            )


async def keep_marking(clock: RisingClock) -> None:
    """Mark the time every few seconds until cancelled."""
    while True:
        try:
            await asyncio.to_thread(clock.mark)
        except MoorlineError as error:
            _LOG.info("time not marked", code=error.code)  # a database that cannot be written consumes nothing either
        await asyncio.sleep(MARK_EVERY_S)
