"""Health of the random numbers that a TPM gives (TPM2_GetRandom): the tests of SP 800-90B 4.4, and answers that come twice.

A TPM hands out what a generator made of its noise (Part 1, 11.4.11), never the noise: a stuck source behind it passes both
tests. So a failure counts, and a pass is `not_probed` with what was seen. What such a generator can be caught at is saying
the same again, as one that is reset to a state or served from a recording does: no answer of 16 bytes or more comes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from moorline.attesters.probes.saying import not_met, not_probed
from moorline.policy.sec009.assessment import Observation
from moorline.policy.sec009.noise import START_UP, appraise, control

CAPABILITY: Final = "entropy.health"
ANSWER: Final = 32
"""Bytes asked for at once: what every TPM can give."""
_TELLING: Final = 16
_CLAIM: Final = 8.0
"""Bits in a byte, which output of a generator must hold: the narrowest cut-offs."""


def probe(source: str, random: Callable[[int], bytes]) -> Observation:
    """The answers of `random`, asked for ANSWER bytes until there are enough for both tests four times over."""
    answers: list[bytes] = []
    while sum(map(len, answers)) < 4 * START_UP:
        answer = random(ANSWER)
        if not answer:
            return not_met(CAPABILITY, "the TPM gives no random bytes", source)
        answers.append(answer)
    seen = appraise(b"".join(answers), entropy=_CLAIM)
    twice = repeated(answers)
    said = (
        f"{source}: {seen.samples} bytes in {len(answers)} answers, "
        f"repetition {seen.repetition} of {seen.repetition_cutoff}, "
        f"proportion {seen.proportion} of {seen.proportion_cutoff}, {twice} answers came twice"
    )
    planted = [bytes([number]) * ANSWER for number in range(4)]
    if not control() or repeated([*planted, planted[2]]) != 1 or repeated(planted):
        return not_probed(CAPABILITY, "the tests do not find what is planted for them", said)
    if twice:
        return not_met(CAPABILITY, "the TPM gave the same bytes again", said)
    if not seen.healthy:
        return not_met(CAPABILITY, "a health test of SP 800-90B failed over the TPM's random bytes", said)
    return not_probed(CAPABILITY, "the tests pass, over what a generator made of the noise; a TPM shows no raw noise", said)


def repeated(answers: Sequence[bytes]) -> int:
    """How many answers came before; short ones may."""
    telling = [one for one in answers if len(one) >= _TELLING]
    return len(telling) - len(set(telling))
