"""Each tenant's log, held by the broker's own: what was in it once cannot be changed unnoticed.

1. every ANCHOR_EVERY_S, for each tenant whose log grew, size and head of it are an entry (`tenant-log`) of the broker's
   secure log. A head is chained over every entry before it, and the broker's log is anchored on the ledger
   (broker_anchor), so a tenant's log is held by the ledger too, within two turns
2. before that, and once at the start, the log is compared with what was entered last: a log that is shorter, or has another
   head at that size, raises an alarm (`tenant.log_rewritten`) each start, and nothing more is entered about it

Names and numbers of tenants are in the broker's log, which its provider's people read; on the ledger stands one root, which
tells nobody how many tenants there are or how busy they are.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from moorline.audit.log import LogEntry, entry_digest
from moorline.digest import same
from moorline.errors import MoorlineError, NotAuthentic
from moorline.services.broker import Broker
from moorline.services.broker_anchor import ANCHOR_EVERY_S
from moorline.storage.broker_store import BrokerStore
from moorline.wire import schema

EVENT: Final = "tenant-log"
_BATCH: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tenant's log as the broker's own log has it: so many entries, and the digest of the last one."""

    size: int
    head: bytes


class TenantLogs:
    """The logs of all tenants of one HSM, against what was entered about them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._held = entered(broker.store)
        self._broken: set[str] = set()

    def turn(self) -> tuple[str, ...]:
        """2, then 1, for every tenant; whose logs do not continue. Raises what the database says."""
        store = self._broker.hsm
        for tenant in store.tenants():
            if tenant.name in self._broken or tenant.state == "destroyed":
                continue
            held = self._held.get(tenant.name)
            try:
                self._require_continues(tenant.name, held)
            except NotAuthentic as error:
                self._broken.add(tenant.name)
                self._alarm(tenant.name, error)
                continue
            size, last = store.tenant_log_end(tenant.name)
            if last is not None and (held is None or size > held.size):
                self._enter(tenant.name, Held(size=size, head=entry_digest(last)))
        return tuple(sorted(self._broken))

    def _require_continues(self, tenant: str, held: Held | None) -> None:
        """Raises NotAuthentic("tenant.log_rewritten")."""
        found = None if held is None else self._broker.hsm.tenant_log_entry(tenant, held.size - 1)
        if held is not None and (found is None or not same(entry_digest(found), held.head)):
            raise NotAuthentic(
                "tenant.log_rewritten",
                "a tenant's log does not continue what was entered about it: it was changed or cut",
                expected=f"{held.size} entries, head {held.head.hex()}",
                got=tenant,
                remedy="an entry was removed from the database, or changed; look at the broker's machine",
            )

    def _enter(self, tenant: str, now: Held) -> None:
        body: dict[str, object] = {"tenant": tenant, "size": now.size, "head": now.head}
        self._broker.store.append(EVENT, body, at=self._broker.clock.now())
        self._held[tenant] = now

    def _alarm(self, tenant: str, error: NotAuthentic) -> None:
        with self._broker.store.transaction() as c:
            at = self._broker.clock.now()
            self._broker.store.alarm_in(c, at, error.code, error.says, tenant, str(error.expected))


def entered(store: BrokerStore) -> dict[str, Held]:
    """What the broker's log says of each tenant's, the last entry of each."""
    found: dict[str, Held] = {}
    first = 0
    while batch := store.audit(first=first, limit=_BATCH):
        for data in batch:
            if EVENT.encode() in data:  # most entries are about something else, and decoding all takes long
                entry = schema.decode(LogEntry, data)
                if entry.event == EVENT:
                    said = entry.details
                    found[said["tenant"]] = Held(size=int(said["size"]), head=bytes.fromhex(said["head"]))
        first += len(batch)
    return found


async def keep_holding(broker: Broker) -> None:
    """Until cancelled; an HSM without tenants has nothing to hold."""
    if broker.settings.tenants is None:
        await asyncio.Event().wait()
        return
    logs = await asyncio.to_thread(TenantLogs, broker)
    while True:
        with suppress(MoorlineError):  # the database is away or busy; the next turn holds more at once
            await asyncio.to_thread(logs.turn)
        await asyncio.sleep(ANCHOR_EVERY_S)
