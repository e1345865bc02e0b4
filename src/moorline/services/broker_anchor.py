"""The broker's secure log, anchored on the ledger by the HSM key; and what a broker checks before it launches anything.

The token's counter moves with epochs, leases and generations; what happens between two of them (a launch consumed) it
does not see. The anchor closes that gap to ANCHOR_EVERY_S: a database whose log is shorter than the anchored one, or has
another root at its size, was restored, and the broker discards what it leased and waits for its operator (PROTOCOLS.md
3). Until the ledger has been asked, nothing is launched.
"""

from __future__ import annotations

import asyncio
from typing import Final

from moorline.audit import merkle
from moorline.audit.log import LogCheckpoint, entry_digest, first_head
from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import records
from moorline.ledger.records import AuditAnchorRecord
from moorline.services import broker_audit
from moorline.services.broker import Broker
from moorline.storage.broker_facts import AUDIT_DOMAIN
from moorline.storage.broker_store import BrokerStore

ANCHOR_EVERY_S: Final = 30.0
_RETRY_S: Final = 1.0
_BATCH: Final = 1000


class GrowingLog:
    """The Merkle frontier of the stored log, brought up to date by reading only what is new."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store
        self._frontier = merkle.Frontier()
        self._head = first_head(AUDIT_DOMAIN)

    def up_to(self, size: int | None) -> merkle.Frontier:
        """The frontier over the first `size` entries, or over all there are (fewer if the log is shorter)."""
        while size is None or self._frontier.size < size:
            wanted = _BATCH if size is None else min(_BATCH, size - self._frontier.size)
            new = self._store.audit(first=self._frontier.size, limit=wanted)
            for data in new:
                self._frontier = self._frontier.appended(merkle.leaf_hash(data))
                self._head = entry_digest(data)
            if len(new) < wanted:
                break
        return self._frontier

    def reached(self) -> LogCheckpoint:
        """What the whole log comes to."""
        frontier = self.up_to(None)
        return LogCheckpoint(size=frontier.size, root=frontier.root(), head=self._head)


async def keep_anchored(broker: Broker) -> None:
    """Judge the log once, then anchor it whenever it grew, until cancelled."""
    log = GrowingLog(broker.store)
    anchored = await _judged(broker, log)
    while True:
        async with broker.anchoring:
            reached = await asyncio.to_thread(log.reached)
            if reached.size > anchored:
                try:
                    await asyncio.to_thread(broker_audit.sign_own, broker, reached)
                    await broker_audit.submit(broker, reached)
                    anchored = reached.size
                except MoorlineError:
                    pass  # the ledger cannot take it now; the next turn tries with a longer log
        await asyncio.sleep(ANCHOR_EVERY_S)


def require_judged(broker: Broker) -> None:
    """Raises Unavailable("launch.log_not_judged") until this broker's log was compared with its anchor."""
    if not broker.judged.is_set():
        raise Unavailable(
            "launch.log_not_judged",
            "the broker has not yet compared its log with the ledger",
            remedy="see that the ledger can be reached; ask again shortly",
        )


async def _judged(broker: Broker, log: GrowingLog) -> int:
    while True:
        try:
            size = await judge_log(broker, log)
        except MoorlineError:
            await asyncio.sleep(_RETRY_S)  # no answer decides nothing; launches are refused as unavailable meanwhile
            continue
        broker.judged.set()
        return size


async def judge_log(broker: Broker, log: GrowingLog) -> int:
    """Compare the log with its anchor, discard if it is behind; the anchored size. Raises what the ledger view raises."""
    key = records.audit_anchor_key(broker.settings.provider, broker.settings.hsm)
    state = await broker.ledger.state((key,))
    try:
        anchor = records.parse(AuditAnchorRecord, state.record(key))
    except MoorlineError as error:
        if error.code != "ledger.absent":
            raise
        return 0
    frontier = await asyncio.to_thread(log.up_to, anchor.size)
    known = broker.store.fact("anchor-accepted") >= anchor.size
    if not known and (frontier.size < anchor.size or frontier.root() != anchor.root):
        says = "the database's log is not the one anchored on the ledger: it was restored or changed"
        await asyncio.to_thread(broker.launch_keys.discard, says, anchored=anchor.size, now=broker.clock.now())
    return anchor.size
