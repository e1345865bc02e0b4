"""Records of the channel without forward secrecy: one AEAD key a direction, counters without gaps, an end. Sans-IO.

- a record is taken only with the counter that comes next, so nothing is dropped, repeated or reordered;
- each direction has its own key, so nothing is reflected; the key id is authenticated with each record;
- a key ends with its counters or its time, whichever comes first: then there is a new key, never a used counter.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from moorline.clock import Instant
from moorline.digest import tagged
from moorline.errors import NotAuthentic, Refused
from moorline.wire.nopfs import Direction, NoPfsRecord

_NONCE: Final = 12


class Direct:
    """One direction of a connection: either seals or opens."""

    def __init__(self, key: bytes, key_id: bytes, direction: Direction, *, count: int, not_after: Instant) -> None:
        self._aead = AESGCM(key)
        self._bound_to = tagged("nopfs-record", key_id, direction.value.encode("ascii"))
        self._next, self._count, self._not_after = 0, count, not_after

    def seal(self, plaintext: bytes, *, now: Instant) -> NoPfsRecord:
        """The next record. Raises Refused("nopfs.key_ended")."""
        counter = self._spend(now)
        sealed = self._aead.encrypt(counter.to_bytes(_NONCE, "big"), plaintext, self._bound_to)
        return NoPfsRecord(counter=counter, sealed=sealed)

    def open(self, record: NoPfsRecord, *, now: Instant) -> bytes:
        """The plaintext of the next record. Raises NotAuthentic("nopfs.record"), Refused("nopfs.key_ended")."""
        if record.counter != self._next:
            raise NotAuthentic(
                "nopfs.record", "a record was dropped, repeated or reordered", expected=self._next, got=record.counter
            )
        if self._next >= self._count or now >= self._not_after:
            raise _ended(self._count)
        try:
            plaintext = self._aead.decrypt(record.counter.to_bytes(_NONCE, "big"), record.sealed, self._bound_to)
        except InvalidTag:
            raise NotAuthentic("nopfs.record", "a record is not from the peer that holds the key") from None
        self._next += 1
        return plaintext

    def _spend(self, now: Instant) -> int:
        if self._next >= self._count or now >= self._not_after:
            raise _ended(self._count)
        self._next += 1  # before anything leaves: a counter is never used twice
        return self._next - 1


def _ended(count: int) -> Refused:
    return Refused(
        "nopfs.key_ended",
        "the key has no counters or no time left",
        expected=f"<= {count} records",
        remedy="connect again: that makes a new key",
    )
