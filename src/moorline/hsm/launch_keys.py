"""Epochs of the launch key, leases of sequence numbers, and tokens recomputed inside the PKCS#11 token (PROTOCOLS.md 3).

A launch key must do two things that a token keeps apart: verify, for which it should never leave, and travel once, sealed
to each attested launcher. So 32 bytes come from the token's generator, go back into it as a non-extractable HMAC key,
with which every token is recomputed, and are kept for launchers only as a copy wrapped under the token's AES key, which
is dropped when the epoch is over. An extractable token key would be one C_WrapKey call away from anybody with the PIN for
as long as it lives; the wrapped copy needs the broker's database as well.

A counter in the token advances before every epoch, lease and generation change, and the database records it in the
transaction around it. Writing transactions are in a row (storage.transactions), so counter and record move together for
all the broker processes that share token and database. A database whose number differs was restored (or a broker died
between the two, which is treated the same): pool, epochs and leases are void and an operator must open the next epoch.
That is looked at when a broker starts and before every advance, so a database put back behind running brokers is noticed
too. The epoch's number is the counter's value, so no number is ever used twice, whatever happens to the database.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from moorline.clock import Instant
from moorline.digest import tagged
from moorline.errors import Misconfigured, Refused, Unavailable
from moorline.hsm.keys import WRAPPING
from moorline.hsm.token import Token
from moorline.storage import broker_facts as store_facts
from moorline.storage.broker_epochs import Epoch, Lease
from moorline.storage.broker_store import BrokerStore
from moorline.storage.steps import reached
from moorline.storage.transactions import Transaction
from moorline.wire import launch
from moorline.wire.launch import LaunchFields
from moorline.wire.session import LauncherSecrets

T = TypeVar("T")

COUNTER: Final = "state-counter"
_KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How long epochs and leases last. `grace_s` is at most 120 (PROTOCOLS.md 3)."""

    epoch_s: int
    grace_s: int
    lease_count: int
    lease_s: int


class LaunchKeys:
    """The launch keys of one HSM."""

    def __init__(self, token: Token, store: BrokerStore, terms: Terms) -> None:
        self._token, self._store, self._terms = token, store, terms
        self._unrecorded: int | None = None  # what this process advanced to and the database could not record

    def reconcile(self, now: Instant) -> bool:
        """Compare the database with the token's counter; True if they agree, else everything leased is discarded."""
        with self._store.transaction() as c:  # no other broker is between the two now
            if self._token.counter(COUNTER) == self._store.fact_in(c, store_facts.COUNTER):
                return True
            anchored = self._store.fact_in(c, "anchor-accepted")
        says = "the database is behind the token's counter: it was restored, or a broker died between the two"
        self.discard(says, anchored=anchored, now=now)
        return False

    def discard(self, says: str, *, anchored: int, now: Instant) -> None:
        """The database was restored: pools, epochs and leases are void until the operator opens the next epoch."""
        self._store.discard(counter=self._token.counter(COUNTER), anchored=anchored, says=says, at=now)

    def advance_in(self, c: Transaction) -> int:
        """Advance counter and record in a writing transaction; the new value.

        Raises Unavailable("launch.halted") if the two differ before: the caller's transaction does nothing.
        """
        before, recorded = self._token.counter(COUNTER), self._store.fact_in(c, store_facts.COUNTER)
        if before not in (recorded, self._unrecorded):
            raise _Behind
        self._unrecorded = counter = self._token.advance(COUNTER)
        reached("broker.counter.advanced")
        self._store.set_fact_in(c, store_facts.COUNTER, counter)
        return counter

    def guarded(self, work: Callable[[], T], now: Instant) -> T:
        """`work`, which may advance; a database found behind the counter is discarded, once, and `work` refused."""
        try:
            return work()
        except _Behind as behind:
            self.reconcile(now)
            raise behind.as_halted() from None

    def open_epoch(self, now: Instant) -> Epoch:
        """Close the epoch that runs, with grace, and open the next. An operator's call also ends a halt."""
        opened, over = self.guarded(lambda: self._store.write(lambda c: self._open(c, now)), now)
        return self._cleared(opened, over)

    def current(self, now: Instant) -> Epoch:
        """The running epoch; the next is opened if its time is over.

        Raises Unavailable("launch.halted") while the broker waits for its operator after a restored database.
        """
        self.require_running()
        newest = self._store.newest_epoch()
        if newest is not None and newest.wrapped is not None and now <= newest.not_after:
            return newest

        def work(c: Transaction) -> tuple[Epoch, list[int]]:
            again = self._store.newest_epoch_in(c)  # another broker may have opened it meanwhile
            if again is not None and again.wrapped is not None and now <= again.not_after:
                return again, []
            return self._open(c, now)

        opened, over = self.guarded(lambda: self._store.write(work), now)
        return self._cleared(opened, over)

    def require_running(self) -> None:
        """Raises Unavailable("launch.halted") while the operator is waited for."""
        if self._store.fact("halted"):
            raise Unavailable(
                "launch.halted",
                "the broker's database was restored; launching stopped",
                remedy="look at the alarms, then open a new epoch (POST /v1/epochs)",
                retry_after_s=60,
            )

    def accept_clock(self, now: Instant) -> Epoch:
        """The operator says that it is `now`, whatever was the latest time seen; what was leased by that time is void."""
        self._store.reset_time(now)
        return self.open_epoch(now)

    def _open(self, c: Transaction, now: Instant) -> tuple[Epoch, list[int]]:
        key = self._token.random(_KEY_BYTES)
        number = self.advance_in(c)
        self._token.import_mac_key(_label(number), key)
        over = self._store.open_epoch_in(
            c,
            epoch=number,
            opened=now,
            not_after=Instant(now + self._terms.epoch_s),
            grace_s=self._terms.grace_s,
            wrapped=self._token.seal(WRAPPING, key, epoch_place(number)),
        )
        opened = self._store.newest_epoch_in(c)
        assert opened is not None
        return opened, over

    def _cleared(self, opened: Epoch, over: list[int]) -> Epoch:
        reached("broker.epoch.opened")
        for epoch in over:
            self._token.destroy_secret(_label(epoch))
        return opened

    def lease(self, launcher: bytes, now: Instant) -> LauncherSecrets:
        """The epoch's key and fresh sequence numbers for an admitted launcher; to be sealed to it and to nobody else.

        Raises Refused("launch.launcher_not_admitted").
        """
        if not self._store.launcher_active(launcher):
            raise Refused(
                "launch.launcher_not_admitted",
                "this launcher was not admitted, or was revoked",
                got=launcher,
                remedy="start a launcher with a new ticket",
            )
        epoch = self.current(now)
        assert epoch.wrapped is not None
        key = self._token.unseal(WRAPPING, epoch.wrapped, epoch_place(epoch.epoch))
        not_after = Instant(min(now + self._terms.lease_s, epoch.accept_until))

        def work(c: Transaction) -> Lease:
            return self._store.grant_lease_in(
                c,
                launcher=launcher,
                epoch=epoch.epoch,
                count=self._terms.lease_count,
                not_after=not_after,
                counter=self.advance_in(c),
                at=now,
            )

        granted = self.guarded(lambda: self._store.write(work), now)
        reached("broker.lease.granted")
        return LauncherSecrets(
            launch_key=key,
            epoch=epoch.epoch,
            epoch_not_after=epoch.not_after,
            lease_first=granted.first,
            lease_count=granted.count,
            lease_not_after=granted.not_after,
        )

    def revoke_launcher(self, launcher: bytes, now: Instant) -> Epoch:
        """Void a launcher and, since all share the key, its epoch without grace; the next epoch is opened."""
        self._store.revoke_launcher(launcher, at=now)
        return self.open_epoch(now)

    def epoch_and_leases(self, fields: LaunchFields) -> tuple[Epoch | None, tuple[Lease, ...]]:
        """The epoch that launch fields name, if this HSM ever opened it, and the leases of their launcher in it."""
        return self._store.epoch_and_leases(fields.launcher, fields.epoch)

    def recompute(self, fields: LaunchFields) -> bytes | None:
        """The one-time token of these fields, computed in the token; None if the epoch's key is not there (any more)."""
        try:
            return self._token.mac(_label(fields.epoch), launch.commitment(fields))
        except Misconfigured:
            return None  # never made, or destroyed when its time was over

    def new_storage_key(self, fields: LaunchFields) -> tuple[bytes, bytes]:
        """A fresh sealed-storage key for one generation of an instance: plain for its function, and wrapped to be kept.

        Nothing else leads to it, so that who deletes the wrapped key destroys the key.
        """
        key = self._token.random(_KEY_BYTES)
        return key, self._token.seal(WRAPPING, key, _storage_place(fields))

    def storage_key(self, fields: LaunchFields, wrapped: bytes) -> bytes:
        """The key that was wrapped for this generation; raises NotAuthentic for another's."""
        return self._token.unseal(WRAPPING, wrapped, _storage_place(fields))


class _Behind(Exception):
    """The token's counter is not what the database says."""

    def as_halted(self) -> Unavailable:
        return Unavailable(
            "launch.halted",
            "the broker's database was restored; launching stopped",
            remedy="look at the alarms, then open a new epoch (POST /v1/epochs)",
            retry_after_s=60,
        )


def _storage_place(fields: LaunchFields) -> bytes:
    return storage_place(fields.provider, fields.tenant, fields.service, fields.instance, fields.generation)


def storage_place(provider: str, tenant: str, service: str, instance: str, generation: int) -> bytes:
    """What the wrapped storage key of one generation is bound to."""
    names = (provider, tenant, service, instance)
    return tagged("storage-key", *(name.encode("ascii") for name in names), generation.to_bytes(8, "big"))


def _label(epoch: int) -> str:
    return f"launch-key-{epoch}"


def epoch_place(epoch: int) -> bytes:
    """What the wrapped launch key of an epoch is bound to."""
    return tagged("launch-key", epoch.to_bytes(8, "big"))
