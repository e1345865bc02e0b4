"""When to ask a vendor again: pauses between requests, and back-off after failures. Pure: jitter and times are arguments.

1. Two requests to one vendor start at least `interval_s` apart.
2. A vendor that says when to come back (Retry-After) is taken at its word, unless that is later than `longest_wait_s`:
   then the caller is told, and decides.
3. Otherwise attempt n waits `base_s * 2**n`, at most `cap_s`, times a factor between one half and one that `jitter` draws,
   so that many clients which failed at once do not come back at once.
4. There are `attempts` of them in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

from moorline.clock import Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """How patient a client is. The figures are ours; no vendor publishes its limits in a form that could be followed."""

    interval_s: float = 1.0
    attempts: int = 5
    base_s: float = 2.0
    cap_s: float = 60.0
    longest_wait_s: float = 120.0

    def pause_s(self, attempt: int, *, jitter: float, retry_after_s: float | None) -> float | None:
        """Seconds to wait after failure number `attempt` (from 0); None to give up. `jitter` is in [0, 1)."""
        if attempt + 1 >= self.attempts:
            return None
        if retry_after_s is not None:
            return retry_after_s if retry_after_s <= self.longest_wait_s else None
        return min(self.cap_s, self.base_s * math.ldexp(1.0, min(attempt, 30))) * (0.5 + jitter / 2)


def retry_after(value: str | None, now: Instant) -> float | None:
    """The seconds a Retry-After header asks for (RFC 9110 10.2.3: seconds or a date); None without one, or without sense."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdecimal() and len(text) <= 9:
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return max(0.0, aware.timestamp() - now)
