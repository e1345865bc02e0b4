"""Key pairs made before they are needed, each handed to one function and never to two (PROTOCOLS.md 5).

A pool entry is a P-256 key from the token's random generator (FIPS 186-5 A.2.1, extra random bits), wrapped at once under
an AES key that does not leave the token. A token object each would cost a disk write (98 a second, FINDINGS.md); wrapped
entries cost a row. An entry is bound to its service, profile and public key: a row moved to another service does not
unwrap. Taking is the store's transaction: it is gone before it is sent. Plain keys exist in this process's memory twice,
when made and when sealed to the function; the broker's host is in the provider's trusted base (PROTOCOLS.md, first
paragraph).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.digest import tagged
from moorline.hsm.keys import WRAPPING
from moorline.hsm.token import Token
from moorline.storage.broker_store import BrokerStore, PoolEntry, Taken
from moorline.wire import keys

_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (SP 800-186 3.2.1.3)
_SEED_BYTES: Final = 40  # 64 bits more than the order has, so that the remainder has no bias one could use


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermarks:
    """A pool below `low` is filled up to `high`."""

    low: int
    high: int


class KeyPool:
    """The pools of one HSM."""

    def __init__(self, token: Token, store: BrokerStore, watermarks: Watermarks) -> None:
        self._token, self._store, self._watermarks = token, store, watermarks

    def refill(self, service: str, profile: str) -> int:
        """Fill a pool that is below its low mark; how many were made. Safe to call from any thread."""
        present = self._store.pool_size(service, profile)
        if present >= self._watermarks.low:
            return 0
        made = [self.make(service, profile) for _ in range(self._watermarks.high - present)]
        self._store.add_to_pool(service, profile, made)
        return len(made)

    def refill_known(self) -> int:
        """Fill every pool that was ever used and is low; how many were made."""
        return sum(self.refill(service, profile) for service, profile in self._store.pools())

    def make(self, service: str, profile: str) -> PoolEntry:
        """One entry, wrapped."""
        key = new_key(self._token)
        public = keys.public_bytes(key.public_key())
        plain = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return PoolEntry(public=public, wrapped=self._token.seal(WRAPPING, plain, entry_place(service, profile, public)))

    def open(self, taken: Taken, service: str, profile: str) -> bytes:
        """The private key (PKCS#8 DER) of an entry that was taken for a launch, to be sealed to its function now."""
        return self._token.unseal(WRAPPING, taken.wrapped, entry_place(service, profile, taken.public))


def new_key(token: Token) -> ec.EllipticCurvePrivateKey:
    """A P-256 key pair in memory, with the token's randomness (SP 800-56A 5.6.1.2.1, extra random bits)."""
    scalar = int.from_bytes(token.random(_SEED_BYTES), "big") % (_ORDER - 1) + 1
    return ec.derive_private_key(scalar, ec.SECP256R1())


def entry_place(service: str, profile: str, public: bytes) -> bytes:
    """What the wrapped key of a pool entry is bound to."""
    return tagged("pool-entry", service.encode("ascii"), profile.encode("ascii"), public)
