"""Keys that are due are replaced in the background, by the policy in `[rotation]` of broker.toml.

1. of several processes on one database one has the turn (HsmStore.take_turn), for a while; one that dies leaves it to expire
2. what hsm.calendar says is due is done, one entry after the other, each durable by itself: who is killed in between is
   followed by whoever has the next turn. Sealing again (hsm.rotation) finds by itself what was done before
3. an entry that fails is logged and tried at the next look; the others go on

Pair keys with other HSMs are replaced by broker_pairs, on the same policy.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from moorline.errors import MoorlineError
from moorline.hsm.calendar import Deed, Entry, Rotation, entries
from moorline.services import broker_keys
from moorline.services.broker import Broker

_LOG: Final = structlog.stdlib.get_logger("broker")
_TURN: Final = "calendar-turn"


async def keep_calendar(broker: Broker) -> None:
    """Until cancelled; without a policy there is nothing to do."""
    policy = broker.settings.rotation
    if policy is None:
        await asyncio.Event().wait()
        return
    while True:
        try:
            await look(broker, policy)
        except MoorlineError as error:
            _LOG.warning("calendar not read", code=error.code)
        await asyncio.sleep(policy.every_s)


async def look(broker: Broker, policy: Rotation) -> None:
    """Do what is due now, if it is this process's turn. Raises what the database says."""
    now = broker.clock.now()
    if not await asyncio.to_thread(broker.hsm.take_turn, _TURN, now, policy.every_s):
        return
    for entry in entries(await asyncio.to_thread(broker.hsm.key_rows), policy, now):
        try:
            await _do(broker, entry)
        except MoorlineError as error:
            _LOG.warning("key not rotated yet", deed=entry.deed.value, key=entry.label or entry.role, code=error.code)
        else:
            _LOG.info("key rotated", deed=entry.deed.value, key=entry.label or entry.role)


async def _do(broker: Broker, entry: Entry) -> None:
    if entry.deed is Deed.BEGIN:
        await asyncio.to_thread(broker_keys.begin, broker, entry.role)
    elif entry.deed is Deed.ACTIVATE:
        await broker_keys.activate(broker, entry.label)
    elif entry.deed is Deed.REWRAP:
        await asyncio.to_thread(broker_keys.rewrap_now, broker)
    else:
        await asyncio.to_thread(broker_keys.retire, broker, entry.label)
