"""A verifier asks its hosts: on suspicion, on a change of use, and where it pulls (SEC009 5.1.2).

Hosts come by themselves once a period. Between, each keeps one request open here (`POST /v1/wait`) and is answered when it
is asked; it then attests with a fresh challenge, which answers the question (storage.verifier_asks). So no port of a host
need be reachable, and the host knows whom it answers: the server it has dialled and whose certificate it has verified.

1. A question is written down first, then hosts that wait are woken: those of this process at once, those that wait at
   another when that one next looks (`look`, every LOOK_EVERY_S).
2. A host says which question it knows already, and is woken for newer ones only.
   Anybody can wait in a host's name, and holds a connection by it: of one host the newest WAITING_OF_A_HOST wait, and the
   oldest makes room, so that strangers hold no more connections than a small multiple of the fleet.
3. Who asked may wait for the answer; it is the standing result, and how old it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from moorline.clock import Clock, Instant
from moorline.errors import MoorlineError, Unavailable
from moorline.nfv import parse_name
from moorline.storage.verifier_asks import Ask, Reason
from moorline.storage.verifier_store import VerifierStore

LOOK_EVERY_S: Final = 0.5
HELD_S: Final = 120.0
"""How long a host's request is held before it is told that nobody asked."""
WAITING_OF_A_HOST: Final = 2
SAYS_CHARS: Final = 256
_ANSWER_LOOK_S: Final = 0.2
_LOG: Final = structlog.stdlib.get_logger("verifier")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Seconds within which a host must answer; and, where the verifier pulls, how old a result may get before it asks."""

    answer_s: int
    pull_every_s: int | None


class Asking:
    """The questions of one process, and the hosts that wait at it."""

    def __init__(self, store: VerifierStore, terms: Terms, clock: Clock) -> None:
        self._store, self._terms, self._clock = store, terms, clock
        self._open: dict[str, int] = {}
        self._waiting: dict[str, list[asyncio.Future[int]]] = {}

    async def ask(self, host: str, reason: Reason, says: str, *, asked_by: str) -> int:
        """Ask an enrolled host; the question's number. Raises Refused("host.not_enrolled"), Unavailable."""
        now = self._clock.now()
        name = parse_name(host, "host")
        await asyncio.to_thread(self._store.host, name)
        ask = Ask(
            host=name,
            reason=reason,
            says=says[:SAYS_CHARS],
            asked_by=asked_by,
            at=now,
            until=Instant(now + self._terms.answer_s),
        )
        number = await asyncio.to_thread(self._store.ask, ask)  # 1
        self._found({name: number})
        return number

    async def answered(self, number: int, *, wait_s: float) -> None:
        """Return once a question is answered. Raises Unavailable("host.not_answered_yet") if it is not in `wait_s`."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + wait_s
        while await asyncio.to_thread(self._store.ask_open, number):
            if loop.time() >= ends:
                raise Unavailable(
                    "host.not_answered_yet",
                    "the host has not answered yet",
                    remedy="ask for its result later; its verdict ends if it does not answer",
                    retry_after_s=2,
                )
            await asyncio.sleep(_ANSWER_LOOK_S)

    async def wait(self, host: str, *, known: int, wait_s: float) -> int:
        """The number of a question newer than `known`, as soon as there is one; `known` if there is none in `wait_s`.

        Also `known`, at once, if others wait in the same name. Raises Refused("host.not_enrolled").
        """
        await asyncio.to_thread(self._store.host, host)
        newest = self._open.get(host, 0)
        if newest > known:  # 2
            return newest
        woken: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        here = self._waiting.setdefault(host, [])
        here.append(woken)
        for oldest in here[:-WAITING_OF_A_HOST]:
            if not oldest.done():
                oldest.set_result(0)  # nothing it does not know
        try:
            async with asyncio.timeout(min(wait_s, HELD_S)):
                return max(known, await woken)
        except TimeoutError:
            return known
        finally:
            here.remove(woken)
            if not here and self._waiting.get(host) is here:
                del self._waiting[host]

    def release(self) -> None:
        """Answer all hosts that wait here that nobody asked: this process stops, and they wait again, or at another."""
        for here in self._waiting.values():
            for woken in here:
                if not woken.done():
                    woken.set_result(0)

    async def look(self, watched: Callable[[str], bool]) -> None:
        """Learn of questions that any process asked, and wake their hosts; ask those that are due and watched here."""
        if self._terms.pull_every_s is not None:
            now = self._clock.now()
            await asyncio.to_thread(
                self._store.ask_due,
                at=now,
                older_than=Instant(now - self._terms.pull_every_s),
                until=Instant(now + self._terms.answer_s),
                watched=watched,
            )
        asked = await asyncio.to_thread(self._store.asked)
        self._open = {}
        self._found(asked)

    async def keep(self, watched: Callable[[str], bool]) -> None:
        """Look until cancelled; a database that is away is waited for."""
        while True:
            try:
                await self.look(watched)
            except MoorlineError as error:
                _LOG.warning("questions", **error.as_problem())
            await asyncio.sleep(LOOK_EVERY_S)

    def _found(self, asked: dict[str, int]) -> None:
        self._open |= asked
        for host in asked.keys() & self._waiting.keys():
            for woken in self._waiting[host]:
                if not woken.done():
                    woken.set_result(asked[host])
