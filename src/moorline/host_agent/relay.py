"""Byte relays between a guest's sockets and the world. They copy, count and hang up; they never look inside.

A guest has no network. What it may reach stands as `out-<name>` sockets in its shared directory, one destination each, fixed
when it started; what may reach it comes over one published TCP port to its socket `in`. Everything that matters is encrypted
and authenticated between the guest and its peer: the relay is part of the untrusted host. Its caps (connections, idle time,
time to connect) keep one guest from exhausting the host agent, nothing more.

Sockets in a guest's directory are addressed through a descriptor of that directory (`/proc/self/fd/N/name`), because a Unix
socket path holds 107 bytes and state directories can be deep.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Self

from moorline.errors import Unavailable

MAX_CONNECTIONS: Final = 64
IDLE_S: Final = 600.0
CONNECT_S: Final = 5.0
_SILENT_S: Final = 0.25
_CHUNK: Final = 64 * 1024
_BACKLOG: Final = 64

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Ends]]


class Relay:
    """One listening socket whose connections are copied, both ways, to one destination. Made by `relay`."""

    def __init__(self, connect: Connect, *, max_connections: int, idle_s: float) -> None:
        self._connect = connect
        self._idle_s = idle_s
        self._free = max_connections
        self._copies: dict[asyncio.Task[None], float] = {}  # when something last moved
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self, listening: socket.socket) -> Self:
        """Serve `listening` (bound, owned by the relay from now on). `address` is empty for a Unix socket."""
        if listening.family == socket.AF_INET:
            host, port = listening.getsockname()
            self.address = f"{host}:{port}"
        self._server = await asyncio.start_server(self._accept, sock=listening, limit=_CHUNK, backlog=_BACKLOG)
        return self

    async def aclose(self) -> None:
        """Stop listening and hang up every connection."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._copies):
            task.cancel()
        await asyncio.gather(*self._copies, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._free <= 0 and not self._made_room():
            writer.transport.abort()
            return
        self._free -= 1
        task = asyncio.ensure_future(self._copy_both((reader, writer)))
        self._copies[task] = asyncio.get_running_loop().time()
        task.add_done_callback(self._done)

    def _made_room(self) -> bool:
        """The connection on which nothing has moved for longest goes, if that is a while: silent peers shut nobody out."""
        waiting = {task: moved for task, moved in self._copies.items() if not task.cancelling()}
        longest = min(waiting, key=lambda task: waiting[task], default=None)
        if longest is None or asyncio.get_running_loop().time() - waiting[longest] < _SILENT_S:
            return False
        return longest.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._copies.pop(task, None)
        self._free += 1

    async def _copy_both(self, near: Ends) -> None:
        far: Ends | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                far = await self._connect()
            mine = asyncio.current_task()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(near[0], far[1], mine))
                group.create_task(self._copy(far[0], near[1], mine))
        except (TimeoutError, OSError, ExceptionGroup):
            return  # a relay has nobody to tell: both ends see their connection close, below
        finally:
            for ends in (near, far):
                if ends is not None:
                    ends[1].transport.abort() if ends[1].transport.get_write_buffer_size() else ends[1].close()

    async def _copy(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, connection: asyncio.Task[None] | None
    ) -> None:
        while True:
            async with asyncio.timeout(self._idle_s):
                data = await source.read(_CHUNK)
                if not data:
                    break
                if connection in self._copies:
                    self._copies[connection] = asyncio.get_running_loop().time()
                target.write(data)
                await target.drain()
        with contextlib.suppress(OSError):
            target.write_eof()  # half-close: the other direction may still have something to say


async def relay(
    listening: socket.socket, connect: Connect, *, max_connections: int = MAX_CONNECTIONS, idle_s: float = IDLE_S
) -> Relay:
    """A running relay from `listening` to wherever `connect` leads."""
    return await Relay(connect, max_connections=max_connections, idle_s=idle_s).start(listening)


def to_address(address: str) -> Connect:
    """A destination: `host:port`, or `unix:/path`."""

    async def connect() -> Ends:
        if address.startswith("unix:"):
            return await asyncio.open_unix_connection(address.removeprefix("unix:"), limit=_CHUNK)
        host, _, port = address.rpartition(":")
        return await asyncio.open_connection(host, int(port), limit=_CHUNK)

    return connect


def to_guest(directory: Path, name: str) -> Connect:
    """The socket `name` of a guest's shared directory, however long its path. The guest may not have made it yet."""

    async def connect() -> Ends:
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            return await asyncio.open_unix_connection(f"/proc/self/fd/{descriptor}/{name}", limit=_CHUNK)
        finally:
            os.close(descriptor)

    return connect


def listen_in(directory: Path, name: str) -> socket.socket:
    """A listening Unix socket `name` (mode 0600) in `directory`, replacing a left-over one."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=descriptor)
        listening.bind(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.umask(mask)
        os.close(descriptor)
    listening.settimeout(0)
    return listening


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 lets the kernel choose. Raises Unavailable("relay.port_taken")."""
    # As TCP by name: only then asyncio sends small pieces at once, and none waits for an acknowledgement.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise Unavailable("relay.port_taken", "the port cannot be bound", got=f"{host}:{port}: {error}") from None
    listening.settimeout(0)
    return listening
