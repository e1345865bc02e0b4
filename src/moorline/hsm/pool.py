"""Key pairs made before they are needed, each handed to one function and never to two (PROTOCOLS.md 5).

A pool entry is a key from the token's random generator (P-256 and P-384 by FIPS 186-5 A.2.1, extra random bits; Ed25519 by
RFC 8032 5.1.5; RSA-2048, for peers that speak nothing else, from OpenSSL's generator), wrapped at once under an AES key that
does not leave the token. A token object each would cost a disk write (98 a second, FINDINGS.md); wrapped entries cost a row.
An entry is bound to its service, profile and public key: a row moved to another service does not unwrap. Taking is the
store's transaction: it is gone before it is sent. Plain keys exist in this process's memory twice, when made and when sealed
to the function; the broker's host is in the provider's trusted base (PROTOCOLS.md, first paragraph).

There are pools for launches, by channel profile (P-256 keys), and for fresh keys of running functions, by kind. The latter
are taken from the database a few at a time, so that not every key waits for the disk. How much a pool holds follows what was
taken lately: enough for HORIZON_S, within its marks. Refilling yields to requests, unless a pool is below its low mark.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from moorline.clock import Instant
from moorline.digest import tagged
from moorline.hsm.keys import WRAPPING
from moorline.hsm.token import Token
from moorline.storage.broker_pool import PoolEntry, Taken
from moorline.storage.broker_store import BrokerStore
from moorline.wire import keys
from moorline.wire.session import KeyKind

_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (SP 800-186 3.2.1.3)
_ORDER_384: Final = int(
    "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16
)  # of P-384 (SP 800-186 3.2.1.4)
_SEED_384: Final = 56
_ED25519_BYTES: Final = 32
HORIZON_S: Final = 10.0
HALF_LIFE_S: Final = 10.0
RESERVED: Final = 32
_SEED_BYTES: Final = 40  # 64 bits more than the order has, so that the remainder has no bias one could use


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
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token, self._store, self._watermarks, self._elapsed = token, store, watermarks, elapsed
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
        return self._add(service, profile, self._watermarks.high - present)

    def top_up(self, *, at_most: int) -> int:
        """Make up to `at_most` keys for the pool that lacks most of what it should hold; how many were made."""
        lacking = [
            (self._wanted(key) - held, key) for key, held in {**dict.fromkeys(self._known, 0), **self._store.pools()}.items()
        ]
        most, key = max(lacking, default=(0, ("", "")))
        return self._add(*key, min(most, at_most)) if most > 0 else 0

    def low(self) -> bool:
        """Whether a pool is below its low mark: then filling it comes before everything else."""
        held = self._store.pools()
        return any(held.get(key, 0) < self._watermarks.low for key in self._known)

    def took(self, service: str, profile: str, count: int = 1) -> None:
        """A launch took entries itself, in its own transaction."""
        with self._turn:
            self._demand.setdefault((service, profile), Demand()).taken(count, self._elapsed())

    def take(self, service: str, kind: KeyKind, now: Instant) -> tuple[bytes, bytes]:
        """A fresh key of this kind: its public (SPKI) and private (PKCS#8) half. Made now if none is ready.

        It was gone from the database before: whoever dies with it loses it.
        """
        profile = kind.value
        self.took(service, profile)
        self._known.add((service, profile))
        taken = self._reserve(service, profile, now)
        if taken is None:
            made = self.make(service, profile)
            taken = Taken(public=made.public, wrapped=made.wrapped, again=False)
        return taken.public, self.open(taken, service, profile)

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

    def _add(self, service: str, profile: str, count: int) -> int:
        made = [self.make(service, profile) for _ in range(count)]
        self._store.add_to_pool(service, profile, made)
        return len(made)

    def make(self, service: str, profile: str) -> PoolEntry:
        """One entry, wrapped."""
        key = self._private(profile)
        public = keys.public_bytes(key.public_key())
        plain = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return PoolEntry(public=public, wrapped=self._token.seal(WRAPPING, plain, entry_place(service, profile, public)))

    def _private(self, profile: str) -> keys.PrivateKey | rsa.RSAPrivateKey:
        if profile == KeyKind.ED25519:
            return ed25519.Ed25519PrivateKey.from_private_bytes(self._token.random(_ED25519_BYTES))
        if profile == KeyKind.RSA2048:
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        if profile == KeyKind.P384:
            return _ec_key(self._token.random(_SEED_384), ec.SECP384R1(), _ORDER_384)
        return _ec_key(self._token.random(_SEED_BYTES), ec.SECP256R1(), _ORDER)

    def open(self, taken: Taken, service: str, profile: str) -> bytes:
        """The private key (PKCS#8 DER) of an entry that was taken for a launch, to be sealed to its function now."""
        return self._token.unseal(WRAPPING, taken.wrapped, entry_place(service, profile, taken.public))


def new_key(token: Token) -> ec.EllipticCurvePrivateKey:
    """A P-256 key pair in memory, with the token's randomness (SP 800-56A 5.6.1.2.1, extra random bits)."""
    scalar = int.from_bytes(token.random(_SEED_BYTES), "big") % (_ORDER - 1) + 1
    return ec.derive_private_key(scalar, ec.SECP256R1())


def _ec_key(seed: bytes, curve: ec.EllipticCurve, order: int) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(seed, "big") % (order - 1) + 1, curve)


def entry_place(service: str, profile: str, public: bytes) -> bytes:
    """What the wrapped key of a pool entry is bound to."""
    return tagged("pool-entry", service.encode("ascii"), profile.encode("ascii"), public)
