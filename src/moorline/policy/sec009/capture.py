"""The ratio of traffic that a point of capture delivers (SEC009 5.3.1): all of it, and nothing lost afterwards.

A numbered stream is sent into the point of capture, and what comes out is counted by number. Some numbers are never sent: a
count that does not find exactly these missing counts nothing, and no ratio is told (the positive control). The ratio is of
this stream at this rate; it does not establish that other traffic is captured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moorline.errors import Malformed


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """What was counted. `lost` are numbers that were sent and never came; `control_held` is whether the gaps were found."""

    sent: int
    captured: int
    lost: tuple[int, ...]
    repeated: int
    late: int
    control_held: bool

    @property
    def ratio(self) -> float:
        """Captured of sent, 0 to 1."""
        return self.captured / self.sent

    @property
    def whole(self) -> bool:
        """Whether everything that was sent came, as a count that finds its gaps says."""
        return self.control_held and not self.lost


def gaps(count: int, wanted: int, seed: int) -> frozenset[int]:
    """Which `wanted` numbers of `count` are not sent: never the first or last, so that losing an end is no gap.

    Raises Malformed("capture.count") for a stream too short to leave them out.
    """
    if not 0 < wanted <= (count - 2) // 2:
        raise Malformed("capture.count", "the stream is too short for its control", expected=2 * wanted + 2, got=count)
    inner = count - 2
    step = inner // wanted
    return frozenset(1 + number * step + seed % step for number in range(wanted))


def appraise(received: Sequence[int], *, count: int, left_out: Iterable[int]) -> Capture:
    """Judge the numbers that came, in the order in which they came. Numbers that are not of the stream are not counted."""
    missing = frozenset(left_out)
    seen: set[int] = set()
    repeated, late, newest = 0, 0, -1
    for number in received:
        if not 0 <= number < count:
            continue
        repeated += number in seen
        late += number < newest and number not in seen
        seen.add(number)
        newest = max(newest, number)
    lost = tuple(number for number in range(count) if number not in seen and number not in missing)
    sent = count - len(missing)
    return Capture(
        sent=sent,
        captured=len(seen - missing),
        lost=lost,
        repeated=repeated,
        late=late,
        control_held=bool(missing) and not missing & seen,
    )
