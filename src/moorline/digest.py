"""Hashes with a domain: the only place where the input of a hash, a MAC or a signature is put together.

Every such input is `lp("moorline/<purpose>/v1") | lp(field) | lp(field) ...` where `lp(x)` is the length of x as eight
bytes, most significant first, and then x. Two different lists of fields therefore never give the same input, and the
same fields under two purposes never do either (PROTOCOLS.md, first paragraph).
"""

from __future__ import annotations

import hashlib
import hmac
from functools import lru_cache
from typing import Final, NewType

Digest256 = NewType("Digest256", bytes)
Digest384 = NewType("Digest384", bytes)
Digest512 = NewType("Digest512", bytes)

_VERSION: Final = "v1"


def length_prefixed(*fields: bytes) -> bytes:
    """Each field behind its length (u64, big-endian)."""
    return b"".join([len(field).to_bytes(8, "big") + field for field in fields])


def domain(purpose: str) -> bytes:
    """The domain string of a purpose, `moorline/<purpose>/v1`."""
    return f"moorline/{purpose}/{_VERSION}".encode("ascii")


def tagged(purpose: str, *fields: bytes) -> bytes:
    """The unambiguous input for a hash, MAC or signature of `fields` under `purpose`."""
    return _prefix(purpose) + length_prefixed(*fields)


@lru_cache(maxsize=1024)  # bounded: one entry a purpose, which are constants of the code
def _prefix(purpose: str) -> bytes:
    return length_prefixed(domain(purpose))


def tagged_hash(purpose: str, *fields: bytes) -> Digest256:
    """SHA-256 over `tagged(purpose, *fields)`; 32 bytes."""
    # `tagged`, written out: it is asked for several times a transaction of the ledger.
    parts = [len(field).to_bytes(8, "big") + field for field in fields]
    return Digest256(hashlib.sha256(_prefix(purpose) + b"".join(parts)).digest())


class RunningHash:
    """`tagged_hash` over fields that come one after the other, of which none is kept."""

    __slots__ = ("_hash",)

    def __init__(self, purpose: str) -> None:
        self._hash = hashlib.sha256(_prefix(purpose))

    def add(self, field: bytes) -> None:
        """One more field."""
        self._hash.update(len(field).to_bytes(8, "big"))
        self._hash.update(field)

    def digest(self) -> Digest256:
        """`tagged_hash(purpose, *fields)` over all fields so far; 32 bytes."""
        return Digest256(self._hash.copy().digest())


def tagged_hash512(purpose: str, *fields: bytes) -> Digest512:
    """SHA-512 over `tagged(purpose, *fields)`; 64 bytes, as report data of an enclave needs."""
    return Digest512(hashlib.sha512(tagged(purpose, *fields)).digest())


def tagged_mac(key: bytes, purpose: str, *fields: bytes) -> Digest256:
    """HMAC-SHA-256 under `key` over `tagged(purpose, *fields)`; 32 bytes."""
    return Digest256(hmac.digest(key, tagged(purpose, *fields), "sha256"))


def same(left: bytes, right: bytes) -> bool:
    """Compare two digests or MACs in constant time."""
    return hmac.compare_digest(left, right)
