"""CMP transactions: each is used once, and may wait for the client's confirmation (RFC 9483 3.1, 4.1.1).

A request is remembered for longer than whatever protects it can be in force, a one-time code (a week at most) or a device's
certificate: a copy of it sent again, over whatever connection, is no request any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Conflict, Refused
from moorline.storage.broker_store import BrokerStore
from moorline.storage.transactions import retried

_REMEMBERED_S: Final = 8 * 24 * 3600
_USED: Final = sa.table("cmp_used", sa.column("transaction"), sa.column("at"))
_WAITING: Final = sa.table(
    "cmp_transactions",
    *(sa.column(name) for name in ("transaction", "serial", "certificate_hash", "number", "nonce", "at")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CmpTransaction:
    """A certificate given out and not confirmed yet. `nonce` is ours, which the confirmation has to carry."""

    transaction: bytes
    serial: str
    certificate_hash: bytes
    number: int
    nonce: bytes
    at: Instant


@retried
class CmpStore:
    """The broker's store, as far as CMP goes."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store

    def use(self, transaction: bytes, *, at: Instant) -> None:
        """Use a transaction, for good. Raises Conflict("cmp.transaction_in_use") if it was used before."""
        with self._store.transaction() as c:
            c.execute(sa.delete(_USED).where(_USED.c.at < at - _REMEMBERED_S))
            used = c.execute(sa.select(_USED.c.at).where(_USED.c.transaction == transaction)).first() is not None
            if not used:
                c.execute(sa.insert(_USED).values(transaction=transaction, at=at))
        if used:
            raise Conflict(
                "cmp.transaction_in_use",
                "this transaction was used before",
                remedy="ask again under a new transaction; a copy of an old request gets nothing",
            )

    def expect(self, made: CmpTransaction) -> None:
        """Wait for a confirmation."""
        with self._store.transaction() as c:
            c.execute(sa.insert(_WAITING).values(**{n: getattr(made, n) for n in CmpTransaction.__dataclass_fields__}))

    def waiting(self, transaction: bytes) -> CmpTransaction:
        """What waits under a transaction. Raises Refused("cmp.nothing_to_confirm")."""
        with self._store.reading() as c:
            row = c.execute(sa.select(_WAITING).where(_WAITING.c.transaction == transaction)).mappings().one_or_none()
        if row is None:
            raise Refused("cmp.nothing_to_confirm", "nothing waits for a confirmation under this transaction")
        return CmpTransaction(**row)

    def overdue(self, before: Instant) -> tuple[CmpTransaction, ...]:
        """What was given out before this and never confirmed."""
        with self._store.reading() as c:
            rows = c.execute(sa.select(_WAITING).where(_WAITING.c.at < before)).mappings()
            return tuple(CmpTransaction(**row) for row in rows)

    def done(self, transaction: bytes) -> None:
        """Nothing waits there any more."""
        with self._store.transaction() as c:
            c.execute(sa.delete(_WAITING).where(_WAITING.c.transaction == transaction))
