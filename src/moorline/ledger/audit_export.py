"""What an exported log establishes: entries, to checkpoints of the HSM key, to an anchor that the ledger proves. Offline.

verify, in this order:
  1. the file is well-formed, and of the ledger this verifier was provisioned for;
  2. its ledger bundle holds (ledger.light_client); it proves the HSM's record, active, and so the HSM's key;
  3. every checkpoint is signed by that key for its log, by rising size;
  4. every log's entries follow from one another and agree with all of its checkpoints, and the last one counts them all;
  5. the broker's log agrees with the anchor the ledger proves;
  6. the newest checkpoint of every other log is an entry of the broker's log, so that the anchor covers it too, and no log
     the broker ever signed for is left out;
  7. the file is whole: nothing is cut off, and its digest fits.

What it does not establish: that an entry is true, only that its service wrote it when the broker says and nobody changed
it since; what happened after the last checkpoint; and that the newest file was shown, unless the anchor must be recent
(`max_age_s`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from moorline.audit import checkpoint as checkpoints
from moorline.audit import export, log
from moorline.audit.checkpoint import BROKER, AuditCheckpoint
from moorline.audit.export import ExportedLog
from moorline.audit.log import LogCheckpoint, LogEntry
from moorline.clock import Instant, rendered
from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.ledger import records
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.ledger.records import AuditAnchorRecord, HsmRecord, Status
from moorline.wire import keys

CHECKPOINTED: Final = "log-checkpointed"
ANY_AGE_S: Final = 100 * 366 * 24 * 3600
_MS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedLog:
    """A log known to be as its service wrote it, up to `signed_at`."""

    log: str
    entries: tuple[bytes, ...]
    signed_at: Instant

    def read(self) -> tuple[LogEntry, ...]:
        """Its entries."""
        return tuple(log.parse_entry(data) for data in self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedExport:
    """What a file established. `missing` are logs the broker signed for that are not in it (only with `partial`)."""

    provider: str
    hsm: str
    logs: tuple[VerifiedLog, ...]
    missing: tuple[str, ...]
    anchor: AuditAnchorRecord
    height: int
    proven_at: Instant
    provider_status: str

    def established(self) -> tuple[str, ...]:
        """In words, what may be relied on."""
        broker, *others = self.logs
        when = f"at height {self.height} ({rendered(self.proven_at)})"
        return (
            f"{when} the ledger proves the key of HSM {self.provider}/{self.hsm}, and its anchor at {self.anchor.size}",
            f"{broker.log}: {len(broker.entries)} entries, chained, signed for and anchored",
            *(
                f"{one.log}: {len(one.entries)} entries, chained, signed for, and the checkpoint is in the anchored log"
                for one in others
            ),
        )

    def not_established(self, *, now: Instant, max_age_s: int | None) -> tuple[str, ...]:
        """In words, what may not."""
        age = now - self.proven_at
        fresh = () if max_age_s is not None else (f"that this is the newest export: the proof is {age} s old (--max-age)",)
        suspended = (
            ()
            if self.provider_status == Status.ACTIVE.value
            else (f"that the provider was in good standing: the ledger says {self.provider_status}",)
        )
        return (
            "that an entry is true: it is as true as the service that wrote it",
            f"what happened after {rendered(min(one.signed_at for one in self.logs))}",
            *fresh,
            *suspended,
            *(f"anything about {name}: it is not in the file" for name in self.missing),
        )


def bundle_keys(provider: str, hsm: str) -> tuple[str, ...]:
    """What the ledger bundle of a file must prove."""
    return (
        records.provider_key(provider),
        records.hsm_key(provider, hsm),
        records.audit_anchor_key(provider, hsm),
    )


def verify(
    data: bytes, trust: LedgerTrust, *, now: Instant, max_age_s: int | None = None, partial: bool = False
) -> VerifiedExport:
    """What the file establishes. Numbers are those of the module's docstring. `data` is untrusted.

    `now` is the time at which it is judged; without `max_age_s` the ledger proof may be of any age. `partial` accepts that
    logs are left out. Raises Malformed; NotAuthentic (`audit.*`, `ledger.*`) naming the log and entry; Refused
    ("ledger.other_ledger" | "ledger.proof_stale" | "audit.hsm_not_active" | "audit.log_missing" ...).
    """
    found = export.parse(data)  # 1
    header = found.header
    if not same(header.ledger_id, trust.ledger_id):
        raise Refused(
            "ledger.other_ledger", "the logs are of another ledger", expected=trust.ledger_id, got=header.ledger_id
        )
    if header.logs[0] != checkpoints.log_name(BROKER, header.hsm):
        raise NotAuthentic("audit.log_missing", "the file does not begin with the broker's log", got=header.logs[0])
    bounded = dataclasses.replace(trust, max_age_s=ANY_AGE_S if max_age_s is None else max_age_s)
    state = verify_bundle(found.bundle, bounded, now=now)  # 2
    key = _hsm_key(state, header.provider, header.hsm)
    signed = {one.log: _signed(one, key, header) for one in found.logs}  # 3
    anchor = _anchor(state, header.provider, header.hsm)
    logs = tuple(_verified(one, signed[one.log], found.cut) for one in found.logs)  # 4
    _require_anchored(found.logs[0], anchor)  # 5
    missing = _require_folded(logs[0], signed, partial=partial)  # 6
    _require_whole(found)  # 7
    provider = records.parse(records.ProviderRecord, state.record(records.provider_key(header.provider)))
    return VerifiedExport(
        provider=header.provider,
        hsm=header.hsm,
        logs=logs,
        missing=missing,
        anchor=anchor,
        height=state.height,
        proven_at=state.time,
        provider_status=provider.status.value,
    )


def _hsm_key(state: ProvenState, provider: str, hsm: str) -> keys.PublicKey:
    """The key, also of a suspended provider: its logs are the ones somebody wants to read. A revoked key signs nothing."""
    record = records.parse(HsmRecord, state.record(records.hsm_key(provider, hsm)))
    if record.status is not Status.ACTIVE:
        raise Refused(
            "audit.hsm_not_active",
            f"the HSM {provider}/{hsm} whose key signed is not active on the ledger",
            expected=Status.ACTIVE.value,
            got=record.status.value,
            remedy="use a file exported before it was revoked, and find out why it was",
        )
    return keys.parse_public(record.signing_public)


def _anchor(state: ProvenState, provider: str, hsm: str) -> AuditAnchorRecord:
    try:
        return records.parse(AuditAnchorRecord, state.record(records.audit_anchor_key(provider, hsm)))
    except Refused as error:
        if error.code != "ledger.absent":
            raise
        raise NotAuthentic("audit.anchor_mismatch", "the ledger has no anchor of this log") from None


def _signed(one: ExportedLog, key: keys.PublicKey, header: export.Header) -> tuple[AuditCheckpoint, ...]:
    checkpoints.domain_of(one.log)
    signed = tuple(
        checkpoints.verify(data, key, ledger_id=header.ledger_id, provider=header.provider, hsm=header.hsm, log=one.log)
        for data in one.checkpoints
    )
    if not signed:
        raise NotAuthentic(
            "audit.checkpoint_missing",
            f"no checkpoint of {one.log} is in the file",
            remedy="export the log again, with its checkpoints",
        )
    for before, after in itertools.pairwise(signed):
        if after.size <= before.size:
            raise NotAuthentic(
                "audit.checkpoint_not_authentic",
                f"the checkpoints of {one.log} are not by rising size",
                expected=f"> {before.size}",
                got=after.size,
            )
    return signed


def _verified(one: ExportedLog, signed: tuple[AuditCheckpoint, ...], cut: bool) -> VerifiedLog:  # noqa: FBT001
    log.verify(
        one.entries,
        domain=checkpoints.domain_of(one.log),
        checkpoints=tuple(checkpoint.of_log() for checkpoint in signed),
        name=one.log,
    )
    beyond = len(one.entries) - signed[-1].size
    if beyond and not cut:
        raise NotAuthentic(
            "audit.entry_appended",
            f"{beyond} entries of {one.log} follow that nobody signed for, from entry {signed[-1].size} on",
            expected=f"{signed[-1].size} entries",
            got=len(one.entries),
        )
    return VerifiedLog(log=one.log, entries=one.entries, signed_at=Instant(signed[-1].time))


def _require_anchored(broker: ExportedLog, anchor: AuditAnchorRecord) -> None:
    root = log.reached(broker.entries)
    if (len(broker.entries), root) != (anchor.size, anchor.root):
        raise NotAuthentic(
            "audit.anchor_mismatch",
            f"{broker.log} is not the log that is anchored on the ledger",
            expected=f"{anchor.size} entries, root {anchor.root.hex()}",
            got=f"{len(broker.entries)} entries, root {root.hex()}",
            remedy="this HSM signed for two logs, or file and anchor are not of one time; export the log again",
        )


def _require_folded(
    broker: VerifiedLog, signed: Mapping[str, tuple[AuditCheckpoint, ...]], *, partial: bool
) -> tuple[str, ...]:
    newest: dict[str, LogCheckpoint] = {}
    marker = CHECKPOINTED.encode()
    for data in broker.entries:
        if marker in data:
            entry = log.parse_entry(data)
            if entry.event == CHECKPOINTED:
                newest[entry.subject] = _written(entry)
    missing = tuple(sorted(set(newest) - set(signed)))
    if missing and not partial:
        raise NotAuthentic(
            "audit.log_missing",
            "logs the broker signed for are not in the file",
            got=", ".join(missing),
            remedy="export them too, or say that the rest is enough (--partial)",
        )
    for name, own in signed.items():
        if name != broker.log and newest.get(name) != own[-1].of_log():
            raise NotAuthentic(
                "audit.anchor_mismatch",
                f"the last checkpoint of {name} is not the newest in the broker's anchored log",
                expected=f"{newest[name].size} entries" if name in newest else "an entry about it",
                got=f"{own[-1].size} entries",
                remedy="export all logs at one time",
            )
    return missing


def _written(entry: LogEntry) -> LogCheckpoint:
    told = entry.details
    try:
        return LogCheckpoint(size=int(told["size"]), root=bytes.fromhex(told["root"]), head=bytes.fromhex(told["head"]))
    except (KeyError, ValueError):
        raise Malformed(
            "audit.entry_malformed", f"entry {entry.number} of the broker's log is no checkpoint of a log"
        ) from None


def _require_whole(found: export.Export) -> None:
    if found.cut:
        raise NotAuthentic("audit.truncated", "the file ends before all of it was there", remedy="copy it again")
    if found.damaged:
        raise NotAuthentic(
            "audit.file_damaged", "the file's digest is not that of its content", remedy="copy it again, or export again"
        )
