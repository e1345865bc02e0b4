"""The SIMULATED secure processor of one machine, as a process of its own (`moor simulate silicon`).

It owns a chip, a private copy of the guest runtime, and the guests it starts. On a unix socket it takes the requests of
`wire.silicon`, one frame each, and answers each with a message or a problem.

A launch:
1. the private copy is looked over: a file that is not the one installed (by inode, size, change time) is measured anew, so
   the launch digest is of the bytes that are there, not of those that should be;
2. the launch digest of the entry is computed over the hashes page; HOST_DATA, digest and policy are fixed from now on;
3. the guest starts in a sandbox whose whole file system is that copy, with limits, and with one end of a socket pair;
4. over the other end this process answers report requests of that guest, about that guest. Nobody else can ask.

So the host chooses the entry, HOST_DATA, debug, limits and the shared directory, as a hypervisor does, and cannot choose
measurement, chip id or report. Guests die with this process, and with their socket pair: one that sends no frame is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from moorline.errors import Conflict, Malformed, Misconfigured, MoorlineError, Refused
from moorline.host_agent import sandbox
from moorline.host_agent.sandbox import Bind, Limits, Running, Sandbox
from moorline.nfv import parse_name
from moorline.services import process
from moorline.simulators import guest_image
from moorline.simulators.guest_image import ImageFile
from moorline.simulators.manufacturer import open_chip
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.wire import cbor, frames, schema
from moorline.wire.guest import SHARED_DIRECTORY
from moorline.wire.silicon import (
    GUEST_REPORT_FD,
    GuestRequest,
    GuestStatus,
    LaunchGuest,
    Platform,
    PlatformRequest,
    ReportRequest,
    encode_answer,
    encode_problem,
)

LOG_FILE: Final = "guest.log"
_REQUEST_CAP: Final = 64 * 1024
_IDLE_S: Final = 3600.0
_FOREVER_S: Final = 1e8
_STOP_GRACE_S: Final = 3.0
_KEPT_ENDED: Final = 256
_WARM_UP_LIMITS: Final = Limits(memory_mib=512, pids=64)
_WARM_UP: Final = """
import importlib, importlib.util, pkgutil, sys
sys.path.append("/moor/site")
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ()), name + "."):
        if found.name.endswith(".__main__"):
            importlib.util.find_spec(found.name).loader.get_code(found.name)
        else:
            importlib.import_module(found.name)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiliconSettings:
    """Settings of `moor simulate silicon`: socket to listen on, chip directory, state directory, report version.

    `warm` are entries whose bytecode is made at start, so that their first launch is quick.
    """

    listen: Path
    """Unix socket it listens on."""
    chip: Path
    """Directory of the SIMULATED chip (moor simulate manufacturer)."""
    state: Path
    """Directory of its images and guests."""
    report_version: int = 3
    """Version of the attestation reports it makes."""
    warm: tuple[str, ...] = ()
    """Entry modules whose bytecode is made at start."""


class PrivateImage:
    """The private copy of the guest image, and bytecode that measured code made from it. Only this process writes there."""

    def __init__(self, state: Path) -> None:
        self.root = state / "image"
        self.bytecode = state / "bytecode"
        for directory in (self.root, self.bytecode):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        state.chmod(0o700)
        installed = {file.path: file for file in guest_image.install(self.root)}
        self._known = {path: (key, installed[path]) for path, key in _walk(self.root)}
        self._compiled: dict[str, tuple[int, ...]] | None = None
        self._warm: dict[str, asyncio.Task[None]] = {}

    def files(self) -> tuple[ImageFile, ...]:
        """Every file of the copy with its hash, as it is now; what changed since the last look is hashed again."""
        now = dict(_walk(self.root))
        for path, key in now.items():
            if path not in self._known or self._known[path][0] != key:
                self._known[path] = (key, _measured(self.root, path))
        for path in self._known.keys() - now.keys():
            del self._known[path]
        return tuple(self._known[path][1] for path in sorted(self._known))

    def known(self) -> tuple[ImageFile, ...]:
        """The files as the last look found them: enough to refuse early, not to measure."""
        return tuple(file for _, file in self._known.values())

    async def prepare(self, entry: str) -> None:
        """Bytecode for `entry` is there, made inside a sandbox by the measured interpreter from the measured sources.

        Bytecode that somebody else touched is thrown away. A failure is not the launch's: the guest then compiles itself.
        """
        if self._compiled is not None and dict(_walk(self.bytecode)) != self._compiled and not self._busy():
            shutil.rmtree(self.bytecode)
            self.bytecode.mkdir()
            self._warm.clear()
        if entry not in self._warm:
            self._warm[entry] = asyncio.ensure_future(self._compile(entry))
        await asyncio.shield(self._warm[entry])

    def _busy(self) -> bool:
        return any(not task.done() for task in self._warm.values())

    async def _compile(self, entry: str) -> None:
        interpreter = guest_image.interpreter()
        prefix = f"pycache_prefix=/{guest_image.BYTECODE}"
        box = Sandbox(
            root=self.root,
            arguments=(interpreter, "-I", "-S", "-X", prefix, "-c", _WARM_UP, entry),
            environment=guest_image.environment(),
            binds=(Bind(source=self.bytecode, target=f"/{guest_image.BYTECODE}", writable=True),),
        )
        with contextlib.suppress(MoorlineError):
            name = f"warm-{secrets.token_hex(4)}"
            running = await sandbox.start(box, _WARM_UP_LIMITS, name=name, output=asyncio.subprocess.DEVNULL)
            await running.wait()
        self._compiled = dict(_walk(self.bytecode))


@dataclass(slots=True, kw_only=True)
class _Guest:
    """One guest: what the firmware holds of it, its sandbox, and how it ended."""

    name: str
    context: GuestContext
    running: Running
    ended: asyncio.Task[int]
    exit_code: int | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def status(self) -> GuestStatus:
        return GuestStatus(
            name=self.name,
            state="running" if self.exit_code is None else "ended",
            pid=self.running.init_pid,
            exit_code=self.exit_code,
            measurement=self.context.measurement,
        )


class SiliconService:
    """The requests of `wire.silicon` over one chip and one private image."""

    def __init__(self, silicon: Silicon, image: PrivateImage, log: structlog.stdlib.BoundLogger) -> None:
        self._silicon = silicon
        self._image = image
        self._log = log
        self._guests: dict[str, _Guest] = {}
        self._starting: set[str] = set()

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends or sends something that is no frame."""
        with contextlib.suppress(MoorlineError, ConnectionError):
            while True:
                try:
                    body = await frames.read_frame(reader, cap=_REQUEST_CAP, deadline_s=_IDLE_S)
                except MoorlineError as error:
                    await frames.write_frame(writer, encode_problem(error), deadline_s=1.0)
                    break
                await frames.write_frame(writer, await self._answer(body), deadline_s=10.0)
        writer.close()

    async def close(self) -> None:
        """End every guest."""
        guests = [guest for guest in self._guests.values() if guest.exit_code is None]
        for guest in guests:
            guest.running.kill()
        await asyncio.gather(*(guest.ended for guest in guests), return_exceptions=True)

    async def _answer(self, body: bytes) -> bytes:
        try:
            return encode_answer(await self._serve(body))
        except MoorlineError as error:
            return encode_problem(error)
        except Exception as error:  # the process's top loop: one request that breaks must not take the guests with it
            self._log.exception("request failed", error=type(error).__name__)
            return encode_problem(
                Misconfigured("silicon.internal", "the silicon could not do this", got=type(error).__name__)
            )

    async def _serve(self, body: bytes) -> GuestStatus | Platform:
        item = cbor.decode(body)
        operation = item.get("op") if isinstance(item, dict) else None
        if operation == "launch":
            return await self._launch(schema.from_item(LaunchGuest, item))
        if operation == "platform":
            return self._platform(schema.from_item(PlatformRequest, item))
        if operation in ("status", "stop", "kill"):
            return await self._act(schema.from_item(GuestRequest, item))
        raise Malformed(
            "silicon.request_unknown", "no such request", expected="launch platform status stop kill", got=operation
        )

    def _platform(self, request: PlatformRequest) -> Platform:
        chip = self._silicon.chip
        return Platform(
            chip_id=chip.chip_id,
            measurement=guest_image.measurement(request.entry, self._image.files()),
            product=chip.product.value,
            vcek=chip.vcek,
            ask=chip.ask,
            ark=chip.ark,
        )

    async def _act(self, request: GuestRequest) -> GuestStatus:
        guest = self._guests.get(request.name)
        if guest is None:
            raise Refused("silicon.no_guest", "no guest of this name was started here", got=request.name)
        if request.op == "stop" and guest.exit_code is None:
            await guest.running.terminate(_STOP_GRACE_S)
            guest.exit_code = await asyncio.shield(guest.ended)
        if request.op == "kill" and guest.exit_code is None:
            guest.running.kill()
            guest.exit_code = await asyncio.shield(guest.ended)
        return guest.status()

    # ------------------------------------------------------------ launch

    async def _launch(self, request: LaunchGuest) -> GuestStatus:
        name = parse_name(request.name, "guest name")
        there = self._guests.get(name)
        if name in self._starting or (there is not None and there.exit_code is None):
            raise Conflict("silicon.guest_running", "a guest of this name is running", got=name, remedy="stop it first")
        shared = _shared_directory(request.shared)
        if not (64 <= request.memory_mib <= 1 << 20 and 4 <= request.pids <= 1 << 16):
            raise Refused("silicon.limits", "limits out of range", expected="64 MiB to 1 TiB, 4 to 65536 processes")
        self._starting.add(name)
        try:
            guest_image.require_entry(request.entry, self._image.known())
            await self._image.prepare(request.entry)
            return (await self._start(request, name, shared)).status()
        finally:
            self._starting.discard(name)

    async def _start(self, request: LaunchGuest, name: str, shared: Path) -> _Guest:
        context = GuestContext(
            measurement=guest_image.measurement(request.entry, self._image.files()),  # 1 and 2
            host_data=request.host_data,
            policy=guest_policy(debug=request.debug),
            report_id=secrets.token_bytes(32),
        )
        ours, theirs = socket.socketpair()
        limits = Limits(memory_mib=request.memory_mib, pids=request.pids)
        try:
            with os.fdopen(_open_log(shared), "ab") as log:
                box = self._box(request.entry, shared, name, theirs.fileno())
                running = await sandbox.start(box, limits, name=name, output=log, pass_fds=(theirs.fileno(),))  # 3
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        guest = _Guest(name=name, context=context, running=running, ended=asyncio.ensure_future(running.wait()))
        guest.tasks = [asyncio.ensure_future(self._reports(guest, ours)), asyncio.ensure_future(self._watch(guest))]
        self._guests.pop(name, None)
        self._guests[name] = guest
        self._forget_old()
        self._log.info(
            "guest started",
            guest=name,
            entry=request.entry,
            pid=running.init_pid,
            limits=running.limits,
            debug=request.debug,
        )
        return guest

    def _box(self, entry: str, shared: Path, name: str, descriptor: int) -> Sandbox:
        return Sandbox(
            root=self._image.root,
            arguments=guest_image.arguments(entry),
            environment={**guest_image.environment(), GUEST_REPORT_FD: str(descriptor)},
            binds=(
                Bind(source=self._image.bytecode, target=f"/{guest_image.BYTECODE}"),
                Bind(source=shared, target=SHARED_DIRECTORY, writable=True),
            ),
            working_directory=guest_image.working_directory(),
            host_name=name,
        )

    async def _reports(self, guest: _Guest, connection: socket.socket) -> None:
        """4: answer this guest's report requests about this guest, until it closes its end or sends no frame."""
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        with contextlib.suppress(MoorlineError, ConnectionError):
            while True:
                body = await frames.read_frame(reader, cap=4096, deadline_s=_FOREVER_S)
                try:
                    request = schema.decode(ReportRequest, body)
                    answer = encode_answer(self._silicon.report(guest.context, request.report_data))
                except MoorlineError as error:
                    answer = encode_problem(error)
                await frames.write_frame(writer, answer, deadline_s=10.0)
        writer.close()

    async def _watch(self, guest: _Guest) -> None:
        guest.exit_code = await guest.ended
        guest.tasks[0].cancel()
        self._log.info("guest ended", guest=guest.name, exit_code=guest.exit_code)

    def _forget_old(self) -> None:
        ended = [name for name, guest in self._guests.items() if guest.exit_code is not None]
        for name in ended[: max(0, len(ended) - _KEPT_ENDED)]:
            del self._guests[name]


async def serve_silicon(settings: SiliconSettings, log: structlog.stdlib.BoundLogger) -> None:
    """Run the silicon until it is cancelled; guests are ended then."""
    chip = open_chip(settings.chip)
    if settings.report_version not in (2, 3, 5):
        raise Misconfigured("silicon.report_version", "unknown report version", expected="2, 3 or 5")
    stale = sandbox.remove_stale_groups()
    image = PrivateImage(settings.state)
    service = SiliconService(Silicon(chip, report_version=settings.report_version), image, log)
    settings.listen.unlink(missing_ok=True)
    try:
        server = await asyncio.start_unix_server(service.connection, path=settings.listen)
    except OSError as error:  # also a path longer than the 107 bytes a unix socket address holds
        raise Misconfigured("silicon.listen", "cannot listen on this socket", got=f"{settings.listen}: {error}") from None
    settings.listen.chmod(0o600)
    warming = [asyncio.ensure_future(image.prepare(entry)) for entry in settings.warm]
    log.info("SIMULATED silicon", chip_id=chip.chip_id.hex(), limits=sandbox.detect_limits(), stale_groups_removed=stale)
    process.announce_ready("silicon", address=f"unix:{settings.listen}")
    try:
        async with server:
            await server.serve_forever()
    finally:
        for task in warming:
            task.cancel()
        await service.close()
        settings.listen.unlink(missing_ok=True)


def run(settings: SiliconSettings) -> int:
    """The process's exit code."""
    return process.run("silicon", lambda log: serve_silicon(settings, log))


def _shared_directory(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or not path.is_dir() or path.is_symlink():
        raise Refused(
            "silicon.shared", "the shared directory is not a directory here", expected="an absolute path", got=text
        )
    return path


def _open_log(shared: Path) -> int:
    """The guest's log, never through a link: an earlier guest could have left one that names a file of the host."""
    try:
        return os.open(shared / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Refused("silicon.shared", "cannot write the guest's log in the shared directory", got=error.strerror) from None


def _measured(root: Path, path: str) -> ImageFile:
    file = root / path
    if file.is_symlink():  # none is installed; one that somebody made is measured as what it says
        return ImageFile(
            path=path, executable=False, sha384=hashlib.sha384(b"link " + os.fsencode(file.readlink())).digest()
        )
    executable = bool(file.stat().st_mode & 0o111)
    return ImageFile(path=path, executable=executable, sha384=hashlib.sha384(file.read_bytes()).digest())


def _walk(root: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every file and link below `root`, and what changes when it does. Links are never followed."""
    for parent, directories, names in os.walk(root):
        for name in (*names, *directories):
            entry = Path(parent, name)
            facts = entry.lstat()
            if not stat.S_ISDIR(facts.st_mode):
                key = (facts.st_ino, facts.st_size, facts.st_mode, facts.st_ctime_ns, facts.st_mtime_ns)
                yield str(entry.relative_to(root)), key
