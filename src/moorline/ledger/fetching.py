"""Proofs we fetch ourselves: one that was overtaken on its way is fetched again, one that stays behind is refused.

Authorities take in a block one after another, and answers travel. So who asks another authority than the last time, or shows
its proof to somebody who saw a newer one meanwhile (a launcher), can be behind although nobody lies. Who keeps showing an
old head is told from that by time alone: what is still behind when `PATIENCE_S` is over is refused as "ledger.rollback".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from moorline.errors import Refused

T = TypeVar("T")
PATIENCE_S: Final = 3.0
_PAUSE_S: Final = 0.05


async def not_overtaken(attempt: Callable[[int], Awaitable[T]]) -> T:
    """What `attempt` returns, made again while it raises Refused("ledger.rollback"), for `PATIENCE_S`; then that stands.

    `attempt` fetches a proof each time, at the height it is given (`LedgerClient.prove`): 0, then what it was said to be
    behind. That number came with the refusal and is hearsay: good for choosing whom to ask. Raises all that `attempt` does.
    """
    deadline, height = asyncio.get_running_loop().time() + PATIENCE_S, 0
    while True:
        try:
            return await attempt(height)
        except Refused as error:
            if error.code != "ledger.rollback" or asyncio.get_running_loop().time() >= deadline:
                raise
            named = error.expected or ""
            height = int(named) if named.isdecimal() else 0
        await asyncio.sleep(_PAUSE_S)
