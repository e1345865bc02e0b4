"""Signatures that held once, so that a transaction seen in the mempool is not verified again in its block.

Only success is remembered, of exactly these bytes under exactly this key; what the state machine decides is the same with or
without it. Bounded, oldest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

from moorline.digest import length_prefixed
from moorline.wire import cose
from moorline.wire.cose import Sign1, VerifyingKey

REMEMBERED: Final = 16_384


class Verified:
    """A memory of one process. Not for threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, None] = OrderedDict()

    def verify(self, sign1: Sign1, key: VerifyingKey) -> None:
        """As cose.verify: raises NotAuthentic, every time, for a signature that does not hold."""
        parts = (sign1.purpose.encode(), key.id, sign1.protected, sign1.signature, sign1.payload)
        name = hashlib.sha256(length_prefixed(*parts)).digest()
        if name in self._held:
            return
        cose.verify(sign1, key)
        self._held[name] = None
        if len(self._held) > REMEMBERED:
            self._held.popitem(last=False)
