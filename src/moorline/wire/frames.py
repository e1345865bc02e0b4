"""Length-prefixed frames on a byte stream: four bytes of length, big-endian, then that many bytes.

A reader says how much it is ready to take and how long it is ready to wait. A frame that announces more is refused before
a byte of it is read; a peer that stalls is dropped at the deadline. Nothing is buffered beyond one frame.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from moorline.errors import Malformed, Unavailable

HEADER: Final = 4
DEFAULT_CAP: Final = 256 * 1024


class Reader(Protocol):
    """What this module needs of `asyncio.StreamReader`, or of a TLS stream."""

    async def readexactly(self, n: int, /) -> bytes:
        """Exactly n bytes, or asyncio.IncompleteReadError."""
        ...


class Writer(Protocol):
    """What this module needs of `asyncio.StreamWriter`, or of a TLS stream."""

    def write(self, data: bytes, /) -> None:
        """Queue bytes."""
        ...

    async def drain(self) -> None:
        """Wait until the peer takes them."""
        ...


def frame(body: bytes) -> bytes:
    """`body` behind its length."""
    return len(body).to_bytes(HEADER, "big") + body


def taken(received: bytearray, *, cap: int) -> bytes | None:
    """The body of the first frame in `received`, taken out of it; None while it is not whole. Raises `frame.too_large`."""
    if len(received) < HEADER:
        return None
    end = HEADER + _size(received[:HEADER], cap)
    if len(received) < end:
        return None
    body = bytes(received[HEADER:end])
    del received[:end]
    return body


async def read_frame(reader: Reader, *, cap: int = DEFAULT_CAP, deadline_s: float) -> bytes:
    """One frame's body. Raises Malformed("frame.too_large" | "frame.truncated") or Unavailable("peer.timeout")."""
    try:
        async with asyncio.timeout(deadline_s):
            return await reader.readexactly(_size(await reader.readexactly(HEADER), cap))
    except asyncio.IncompleteReadError:
        raise truncated() from None
    except TimeoutError:
        raise silent(deadline_s) from None
    except ConnectionError as error:
        raise broken(error) from None


async def write_frame(writer: Writer, body: bytes, *, deadline_s: float) -> None:
    """Send one frame and wait until it left. Raises Unavailable("peer.timeout" | "peer.gone")."""
    try:
        async with asyncio.timeout(deadline_s):
            writer.write(frame(body))
            await writer.drain()
    except TimeoutError:
        raise blocked(deadline_s) from None
    except ConnectionError as error:
        raise broken(error) from None


def truncated() -> Malformed:
    """A frame that never became whole."""
    return Malformed("frame.truncated", "the peer closed the connection inside or before a frame")


def silent(deadline_s: float) -> Unavailable:
    """A peer that owes a frame."""
    return Unavailable("peer.timeout", "the peer sent nothing in time", expected=f"within {deadline_s} s")


def blocked(deadline_s: float) -> Unavailable:
    """A peer that does not read."""
    return Unavailable("peer.timeout", "the peer takes nothing", expected=f"within {deadline_s} s")


def broken(error: ConnectionError) -> Unavailable:
    """A connection that failed."""
    return Unavailable("peer.gone", "the connection broke", got=type(error).__name__)


def _size(header: bytes | bytearray, cap: int) -> int:
    size = int.from_bytes(header, "big")
    if size > cap:
        raise Malformed(
            "frame.too_large",
            "the peer announced a frame larger than allowed here",
            expected=f"<= {cap} bytes",
            got=size,
            remedy="send less in one message",
        )
    return size
