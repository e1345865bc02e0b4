"""Who is served next when many tenants want one token: start-time fair queuing, as a pure machine.

Each tenant has a weight. A request gets a start tag, the greater of the queue's virtual time and the finish tag of the
tenant's request before; its finish tag is that plus cost / weight. The request with the least start tag is served next;
ties go to who came first. (Goyal, Vin, Cheng 1996.) So a tenant that floods waits behind its own requests, not before
anybody else's: between two requests of a tenant that asks now and then, a flooding tenant of the same weight is served
once, however many of its requests wait.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Generic, TypeVar

from moorline.errors import Refused, Unavailable

T = TypeVar("T")


@dataclass(slots=True)
class _Account:
    weight: int
    finish: Fraction = Fraction(0)
    waiting: int = 0


@dataclass(order=True, slots=True)
class _Entry(Generic[T]):
    start: Fraction
    arrival: int
    item: T = field(compare=False)
    tenant: str = field(compare=False)


class FairQueue(Generic[T]):
    """Requests in the order in which they are to be served. Pure: no clock, no threads."""

    def __init__(self, *, at_most: int) -> None:
        """`at_most` bounds what one tenant may have waiting."""
        self._at_most = at_most
        self._accounts: dict[str, _Account] = {}
        self._heap: list[_Entry[T]] = []
        self._arrivals = itertools.count()
        self._virtual = Fraction(0)

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, tenant: str, item: T, *, weight: int = 1, cost: int = 1) -> None:
        """A request arrives. Raises Unavailable("token.queue_full") when the tenant has too many waiting."""
        account = self._accounts.setdefault(tenant, _Account(weight))
        account.weight = weight
        if account.waiting >= self._at_most:
            raise Unavailable(
                "token.queue_full",
                "this tenant has as many requests waiting as it may",
                expected=f"<= {self._at_most}",
                remedy="wait for answers before asking for more",
            )
        start = max(self._virtual, account.finish)
        account.finish = start + Fraction(cost, weight)
        account.waiting += 1
        heapq.heappush(self._heap, _Entry(start, next(self._arrivals), item, tenant))

    def pop(self) -> tuple[str, T]:
        """The request to be served next. Raises IndexError if none waits."""
        entry = heapq.heappop(self._heap)
        self._virtual = max(self._virtual, entry.start)
        self._accounts[entry.tenant].waiting -= 1
        if not self._heap:  # an idle queue owes nobody anything
            self._accounts.clear()
            self._virtual = Fraction(0)
        return entry.tenant, entry.item

    def waiting(self, tenant: str) -> int:
        """How many requests of a tenant wait."""
        account = self._accounts.get(tenant)
        return 0 if account is None else account.waiting


class FairGate:
    """A few places at the token; threads enter in the order of a FairQueue."""

    def __init__(self, places: int, *, at_most: int = 256) -> None:
        self._queue: FairQueue[threading.Event] = FairQueue(at_most=at_most)
        self._free = places
        self._lock = threading.Lock()

    @contextmanager
    def place(self, tenant: str, *, weight: int = 1, cost: int = 1) -> Iterator[None]:
        """A place for one request. Raises Unavailable("token.queue_full")."""
        turn = threading.Event()
        with self._lock:
            self._queue.push(tenant, turn, weight=weight, cost=cost)
            self._admit()
        turn.wait()
        try:
            yield
        finally:
            with self._lock:
                self._free += 1
                self._admit()

    def waiting(self, tenant: str) -> int:
        """How many requests of a tenant wait."""
        with self._lock:
            return self._queue.waiting(tenant)

    def _admit(self) -> None:
        while self._free and len(self._queue):
            self._free -= 1
            self._queue.pop()[1].set()


@dataclass(slots=True)
class Quota:
    """What one tenant may use: keys in its token, and operations a minute. Zero is none, not "unlimited"."""

    keys: int
    operations_a_minute: int
    _minute: int = -1
    _used: int = 0

    def spend(self, now: int) -> None:
        """One operation at `now` (seconds). Raises Unavailable("tenant.quota_operations")."""
        minute = now // 60
        if minute != self._minute:
            self._minute, self._used = minute, 0
        if self._used >= self.operations_a_minute:
            raise Unavailable(
                "tenant.quota_operations",
                "the tenant's operations of this minute are used up",
                expected=f"<= {self.operations_a_minute} a minute",
                retry_after_s=float(60 - now % 60),
            )
        self._used += 1

    def require_room(self, present: int) -> None:
        """Raises Refused("tenant.quota_keys") if one key more is too many."""
        if present >= self.keys:
            raise Refused(
                "tenant.quota_keys",
                "the tenant has as many keys as it may",
                expected=f"<= {self.keys}",
                got=present,
                remedy="destroy a key, or have the provider raise the quota",
            )
