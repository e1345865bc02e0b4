"""Steps taken together: each session has its own outcome, whatever became of the others of its batch."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from moorline.errors import Refused, Unavailable
from moorline.services.broker_function_steps import FunctionSteps, Step
from moorline.services.broker_functions import FunctionSession, ResumedSession
from moorline.services.broker_launchers import LauncherSession


class Rows:
    """What a store does with a batch: one that is asked for `None` refuses, and batches are remembered."""

    def __init__(self):
        self.batches = []

    def consume_all(self, asked):
        self.batches.append(list(asked))
        return [Refused("launch.token_consumed", "used") if one is None else -one for one in asked]

    confirm_all = consume_all


def refused():
    raise Refused("launch.not_permitted", "no")


def broken():
    raise ZeroDivisionError


async def test_each_of_a_batch_has_its_own_outcome():
    """verifies that: a refusal, an odd fault or a used token of one session is told to it, and nothing of it is written."""
    rows = Rows()
    steps = FunctionSteps(rows)
    asked = [Step(lambda n=n: n, lambda asked, said: (asked, said())) for n in range(6)]
    asked[1] = Step(refused, lambda *_: "never")
    asked[2] = Step(broken, lambda *_: "never")
    asked[3] = Step(lambda: None, lambda _asked, said: said())
    asked[4] = Step(lambda: 4, lambda _asked, _said: broken())
    for ask in (steps.consume, steps.confirm):
        rows.batches.clear()
        outcomes = await asyncio.gather(*(ask(one) for one in asked), return_exceptions=True)
        assert outcomes[0] == (0, 0)
        assert outcomes[5] == (5, -5)
        assert [type(one).__name__ for one in outcomes[1:5]] == [
            "Refused",
            "ZeroDivisionError",
            "Refused",
            "ZeroDivisionError",
        ]
        assert (outcomes[1].code, outcomes[3].code) == ("launch.not_permitted", "launch.token_consumed")
        assert sorted(itertools.chain(*rows.batches), key=str) == [0, 4, 5, None]
        assert len(rows.batches) < 6  # those that came while another was under way were one batch


async def test_work_of_one_that_fails_is_not_the_others():
    steps = FunctionSteps(Rows())
    outcomes = await asyncio.gather(
        steps.work(lambda: 1), steps.work(broken), steps.work(refused), steps.work(lambda: 2), return_exceptions=True
    )
    assert (outcomes[0], outcomes[3]) == (1, 2)
    assert [type(one) for one in outcomes[1:3]] == [ZeroDivisionError, Refused]


async def test_who_is_gone_takes_nothing_along():
    """verifies that: a session whose connection broke while its batch was on its way costs the others nothing."""
    steps = FunctionSteps(Rows())
    waits = [asyncio.ensure_future(steps.work(lambda n=n: n)) for n in range(4)]
    await asyncio.sleep(0)
    waits[1].cancel()
    assert await asyncio.gather(waits[0], *waits[2:]) == [0, 2, 3]
    with pytest.raises(asyncio.CancelledError):
        await waits[1]


@pytest.mark.parametrize("role", [LauncherSession, FunctionSession, ResumedSession])
async def test_nothing_is_launched_or_resumed_before_the_log_was_judged(role):
    """verifies that: a broker that has not compared its log with the ledger looks at nothing, and says when to ask."""
    broker = SimpleNamespace(judged=asyncio.Event(), settings=SimpleNamespace(provider="alpha"))
    with pytest.raises(Unavailable) as caught:
        await role(broker=broker, claim=SimpleNamespace(role="any")).appraise()
    assert caught.value.code == "launch.log_not_judged"
    assert caught.value.retry_after_s > 0
