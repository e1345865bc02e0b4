"""A port of TLS 1.3 streams: a bound on its connections, a deadline for their handshakes, a task for each."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Self

from OpenSSL import SSL

from moorline.channel import identity as identities
from moorline.channel.address import bound, made_ready, parse_address
from moorline.channel.identity import TlsIdentity, Verify
from moorline.channel.plain import PlainStream
from moorline.channel.stream import TlsStream, established
from moorline.errors import MoorlineError

_AT_ONCE: Final = 64
_ACCEPT_AGAIN_S: Final = 1.0
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_LOG: Final = logging.getLogger("moorline.channel.tls")

Accept = Callable[[TlsStream], Awaitable[None]]
Plain = Callable[[PlainStream], Awaitable[None]]


class TlsServer:
    """A listener. `address` is where it really listens, also when port 0 was asked for."""

    def __init__(self, doors: list[socket.socket], address: str, connections: _Connections) -> None:
        self._doors, self._connections = doors, connections
        self.address = address
        for door in doors:
            self._open(door)

    async def serve_forever(self) -> None:
        """Until cancelled; then nobody is let in any more."""
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._shut()

    async def aclose(self) -> None:
        """Stop listening and drop every connection."""
        self._shut()
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _open(self, door: socket.socket) -> None:
        if door in self._doors:  # not shut meanwhile
            asyncio.get_running_loop().add_reader(door, self._knocked, door)

    def _shut(self) -> None:
        loop = asyncio.get_running_loop()
        while self._doors:
            door = self._doors.pop()
            loop.remove_reader(door)
            door.close()

    def _knocked(self, door: socket.socket) -> None:
        for _ in range(_AT_ONCE):  # then the others of the event loop have their turn
            try:
                carrier, peer = door.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                _LOG.error("no connection can be taken now", extra={"code": error.errno})
                loop = asyncio.get_running_loop()
                loop.remove_reader(door)
                loop.call_later(_ACCEPT_AGAIN_S, self._open, door)
                return
            self._connections.arrived(carrier, peer)


async def listen(
    address: str,
    *,
    identity: Callable[[], TlsIdentity],
    verify: Verify | None,
    accept: Accept,
    plain: Plain | None = None,
    max_connections: int = 256,
    handshake_deadline_s: float = 5.0,
) -> TlsServer:
    """A running listener. `verify` None asks for no client certificate; otherwise one is required and judged.

    `identity` is asked at every connection, so that a renewed certificate is used at once. `accept` owns the stream until it
    returns; then the stream is closed. Whatever one peer does, the listener goes on. `plain` takes connections that do not
    begin with a TLS handshake; without it there are none.
    """
    connections = _Connections(identity, verify, accept, plain, max_connections, handshake_deadline_s)
    doors = await bound(address)
    if not isinstance(parse_address(address), str):
        host, port = doors[0].getsockname()[:2]
        address = f"{host}:{port}"
    return TlsServer(doors, address, connections)


class _Connections:
    """Every connection of a listener is a task here, so that there is a bound and an end."""

    def __init__(
        self,
        identity: Callable[[], TlsIdentity],
        verify: Verify | None,
        accept: Accept,
        plain: Plain | None,
        most: int,
        handshake_deadline_s: float,
    ) -> None:
        self._identity = identity
        self._verify = verify
        self._accept = accept
        self._plain = plain
        self._most = most
        self._handshake_deadline_s = handshake_deadline_s
        self._made: tuple[TlsIdentity, SSL.Context] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting: dict[TlsStream, None] = {}

    def arrived(self, carrier: socket.socket, peer: object) -> None:
        """One more connection. One beyond the bound takes the place of the longest handshake under way.

        So silent peers shut nobody out. If all are past their handshakes, the newcomer is closed at once.
        """
        if len(self._tasks) >= self._most:
            if not self._greeting:
                carrier.close()
                return
            self._hang_up(next(iter(self._greeting)))
        try:
            made_ready(carrier)
            stream = TlsStream(self._current(), carrier, _peer_name(peer))
        except (MoorlineError, OSError) as error:  # no identity to show, or the peer is gone already
            carrier.close()
            code = error.code if isinstance(error, MoorlineError) else type(error).__name__
            _LOG.info("connection refused", extra={"code": code, "peer": _peer_name(peer)})
            return
        self._greeting[stream] = None
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, stream: TlsStream) -> None:
        try:
            await self._served(stream)
        except MoorlineError as error:
            _LOG.info("connection refused", extra={"code": error.code, "peer": stream.peer_address})
        except (TimeoutError, OSError) as error:
            _LOG.info("connection lost", extra={"code": type(error).__name__, "peer": stream.peer_address})
        except Exception:  # the top of this connection's task: a fault here must not reach the others
            _LOG.exception("connection failed")
        finally:
            self._greeting.pop(stream, None)
            stream.close()

    async def _served(self, stream: TlsStream) -> None:
        if self._plain is not None and not await stream.begins_tls(self._handshake_deadline_s):
            self._greeting.pop(stream, None)
            await _plainly(self._plain, stream)
            return
        await established(stream, self._verify, self._handshake_deadline_s)
        self._greeting.pop(stream, None)
        try:
            await self._accept(stream)
        finally:
            await stream.aclose()

    def _hang_up(self, stream: TlsStream) -> None:
        self._greeting.pop(stream, None)
        stream.close()

    def _current(self) -> SSL.Context:
        identity = self._identity()
        if self._made is None or self._made[0] is not identity:
            self._made = identity, identities.of_server(identity, mutual=self._verify is not None)
        return self._made[1]


async def _plainly(plain: Plain, stream: TlsStream) -> None:
    reader, writer = await asyncio.open_connection(sock=stream.released())
    without_tls = PlainStream(reader, writer)
    try:
        await plain(without_tls)
    finally:
        await without_tls.aclose()


def _peer_name(peer: object) -> str:
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) and len(peer) >= 2 else "unix"
