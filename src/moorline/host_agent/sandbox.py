"""One process behind walls: a bubblewrap sandbox with memory and process limits, whatever this host can do.

Inside: its own mount, pid, network, ipc, uts and cgroup view; a root file system that is read-only and given by the caller;
an empty network; a private /tmp; no capability, no new privilege, no controlling terminal; it dies with its parent. Where
user namespaces work the sandbox gets one too and cannot make further ones.

Limits: cgroup v2 if its controllers can be used here, else cgroup v1, else resource limits. Which one is found by trying,
not assumed, and reported with the started process: resource limits count per process and per user, and are weaker.

This is containment of a guest against its neighbours. It protects nothing from the host's own administrator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import IO, Final

from moorline.errors import Misconfigured, Unavailable

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_PREFIX: Final = "moorline-"
_START_DEADLINE_S: Final = 20.0
_MIB: Final = 1 << 20


class LimitKind(StrEnum):
    """What enforces the limits of a sandbox."""

    CGROUP_V2 = "cgroup-v2"
    CGROUP_V1 = "cgroup-v1"
    RLIMITS = "rlimits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """At most this much memory, and this many processes and threads, for everything in the sandbox together."""

    memory_mib: int
    pids: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """`source` of the host appears as `target` inside."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """What runs, and what it sees. `root` is a directory that becomes the whole, read-only file system."""

    root: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    binds: tuple[Bind, ...] = ()
    working_directory: str = "/"
    host_name: str = "guest"


def sandbox_command(sandbox: Sandbox, *, info_fd: int, block_fd: int, user_namespace: bool) -> list[str]:
    """The bubblewrap command line. It writes the pid inside to `info_fd` and starts when `block_fd` is readable.

    bubblewrap always sets no_new_privs. /proc is made read-only: bubblewrap covers /proc/sys only where the directory itself
    is writable, and a sandbox started by root could write core_pattern there, which is a way out. `user_namespace` adds one
    that forbids further ones: half of the kernel's local holes need a nested user namespace.
    """
    command = [_bubblewrap(), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if user_namespace:
        command += ["--unshare-user", "--disable-userns"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", sandbox.host_name]
    command += ["--ro-bind", str(sandbox.root), "/", "--proc", "/proc", "--remount-ro", "/proc"]
    command += ["--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - inside
    for bind in sandbox.binds:
        command += ["--bind" if bind.writable else "--ro-bind", str(bind.source), bind.target]
    command += ["--chdir", sandbox.working_directory, "--clearenv"]
    for name, value in sandbox.environment.items():
        command += ["--setenv", name, value]
    return [*command, "--info-fd", str(info_fd), "--block-fd", str(block_fd), "--", *sandbox.arguments]


class Running:
    """A sandbox that was started: wait for it, stop it, and it cleans up after itself."""

    def __init__(
        self, process: asyncio.subprocess.Process, init_pid: int, kind: LimitKind, groups: tuple[Path, ...]
    ) -> None:
        self._process = process
        self._groups = groups
        self._init = os.pidfd_open(init_pid)
        self._over = asyncio.ensure_future(self._until_empty())
        self.init_pid = init_pid
        """The first process of the sandbox's own pid namespace, as the host numbers it."""
        self.limits = kind

    async def wait(self) -> int:
        """The exit code, 128+n after signal n. Afterwards nothing of it runs and its control groups are gone."""
        return await asyncio.shield(self._over)

    async def terminate(self, grace_s: float) -> None:
        """Ask what runs inside to end (SIGTERM), and end it when `grace_s` is over. It may still be running on return.

        The first process is bubblewrap's own and ignores the signal; its child may not be there yet when a sandbox is ended
        at once, so we look again until there is somebody to ask.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        asked = False
        while self._process.returncode is None and loop.time() < deadline:
            if not asked:
                asked = sum(_signal(pid, signal.SIGTERM) for pid in _children(self.init_pid)) > 0
            await asyncio.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """End everything inside now: killing the first process of a pid namespace kills all of it."""
        if not self._over.done():
            with contextlib.suppress(OSError):  # it ended by itself a moment ago
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            if self._process.returncode is None:
                _signal(self._process.pid, signal.SIGKILL)

    async def _until_empty(self) -> int:
        """Bubblewrap ends first, the first process inside a little later, and with it the kernel ends all that is inside."""
        code = await self._process.wait()
        loop, empty = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._init, empty.set)
        try:
            await empty.wait()
        finally:
            loop.remove_reader(self._init)
            os.close(self._init)
        await _remove(self._groups)
        return 128 - code if code < 0 else code


async def start(
    sandbox: Sandbox, limits: Limits, *, name: str, output: IO[bytes] | int, pass_fds: tuple[int, ...] = ()
) -> Running:
    """Start `sandbox`; it runs its first instruction only when its limits hold. `name` tells its control group apart.

    Raises Misconfigured("sandbox.no_bubblewrap") and Unavailable("sandbox.not_started") if bubblewrap ends by itself.
    """
    kind = detect_limits()
    groups: tuple[Path, ...] = ()
    try:
        if kind is not LimitKind.RLIMITS:
            groups = _make_groups(kind, f"{_PREFIX}{os.getpid()}-{name}", limits)
        return await _start(sandbox, limits, kind, groups, output=output, pass_fds=pass_fds)
    except OSError as error:  # the process ended while it was put into its groups, or a group cannot be made any more
        await _remove(groups)
        raise Unavailable("sandbox.not_started", "the sandbox could not be started", got=error.strerror) from None
    except BaseException:
        await _remove(groups)
        raise


async def _start(
    sandbox: Sandbox,
    limits: Limits,
    kind: LimitKind,
    groups: tuple[Path, ...],
    *,
    output: IO[bytes] | int,
    pass_fds: tuple[int, ...],
) -> Running:
    info_read, info_write = os.pipe()
    block_read, block_write = os.pipe()
    try:
        command = sandbox_command(sandbox, info_fd=info_write, block_fd=block_read, user_namespace=detect_user_namespace())
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(info_write, block_read, *pass_fds),
            close_fds=True,
        )
        os.close(info_write)
        os.close(block_read)
        info_write = block_read = -1
        try:
            init_pid = await _announced_pid(info_read)
            _confine(kind, limits, groups, (process.pid, init_pid))
            running = Running(process, init_pid, kind, groups)
            os.write(block_write, b"1")
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return running
    finally:
        for descriptor in (info_read, info_write, block_read, block_write):
            if descriptor >= 0:
                os.close(descriptor)


@cache
def detect_limits() -> LimitKind:
    """What can be used here, found by making a group of each kind and removing it again."""
    for kind in (LimitKind.CGROUP_V2, LimitKind.CGROUP_V1):
        try:
            groups = _make_groups(kind, f"{_PREFIX}{os.getpid()}-probe", Limits(memory_mib=64, pids=8))
        except OSError:
            continue
        for group in groups:
            group.rmdir()
        return kind
    return LimitKind.RLIMITS


@cache
def detect_user_namespace() -> bool:
    """True if a sandbox can have a user namespace of its own here, found by trying."""
    probe = [_bubblewrap(), "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "--", "/bin/true"]
    try:
        return subprocess.run(probe, capture_output=True, check=False, timeout=_START_DEADLINE_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def remove_stale_groups() -> int:
    """Remove control groups whose maker is gone (it was killed); how many there were. Groups in use are left alone."""
    removed = 0
    for kind in (LimitKind.CGROUP_V2, LimitKind.CGROUP_V1):
        for parent in _parents(kind):
            for group in _groups_in(parent):
                owner = group.name.removeprefix(_PREFIX).partition("-")[0]
                if owner.isdigit() and not Path("/proc", owner).exists():
                    with contextlib.suppress(OSError):
                        group.rmdir()
                        removed += 1
    return removed


def _groups_in(parent: Path) -> list[Path]:
    try:
        return [entry for entry in parent.iterdir() if entry.name.startswith(_PREFIX)]
    except OSError:
        return []


def _bubblewrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise Misconfigured("sandbox.no_bubblewrap", "bubblewrap is not installed", remedy="apt-get install bubblewrap")
    return found


async def _announced_pid(descriptor: int) -> int:
    """The pid that bubblewrap writes as JSON when the walls stand and before anything runs behind them."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    pipe = os.fdopen(os.dup(descriptor), "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        async with asyncio.timeout(_START_DEADLINE_S):
            text = await reader.readuntil(b"}")
        return int(json.loads(text)["child-pid"])
    except (asyncio.IncompleteReadError, TimeoutError, ValueError, KeyError):
        raise Unavailable(
            "sandbox.not_started", "bubblewrap ended before the sandbox stood", remedy="read its output (guest.log)"
        ) from None
    finally:
        transport.close()


# ---------------------------------------------------------------- limits


def _confine(kind: LimitKind, limits: Limits, groups: tuple[Path, ...], pids: tuple[int, ...]) -> None:
    """Put bubblewrap and the first process inside under their limits; what they start later inherits them."""
    for pid in pids:
        for group in groups:
            (group / "cgroup.procs").write_text(str(pid))
    if kind is LimitKind.RLIMITS:
        for pid in pids[1:]:
            resource.prlimit(pid, resource.RLIMIT_AS, (limits.memory_mib * _MIB,) * 2)
            resource.prlimit(pid, resource.RLIMIT_NPROC, (limits.pids,) * 2)


def _make_groups(kind: LimitKind, name: str, limits: Limits) -> tuple[Path, ...]:
    """The control groups of one sandbox with their limits set; raises OSError, and leaves nothing, if it cannot be done."""
    made: list[Path] = []
    try:
        for parent in _parents(kind):
            group = parent / name
            group.mkdir()
            made.append(group)
            for file, value in _settings(kind, parent, limits).items():
                (group / file).write_text(str(value))
        if not made:
            message = f"no {kind} here"
            raise OSError(message)
    except OSError:
        for group in made:
            with contextlib.suppress(OSError):
                group.rmdir()
        raise
    return tuple(made)


def _settings(kind: LimitKind, parent: Path, limits: Limits) -> dict[str, int]:
    if kind is LimitKind.CGROUP_V2:
        return {"memory.max": limits.memory_mib * _MIB, "memory.swap.max": 0, "pids.max": limits.pids}
    if (parent / "memory.limit_in_bytes").exists():
        most = limits.memory_mib * _MIB
        with_swap = {"memory.memsw.limit_in_bytes": most} if (parent / "memory.memsw.limit_in_bytes").exists() else {}
        return {"memory.limit_in_bytes": most, **with_swap}  # in this order: the kernel wants memory <= memory + swap
    return {"pids.max": limits.pids}


def _parents(kind: LimitKind) -> list[Path]:
    """Where groups of this kind can be made: as near to this process's own as can be, so that its own limits keep holding.

    In cgroup v2 a group with processes of its own gives no controllers to groups below it, so it is mostly an ancestor.
    """
    own = _own_groups()
    if kind is LimitKind.CGROUP_V2:
        if not (_CGROUP_ROOT / "cgroup.controllers").exists():
            return []
        mine = _CGROUP_ROOT / own.get("", "/").lstrip("/")
        nearest = [path for path in (mine, *mine.parents) if path == _CGROUP_ROOT or _CGROUP_ROOT in path.parents]
        giving = (path for path in nearest if {"memory", "pids"} <= set(_read(path / "cgroup.subtree_control").split()))
        return [path for path in (next(giving, None),) if path is not None]
    found = []
    for controller in ("memory", "pids"):
        mount = _CGROUP_ROOT / controller
        inside = mount / own.get(controller, "/").lstrip("/")
        found.append(inside if inside.is_dir() else mount)  # in a container the path of the host is not there
    return found if all((path / "cgroup.procs").exists() for path in found) else []


def _own_groups() -> dict[str, str]:
    """/proc/self/cgroup as {controller: path}; the one of cgroup v2 is under the empty name."""
    groups: dict[str, str] = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


async def _remove(groups: tuple[Path, ...]) -> None:
    """Remove empty groups. The kernel takes a moment to notice that the last process left: ask again, with a bound."""
    for group in groups:
        for _ in range(50):
            try:
                group.rmdir()
            except FileNotFoundError:
                break
            except OSError:
                await asyncio.sleep(0.02)
            else:
                break


def _children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _read(entry / "stat").rpartition(")")[2].split()
            if len(fields) > 1 and fields[1] == str(pid):
                found.append(int(entry.name))
    return found


def _signal(pid: int, number: signal.Signals) -> bool:
    """True if the signal was sent; a process that is already gone is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
