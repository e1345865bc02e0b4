"""Spoils a saga at every step and sees that it finishes, or is cleanly refused, with nothing doubled and nothing lost.

A saga is given as an object with `start`, `resume` and `observe` (docs/howto/write-a-saga.md). It is played once
undisturbed; then again, from the beginning, for each call it makes to the outside and each way to spoil that call, and for
each durable step (storage.steps) with a crash right there. After a crash everything in memory is gone and `resume` goes on
with another process over the same durable state. What `observe` says at the end is judged by the saga's own `judge`.

A crash here is an exception that no code of ours catches (a BaseException); tests/crash does it with SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from moorline.errors import Refused, Unavailable
from moorline.storage import steps

RUN_S = 20.0


class Crashed(BaseException):
    """The process died here."""


class Mischief(Enum):
    """What happens to one call to the outside, or at one step."""

    REPEATED = "its effect happens twice"
    NOT_REACHED = "the other side is away, once"
    ANSWER_LOST = "it happens, and the answer is lost"
    REFUSED = "the other side refuses"
    CRASHED_BEFORE = "the process dies before it"
    CRASHED_AFTER = "it happens, and the process dies before it knows"
    CRASHED_AT_STEP = "the process dies when this is durable"


OF_CALLS = tuple(one for one in Mischief if one is not Mischief.CRASHED_AT_STEP)


@dataclass(frozen=True)
class Spoilt:
    """One disturbance: the call or step of this number, counted from 0, and its name once it happened."""

    number: int
    how: Mischief
    name: str = ""


class Saga(Protocol):
    """What the harness needs of a saga under test. Each object is one story in a world of its own."""

    async def start(self, outside: Outside) -> None:
        """Begin, and go on to the end. Everything the saga does to the outside must go through `outside.guard(...)`."""
        ...

    async def resume(self, outside: Outside) -> None:
        """Another process over the same durable state goes on to the end; also if nothing is left to do, or begun."""
        ...

    def observe(self) -> Any:
        """What is true at the end: durable state, and the outside."""
        ...

    def judge(self, observed: Any, spoilt: Spoilt | None) -> None:
        """Assert that nothing is doubled, nothing lost, and that it finished, or was refused where `spoilt` refuses."""
        ...


@dataclass
class Outside:
    """Counts the calls that leave the saga and the steps it makes durable, and spoils one of them."""

    plan: Spoilt | None = None
    calls: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    done: Spoilt | None = None

    def guard(self, target: Any, *methods: str) -> Any:
        """`target` with these async methods under the harness; everything else is passed on."""
        return _Guarded(self, target, methods)

    async def call(self, name: str, act: Callable[[], Any]) -> Any:
        """One call to the outside."""
        number = len(self.calls)
        self.calls.append(name)
        if self.plan is None or self.plan.how is Mischief.CRASHED_AT_STEP or self.plan.number != number:
            return await act()
        self.done = Spoilt(number, self.plan.how, name)
        return await self._spoilt(self.plan.how, act)

    def step(self, name: str) -> None:
        """One durable step; called in place of the real death."""
        number = len(self.steps)
        self.steps.append(name)
        if self.plan is not None and self.plan.how is Mischief.CRASHED_AT_STEP and self.plan.number == number:
            self.done = Spoilt(number, self.plan.how, name)
            raise Crashed(name)

    async def _spoilt(self, how: Mischief, act: Callable[[], Any]) -> Any:
        if how is Mischief.CRASHED_BEFORE:
            raise Crashed
        if how is Mischief.NOT_REACHED:
            raise Unavailable("test.away", "the other side is away", retry_after_s=0.0)
        if how is Mischief.REFUSED:
            raise Refused("test.refused", "the other side refuses")
        await act()
        if how is Mischief.CRASHED_AFTER:
            raise Crashed
        if how is Mischief.ANSWER_LOST:
            raise Unavailable("test.answer_lost", "the answer was lost", retry_after_s=0.0)
        return await act()


class _Guarded:
    def __init__(self, outside: Outside, target: Any, methods: tuple[str, ...]) -> None:
        self._outside, self._target, self._methods = outside, target, methods

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if name not in self._methods:
            return found

        async def guarded(*arguments: Any, **named: Any) -> Any:
            return await self._outside.call(name, lambda: found(*arguments, **named))

        return guarded


@dataclass(frozen=True)
class Exercised:
    """What was done to a saga; a test asserts that it is what it meant to test."""

    calls: tuple[str, ...]
    steps: tuple[str, ...]
    spoilt: tuple[Spoilt, ...]


async def exercise(make: Callable[[], Saga], monkeypatch: Any, *, repeatable: Callable[[str], bool] = bool) -> Exercised:
    """Play the saga undisturbed, then spoil each call and each step, one a story. `repeatable` calls may happen twice."""
    monkeypatch.setenv(steps.VARIABLE, "/under/the/harness")
    straight = Outside()
    await _play(make(), straight, monkeypatch)
    plans = [Spoilt(number, how) for number in range(len(straight.calls)) for how in OF_CALLS]
    plans += [Spoilt(number, Mischief.CRASHED_AT_STEP) for number in range(len(straight.steps))]
    spoilt = []
    for plan in plans:
        if plan.how is Mischief.REPEATED and not repeatable(straight.calls[plan.number]):
            continue
        outside = Outside(plan)
        await _play(make(), outside, monkeypatch)
        assert outside.done is not None, f"{plan} did not happen"
        spoilt.append(outside.done)
    return Exercised(tuple(straight.calls), tuple(straight.steps), tuple(spoilt))


async def _play(saga: Saga, outside: Outside, monkeypatch: Any) -> None:
    async with _steps_reported_to(outside, monkeypatch), asyncio.timeout(RUN_S):
        try:
            await saga.start(outside)
        except Crashed:
            await saga.resume(outside)
        await saga.resume(outside)  # a process that is started when all is done must change nothing
    observed = saga.observe()
    try:
        saga.judge(observed, outside.done)
    except AssertionError as error:
        error.add_note(f"spoilt: {outside.done}; calls: {outside.calls}; steps: {outside.steps}; observed: {observed}")
        raise


@contextlib.asynccontextmanager
async def _steps_reported_to(outside: Outside, monkeypatch: Any) -> AsyncIterator[None]:
    def told(_: str, name: str) -> bool:
        outside.step(name)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_is_told", told)
        yield
