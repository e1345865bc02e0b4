"""Key pairs made before they are needed, each handed to one function and never to two (PROTOCOLS.md 5).

A pool entry is a key from the token's random generator (hsm.key_pairs), wrapped at once under an AES key that does not leave
the token. A token object each would cost a disk write (98 a second, FINDINGS.md); wrapped entries cost a row. An entry is
bound to its service, profile and public key: a row moved to another service does not unwrap. Taking is the store's
transaction: it is gone before it is sent. Plain keys exist in memory twice, when made (here, or in the child that makes them
ahead) and when sealed to the function; the broker's host is in the provider's trusted base (PROTOCOLS.md, first paragraph).

There are pools for launches, by channel profile (P-256 keys), and for fresh keys of running functions, by kind. The latter
are taken from the database a few at a time, so that not every key waits for the disk. How much a pool holds follows what was
taken lately: enough for HORIZON_S, within its marks. Keys ahead of demand are made by a process that runs when nothing else
does; a pool below its low mark is filled here and now.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.digest import tagged
from moorline.hsm import key_pairs
from moorline.hsm.key_pairs import KeyPair
from moorline.hsm.keys import WRAPPING
from moorline.hsm.token import Token
from moorline.storage.broker_pool import PoolEntry, Taken
from moorline.storage.broker_store import BrokerStore
from moorline.wire.session import KeyKind

HORIZON_S: Final = 10.0
HALF_LIFE_S: Final = 10.0
RESERVED: Final = 32
_SEEDS_AT_ONCE: Final = 32

Make = Callable[[str, Sequence[bytes]], list[KeyPair]]
"""A pair of a profile for each seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermarks:
    """A pool below `low` is filled up to `high`, or to what is taken in HORIZON_S if that is more, up to `most`."""

    low: int
    high: int
    most: int = 2048


class Demand:
    """How fast one pool is emptied: takes a second, forgotten by half every HALF_LIFE_S."""

    def __init__(self) -> None:
        self._rate, self._at = 0.0, 0.0

    def taken(self, count: int, now: float) -> None:
        """`count` were taken at `now` (seconds of a monotonic clock)."""
        self._rate = self.rate(now) + count * math.log(2) / HALF_LIFE_S
        self._at = now

    def rate(self, now: float) -> float:
        """Takes a second, as of now."""
        return self._rate * math.exp2((self._at - now) / HALF_LIFE_S)


class KeyPool:
    """The pools of one HSM."""

    def __init__(
        self,
        token: Token,
        store: BrokerStore,
        watermarks: Watermarks,
        *,
        ahead: Make | None = None,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ahead` makes what may be needed later, at its leisure; left out, it is made here as what is needed now."""
        self._token, self._store, self._watermarks, self._elapsed = token, store, watermarks, elapsed
        self._ahead = ahead or _at_once
        self._demand: dict[tuple[str, str], Demand] = {}
        self._reserved: dict[tuple[str, str], deque[Taken]] = {}
        self._turn = threading.Lock()
        self._known: set[tuple[str, str]] = set()

    def refill(self, service: str, profile: str) -> int:
        """Fill a pool that is below its low mark; how many were made. Safe to call from any thread."""
        self._known.add((service, profile))
        present = self._store.pool_size(service, profile)
        if present >= self._watermarks.low:
            return 0
        return self._add(service, profile, self._watermarks.high - present, _at_once)

    def top_up(self, *, at_most: int) -> int:
        """Make up to `at_most` keys for the pool that lacks most of what it should hold; how many were made."""
        lacking = [
            (self._wanted(key) - held, key) for key, held in {**dict.fromkeys(self._known, 0), **self._store.pools()}.items()
        ]
        most, key = max(lacking, default=(0, ("", "")))
        if most <= 0:
            return 0
        low = self._wanted(key) - most < self._watermarks.low
        return self._add(*key, min(most, at_most), _at_once if low else self._ahead)

    def low(self) -> bool:
        """Whether a pool is below its low mark: then filling it comes before everything else."""
        held = self._store.pools()
        return any(held.get(key, 0) < self._watermarks.low for key in self._known)

    def took(self, service: str, profile: str, count: int = 1) -> None:
        """A launch took entries itself, in its own transaction."""
        self._known.add((service, profile))
        with self._turn:
            self._demand.setdefault((service, profile), Demand()).taken(count, self._elapsed())

    def take(self, service: str, kind: KeyKind, now: Instant) -> tuple[bytes, bytes]:
        """A fresh key of this kind: its public (SPKI) and private (PKCS#8) half. Made now if none is ready.

        It was gone from the database before: whoever dies with it loses it.
        """
        profile = kind.value
        self.took(service, profile)
        taken = self._reserve(service, profile, now)
        if taken is not None:
            return taken.public, self.open(taken, service, profile)
        (pair,) = _at_once(profile, self._seeds(profile, 1))
        return pair.public, pair.private

    def _reserve(self, service: str, profile: str, now: Instant) -> Taken | None:
        with self._turn:
            reserved = self._reserved.setdefault((service, profile), deque())
            if reserved:
                return reserved.popleft()
        some = self._store.take_from_pool(service, profile, count=RESERVED, at=now)
        with self._turn:
            reserved.extend(some)
            return reserved.popleft() if reserved else None

    def _wanted(self, key: tuple[str, str]) -> int:
        with self._turn:
            demand = self._demand.get(key)
            lately = 0 if demand is None else math.ceil(demand.rate(self._elapsed()) * HORIZON_S)
        return min(max(self._watermarks.high, lately), self._watermarks.most)

    def _add(self, service: str, profile: str, count: int, make: Make) -> int:
        made = [self._wrapped(service, profile, pair) for pair in make(profile, self._seeds(profile, count))]
        self._store.add_to_pool(service, profile, made)
        return len(made)

    def _seeds(self, profile: str, count: int) -> list[bytes]:
        size, seeds = key_pairs.seed_bytes(profile), list[bytes]()
        if size == 0:
            return [b""] * count
        while len(seeds) < count:
            some = min(count - len(seeds), _SEEDS_AT_ONCE)
            drawn = self._token.random(size * some)
            seeds += (drawn[at * size : (at + 1) * size] for at in range(some))
        return seeds

    def make(self, service: str, profile: str) -> PoolEntry:
        """One entry, wrapped, made now."""
        (pair,) = _at_once(profile, self._seeds(profile, 1))
        return self._wrapped(service, profile, pair)

    def _wrapped(self, service: str, profile: str, pair: KeyPair) -> PoolEntry:
        sealed = self._token.seal(WRAPPING, pair.private, entry_place(service, profile, pair.public))
        return PoolEntry(public=pair.public, wrapped=sealed)

    def open(self, taken: Taken, service: str, profile: str) -> bytes:
        """The private key (PKCS#8 DER) of an entry that was taken for a launch, to be sealed to its function now."""
        return self._token.unseal(WRAPPING, taken.wrapped, entry_place(service, profile, taken.public))


def new_key(token: Token) -> ec.EllipticCurvePrivateKey:
    """A P-256 key pair in memory, with the token's randomness."""
    return key_pairs.p256(token.random(key_pairs.P256_SEED))


def _at_once(profile: str, seeds: Sequence[bytes]) -> list[KeyPair]:
    return [key_pairs.pair(profile, seed) for seed in seeds]


def entry_place(service: str, profile: str, public: bytes) -> bytes:
    """What the wrapped key of a pool entry is bound to."""
    return tagged("pool-entry", service.encode("ascii"), profile.encode("ascii"), public)
