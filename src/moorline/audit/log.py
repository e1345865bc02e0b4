"""The secure log: entries chained by hash, committed to by a Merkle root that a checkpoint carries elsewhere.

Entry n holds H(entry n-1), so a change anywhere breaks the chain at the next entry; the RFC 6962 root over all entries is
what is anchored (on the ledger: AnchorLog), so that cutting off the end or rewriting the whole chain shows too. Pure: the
caller stores the encoded entries and gives the time. What an entry says is as trustworthy as whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.audit import merkle
from moorline.clock import Instant
from moorline.digest import tagged_hash
from moorline.errors import NotAuthentic
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

MAX_ENTRY_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One thing that happened. `details` are public facts as text; never a secret."""

    number: int
    previous: Bytes32
    time: int
    event: Annotated[str, Size(at_most=128)]
    subject: Annotated[str, Size(at_most=512)]
    details: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCheckpoint:
    """The first `size` entries have this Merkle `root`; `head` is the digest of the last."""

    size: int
    root: Bytes32
    head: Bytes32


class SecureLog:
    """The writing end: knows how far the log is, and makes the next entry. Immutable."""

    __slots__ = ("_frontier", "head", "size")

    def __init__(self, *, domain: str) -> None:
        self.size = 0
        self.head: bytes = tagged_hash("audit-log", domain.encode())
        self._frontier = merkle.Frontier()

    def appended(self, *, time: Instant, event: str, subject: str, details: dict[str, str]) -> tuple[SecureLog, bytes]:
        """The log after one more entry, and the entry's bytes to store. The log counts only what was stored."""
        entry = LogEntry(number=self.size, previous=self.head, time=time, event=event, subject=subject, details=details)
        data = schema.encode(entry)
        return self._with(data), data

    def checkpoint(self) -> LogCheckpoint:
        """What to anchor."""
        return LogCheckpoint(size=self.size, root=self._frontier.root(), head=self.head)

    def _with(self, data: bytes) -> SecureLog:
        after = object.__new__(SecureLog)
        after.size = self.size + 1
        after.head = entry_digest(data)
        after._frontier = self._frontier.appended(merkle.leaf_hash(data))
        return after


def entry_digest(data: bytes) -> bytes:
    """What the next entry holds of this one; 32 bytes."""
    return tagged_hash("audit-entry", data)


def verify(entries: Sequence[bytes], *, domain: str, anchored: LogCheckpoint | None) -> SecureLog:
    """The writing end after these entries, if they are a log of `domain` that continues what was anchored.

    Raises Malformed if an entry cannot be read, and NotAuthentic: "audit.chain_broken" names the first entry that does not
    follow from the one before it (that one, or itself, was changed), "audit.cut" an end that is missing, "audit.rewritten" a
    chain that holds in itself and is not the anchored one. Without `anchored`, a log rewritten as a whole is not noticed.
    """
    log = SecureLog(domain=domain)
    if anchored is not None and anchored.size > len(entries):
        raise NotAuthentic("audit.cut", "entries are missing at the end", expected=f">= {anchored.size}", got=len(entries))
    for data in entries:
        entry = schema.decode(LogEntry, data, max_bytes=MAX_ENTRY_BYTES)
        if entry.number != log.size or entry.previous != log.head:
            raise NotAuthentic(
                "audit.chain_broken",
                "an entry does not follow from the one before it",
                expected=f"number {log.size} after {log.head.hex()}",
                got=f"number {entry.number} after {entry.previous.hex()}",
                remedy="one of these two was changed; compare with a copy",
            )
        log = log._with(data)  # noqa: SLF001 - one of our own
        if anchored is not None and log.size == anchored.size and log.checkpoint() != anchored:
            raise NotAuthentic(
                "audit.rewritten",
                "the log is not the one that was anchored",
                expected=anchored.root,
                got=log.checkpoint().root,
            )
    return log


def changed_entry(entries: Sequence[bytes], leaves: Sequence[bytes]) -> int | None:
    """The first entry whose leaf hash differs from a trusted list of leaf hashes, or None: what was changed, exactly.

    `leaves` must lead to an anchored root (merkle.root), or they say nothing.
    """
    for number, (data, leaf) in enumerate(zip(entries, leaves, strict=False)):
        if merkle.leaf_hash(data) != leaf:
            return number
    return None if len(entries) == len(leaves) else min(len(entries), len(leaves))
