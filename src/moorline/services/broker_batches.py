"""Requests of one kind, answered several at a time: one thread and one transaction for those that come together.

Nobody waits for company: who comes while no batch is under way begins one, and those who come meanwhile are the next. With
two under way at a time each was half as large: while one waited for the disk the other computed, and all of them paid for
twice as many transactions, and for two threads that take turns with the interpreter's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")

BATCH_MAX: Final = 32


class Batches(Generic[A, B]):
    """Those who ask, of one broker process. Owned by one event loop."""

    def __init__(self) -> None:
        self._waiting: list[tuple[A, asyncio.Future[B]]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, wanted: A, answer: Callable[[Sequence[A]], Sequence[B | Exception]]) -> B:
        """What `answer`, in a thread, says to `wanted` among those that ask now, or the exception it has for it.

        `answer` gives each its own outcome, in order; what it raises is raised to all of its batch.
        """
        asked: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, asked))
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run(answer))
        return await asked

    async def _run(self, answer: Callable[[Sequence[A]], Sequence[B | Exception]]) -> None:
        while self._waiting:  # found empty, this task is done in the same step: whoever comes next begins another
            some, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
            outcomes: Sequence[B | Exception]
            try:
                outcomes = await asyncio.to_thread(answer, [wanted for wanted, _ in some])
            except Exception as error:  # whatever it was, everybody who waits for this batch is told
                outcomes = [error] * len(some)
            for (_, asked), outcome in zip(some, outcomes, strict=True):
                _tell(asked, outcome)


def _tell(asked: asyncio.Future[B], outcome: B | Exception) -> None:
    if asked.done():  # who asked is gone
        return
    if isinstance(outcome, Exception):
        asked.set_exception(outcome)
    else:
        asked.set_result(outcome)
