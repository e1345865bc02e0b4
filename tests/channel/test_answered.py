"""Asking a broker again: verifies that only silence is asked again, and not a broker that says to come back much later."""

import asyncio

import pytest

from moorline.channel.driver import answered
from moorline.errors import MoorlineError, Refused, Unavailable


def asked(*answers: MoorlineError | str) -> tuple[object, int]:
    """What came of asking somebody who gives these answers, and how many were needed."""
    left = list(answers)

    async def ask() -> str:
        answer = left.pop(0)
        if isinstance(answer, MoorlineError):
            raise answer
        return answer

    try:
        came: object = asyncio.run(answered(ask, within_s=5))
    except MoorlineError as error:
        came = error.code
    return came, len(answers) - len(left)


@pytest.mark.parametrize(
    ("answers", "came", "times"),
    [
        ((Unavailable("peer.gone", "broke"), "a session"), "a session", 2),
        ((Refused("launch.token_mismatch", "no"), "a session"), "launch.token_mismatch", 1),
        ((Unavailable("launch.halted", "halted", retry_after_s=60), "a session"), "launch.halted", 1),
    ],
)
def test_silence_is_asked_again_and_an_answer_is_not(answers, came, times):
    assert asked(*answers) == (came, times)
