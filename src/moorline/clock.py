"""Time as a value: whole seconds since 1970-01-01 UTC, handed in, never asked for by a pure room."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NewType, Protocol

Instant = NewType("Instant", int)
"""Seconds since the Unix epoch, UTC."""


class Clock(Protocol):
    """Where a process gets its time; only composition roots hold one."""

    def now(self) -> Instant:
        """The present, in whole seconds."""
        ...


class SystemClock:
    """The clock of this machine. On a host that is not trusted it belongs to the host (PROTOCOLS.md 4, Time)."""

    def now(self) -> Instant:
        """The present, in whole seconds."""
        return Instant(int(time.time()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """A closed interval of time, both ends included, in seconds since the epoch."""

    not_before: Instant
    not_after: Instant

    def contains(self, at: Instant) -> bool:
        """True if `at` lies in the interval."""
        return self.not_before <= at <= self.not_after


def rendered(at: Instant) -> str:
    """RFC 3339 in UTC, for people and JSON."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_instant(text: str) -> Instant:
    """A time as people write it: RFC 3339 with its offset, or seconds since the epoch. Raises ValueError."""
    if text.isascii() and text.isdigit():
        return Instant(int(text))
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        message = "a time without its offset from UTC says nothing"
        raise ValueError(message)
    return Instant(int(found.timestamp()))


def to_datetime(at: Instant) -> datetime:
    """An aware UTC datetime, for libraries that want one."""
    return datetime.fromtimestamp(at, UTC)
