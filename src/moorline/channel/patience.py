"""One timer for all the waits of a connection, of which there is one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class Patience:
    """How long a connection's present wait may last. Owned by one event loop.

    A wait that ends in time leaves the timer where it is, for the next one: when it goes off it looks whether somebody waits
    and since when. So a session of six messages costs one timer and not one for each step.
    """

    __slots__ = ("_due", "_late", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: float | None = None
        self._late: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float, late: Callable[[], None]) -> None:
        """A wait begins; `late` is called if it did not `end` within so many seconds."""
        self._due, self._late = due, _ = self._loop.time() + seconds, late
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._look)

    def end(self) -> None:
        """The wait is over."""
        self._due = self._late = None

    def close(self) -> None:
        """There will be no more waits."""
        self.end()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        due, late = self._due, self._late
        if due is None or late is None:
            return
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._look)
            return
        self.end()
        late()
