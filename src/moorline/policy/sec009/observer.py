"""Whether an observer tells use from idleness (SEC009 5.2.5, 6.14), by one number a window of time and nothing else.

Windows of use and of idleness are taken in an order the observed cannot foresee. The observer ranks all windows by what it
saw: if use had no effect, every order of ranks is as likely as any other (Mann and Whitney 1947). `advantage` is how much
better than guessing it names a window of use against one of idleness, 0 to 1.

That nothing was told apart does not establish that nothing can be: only that this observer, over so many windows, could not.
`blind_below` says how large an advantage would have to be to be noticed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed

LEAST: Final = 8
"""Windows of each kind; with fewer, the normal approximation of the ranks' sum is poor."""
SURE: Final = 0.01
PLAIN: Final = 0.5
"""An observer that would miss a larger advantage than this says nothing about who conceals what."""
_Z: Final = 2.576
"""The quantile of the normal distribution that belongs to SURE, both sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the observer could tell. `chance` is the probability of as much by accident."""

    advantage: float
    chance: float
    blind_below: float

    @property
    def apart(self) -> bool:
        """Whether use was told from idleness."""
        return self.chance < SURE

    @property
    def keen(self) -> bool:
        """Whether the observer would have noticed a plain advantage."""
        return self.blind_below <= PLAIN


def tell_apart(idle: Sequence[float], used: Sequence[float]) -> Told:
    """Compare what was seen in windows of idleness and of use. Raises Malformed("observer.windows") for fewer than LEAST."""
    few = min(len(idle), len(used))
    if few < LEAST:
        raise Malformed("observer.windows", "too few windows to say anything", expected=f">= {LEAST} of each", got=few)
    ranks = _ranks([*idle, *used])
    pairs = len(idle) * len(used)
    above = sum(ranks[len(idle) :]) - len(used) * (len(used) + 1) / 2
    advantage = abs(2 * above / pairs - 1)
    spread = _spread([*idle, *used], len(idle), len(used))
    if spread == 0:  # what is always the same tells nothing; blind is the observer no more than without equal ranks
        untied = _spread(range(len(ranks)), len(idle), len(used))
        return Told(advantage=0.0, chance=1.0, blind_below=_blind_below(untied, pairs))
    chance = math.erfc(abs(above - pairs / 2) / spread / math.sqrt(2))
    return Told(advantage=advantage, chance=chance, blind_below=_blind_below(spread, pairs))


def _blind_below(spread: float, pairs: int) -> float:
    return min(1.0, 2 * _Z * spread / pairs)


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal values share the middle of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def _spread(values: Sequence[float], first: int, second: int) -> float:
    """The standard deviation of the count of pairs if use had no effect, with the correction for equal values."""
    total = first + second
    ties = sum(count**3 - count for count in (list(values).count(value) for value in set(values)))
    return math.sqrt(first * second / 12 * (total + 1 - ties / (total * (total - 1))))
