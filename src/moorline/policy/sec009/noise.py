"""The continuous health tests of SP 800-90B 4.4 over samples of a noise source: repetition count and adaptive proportion.

They say that a source is not stuck and not grossly biased, at a false alarm rate of 2**-30 a test; they do not estimate
entropy. On conditioned output they prove nothing, since a stuck source behind a hash passes: the caller has to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed

ALPHA_LOG2: Final = -30
START_UP: Final = 1024
WINDOW: Final = 512
"""For samples of a byte; a binary source has 1024 (SP 800-90B 4.4.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What the tests saw: `repetition` and `proportion` are the highest counts, with their cut-offs."""

    samples: int
    repetition: int
    repetition_cutoff: int
    proportion: int
    proportion_cutoff: int

    @property
    def healthy(self) -> bool:
        """Whether both stay below their cut-offs over at least the samples of a start-up test."""
        return (
            self.samples >= START_UP
            and self.repetition < self.repetition_cutoff
            and self.proportion < self.proportion_cutoff
        )


def control() -> bool:
    """Whether the tests find what is planted here: a source that is stuck, and one that is biased without long runs."""
    stuck = appraise(bytes(START_UP), entropy=1.0)
    biased = appraise(bytes(0 if place % 10 < 7 else 1 + place % 255 for place in range(START_UP)), entropy=1.0)
    return (
        stuck.repetition >= stuck.repetition_cutoff
        and biased.repetition < biased.repetition_cutoff
        and biased.proportion >= biased.proportion_cutoff
    )


def repetition_cutoff(entropy: float) -> int:
    """C = 1 + ceil(-log2(alpha) / H) for H bits of entropy a sample (4.4.1)."""
    return 1 + math.ceil(-ALPHA_LOG2 / entropy)


def proportion_cutoff(entropy: float, window: int = WINDOW) -> int:
    """1 + critbinom(W, 2**-H, 1 - alpha) (4.4.2), summed exactly from the tail down."""
    chance, alpha = 2.0**-entropy, 2.0**ALPHA_LOG2
    tail = 0.0
    for count in range(window, -1, -1):
        tail += math.comb(window, count) * chance**count * (1 - chance) ** (window - count)
        if tail > alpha:
            return 1 + count
    return 1


def appraise(samples: Sequence[int], *, entropy: float) -> Health:
    """Both tests over `samples`, claimed to hold `entropy` bits each. Raises Malformed("noise.entropy") outside 0 to 8."""
    if not 0 < entropy <= 8:
        raise Malformed("noise.entropy", "a byte holds more than 0 and at most 8 bits", got=entropy)
    longest, run, before = 0, 0, None
    for sample in samples:
        run = run + 1 if sample == before else 1
        before, longest = sample, max(longest, run)
    highest = 0
    for start in range(0, len(samples) - WINDOW + 1, WINDOW):
        window = samples[start : start + WINDOW]
        highest = max(highest, sum(one == window[0] for one in window))
    return Health(
        samples=len(samples),
        repetition=longest,
        repetition_cutoff=repetition_cutoff(entropy),
        proportion=highest,
        proportion_cutoff=proportion_cutoff(entropy),
    )
