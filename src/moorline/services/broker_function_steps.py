"""Steps that sessions of functions take at one time, taken together: one thread for a batch, one transaction.

In a batch each stands for itself. What an attester sent is judged here, so whatever goes wrong with one, expected or not, is
its own and nobody else's: the others of its batch are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

from moorline.services.broker_batches import Batches
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_consumption import Confirmation, Consumption
from moorline.storage.broker_pool import Taken
from moorline.storage.broker_store import BrokerStore

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step(Generic[P, R, T]):
    """A step around one write. `prepare` says what to write, or raises to refuse.

    `finish` is given that and what returns or raises what came of the write, and makes the step's own result of it.
    """

    prepare: Callable[[], P]
    finish: Callable[[P, Callable[[], R]], T]


class FunctionSteps:
    """The steps of one broker process. Owned by one event loop."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store
        self._work: Batches[Callable[[], Any], Any] = Batches()
        self._consuming: Batches[Step[Consumption, Taken, Any], Any] = Batches()
        self._confirming: Batches[Step[Confirmation, Issued, Any], Any] = Batches()

    async def work(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises, in a thread with those of others."""
        return cast("T", await self._work.ask(call, _each))

    async def consume(self, step: Step[Consumption, Taken, T]) -> T:
        """The step around `BrokerStore.consume_all`."""
        return cast("T", await self._consuming.ask(step, lambda steps: _around(self._store.consume_all, steps)))

    async def confirm(self, step: Step[Confirmation, Issued, T]) -> T:
        """The step around `BrokerStore.confirm_all`."""
        return cast("T", await self._confirming.ask(step, lambda steps: _around(self._store.confirm_all, steps)))


def _each(calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
    return [_outcome(call) for call in calls]


def _around(write: Callable[[Sequence[P]], Sequence[R | Exception]], steps: Sequence[Step[P, R, T]]) -> list[T | Exception]:
    prepared = [_outcome(step.prepare) for step in steps]
    said = iter(write([one for one in prepared if not isinstance(one, Exception)]))
    outcomes: list[T | Exception] = []
    for step, one in zip(steps, prepared, strict=True):
        finish = one if isinstance(one, Exception) else partial(step.finish, one, partial(_said, next(said)))
        outcomes.append(finish if isinstance(finish, Exception) else _outcome(finish))
    return outcomes


def _said(outcome: R | Exception) -> R:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _outcome(call: Callable[[], T]) -> T | Exception:
    try:
        return call()
    except Exception as error:  # whatever an attester's evidence brought about is told to that attester alone
        return error
