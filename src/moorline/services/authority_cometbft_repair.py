"""Repairing one authority of the CometBFT engine: what it stored is set aside, and it comes again from the others' blocks.

  1. the database and CometBFT's data are moved away; what the signer signed last stays, so that nothing is signed twice;
  2. an empty CometBFT starts, takes every block from its peers (or a snapshot, where its config.toml says so) and verifies
     the commits; our application executes them, and every header has to carry the root that it comes to;
  3. once it is where the others are, both stop, and the database is opened again, which compares its state with its root.

Nobody is served meanwhile. Evidence in blocks, and clocks that were off, are found again on the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import ceremony
from moorline.ledger.ceremony import AuthorityKeys
from moorline.ledger.checkpoint import tolerated_faults
from moorline.ledger.engines.cometbft.chain import Chain
from moorline.ledger.genesis import Genesis
from moorline.services import authority_cometbft
from moorline.services.authority import Settings
from moorline.services.authority_repair import Repaired, aside, sqlite_file
from moorline.services.process import configure_logs
from moorline.storage.consensus_store import open_consensus
from moorline.wire import cbor
from moorline.wire.http import HttpClient

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moorline.ledger.engines.cometbft.node import CometNode, Consensus

ASK_S: Final = 5.0
POLL_S: Final = 0.2
STUCK_S: Final = 120.0


async def repair(settings: Settings, keys: AuthorityKeys, found: Genesis) -> Repaired:
    """As authority_repair.repair, which looked whether it is stopped.

    Raises Unavailable("ledger.too_few_answers" | "ledger.repair_stuck") and what an authority says that does not start.
    """
    assert settings.cometbft is not None, "the caller looked"
    url = authority_cometbft.database_url(settings)
    file = sqlite_file(url)
    wanted = await _height_of_others(settings, found)
    moved = aside(file)  # 1
    data = settings.cometbft.home / "data"
    aside(data)
    data.mkdir(mode=0o700)

    async def caught_up(node: CometNode, _engine: Consensus, _routes: Callable[[FastAPI], None]) -> None:
        await _reached(node, wanted)

    await authority_cometbft.run(settings, configure_logs("authority"), keys, found, caught_up)  # 2
    store = open_consensus(url)
    try:
        height = Chain(genesis=found, store=store).state.height  # 3
    finally:
        store.close()
    return Repaired(height=height, moved=moved, kept=["what was signed last"])


async def _height_of_others(settings: Settings, found: Genesis) -> int:
    """A height that an honest authority has: f others may say anything, so the f highest answers count for nothing."""

    async def asked(address: str, name: str) -> int:
        async with HttpClient(
            f"https://{address}",
            server_name=authority_cometbft.server_name_of(found, name),
            roots_pem=ceremony.pem_of(found.roots),
            timeout_s=ASK_S,
        ) as client:
            status = cbor.decode(await client.get_bytes("/v1/ledger"))
        height = status.get("height") if isinstance(status, dict) else None
        return height if isinstance(height, int) else 0

    others = [one for one in found.authorities if one.name != settings.name]
    answers = await asyncio.gather(*(asked(one.address, one.name) for one in others), return_exceptions=True)
    heights = sorted((one for one in answers if isinstance(one, int)), reverse=True)
    faulty = tolerated_faults(len(found.authorities))
    if len(heights) <= faulty:
        raise Unavailable(
            "ledger.too_few_answers",
            "too few other authorities can be asked how far they are",
            expected=f"> {faulty}",
            got=len(heights),
            remedy="start the others first",
        )
    return heights[faulty]


async def _reached(node: CometNode, wanted: int) -> None:
    """Returns when the state at that height, or a later one, is executed and proven by a header."""
    loop = asyncio.get_running_loop()
    last, since = -1, loop.time()
    while node.head.state.height < wanted or node.next_header() is not None or not _proven(node):
        if node.head.state.height != last:
            last, since = node.head.state.height, loop.time()
        if loop.time() - since > STUCK_S:
            raise Unavailable(
                "ledger.repair_stuck",
                "no more blocks come from the others",
                expected=wanted,
                got=last,
                remedy="see that the peers in config.toml can be reached, and repair again",
            )
        await asyncio.sleep(POLL_S)


def _proven(node: CometNode) -> bool:
    try:
        node.signed_note()
    except MoorlineError:
        return False
    return True
