"""Keeping the broker's pools filled: soon after each launch and now and then anyway, behind whoever asks."""

from __future__ import annotations

import asyncio
from typing import Final

from moorline.errors import MoorlineError
from moorline.services.broker import Broker
from moorline.wire.launch import ChannelProfile

_REFILL_EVERY_S: Final = 1.0
_REFILL_AT_ONCE: Final = 32
_REFILL_REST_S: Final = 0.05


async def keep_pools(broker: Broker) -> None:
    """Fill pools in the background, soon after each launch and now and then anyway."""
    while True:
        try:
            async with asyncio.timeout(_REFILL_EVERY_S):
                await broker.refill.wait()
        except TimeoutError:
            pass
        await asyncio.sleep(_REFILL_REST_S)  # what was taken in a burst is one look at the pools
        broker.refill.clear()
        try:
            # A few at a time, and only while nobody waits for an answer: requests come before what may be needed later.
            while broker.open.working == 0 or await asyncio.to_thread(broker.pool.low):
                if not await asyncio.to_thread(broker.pool.top_up, at_most=_REFILL_AT_ONCE):
                    break
                await asyncio.sleep(0)
        except MoorlineError:
            await asyncio.sleep(_REFILL_EVERY_S)  # token or database is busy or gone; a launch that needs them says so


def prefill(broker: Broker) -> None:
    """Have something ready for the services that the settings name."""
    for service in broker.settings.pool_services:
        broker.pool.refill(service, ChannelProfile.TLS)
