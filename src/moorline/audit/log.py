"""The secure log: entries chained by hash, committed to by a Merkle root that a checkpoint carries elsewhere.

Entry n holds H(entry n-1), so a change anywhere breaks the chain at the next entry; the RFC 6962 root over all entries is
what the HSM key signs (audit.checkpoint) and the ledger anchors (AnchorLog), so that cutting off the end or rewriting the
whole chain shows too. Pure: the caller stores the encoded entries and gives the time. What an entry says is as trustworthy
as whoever wrote it.

`verify` names what was done to a log:
1. an entry that cannot be read, or whose number is not its place though it follows from the one before: changed;
2. an entry of a later number: those between are removed, unless they stand further on: reordered; of an earlier: added;
3. an entry of the right number that does not follow: it was changed if the next does not follow from it either, else the
   one before it was;
4. a chain that holds and is not what a checkpoint committed to: rewritten, somewhere since the checkpoint before;
5. fewer entries than the last checkpoint counts: truncated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import cbor2

from moorline.audit import merkle
from moorline.clock import Instant
from moorline.digest import domain as domain_string
from moorline.digest import length_prefixed, tagged_hash
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

MAX_ENTRY_BYTES: Final = 64 * 1024
_EVENT_CHARS: Final = 128
_SUBJECT_CHARS: Final = 512
_DEPTH: Final = 4
_DIGEST: Final = 32
_INTEGERS: Final = 1 << 64
_ORDER: Final = ["time", "event", "number", "details", "subject", "previous"]  # RFC 8949 4.2: by length, then by bytes
_ENTRY_PREFIX: Final = length_prefixed(domain_string("audit-entry"))
_sha256: Final = hashlib.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One thing that happened. `details` are public facts as text; never a secret."""

    number: int
    previous: Bytes32
    time: int
    event: Annotated[str, Size(at_most=_EVENT_CHARS)]
    subject: Annotated[str, Size(at_most=_SUBJECT_CHARS)]
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
        self.head: bytes = first_head(domain)
        self._frontier = merkle.Frontier()

    def appended(self, *, time: Instant, event: str, subject: str, details: Mapping[str, str]) -> tuple[SecureLog, bytes]:
        """The log after one more entry, and the entry's bytes to store. The log counts only what was stored."""
        data = encode_entry(number=self.size, previous=self.head, time=time, event=event, subject=subject, details=details)
        after = object.__new__(SecureLog)
        after.size = self.size + 1
        after.head = entry_digest(data)
        after._frontier = self._frontier.appended(merkle.leaf_hash(data))
        return after, data

    def checkpoint(self) -> LogCheckpoint:
        """What to have signed and anchored."""
        return LogCheckpoint(size=self.size, root=self._frontier.root(), head=self.head)


def first_head(domain: str) -> bytes:
    """What the first entry of a log holds in place of the digest of one before it."""
    return tagged_hash("audit-log", domain.encode())


def entry_digest(data: bytes) -> bytes:
    """What the next entry holds of this one; 32 bytes: tagged_hash("audit-entry", data)."""
    return _sha256(_ENTRY_PREFIX + len(data).to_bytes(8, "big") + data).digest()


def encode_entry(*, number: int, previous: bytes, time: int, event: str, subject: str, details: Mapping[str, str]) -> bytes:
    """The one encoding of an entry. Raises Malformed("audit.entry_malformed") for what no reader would accept."""
    data = cbor2.dumps(
        {
            "time": time,
            "event": event,
            "number": number,
            "details": dict(sorted(details.items(), key=_key_order)),
            "subject": subject,
            "previous": previous,
        }
    )
    if len(event) > _EVENT_CHARS or len(subject) > _SUBJECT_CHARS or len(data) > MAX_ENTRY_BYTES:
        raise Malformed("audit.entry_malformed", "an entry of the secure log is too large", expected=MAX_ENTRY_BYTES)
    return data


def parse_entry(data: bytes) -> LogEntry:
    """The entry that `data` encodes; raises only Malformed. It establishes nothing about who wrote it."""
    return schema.decode(LogEntry, data, max_bytes=MAX_ENTRY_BYTES)


def leaves_of(entries: Sequence[bytes]) -> list[bytes]:
    """The leaf hashes of stored entries, for merkle.root and merkle.consistency_proof."""
    return [_sha256(b"\x00" + data).digest() for data in entries]


def reached(entries: Sequence[bytes]) -> bytes:
    """The Merkle root over these entries, to compare with one that was anchored."""
    return merkle.root(leaves_of(entries))


def verify(
    entries: Sequence[bytes], *, domain: str, checkpoints: Sequence[LogCheckpoint] = (), name: str = "the log"
) -> LogCheckpoint:
    """How far these entries lead, if they are a log of `domain` that agrees with every one of `checkpoints` (rising sizes).

    The caller knows why it believes the checkpoints; without any, a log rewritten as a whole is not noticed, and neither
    is an end that is missing. Entries beyond the last checkpoint are as good as the chain alone.
    Raises NotAuthentic("audit.entry_changed" | "audit.entry_removed" | "audit.entry_reordered" | "audit.entry_added" |
    "audit.log_rewritten" | "audit.truncated"). Numbers are those of the module's docstring.
    """
    head, growing = first_head(domain), merkle.Growing()
    append, prefix = growing.append, _ENTRY_PREFIX
    pending = iter(checkpoints)
    due: LogCheckpoint | None = next(pending, None)
    since = 0
    for number, data in enumerate(entries):
        linked = _linked(data)
        if linked != (number, head):
            raise _fault(entries, number, head, due, name)  # 1 to 3
        head = _sha256(prefix + len(data).to_bytes(8, "big") + data).digest()
        append(_sha256(b"\x00" + data).digest())
        while due is not None and due.size == number + 1:
            if due.head != head or due.root != growing.root():
                raise _rewritten(entries, since, due, growing.root(), name)  # 4
            since, due = due.size, next(pending, None)
    if due is not None:
        raise NotAuthentic(
            "audit.truncated",
            f"entries of {name} are missing at the end, from entry {len(entries)} on",
            expected=f">= {due.size} entries",
            got=len(entries),
            remedy="compare with a copy; find out who could write where it was kept",
        )  # 5
    return LogCheckpoint(size=growing.size, root=growing.root(), head=head)


def _key_order(item: tuple[str, str]) -> tuple[int, bytes]:
    encoded = item[0].encode()
    return len(encoded), encoded


def _linked(data: bytes) -> tuple[int, bytes] | None:
    """Number and `previous` of an entry in its one encoding, or None. As `parse_entry`, four times as fast.

    cbor2 keeps the order of keys both ways and writes the shortest form, so equal bytes after a round trip mean the one
    encoding, if the keys were in order.
    """
    if len(data) > MAX_ENTRY_BYTES:
        return None
    try:
        item = cbor2.loads(data, max_depth=_DEPTH, allow_indefinite=False, allow_duplicate_keys=False)
        if type(item) is not dict or list(item) != _ORDER or cbor2.dumps(item) != data:
            return None
    except Exception:  # as wire.cbor.decode: cbor2 raises its own tree and what its semantic tags raise
        return None
    time, event, number, details, subject, previous = item.values()
    well_formed = (
        type(number) is type(time) is int
        and type(event) is type(subject) is str
        and type(details) is dict
        and type(previous) is bytes
        and len(previous) == _DIGEST
        and 0 <= number < _INTEGERS
        and 0 <= time < _INTEGERS
        and len(event) <= _EVENT_CHARS
        and len(subject) <= _SUBJECT_CHARS
        and _texts_in_order(details)
    )
    return (number, previous) if well_formed else None


def _texts_in_order(details: dict[object, object]) -> bool:
    before = (-1, b"")
    for key, value in details.items():
        if type(key) is not str or type(value) is not str:
            return False
        encoded = key.encode()
        place = (len(encoded), encoded)
        if place <= before:
            return False
        before = place
    return True


def _fault(entries: Sequence[bytes], place: int, head: bytes, due: LogCheckpoint | None, name: str) -> MoorlineError:
    """What is wrong at the first place where the chain does not hold."""
    linked = _linked(entries[place])
    if linked is None or (linked[1] == head and linked[0] != place):
        return _changed(place, name)  # 1
    number, _ = linked
    if number != place:  # 2
        return _misplaced(entries, place, number, name)
    follows = _follows(entries, place, due)  # 3
    if place == 0 and follows:
        return NotAuthentic(
            "audit.log_rewritten",
            f"{name} does not begin as a log of this service does",
            remedy="this is the log of another service, or one that was begun anew",
        )
    return _changed(place - 1 if follows else place, name)


def _misplaced(entries: Sequence[bytes], place: int, number: int, name: str) -> NotAuthentic:
    if number < place:
        return NotAuthentic(
            "audit.entry_added",
            f"entry {number} of {name} is there twice",
            expected=f"entry {place}",
            got=f"entry {number}",
        )
    elsewhere = next((at for at in range(place + 1, len(entries)) if (_linked(entries[at]) or (-1,))[0] == place), None)
    if elsewhere is not None:
        return NotAuthentic(
            "audit.entry_reordered",
            f"entry {place} of {name} stands in the place of entry {elsewhere}",
            expected=f"entry {place}",
            got=f"entry {number}",
        )
    gone = f"entry {place}" if number == place + 1 else f"entries {place} to {number - 1}"
    return NotAuthentic(
        "audit.entry_removed",
        f"{gone} of {name} {'is' if number == place + 1 else 'are'} missing",
        expected=f"entry {place}",
        got=f"entry {number}",
        remedy="compare with a copy; find out who could write where it was kept",
    )


def _follows(entries: Sequence[bytes], place: int, due: LogCheckpoint | None) -> bool:
    """Whether what comes after the entry at `place` knows it as it is."""
    digest = entry_digest(entries[place])
    if place + 1 < len(entries):
        after = _linked(entries[place + 1])
        return after is not None and after[1] == digest
    return due is not None and due.size == place + 1 and due.head == digest


def _rewritten(entries: Sequence[bytes], since: int, due: LogCheckpoint, root: bytes, name: str) -> NotAuthentic:
    last = due.size - 1
    after = _linked(entries[due.size]) if due.size < len(entries) else None
    # The next entry, or a checkpoint one entry ago, still knows what stood here: then it is this entry and no other.
    if since == last or (after is not None and after[1] == due.head):
        return _changed(last, name)
    return NotAuthentic(
        "audit.log_rewritten",
        f"{name} is not the one that was signed: an entry from {since} to {last} was changed, and those after it with it",
        expected=due.root,
        got=root,
        remedy="compare these entries with a copy",
    )


def _changed(number: int, name: str) -> NotAuthentic:
    return NotAuthentic(
        "audit.entry_changed",
        f"entry {number} of {name} was changed",
        remedy="compare this entry with a copy; find out who could write where it was kept",
    )
