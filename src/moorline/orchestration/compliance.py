"""What was true when a function became active must stay true: its host's verdict, and that its guest runs.

Two loops, and either is enough to notice:

* `follow` reads the verifier's events from a durable cursor. The cursor moves only after everything up to it was recorded,
  and a function is halted by the same loss once, so nothing is lost and nothing is doubled by a crash in between.
* `supervise` looks at what is: whether each host in use has a verdict now, and whether each guest runs. It needs no event,
  and so it notices what a restored database, a clock that differs or a verifier without an event stream would hide.

A host is taken to have lost its verdict only if the verifier says so. A verifier that is away, or whose answer cannot be
believed, decides nothing: results are leases, the broker renews no identity without one, and nothing is placed meanwhile.
A host agent that is away decides nothing either: its host stops attesting, and its verdict ends by itself. That a result has
expired counts at once where the verifier reports it as an event, and otherwise after a while: a verifier that was away has
only expired results, and its hosts attest again within moments.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from moorline.clock import Clock, Instant
from moorline.errors import Conflict, Malformed, MoorlineError, Refused, Unavailable
from moorline.orchestration.clean_up import GUEST_ENDED, HOST_LOST, CleanUps
from moorline.orchestration.launch import GuestReport
from moorline.storage.orchestrator_store import Afterwards, FunctionRow, Halt, LaunchState, LeftGuest, OrchestratorStore

EVENT_WAIT_S: Final = 20
MAX_EVENTS: Final = 10_000
ASK_S: Final = 5.0
RETRY_S: Final = 2.0
NO_EVENTS_S: Final = 30.0
_SILENT: Final = ("result.expired", "result.none")
_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEvent:
    """A verdict that the verifier lost or gained, as it says; `at` is its clock, `code` the rule."""

    cursor: int
    host: str
    at: Instant
    lost: bool
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventPage:
    """Events after a cursor, in order, and the cursor to ask after next."""

    events: tuple[HostEvent, ...]
    next: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A host without a verdict, and which rule says so. `lost_at` and `cursor` are known if an event told."""

    host: str
    code: str
    lost_at: Instant | None = None
    cursor: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reactions:
    """What becomes of a function whose host lost its verdict, or whose guest ended by itself; how often, in which time."""

    host_lost: Afterwards = Afterwards.RELAUNCH
    guest_ended: Afterwards = Afterwards.RELAUNCH
    relaunches: int = 3
    within_s: int = 600
    supervise_s: float = 3.0
    silent_s: int = 30


class Verdicts(Protocol):
    """The verifier."""

    async def events(self, after: int, wait_s: int, /) -> EventPage:
        """Events after the cursor, waiting for the first at most `wait_s`."""
        ...

    async def lost(self, hosts: frozenset[str], /) -> tuple[Loss, ...]:
        """Those hosts of which the verifier says that no verdict stands. Of the others nothing is said."""
        ...


class Guests(Protocol):
    """The host agents."""

    async def reports(self, host: str, /) -> dict[str, GuestReport]:
        """How every guest of a host is, by instance."""
        ...

    async def stop(self, host: str, instance: str, /) -> None:
        """End a guest; fine if it is not there."""
        ...


class Compliance:
    """Watches, and begins clean-ups. `interrupt` is told which function was halted, so that it is driven on from there."""

    def __init__(
        self,
        *,
        store: OrchestratorStore,
        clean_ups: CleanUps,
        verdicts: Verdicts,
        guests: Guests,
        clock: Clock,
        reactions: Reactions,
        interrupt: Callable[[str], object],
        on_error: Callable[[MoorlineError], None],
    ) -> None:
        self._store, self._clean_ups, self._verdicts, self._guests = store, clean_ups, verdicts, guests
        self._clock, self._reactions, self._interrupt, self._on_error = clock, reactions, interrupt, on_error
        self._look_now = asyncio.Event()
        self._silent_since: dict[str, Instant] = {}

    async def follow(self) -> None:
        """Read events until cancelled."""
        while True:
            try:
                await self.read_events(EVENT_WAIT_S)
            except MoorlineError as error:
                self._on_error(error)
                await asyncio.sleep(NO_EVENTS_S if error.code == "http.no_such_route" else RETRY_S)

    async def supervise(self) -> None:
        """Look at what is until cancelled."""
        while True:
            try:
                await self.look()
            except MoorlineError as error:
                self._on_error(error)
            self._look_now.clear()
            try:
                async with asyncio.timeout(self._reactions.supervise_s):
                    await self._look_now.wait()
            except TimeoutError:
                continue

    async def read_events(self, wait_s: int) -> int:
        """Act on the next page of events; the cursor reached. Raises what the verifier or the store answers."""
        cursor = await asyncio.to_thread(self._store.cursor)
        try:
            page = await self._verdicts.events(cursor, wait_s)
        except Conflict as error:
            if error.code != "events.cursor_unknown":
                raise
            # The verifier's database was restored. Read its history anew; what is older than a function does not concern it.
            self._on_error(error)
            await asyncio.to_thread(self._store.remember_cursor, 0)
            self._look_now.set()
            return 0
        for event in page.events:
            if event.lost:
                loss = Loss(host=event.host, code=event.code, lost_at=event.at, cursor=event.cursor)
                await self._halt_on(loss, await asyncio.to_thread(self._store.on_hosts))
        if page.next != cursor:
            await asyncio.to_thread(self._store.remember_cursor, page.next)
        return page.next

    async def look(self) -> None:
        """Halt what is not as it must be. One host that does not answer keeps no other from being looked at."""
        rows = await asyncio.to_thread(self._store.on_hosts)
        losses: tuple[Loss, ...] = ()
        if rows:
            try:
                losses = await self._verdicts.lost(frozenset(row.host for row in rows if row.host is not None))
            except MoorlineError as error:  # guests are looked at all the same
                self._on_error(error)
        losses = self._counting(losses)
        for loss in losses:
            await self._halt_on(loss, rows)
        lost = {loss.host for loss in losses}
        turn = asyncio.Semaphore(_AT_ONCE)
        serving: dict[str, list[FunctionRow]] = {}
        for row in rows:
            if row.state is LaunchState.ACTIVE and row.host is not None and row.host not in lost:
                serving.setdefault(row.host, []).append(row)
        left = await asyncio.to_thread(self._store.left_guests)
        await asyncio.gather(
            *(self._look_at(host, here, turn) for host, here in serving.items()),
            *(self._ask_again(one, turn) for one in left),
        )

    # -- parts --------------------------------------------------------------------------------------------------------

    def _counting(self, losses: tuple[Loss, ...]) -> tuple[Loss, ...]:
        """Without hosts whose results have only been missing for moments."""
        now = self._clock.now()
        silent = {loss.host for loss in losses if loss.code in _SILENT}
        self._silent_since = {host: self._silent_since.get(host, now) for host in silent}
        return tuple(
            loss
            for loss in losses
            if loss.host not in silent or now - self._silent_since[loss.host] >= self._reactions.silent_s
        )

    async def _halt_on(self, loss: Loss, rows: Iterable[FunctionRow]) -> None:
        for row in rows:
            if row.host != loss.host:
                continue
            if loss.lost_at is not None and row.placed is not None and row.placed > loss.lost_at:
                self._look_now.set()  # lost before this function came; whether it is lost now is for `look` to say
                continue
            problem = Refused(
                "compliance.host_lost", "the host of this function lost its verdict", got=f"{loss.host}: {loss.code}"
            )
            halt = Halt(
                cause=HOST_LOST,
                code=loss.code,
                problem=dict(problem.as_problem()),
                afterwards=self._reactions.host_lost,
                noticed=self._clock.now(),
                lost_at=loss.lost_at,
                cursor=loss.cursor,
            )
            await self._halt(row, halt, f"{loss.host} lost its verdict: {loss.code}")

    async def _look_at(self, host: str, rows: list[FunctionRow], turn: asyncio.Semaphore) -> None:
        try:
            async with turn, asyncio.timeout(ASK_S):
                reports = await self._guests.reports(host)
        except (Unavailable, TimeoutError):
            return
        except MoorlineError as error:
            self._on_error(error)
            return
        for row in rows:
            report = reports.get(row.instance)
            if report is None:
                await self._ended(row, Refused("launch.guest_unknown", "its host knows no guest of this name", got=host))
            elif not report.running:
                ended = Refused("launch.guest_ended", "the guest ended by itself", remedy="read its guest.log on the host")
                await self._ended(row, report.refusal or ended)

    async def _ended(self, row: FunctionRow, error: MoorlineError) -> None:
        halt = Halt(
            cause=GUEST_ENDED,
            code=error.code,
            problem=dict(error.as_problem()),
            afterwards=self._reactions.guest_ended,
            noticed=self._clock.now(),
        )
        await self._halt(row, halt, f"its guest on {row.host} is gone: {error}")

    async def _ask_again(self, left: LeftGuest, turn: asyncio.Semaphore) -> None:
        try:
            async with turn, asyncio.timeout(ASK_S):
                await self._guests.stop(left.host, left.instance)
        except (MoorlineError, TimeoutError):
            return  # it is asked again next time
        await asyncio.to_thread(self._store.guest_is_gone, left, at=self._clock.now())

    async def _halt(self, row: FunctionRow, halt: Halt, says: str) -> None:
        if halt.afterwards is Afterwards.RELAUNCH:
            since = Instant(self._clock.now() - self._reactions.within_s)
            if await asyncio.to_thread(self._store.halts_since, row.instance, since) >= self._reactions.relaunches:
                halt = _too_often(halt, self._reactions)
        if await self._clean_ups.begin(row, halt, says=says) is not None:
            self._interrupt(row.instance)


def parse_events(answer: object, *, after: int) -> EventPage:
    """The verifier's answer to GET /v1/events. Raises Malformed("peer.answer_malformed") unless it is one, in order."""
    if not isinstance(answer, dict) or not isinstance(answer.get("events"), list) or not _is_number(answer.get("next")):
        raise _not_events("neither events nor next")
    if len(answer["events"]) > MAX_EVENTS:
        raise _not_events(f"{len(answer['events'])} events")
    events = tuple(_event(one) for one in answer["events"])
    cursors = [after, *(event.cursor for event in events)]
    if any(later <= earlier for earlier, later in itertools.pairwise(cursors)):
        raise _not_events("cursors that do not rise")
    if answer["next"] < cursors[-1]:
        raise _not_events("a next cursor before its own events")
    return EventPage(events=events, next=answer["next"])


def _event(one: object) -> HostEvent:
    if not isinstance(one, dict):
        raise _not_events("an event that is no object")
    kinds = {"verdict_lost": True, "verdict_gained": False}
    texts = (one.get("host"), one.get("code"), one.get("kind"))
    if not all(isinstance(text, str) for text in texts) or one["kind"] not in kinds:
        raise _not_events("an event without host, code or known kind")
    if not (_is_number(one.get("cursor")) and _is_number(one.get("at"))):
        raise _not_events("an event without cursor or time")
    return HostEvent(
        cursor=one["cursor"], host=one["host"], at=Instant(one["at"]), lost=kinds[one["kind"]], code=one["code"]
    )


def _is_number(value: Any) -> bool:  # noqa: ANN401 - JSON
    return type(value) is int and value >= 0


def _not_events(got: str) -> Malformed:
    return Malformed("peer.answer_malformed", "the verifier's answer is not a page of events", got=got)


def _too_often(halt: Halt, reactions: Reactions) -> Halt:
    problem = Refused(
        "compliance.relaunched_too_often",
        "the function was halted too often to be launched again",
        expected=f"at most {reactions.relaunches} in {reactions.within_s} s",
        got=halt.code,
        remedy="find out why, then create the function under another name",
    )
    return Halt(
        cause=halt.cause,
        code=halt.code,
        problem=dict(problem.as_problem()),
        afterwards=Afterwards.FAIL,
        noticed=halt.noticed,
        lost_at=halt.lost_at,
        cursor=halt.cursor,
    )
