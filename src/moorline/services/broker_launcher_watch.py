"""Launchers that the ledger revokes while they hold leases: all launchers share a key, so their epoch ends (PROTOCOLS.md 3).

Every `revocation_poll_s` the ledger is asked about each launcher that could still mint: itself, its code, its chip. Of one
that is revoked every lease is void and every epoch closed without grace, whether or not it ever asks for anything again;
launchers that stand take a lease of the next epoch. A ledger that cannot be asked decides nothing here: what is minted
meanwhile is asked about when its function comes.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from moorline.errors import MoorlineError, Refused
from moorline.ledger.records import RevocationKind
from moorline.services.broker import Broker
from moorline.services.broker_enclaves import revocable_enclave
from moorline.services.broker_role import Revocable, require_not_revoked, revocable_keys
from moorline.storage.broker_epochs import Launcher

_LOG: Final = structlog.stdlib.get_logger("broker")


async def keep_watching(broker: Broker) -> None:
    """Look until cancelled."""
    while True:
        try:
            await look(broker)
        except MoorlineError as error:
            _LOG.info("launchers not looked at", code=error.code)
        await asyncio.sleep(broker.settings.revocation_poll_s)


async def look(broker: Broker) -> None:
    """Ask once about every launcher that holds a lease. Raises what ledger, database and token say."""
    now = broker.clock.now()
    for one in await asyncio.to_thread(broker.store.leasing_launchers, at=now):
        try:
            await require_standing(broker, one)
        except Refused as refusal:
            if refusal.code != "ledger.revoked":
                raise
            _LOG.error("launcher revoked on the ledger; its epoch is closed", launcher=one.launcher.hex())
            await asyncio.to_thread(broker.launch_keys.revoke_launcher, one.launcher, now)


async def require_standing(broker: Broker, one: Launcher) -> None:
    """Raises Refused("ledger.revoked"), and what the ledger view raises."""
    revocable = rests_on(broker, one)
    require_not_revoked(await broker.ledger.state(revocable_keys(revocable)), revocable)


def rests_on(broker: Broker, one: Launcher) -> tuple[Revocable, ...]:
    """What the ledger could revoke about a launcher."""
    itself = (RevocationKind.LAUNCHER, broker.settings.provider, one.launcher.hex())
    return (itself, *revocable_enclave(one.measurement, one.chip))
