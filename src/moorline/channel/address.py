"""Where a channel's ends are: "host:port" or "unix:/path", and the sockets there. None of them ever blocks."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final

from moorline.errors import Misconfigured, Unavailable

_BACKLOG: Final = 100

_At = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes] | str
"""An address as sockets of its family take it."""


def parse_address(address: str) -> tuple[str, int] | str:
    """`(host, port)` of "host:port", or the path of "unix:/path". Raises Misconfigured("address.malformed")."""
    if address.startswith("unix:"):
        return address.removeprefix("unix:")
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise Misconfigured("address.malformed", "not an address", expected='"host:port" or "unix:/path"', got=address)
    return host.strip("[]"), int(port)


async def dialled(address: str) -> socket.socket:
    """A socket with a connection to `address`. Raises Unavailable("peer.unreachable")."""
    where = parse_address(address)
    try:
        if isinstance(where, str):
            return await _connected(socket.AF_UNIX, where)
        return await _first_connected(*where)
    except OSError as error:
        raise Unavailable("peer.unreachable", "nobody answers there", expected=address, got=str(error)) from None


async def bound(address: str) -> list[socket.socket]:
    """Listening sockets: one, or one for each address of the host's name. Raises OSError."""
    where = parse_address(address)
    if isinstance(where, str):
        _remove_socket(where)
        return [_listening(socket.AF_UNIX, where)]
    host, port = where
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened: list[socket.socket] = []
    try:
        for family, _, _, _, at in dict.fromkeys(found):
            opened.append(_listening(family, at))
    except BaseException:
        for one in opened:
            one.close()
        raise
    return opened


def made_ready(carrier: socket.socket) -> None:
    """What every connection's socket is told: never block, send at once, and notice a machine that died silently."""
    carrier.settimeout(0)
    if carrier.family != socket.AF_UNIX:
        carrier.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        carrier.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def _first_connected(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    for family, _, _, _, at in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            return await _connected(family, at)
        except OSError as error:
            failure = error
    raise failure or OSError("the name has no address")


async def _connected(family: int, at: _At) -> socket.socket:
    carrier = socket.socket(family, socket.SOCK_STREAM)
    try:
        made_ready(carrier)
        await asyncio.get_running_loop().sock_connect(carrier, at)
    except BaseException:
        carrier.close()
        raise
    return carrier


def _listening(family: int, at: _At) -> socket.socket:
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        door.settimeout(0)
        if family != socket.AF_UNIX:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # the other family of the same name has a socket of its own
            door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        door.bind(at)
        door.listen(_BACKLOG)
    except BaseException:
        door.close()
        raise
    return door


def _remove_socket(path: str) -> None:
    """What a process that died left behind would keep the next one from listening."""
    if Path(path).is_socket():
        Path(path).unlink(missing_ok=True)
