"""The secure logs a broker answers for: its own, and those of its provider's orchestrators and verifier.

Another service's log, on request of that service alone:
1. it names its own log and nobody else's;
2. what it shows continues, by a consistency proof (RFC 9162 2.1.4), what was signed of this log before; one that shrank, or
   holds something else, is refused, and an alarm is raised, since somebody changed the service's database;
3. the HSM key signs; the checkpoint becomes an entry of the broker's log in the transaction that keeps it.

The own log: read from the database as a whole, compared with the last checkpoint signed of it, signed, and anchored on the
ledger (AnchorLog). One anchor thus covers every log.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from moorline.audit import checkpoint as checkpoints
from moorline.audit import log as secure_log
from moorline.audit import merkle
from moorline.audit.checkpoint import AuditCheckpoint
from moorline.audit.log import LogCheckpoint
from moorline.digest import same
from moorline.errors import MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import records
from moorline.ledger.audit_export import bundle_keys
from moorline.ledger.client import Submitter
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.records import AuditAnchorRecord
from moorline.ledger.transactions import AnchorLog, Sender, SenderKind
from moorline.storage.broker_facts import AUDIT_DOMAIN
from moorline.storage.broker_store import BrokerStore
from moorline.storage.checkpoint_store import SignedCheckpoint

if TYPE_CHECKING:
    from moorline.services.broker import Broker

CHECKPOINTS_KEPT: Final = 256
"""So many of the newest checkpoints of each log go into an export: they narrow down where a rewritten log was changed."""
_BATCH: Final = 4096
_ANCHOR_TRIES: Final = 20
_ANCHOR_EVERY_S: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownLog:
    """What a service says of its log, and the proof that it continues the checkpoint it was last given."""

    log: str
    size: int
    root: bytes
    head: bytes
    proof: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchored:
    """The own log at the size the ledger has, checkpoints it covers by log, and the ledger's proof."""

    size: int
    height: int
    covered: dict[str, tuple[SignedCheckpoint, ...]]
    bundle: bytes


def own_log(broker: Broker) -> str:
    """The name of the broker's log."""
    return checkpoints.log_name(AUDIT_DOMAIN, broker.settings.hsm)


def stored_entries(store: BrokerStore) -> list[bytes]:
    """All entries as they stand in the database."""
    found: list[bytes] = []
    after = 0
    while batch := store.audit_rows(first=after, limit=_BATCH):
        found.extend(data for _, data in batch)
        after = batch[-1][0] + 1
    return found


def last_shown(broker: Broker, log: str) -> LogCheckpoint | None:
    """What was last signed of a log."""
    newest = broker.store.newest_checkpoint(log)
    return None if newest is None else newest.checkpoint


def sign_shown(broker: Broker, shown: ShownLog) -> bytes:
    """The signed checkpoint of a service's log. Numbers 2 and 3 of the module's docstring.

    The same again is answered with what was signed. Raises NotAuthentic("audit.log_truncated" | "audit.log_rewritten"),
    both with an alarm of that code.
    """
    newest = broker.store.newest_checkpoint(shown.log)
    if newest is not None:
        try:
            _require_continues(newest.checkpoint, shown)  # 2
        except MoorlineError as error:
            broker.store.raise_alarm(
                code=error.code,
                says=error.says,
                first=f"{shown.log} size {newest.checkpoint.size} root {newest.checkpoint.root.hex()}",
                second=f"{shown.log} size {shown.size} root {shown.root.hex()}",
                at=broker.clock.now(),
            )
            raise
        if newest.checkpoint.size == shown.size:
            return newest.signed
    made = LogCheckpoint(size=shown.size, root=shown.root, head=shown.head)
    return _signed(broker, shown.log, made, after=None if newest is None else newest.checkpoint, foreign=True)  # 3


def sign_own(broker: Broker, checkpoint: LogCheckpoint) -> None:
    """Sign a checkpoint of the own log, if it grew since the last."""
    newest = broker.store.newest_checkpoint(own_log(broker))
    if newest is None or newest.checkpoint.size < checkpoint.size:
        after = None if newest is None else newest.checkpoint
        _signed(broker, own_log(broker), checkpoint, after=after, foreign=False)


def judged_own(broker: Broker) -> LogCheckpoint:
    """The own log read from the database as a whole, known to chain and to continue what was signed of it before.

    Raises NotAuthentic (`audit.*`) naming the entry, with an alarm, if somebody changed the database under the broker.
    """
    name = own_log(broker)
    newest = broker.store.newest_checkpoint(name)
    try:
        return secure_log.verify(
            stored_entries(broker.store),
            domain=AUDIT_DOMAIN,
            checkpoints=() if newest is None else (newest.checkpoint,),
            name=name,
        )
    except NotAuthentic as error:
        broker.store.raise_alarm(code=error.code, says=error.says, first=name, second="", at=broker.clock.now())
        raise


async def anchor(broker: Broker) -> Anchored:
    """Sign and anchor the own log as it stands now, and prove the anchor.

    Raises what `judged_own` and the ledger raise, and Unavailable("audit.anchor_pending") while the ledger's answers do not
    show the new anchor yet.
    """
    async with broker.anchoring:
        reached = await asyncio.to_thread(judged_own, broker)
        await asyncio.to_thread(sign_own, broker, reached)
        bundle, height, size = await _proven(broker)
        if size != reached.size:
            await submit(broker, reached)
        for _ in range(_ANCHOR_TRIES):
            if size == reached.size:
                covered = await asyncio.to_thread(broker.store.covered_checkpoints, size=size, limit=CHECKPOINTS_KEPT)
                return Anchored(size=size, height=height, covered=covered, bundle=bundle)
            await asyncio.sleep(_ANCHOR_EVERY_S)
            bundle, height, size = await _proven(broker)
    raise Unavailable("audit.anchor_pending", "the authorities do not show the new anchor yet", remedy="ask again shortly")


async def submit(broker: Broker, reached: LogCheckpoint) -> None:
    """AnchorLog by the HSM key, for the own log."""
    sender = Sender(kind=SenderKind.HSM, name=f"{broker.settings.provider}/{broker.settings.hsm}")
    submitter = Submitter(
        broker.ledger_client, sender=sender, signer=broker.identity.signer, ledger_id=broker.trust.ledger_id
    )
    await submitter.send(AnchorLog(log=broker.settings.hsm, size=reached.size, root=reached.root))


async def _proven(broker: Broker) -> tuple[bytes, int, int]:
    wanted = bundle_keys(broker.settings.provider, broker.settings.hsm)
    bundle = await broker.ledger.bundle(wanted)
    state = verify_bundle(bundle, broker.trust, now=broker.clock.now())
    key = records.audit_anchor_key(broker.settings.provider, broker.settings.hsm)
    try:
        return bundle, state.height, records.parse(AuditAnchorRecord, state.record(key)).size
    except Refused as error:
        if error.code != "ledger.absent":
            raise
        return bundle, state.height, 0


def _require_continues(before: LogCheckpoint, shown: ShownLog) -> None:
    if shown.size < before.size:
        raise NotAuthentic(
            "audit.log_truncated",
            f"{shown.log} is shorter than when its last checkpoint was signed",
            expected=f">= {before.size} entries",
            got=shown.size,
            remedy="entries were removed from its database, or an old copy was put in place; look at the service's machine",
        )
    if not _continues(before, shown):
        raise NotAuthentic(
            "audit.log_rewritten",
            f"{shown.log} does not continue the log whose checkpoint was signed",
            expected=f"{before.size} entries, root {before.root.hex()}",
            got=f"{shown.size} entries, root {shown.root.hex()}",
            remedy="an entry was removed from its database, or changed; look at the service's machine",
        )


def _continues(before: LogCheckpoint, shown: ShownLog) -> bool:
    if shown.size == before.size:
        return same(shown.root, before.root) and same(shown.head, before.head)
    try:
        merkle.verify_consistency(before.size, before.root, shown.size, shown.root, shown.proof)
    except NotAuthentic:
        return False
    return True


def _signed(broker: Broker, log: str, made: LogCheckpoint, *, after: LogCheckpoint | None, foreign: bool) -> bytes:
    now = broker.clock.now()
    data = checkpoints.sign(
        AuditCheckpoint(
            ledger_id=broker.trust.ledger_id,
            provider=broker.settings.provider,
            hsm=broker.settings.hsm,
            log=log,
            size=made.size,
            root=made.root,
            head=made.head,
            time=now,
        ),
        broker.identity.signer,
    )
    kept = SignedCheckpoint(log=log, checkpoint=made, at=now, signed=data)
    broker.store.record_checkpoint(kept, after=after, foreign=foreign)
    return data
