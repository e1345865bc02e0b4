"""A process of a verifier among others over one database: it lives, watches its part of the fleet, and takes over.

1. Every BEAT_S it beats (storage.verifier_watch) and learns which parts it holds.
2. It remembers when it saw each other process beat last, by a clock that never goes back. One whose beat stood still for
   `takeover_s` is dead: at the next beat its parts are free, and taken.
3. It holds its own parts for `takeover_s` after its own last beat and not longer, so that a process that was stopped, or cut
   off from the database, lets go by itself when the others take over.

`sweep` and `follow` are what a process does by itself: tell of silent hosts of its parts, and wake its readers for events
that any process wrote. A database that is away is waited for.

Between 2 and 3 two processes can believe that they hold a part, for a beat at most; all that is done for a part is written
in transactions that are true of it only once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog

from moorline.errors import MoorlineError
from moorline.services.attestation_authority import AttestationAuthority
from moorline.storage.verifier_watch import Watchers, part_of

BEAT_S: Final = 1.0
SWEEP_EVERY_S: Final = 1.0
FOLLOW_EVERY_S: Final = 0.5
_LOG: Final = structlog.stdlib.get_logger("verifier")


class Watch:
    """The watch of one process. `steady` is a clock (s) that never goes back; `ready` says whether it may blame hosts."""

    def __init__(
        self,
        watchers: Watchers,
        *,
        process: str,
        takeover_s: float,
        steady: Callable[[], float],
        ready: Callable[[], bool],
    ) -> None:
        self._watchers, self._process, self._takeover_s = watchers, process, takeover_s
        self._steady, self._ready = steady, ready
        self._seen: dict[str, tuple[int, float]] = {}
        self._parts: frozenset[int] = frozenset()
        self._until = steady()

    def beat(self) -> None:
        """Numbers 1 and 2 of the module. Raises Unavailable where the database cannot be reached."""
        began = self._steady()
        dead = {name: beat for name, (beat, at) in self._seen.items() if began - at >= self._takeover_s}
        learnt = self._watchers.beat(self._process, ready=self._ready(), dead=dead)
        now = self._steady()
        before, self._seen = self._seen, {}
        for name, beat in learnt.others.items():
            known = before.get(name)
            self._seen[name] = known if known is not None and known[0] == beat else (beat, now)
        self._parts = learnt.parts
        self._until = began + self._takeover_s  # from before the question: nobody can have called it dead earlier

    def holds(self, name: str) -> bool:
        """Whether this process watches the host or receiver of this name now."""
        return self._steady() < self._until and part_of(name) in self._parts

    @property
    def parts(self) -> int:
        """How many parts of the fleet this process watches now."""
        return len(self._parts) if self._steady() < self._until else 0

    async def keep(self) -> None:
        """Beat until cancelled; then let go."""
        try:
            while True:
                try:
                    await asyncio.to_thread(self.beat)
                except MoorlineError as error:
                    _LOG.warning("watch", **error.as_problem())
                await asyncio.sleep(BEAT_S)
        finally:
            with contextlib.suppress(MoorlineError):
                self._watchers.leave(self._process)


async def sweep(authority: AttestationAuthority, watch: Watch) -> None:
    """Tell of silent hosts, soon after their lease ran out, until cancelled."""
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        try:
            await authority.sweep(watch.holds)
        except MoorlineError as error:
            _LOG.warning("sweep", **error.as_problem())


async def follow(authority: AttestationAuthority) -> None:
    """Wake whoever waits for events when another process wrote some, until cancelled."""
    known = 0
    while True:
        try:
            newest = await asyncio.to_thread(authority.newest_event)
        except MoorlineError as error:
            _LOG.warning("events", **error.as_problem())
        else:
            if newest != known:
                known = newest
                authority.tell_readers()
        await asyncio.sleep(FOLLOW_EVERY_S)
