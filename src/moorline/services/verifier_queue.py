"""Evidence, or requests for challenges, that wait for their round.

Whatever came while one round was under way is the next, so that a verifier under load reads and writes its database for many
hosts at once, and one that is not answers each host at once. A round costs as much as ten hosts in it do; so where several
hosts came together, the next round lets others come, GATHER_S from one to the next, unless it is full.

A host is in a round once: what else it sent waits for the next, in the order in which it came.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from moorline.errors import MoorlineError, Unavailable

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

MOST: Final = 128
"""Hosts in one round at most: what one transaction holds, and how long the process does nothing else."""
MAX_WAITING: Final = 20_000
GATHER_S: Final = 0.05
"""A fleet of ten thousand under a period of ten seconds has fifty hosts in a round then, and one of two hundred, one."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[Asked, Answer]):
    """What one host sent, and whoever waits for what becomes of it."""

    host: str
    asked: Asked
    answer: asyncio.Future[Answer]

    def tell(self, said: Answer | MoorlineError) -> None:
        """Answer whoever waits; who gave up is not told."""
        if self.answer.done():
            return
        if isinstance(said, MoorlineError):
            self.answer.set_exception(said)
        else:
            self.answer.set_result(said)


class VerifierQueue(Generic[Asked, Answer]):
    """Rounds, one after the other. `settle` takes one and tells every entry of it; what it raises is told to all."""

    def __init__(self, settle: Callable[[list[Entry[Asked, Answer]]], Awaitable[None]]) -> None:
        self._settle = settle
        self._waiting: list[Entry[Asked, Answer]] = []
        self._running: asyncio.Task[None] | None = None
        self._full = asyncio.Event()

    async def join(self, host: str, asked: Asked) -> Answer:
        """What becomes of this. Raises what became of it, and Unavailable("verifier.busy")."""
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable(
                "verifier.busy", "too many hosts attest at once", expected=f"<= {MAX_WAITING}", remedy="come back later"
            )
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        entry = Entry(host, asked, answer)
        self._waiting.append(entry)
        if len(self._waiting) >= MOST:
            self._full.set()
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._run())
        return await entry.answer

    async def _run(self) -> None:
        await asyncio.sleep(0)  # what arrived in the same turn of the loop is of the same round
        while self._waiting:
            began, round_ = asyncio.get_running_loop().time(), self._next()
            try:
                await self._settle(round_)
            except MoorlineError as error:
                for entry in round_:
                    entry.tell(error)
            except Exception as error:  # a defect: whoever waits hears of it, as without a queue
                for entry in round_:
                    if not entry.answer.done():
                        entry.answer.set_exception(error)
            finally:
                for entry in round_:
                    entry.answer.cancel()  # nothing if it was told; this process is being stopped if not
            if len(round_) > 1:
                await self._gather(until=began + GATHER_S)

    async def _gather(self, *, until: float) -> None:
        """Let others come until then, or until a round is full."""
        self._full.clear()
        if len(self._waiting) < MOST:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._full.wait()

    def _next(self) -> list[Entry[Asked, Answer]]:
        taken: dict[str, Entry[Asked, Answer]] = {}
        left: list[Entry[Asked, Answer]] = []
        for entry in self._waiting:
            if len(taken) < MOST and entry.host not in taken:
                taken[entry.host] = entry
            else:
                left.append(entry)
        self._waiting = left
        return list(taken.values())
