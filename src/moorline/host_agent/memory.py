"""Reading another process's memory: the positive control that it works here, and the one door through which it is allowed.

`control` plants a random value in a process of its own and reads it back through /proc/PID/mem. Where it is found, whoever
has these rights can read any guest that is a process; the report says so, and lockdown does not help. Where it is not found,
that says only that this way was closed to this user now.

`InspectionBroker.look`: 1. the log verifies and is locked; 2. the request is authorised (policy.inspection), with the
looks already in the log; 3. the process is the one that was approved; 4. the intent is written to the log and is on disk;
5. memory is read; 6. what was read (its digest and size, never the bytes) is written too. A look that fails after 4 counts
as used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.audit import log as secure_log
from moorline.clock import Clock
from moorline.errors import Malformed, Refused, Unavailable
from moorline.policy.inspection import Granted, authorise
from moorline.wire import keys

LOG_DOMAIN: Final = "memory-inspection"
_SECRET: Final = 48
_PIECE: Final = 1 << 20
_SCANNED: Final = 256 << 20
_MAP: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r")
_CHILD: Final = "import sys; held = sys.stdin.buffer.read(48); print('held', flush=True); sys.stdin.buffer.read(1)"
_MAX_LOG: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlResult:
    """Whether the planted value was found, how often, as whom, and what stood in the way if it was not."""

    found: int
    user: int
    why: str


def control() -> ControlResult:
    """Plant a value in another process and look for it. Takes a fraction of a second; leaves nothing behind."""
    planted = secrets.token_bytes(_SECRET)
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(planted)
        child.stdin.flush()
        if child.stdout.readline() != b"held\n":
            raise Unavailable("inspection.control", "the process for the control did not start")
        try:
            hits = sum(part.count(planted) for part in _memory(child.pid, _SCANNED))
        except OSError as error:
            return ControlResult(found=0, user=os.geteuid(), why=(error.strerror or "refused").lower())
        return ControlResult(found=hits, user=os.geteuid(), why="" if hits else "it was not in the memory that was read")
    finally:
        child.kill()
        child.stdin.close()
        child.stdout.close()
        child.wait()


def started(process: int) -> int:
    """When a process began, in clock ticks since boot: with its number, who it is.

    Raises Unavailable("inspection.process").
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text("ascii", errors="replace")
    except OSError:
        raise Unavailable("inspection.process", "there is no such process", got=process) from None
    return int(stat.rpartition(")")[2].split()[19])


class InspectionBroker:
    """The door. `approvers` are the host's own configuration; the log is a file that only grows."""

    def __init__(self, *, host: str, approvers: Mapping[str, keys.PublicKey], log: Path, clock: Clock) -> None:
        self._host = host
        self._approvers = approvers
        self._log = log
        self._clock = clock

    def look(self, request: bytes, approvals: Iterable[bytes], *, start: int, size: int) -> bytes:
        """`size` bytes from `start` of the approved process. Raises what `authorise` raises, and Refused and Unavailable."""
        with self._opened() as held:
            granted = authorise(
                request,
                approvals,
                approvers=self._approvers,
                host=self._host,
                used=_uses(held.entries, request),
                now=self._clock.now(),
            )
            _fits(granted, size)
            facts = {
                "request": granted.digest.hex(),
                "function": granted.request.function,
                "process": str(granted.request.process),
                "inspector": granted.request.inspector,
                "approvers": ", ".join(granted.approvers),
                "reason": granted.request.reason,
                "start": hex(start),
                "size": str(size),
            }
            held.append("inspection.look", granted.request.inspector, facts, self._clock)
            try:
                read = _exactly(granted, start, size)
            except OSError as error:
                why = (error.strerror or "refused").lower()
                held.append(
                    "inspection.failed",
                    granted.request.inspector,
                    {"request": granted.digest.hex(), "why": why},
                    self._clock,
                )
                raise Unavailable("inspection.unreadable", "the memory cannot be read", got=why) from None
            facts = {"request": granted.digest.hex(), "digest": hashlib.sha256(read).hexdigest(), "size": str(len(read))}
            held.append("inspection.looked", granted.request.inspector, facts, self._clock)
            return read

    def entries(self) -> tuple[secure_log.LogEntry, ...]:
        """Everything that was looked at, verified as one chain. Raises NotAuthentic (`audit.*`) if it was changed."""
        with self._opened() as held:
            return tuple(secure_log.parse_entry(one) for one in held.entries)

    @contextmanager
    def _opened(self) -> Iterator[_Log]:
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self._log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield _Log(handle)
        finally:
            os.close(handle)


class _Log:
    """The log file while it is locked: entries behind their length, four bytes each."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        size = os.fstat(handle).st_size
        if size > _MAX_LOG:
            raise Unavailable(
                "inspection.log_full", "the log of inspections is too long", remedy="archive it, and begin another"
            )
        data = b"".join(iter(lambda: os.read(handle, _PIECE), b""))
        self.entries: list[bytes] = []
        while data:
            length = int.from_bytes(data[:4], "big")
            if not 0 < length <= secure_log.MAX_ENTRY_BYTES or len(data) < 4 + length:
                raise Malformed(
                    "inspection.log", "the log of inspections ends inside an entry", remedy="look at who wrote it"
                )
            self.entries.append(data[4 : 4 + length])
            data = data[4 + length :]
        secure_log.verify(self.entries, domain=LOG_DOMAIN, checkpoints=(), name=LOG_DOMAIN)

    def append(self, event: str, subject: str, details: Mapping[str, str], clock: Clock) -> None:
        entry = secure_log.encode_entry(
            number=len(self.entries),
            previous=secure_log.entry_digest(self.entries[-1]) if self.entries else secure_log.first_head(LOG_DOMAIN),
            time=clock.now(),
            event=event,
            subject=subject,
            details=details,
        )
        os.write(self._handle, len(entry).to_bytes(4, "big") + entry)
        os.fsync(self._handle)
        self.entries.append(entry)


def _uses(entries: Iterable[bytes], request: bytes) -> int:
    from moorline.policy.inspection import request_digest

    wanted = request_digest(request).hex()
    read = (secure_log.parse_entry(one) for one in entries)
    return sum(one.event == "inspection.look" and one.details.get("request") == wanted for one in read)


def _fits(granted: Granted, size: int) -> None:
    if not 0 < size <= granted.request.most_bytes:
        raise Refused(
            "inspection.too_much", "more is asked than was approved", expected=f"1 to {granted.request.most_bytes}", got=size
        )
    _same_process(granted)


def _same_process(granted: Granted) -> None:
    if started(granted.request.process) != granted.request.started:
        raise Refused(
            "inspection.other_process", "the process with this number is another one now", got=granted.request.process,
            remedy="make a request about the process that runs",
        )  # fmt: skip


def _exactly(granted: Granted, start: int, size: int) -> bytes:
    handle = os.open(f"/proc/{granted.request.process}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _same_process(granted)  # the descriptor is of this memory for good; its number could have been given away before
        read = os.pread(handle, size, start)
    except OverflowError:
        raise OSError(0, "no such address") from None
    finally:
        os.close(handle)
    if len(read) != size:
        raise OSError(0, "the memory ends before that")
    return read


def _memory(process: int, most: int) -> Iterator[bytes]:
    """Readable memory of a process, mapping by mapping, up to `most` bytes. Raises OSError if it may not be read at all."""
    handle = os.open(f"/proc/{process}/mem", os.O_RDONLY | os.O_CLOEXEC)
    end = time.monotonic() + 5.0
    try:
        for line in Path(f"/proc/{process}/maps").read_text("ascii", errors="replace").splitlines():
            match = _MAP.match(line)
            if match is None or most <= 0 or time.monotonic() > end:
                continue
            first, last = int(match[1], 16), int(match[2], 16)
            try:
                part = os.pread(handle, min(last - first, most), first)
            except (OSError, OverflowError):
                continue  # [vvar] and the like
            most -= len(part)
            yield part
    finally:
        os.close(handle)
