"""What holds memory after a function ended: processes, System V IPC, POSIX message queues, control groups."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_IPC: Final = _PROC / "sysvipc"
_QUEUES: Final = Path("/dev/mqueue")
_GROUPS: Final = Path("/sys/fs/cgroup")
_KERNEL: Final = 2
"""kthreadd: its children are the kernel's own, and come and go."""
_CREATE: Final = 0o1000 | 0o600
_REMOVE: Final = 0


def processes() -> set[str]:
    """Every process but the kernel's own, this one and those above it."""
    found, own = {}, os.getpid()
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            head, _, rest = (folder / "stat").read_text("utf-8", "replace").rpartition(")")
            fields = rest.split()
            found[int(folder.name)] = (int(fields[1]), fields[0], head.partition("(")[2], fields[19])
    above = set()
    while own in found and own not in above:
        above.add(own)
        own = found[own][0]
    return {
        f"process {pid} {name} started {started}"
        for pid, (parent, state, name, started) in found.items()
        if pid not in above and _KERNEL not in (pid, parent) and state != "Z"
    }


@contextlib.contextmanager
def process() -> Iterator[str]:
    """A process that sleeps."""
    with subprocess.Popen((sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)")) as own:
        try:
            (mine,) = (one for one in processes() if one.startswith(f"process {own.pid} "))
            yield mine
        except ValueError:
            raise OSError(0, "an own process is not listed") from None
        finally:
            own.kill()


def segments() -> set[str]:
    """System V shared memory."""
    return _ipc("shm")


def segment() -> contextlib.AbstractContextManager[str]:
    """A segment of one page."""
    libc = _libc()
    return _made("shm", lambda: libc.shmget(0, 4096, _CREATE), lambda made: libc.shmctl(made, _REMOVE, None))


def semaphores() -> set[str]:
    """System V semaphores."""
    return _ipc("sem")


def semaphore() -> contextlib.AbstractContextManager[str]:
    """A set of one semaphore."""
    libc = _libc()
    return _made("sem", lambda: libc.semget(0, 1, _CREATE), lambda made: libc.semctl(made, 0, _REMOVE))


def queues() -> set[str]:
    """System V message queues."""
    return _ipc("msg")


def queue() -> contextlib.AbstractContextManager[str]:
    """An empty queue."""
    libc = _libc()
    return _made("msg", lambda: libc.msgget(0, _CREATE), lambda made: libc.msgctl(made, _REMOVE, None))


def posix_queues() -> set[str]:
    """POSIX message queues, where the kernel's file system of them is mounted. Raises OSError elsewhere."""
    if not os.path.ismount(_QUEUES):
        raise OSError(0, "is not mounted")
    return {f"mqueue {one.name}" for one in _QUEUES.iterdir()}


@contextlib.contextmanager
def posix_queue() -> Iterator[str]:
    """An empty queue."""
    name = f"moorline-{secrets.token_hex(8)}"
    (_QUEUES / name).touch(mode=0o600)
    try:
        yield f"mqueue {name}"
    finally:
        (_QUEUES / name).unlink()


def groups() -> set[str]:
    """Control groups, of every hierarchy. Raises OSError where there is none."""
    if not _GROUPS.is_dir():
        raise OSError(0, "there are no control groups")
    found = {Path(folder).relative_to(_GROUPS) for folder, _, _ in os.walk(_GROUPS)}
    return {f"cgroup /{one}" for one in found}


@contextlib.contextmanager
def group() -> Iterator[str]:
    """A control group without processes. Raises OSError where this user may not make one."""
    tops = [one for one in (_GROUPS / "pids", _GROUPS / "memory", _GROUPS) if one.is_dir()]
    own = tops[0] / f"moorline-{secrets.token_hex(8)}"
    own.mkdir()
    try:
        yield f"cgroup /{own.relative_to(_GROUPS)}"
    finally:
        own.rmdir()


def _ipc(kind: str) -> set[str]:
    head, *rows = ((_IPC / kind).read_text("ascii")).splitlines()
    place = head.split().index("uid")
    return {f"{kind} {fields[1]} uid {fields[place]}" for fields in map(str.split, rows)}


@contextlib.contextmanager
def _made(kind: str, make: Callable[[], int], remove: Callable[[int], int]) -> Iterator[str]:
    made = make()
    if made < 0:
        raise OSError(ctypes.get_errno(), f"no {kind} can be made")
    try:
        yield f"{kind} {made} uid {os.geteuid()}"
    finally:
        remove(made)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
