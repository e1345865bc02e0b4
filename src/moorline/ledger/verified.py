"""What was read and verified once, so that a transaction seen in the mempool is not read and verified again in its block.

Only success is remembered, of exactly these bytes under exactly this key; what the state machine decides is the same with or
without it. Bounded, oldest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

from moorline.digest import length_prefixed
from moorline.ledger import transactions
from moorline.ledger.transactions import Transaction
from moorline.wire import cose
from moorline.wire.cose import Sign1, VerifyingKey

REMEMBERED: Final = 16_384
READ: Final = 4096
_SHORT: Final = 2048
"""What is longer is remembered by its digest: the memory is bounded in bytes too, by 32 MiB."""


class Verified:
    """A memory of one process. Not for threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[object, ...], None] = OrderedDict()
        self._read: OrderedDict[bytes, Transaction] = OrderedDict()

    def parse(self, data: bytes) -> Transaction:
        """As transactions.parse."""
        found = self._read.get(data)
        if found is None:
            found = transactions.parse(data)
            if len(data) <= _SHORT:
                self._read[data] = found
                if len(self._read) > READ:
                    self._read.popitem(last=False)
        return found

    def verify(self, sign1: Sign1, key: VerifyingKey) -> None:
        """As cose.verify: raises NotAuthentic, every time, for a signature that does not hold."""
        if not self.knows(sign1, key):
            cose.verify(sign1, key)
            self.remember(sign1, key)

    def knows(self, sign1: Sign1, key: VerifyingKey) -> bool:
        """Whether it held, and is remembered."""
        return _name(sign1, key) in self._held

    def remember(self, sign1: Sign1, key: VerifyingKey) -> None:
        """Say that cose.verify took this signature, wherever it was called."""
        self._held[_name(sign1, key)] = None
        if len(self._held) > REMEMBERED:
            self._held.popitem(last=False)


def _name(sign1: Sign1, key: VerifyingKey) -> tuple[object, ...]:
    if len(sign1.payload) <= _SHORT:
        return sign1.purpose, key.id, sign1.protected, sign1.signature, sign1.payload
    parts = (sign1.purpose.encode(), key.id, sign1.protected, sign1.signature, sign1.payload)
    return (hashlib.sha256(length_prefixed(*parts)).digest(),)
