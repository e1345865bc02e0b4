"""Epochs of the launch key, leases of sequence numbers, and tokens recomputed inside the PKCS#11 token (PROTOCOLS.md 3).

A launch key must do two things that a token keeps apart: verify, for which it should never leave, and travel once, sealed
to each attested launcher. So 32 bytes come from the token's generator, go back into it as a non-extractable HMAC key,
with which every token is recomputed, and are kept for launchers only as a copy wrapped under the token's AES key, which
is dropped when the epoch is over. An extractable token key would be one C_WrapKey call away from anybody with the PIN for
as long as it lives; the wrapped copy needs the broker's database as well.

A counter in the token advances before every epoch, lease and generation change, and the database records it in the
transaction that follows. A database whose number differs was restored (or the broker died between the two, which is
treated the same): pool, epochs and leases are void and an operator must open the next epoch. The epoch's number is the
counter's value, so no number is ever used twice, whatever happens to the database.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from moorline.clock import Instant
from moorline.digest import tagged
from moorline.errors import Misconfigured, Refused, Unavailable
from moorline.hsm.keys import WRAPPING
from moorline.hsm.token import Token
from moorline.storage.broker_store import BrokerStore, Epoch, Lease
from moorline.storage.steps import reached
from moorline.wire import launch
from moorline.wire.launch import LaunchFields
from moorline.wire.session import LauncherSecrets

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
        self._moving = threading.RLock()  # counter and database move together within this process

    def reconcile(self, now: Instant) -> bool:
        """Compare the database with the token's counter; True if they agree, else everything leased is discarded."""
        with self._moving:
            if self._token.counter(COUNTER) == self._store.fact("counter"):
                return True
            says = "the database is behind the token's counter: it was restored, or the broker died between the two"
            self.discard(says, anchored=self._store.fact("anchor-accepted"), now=now)
            return False

    def discard(self, says: str, *, anchored: int, now: Instant) -> None:
        """The database was restored: pools, epochs and leases are void until the operator opens the next epoch."""
        with self._moving:
            self._store.discard(counter=self._token.counter(COUNTER), anchored=anchored, says=says, at=now)

    def open_epoch(self, now: Instant) -> Epoch:
        """Close the epoch that runs, with grace, and open the next. An operator's call also ends a halt."""
        with self._moving:
            key = self._token.random(_KEY_BYTES)
            number = self._advance()
            self._token.import_mac_key(_label(number), key)
            wrapped = self._token.seal(WRAPPING, key, _place(number))
            over = self._store.open_epoch(
                epoch=number,
                opened=now,
                not_after=Instant(now + self._terms.epoch_s),
                grace_s=self._terms.grace_s,
                wrapped=wrapped,
            )
            for epoch in over:
                self._token.destroy_secret(_label(epoch))
        opened = self._store.epoch(number)
        assert opened is not None
        return opened

    def current(self, now: Instant) -> Epoch:
        """The running epoch; the next is opened if its time is over.

        Raises Unavailable("launch.halted") while the broker waits for its operator after a restored database.
        """
        with self._moving:
            if self._store.fact("halted"):
                raise Unavailable(
                    "launch.halted",
                    "the broker's database was restored; launching stopped",
                    remedy="look at the alarms, then open a new epoch (POST /v1/epochs)",
                    retry_after_s=60,
                )
            newest = self._store.newest_epoch()
            if newest is not None and newest.wrapped is not None and now <= newest.not_after:
                return newest
            return self.open_epoch(now)

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
        with self._moving:
            epoch = self.current(now)
            assert epoch.wrapped is not None
            key = self._token.unseal(WRAPPING, epoch.wrapped, _place(epoch.epoch))
            granted = self._store.grant_lease(
                launcher=launcher,
                epoch=epoch.epoch,
                count=self._terms.lease_count,
                not_after=Instant(min(now + self._terms.lease_s, epoch.accept_until)),
                counter=self._advance(),
                at=now,
            )
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
        with self._moving:
            self._store.revoke_launcher(launcher, at=now)
            return self.open_epoch(now)

    def epoch_of(self, fields: LaunchFields) -> Epoch | None:
        """The epoch that launch fields name, if this HSM ever opened it."""
        return self._store.epoch(fields.epoch)

    def leases_of(self, fields: LaunchFields) -> tuple[Lease, ...]:
        """The leases of the launcher that launch fields name."""
        return self._store.leases(fields.launcher, fields.epoch)

    def recompute(self, fields: LaunchFields) -> bytes | None:
        """The one-time token of these fields, computed in the token; None if the epoch's key is not there (any more)."""
        try:
            return self._token.mac(_label(fields.epoch), launch.commitment(fields))
        except Misconfigured:
            return None  # never made, or destroyed when its time was over

    def advance_for_generation(self, fields: LaunchFields) -> int | None:
        """Advance the counter if this launch raises the generation of an instance that ran before, else None."""
        known = self._store.generation(fields.instance)
        if known is None or fields.generation <= known:
            return None
        return self._advance()

    def new_storage_key(self, fields: LaunchFields) -> bytes:
        """A fresh sealed-storage key for one generation of an instance, wrapped.

        Nothing else leads to it, so that who deletes the wrapped key destroys the key.
        """
        return self._token.seal(WRAPPING, self._token.random(_KEY_BYTES), _storage_place(fields))

    def storage_key(self, fields: LaunchFields, wrapped: bytes) -> bytes:
        """The key that was wrapped for this generation; raises NotAuthentic for another's."""
        return self._token.unseal(WRAPPING, wrapped, _storage_place(fields))

    def _advance(self) -> int:
        counter = self._token.advance(COUNTER)
        reached("broker.counter.advanced")
        return counter

    @property
    def moving(self) -> threading.RLock:
        """Held while counter and database move together."""
        return self._moving


def _storage_place(fields: LaunchFields) -> bytes:
    names = (fields.provider, fields.tenant, fields.service, fields.instance)
    return tagged("storage-key", *(name.encode("ascii") for name in names), fields.generation.to_bytes(8, "big"))


def _label(epoch: int) -> str:
    return f"launch-key-{epoch}"


def _place(epoch: int) -> bytes:
    return tagged("launch-key", epoch.to_bytes(8, "big"))
