"""Guests of one host: their shared directories, their relays, their life under the silicon.

    <directory>/<instance>/guest.json     what was ordered (digest), published port, relays; written before the guest starts
    <directory>/<instance>/shared/        becomes /run/moor inside (wire.guest)

Starting is idempotent: the same order again gives the same guest, another order under a taken name is refused. A host agent
that was killed finds its guests again from these files and the silicon, and puts the relays back (`adopt`).
What a guest writes into its directory is a stranger's: it is read under caps and never through links.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from moorline.errors import Conflict, MoorlineError, Refused, Unavailable, from_problem
from moorline.host_agent import relay
from moorline.nfv import parse_name
from moorline.storage.steps import reached
from moorline.wire import schema
from moorline.wire.guest import CONFIGURATION_FILE, INBOUND_SOCKET, LAUNCH_FILE, PACKAGE_FILE, STATUS_FILE
from moorline.wire.orchestration import MAX_ORDER_BYTES, GuestOrder
from moorline.wire.silicon import GuestStatus, LaunchGuest

MAX_STATUS_BYTES: Final = 64 * 1024
MAX_EVENTS: Final = 64
MAX_WAIT_S: Final = 20
_LOOK_S: Final = 0.005
_ASK_SILICON_S: Final = 0.25
_RECORD_FILE: Final = "guest.json"
_SHARED: Final = "shared"
MIN_MEMORY_MIB: Final = 64
MAX_MEMORY_MIB: Final = 8192
MIN_PIDS: Final = 4
MAX_PIDS: Final = 4096


class Silicon(Protocol):
    """What starts and stops measured guests; `host_agent.silicon.SiliconClient` is one."""

    async def launch(self, request: LaunchGuest, /) -> GuestStatus:
        """Start a guest."""
        ...

    async def status(self, name: str, /) -> GuestStatus:
        """How a guest is."""
        ...

    async def stop(self, name: str, /) -> GuestStatus:
        """End a guest."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestState:
    """A guest as the host sees it. `events` are what the guest said about itself, oldest first; hearsay."""

    instance: str
    state: str
    exit_code: int | None
    address: str
    events: tuple[dict[str, Any], ...]

    def as_json(self) -> dict[str, object]:
        """For the HTTP interface."""
        return {
            "instance": self.instance,
            "state": self.state,
            "exit_code": self.exit_code,
            "address": self.address,
            "events": list(self.events),
        }


class Guests:
    """All guests of this host agent. One instance a directory and process."""

    def __init__(self, directory: Path, silicon: Silicon, *, publish: str) -> None:
        self._directory = directory.absolute()  # the silicon is another process with another working directory
        self._silicon = silicon
        self._publish = publish
        self._relays: dict[str, list[relay.Relay]] = {}
        self._turn = asyncio.Lock()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def start(self, order: GuestOrder, *, publish_on: str | None = None) -> GuestState:
        """Start what was ordered, or find it already started. `publish_on` fixes the published address.

        Raises Conflict("host.guest_differs"), Refused("host.limits"), and what the silicon reports.
        """
        parse_name(order.instance, "instance")
        if not (MIN_MEMORY_MIB <= order.memory_mib <= MAX_MEMORY_MIB and MIN_PIDS <= order.pids <= MAX_PIDS):
            raise Refused("host.limits", "this host does not grant such limits", got=f"{order.memory_mib} MiB, {order.pids}")
        digest = order_digest(order)
        async with self._turn:
            record = self._record(order.instance)
            if record is not None and record["digest"] != digest:
                raise Conflict("host.guest_differs", "another order was started under this name", got=order.instance)
            if record is None:
                self._prepare(order)
                reached("host.guest.prepared")
                record = await self._open(order.instance, dict(order.relays), order.publish, publish_on)
                self._write_record(order.instance, {**record, "digest": digest})
                reached("host.guest.recorded")
                await self._launch(order)
            else:
                if order.instance not in self._relays:
                    await self._open(order.instance, record["relays"], order.publish, record["address"])
                await self._launch_if_unknown(order)
        return await self.state(order.instance)

    async def state(self, instance: str) -> GuestState:
        """How a guest is. Raises Refused("host.no_such_guest")."""
        record = self._known(instance)
        try:
            status = await self._silicon.status(instance)
            state, code = status.state, status.exit_code
        except Refused:
            state, code = "ended", None  # the silicon was restarted and forgot it: nothing of it runs any more
        return GuestState(
            instance=instance, state=state, exit_code=code, address=record["address"], events=self._events(instance)
        )

    async def decided(self, instance: str, wait_s: float) -> GuestState:
        """As `state`, as soon as the guest said that it serves or gave up, or ended; as it is after `wait_s` seconds."""
        now = asyncio.get_running_loop().time
        until, words = now() + wait_s, self.shared(parse_name(instance, "instance")) / STATUS_FILE
        while True:
            said = _size(words)
            state = await self.state(instance)
            if now() >= until or _is_decided(state):
                return state
            again = min(until, now() + _ASK_SILICON_S)
            while now() < again and _size(words) == said:  # noqa: ASYNC110 - nothing tells of a file that another process wrote
                await asyncio.sleep(_LOOK_S)

    async def states(self) -> tuple[GuestState, ...]:
        """All guests ever started here and not removed."""
        names = sorted(path.name for path in self._directory.iterdir() if (path / _RECORD_FILE).exists())
        return tuple([await self.state(name) for name in names])

    async def stop(self, instance: str) -> GuestState:
        """End a guest, close its relays, forget its directory; the last state seen. Idempotent while the name is known."""
        self._known(instance)
        async with self._turn:
            with contextlib.suppress(Refused):  # already gone
                await self._silicon.stop(instance)
            last = await self.state(instance)
            for one in self._relays.pop(instance, []):
                await one.aclose()
            await asyncio.to_thread(shutil.rmtree, self._directory / instance, ignore_errors=True)
            reached("host.guest.removed")
        return GuestState(
            instance=instance, state="ended", exit_code=last.exit_code, address=last.address, events=last.events
        )

    async def adopt(self) -> tuple[str, ...]:
        """Put the relays of guests from before a restart back; the names of those adopted now. Idempotent.

        Raises Unavailable if the silicon cannot be asked, or a guest's port is taken: those already adopted stay adopted.
        """
        adopted, taken = [], None
        async with self._turn:
            for state in await self.states():
                if state.state == "running" and state.instance not in self._relays:
                    record = self._known(state.instance)
                    try:
                        await self._open(state.instance, record["relays"], bool(record["address"]), record["address"])
                    except Unavailable as error:  # one guest that cannot be reached is no reason to leave the others alone
                        taken = error
                        continue
                    adopted.append(state.instance)
        if taken is not None:
            raise taken
        return tuple(adopted)

    async def aclose(self) -> None:
        """Close all relays. Guests go on; a later process adopts them."""
        for relays in self._relays.values():
            for one in relays:
                await one.aclose()
        self._relays.clear()

    def shared(self, instance: str) -> Path:
        """The directory that a guest sees as /run/moor."""
        return self._directory / instance / _SHARED

    def _prepare(self, order: GuestOrder) -> None:
        shared = self.shared(order.instance)
        if shared.parent.exists():  # left by a crash before the record was written: nothing of it was ever started
            shutil.rmtree(shared.parent)
        shared.mkdir(mode=0o700, parents=True)
        _write(shared / LAUNCH_FILE, order.launch)
        if order.package:
            _write(shared / PACKAGE_FILE, order.package)
        if order.configuration:
            _write(shared / CONFIGURATION_FILE, order.configuration)

    async def _open(
        self,
        instance: str,
        relays: dict[str, str],
        publish: bool,  # noqa: FBT001 - from the order
        address: str | None,
    ) -> dict[str, Any]:
        shared = self.shared(instance)
        opened: list[relay.Relay] = []
        async with contextlib.AsyncExitStack() as undo:
            for name, destination in sorted(relays.items()):
                parse_name(name, "relay")
                outbound = await relay.relay(relay.listen_in(shared, f"out-{name}"), relay.to_address(destination))
                opened.append(outbound)
                undo.push_async_callback(outbound.aclose)
            published = ""
            if publish:
                inbound = await relay.relay(self._published(address), relay.to_guest(shared, INBOUND_SOCKET))
                opened.append(inbound)
                published = inbound.address or str(address)
            undo.pop_all()
        self._relays[instance] = opened
        return {"relays": relays, "address": published}

    def _published(self, address: str | None) -> Any:  # noqa: ANN401 - a socket; typed where it is made
        if address is None or address == "":
            return relay.listen_tcp(self._publish, 0)
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            return relay.listen_in(path.parent, path.name)
        host, _, port = address.rpartition(":")
        return relay.listen_tcp(host, int(port))

    async def _launch_if_unknown(self, order: GuestOrder) -> None:
        # The record is there, so an earlier call came this far; it may have been killed before the silicon was asked.
        try:
            await self._silicon.status(order.instance)
        except Refused:
            await self._launch(order)

    async def _launch(self, order: GuestOrder) -> None:
        await self._silicon.launch(
            LaunchGuest(
                op="launch",
                name=order.instance,
                entry=order.entry,
                host_data=order.host_data,
                shared=str(self.shared(order.instance)),
                debug=False,
                memory_mib=order.memory_mib,
                pids=order.pids,
            )
        )
        reached("host.guest.started")

    def _known(self, instance: str) -> dict[str, Any]:
        parse_name(instance, "instance")
        record = self._record(instance)
        if record is None:
            raise Refused("host.no_such_guest", "no guest of this name was started here", got=instance)
        return record

    def _record(self, instance: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads((self._directory / instance / _RECORD_FILE).read_text("utf-8"))
        except FileNotFoundError:
            return None
        return record

    def _write_record(self, instance: str, record: dict[str, Any]) -> None:
        target = self._directory / instance / _RECORD_FILE
        draft = target.with_suffix(".new")
        _write(draft, json.dumps(record).encode())
        draft.replace(target)

    def _events(self, instance: str) -> tuple[dict[str, Any], ...]:
        events = []
        for line in _read_untrusted(self.shared(instance) / STATUS_FILE).splitlines()[-MAX_EVENTS:]:
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # a guest writes what it likes, and a line may be half written
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                events.append(event)
        return tuple(events)


def order_digest(order: GuestOrder) -> str:
    """What tells two orders apart; hex."""
    return hashlib.sha256(schema.encode(order)).hexdigest()


def parse_order(data: bytes) -> GuestOrder:
    """An order from the wire; raises only Malformed. It is authentic as far as its connection is."""
    return schema.decode(GuestOrder, data, max_bytes=MAX_ORDER_BYTES)


def active_event(state: GuestState) -> dict[str, Any] | None:
    """The guest's own word that it serves, if it has given it."""
    return next((event for event in reversed(state.events) if event["event"] == "active"), None)


def refused_event(state: GuestState) -> MoorlineError | None:
    """Why the guest gave up, if it said so."""
    for event in reversed(state.events):
        if event["event"] == "refused":
            return from_problem(event.get("problem"))
    return None


def _is_decided(state: GuestState) -> bool:
    return state.state != "running" or active_event(state) is not None or refused_event(state) is not None


def _size(path: Path) -> int | None:
    """How long a file of a guest is; a link is not followed."""
    try:
        return path.lstat().st_size
    except OSError:
        return None


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_untrusted(path: Path) -> bytes:
    """The last bytes of a file that a guest owns; nothing if it is not a regular file (a link would read the host's)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            return b""
        file.seek(max(0, facts.st_size - MAX_STATUS_BYTES))
        return file.read(MAX_STATUS_BYTES)
