"""Requests of one kind, answered several at a time: one thread and one transaction for those that come together.

Nobody waits for company: who comes while no batch is under way begins one, and those who come meanwhile are the next. With
two under way at a time each was half as large: while one waited for the disk the other computed, and all of them paid for
twice as many transactions, and for two threads that take turns with the interpreter's lock.

A batch is one call into a thread of its own and one word back for all of it: no task, no future and no waking for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")

BATCH_MAX: Final = 32


class Batches(Generic[A, B]):
    """Those who ask, of one broker process. Owned by one event loop."""

    def __init__(self) -> None:
        self._waiting: list[tuple[A, asyncio.Future[B]]] = []
        self._under_way = False
        self._thread = ThreadPoolExecutor(max_workers=1)  # begun when first needed; ends with this object

    async def ask(self, wanted: A, answer: Callable[[Sequence[A]], Sequence[B | Exception]]) -> B:
        """What `answer`, in a thread, says to `wanted` among those that ask now, or the exception it has for it.

        `answer` gives each its own outcome, in order; what it raises is raised to all of its batch.
        """
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[B] = loop.create_future()
        self._waiting.append((wanted, asked))
        if not self._under_way:
            self._under_way = True
            loop.call_soon(self._begin, loop, answer)  # with all who ask in this turn of the loop
        return await asked

    def _begin(self, loop: asyncio.AbstractEventLoop, answer: Callable[[Sequence[A]], Sequence[B | Exception]]) -> None:
        some, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
        wanted = [one for one, _ in some]

        def told(outcomes: Sequence[B | Exception]) -> None:
            self._under_way = bool(self._waiting)
            if self._under_way:
                self._begin(loop, answer)
            for (_, asked), outcome in zip(some, outcomes, strict=True):
                _tell(asked, outcome)

        def answered() -> None:
            outcomes: Sequence[B | Exception]
            try:
                outcomes = answer(wanted)
            except Exception as error:  # whatever it was, everybody who waits for this batch is told
                outcomes = [error] * len(wanted)
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                loop.call_soon_threadsafe(told, outcomes)

        self._thread.submit(answered)


def _tell(asked: asyncio.Future[B], outcome: B | Exception) -> None:
    if asked.done():  # who asked is gone
        return
    if isinstance(outcome, Exception):
        asked.set_exception(outcome)
    else:
        asked.set_result(outcome)
