"""What the attestation authority says about a host is asked once for everybody who wants to know it now."""

from __future__ import annotations

import asyncio

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.services.broker_hosts import HostAuthority

NOW = Instant(1_800_000_000)


class FixedClock:
    def now(self):
        return NOW


class Said:
    """A result that stands, told apart by its number."""

    def __init__(self, number):
        self.number, self.result, self.expires = number, "stands", NOW + 60


KEY = ec.generate_private_key(ec.SECP256R1())


class Authority(HostAuthority):
    """Answers when it is let, with the number of the question."""

    async def _asked(self, host):
        number = len(self.questions)
        self.questions.append(asyncio.get_running_loop().create_future())
        await self.questions[number]
        return Said(number)


def authority(reuse_s):
    made = Authority(
        url="https://none.invalid",
        server_name="none.invalid",
        roots_pem=b"",
        identity=lambda: None,
        keys=lambda: (KEY.public_key(),),
        audience="alpha.test",
        clock=FixedClock(),
        reuse_s=reuse_s,
    )
    object.__setattr__(made, "questions", [])
    return made


async def asked(made, count, host="h1"):
    tasks = [asyncio.ensure_future(made.standing(host)) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def test_many_sessions_ask_one_question():
    """verifies that: who wants to know while the question is on its way gets its answer, as does who comes after."""

    async def story():
        made = authority(30.0)
        waiting = await asked(made, 20)
        assert len(made.questions) == 1
        made.questions[0].set_result(None)
        assert {one.number for one in await asyncio.gather(*waiting)} == {0}
        assert (await made.standing("h1")).number == 0
        assert len(made.questions) == 1
        assert len(await asked(made, 3, "h2")) == 3
        assert len(made.questions) == 2  # another host is another question

    asyncio.run(story())


def test_nobody_gets_an_answer_to_a_question_older_than_he_takes():
    """verifies that: without reuse each asks for himself, also while others ask."""

    async def story():
        made = authority(0.0)
        waiting = await asked(made, 3)
        assert len(made.questions) == 3
        for question in made.questions:
            question.set_result(None)
        await asyncio.gather(*waiting)

    asyncio.run(story())


def test_what_was_asked_before_the_news_is_not_kept_after_it():
    """verifies that: an answer that crosses the verifier's event serves nobody who asks after the event."""

    async def story():
        made = authority(30.0)
        before = await asked(made, 1)
        made.forget("h1")
        after = await asked(made, 1)
        assert len(made.questions) == 2
        made.questions[1].set_result(None)
        assert (await after[0]).number == 1
        made.questions[0].set_result(None)  # late, and of before
        assert (await before[0]).number == 0
        assert (await made.standing("h1")).number == 1

    asyncio.run(story())


def test_a_question_that_fails_fails_for_those_who_wait_and_is_asked_again():
    """verifies that: no answer is no answer for all who wait, and nothing is kept of it."""

    async def story():
        made = authority(30.0)
        waiting = await asked(made, 3)
        made.questions[0].set_exception(OSError("gone"))
        assert all(isinstance(one, OSError) for one in await asyncio.gather(*waiting, return_exceptions=True))
        again = await asked(made, 1)
        assert len(made.questions) == 2
        again[0].cancel()
        made.questions[1].set_result(None)

    asyncio.run(story())
