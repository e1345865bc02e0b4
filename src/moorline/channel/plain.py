"""A connection whose first byte was not TLS: for a protocol that brings its own protection (channel.nopfs)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

_CLOSE_DEADLINE_S: Final = 1.0


class PlainStream:
    """A byte stream both ways; a `wire.frames` Reader and Writer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def readexactly(self, n: int, /) -> bytes:
        """Exactly n bytes, or asyncio.IncompleteReadError."""
        return await self._reader.readexactly(n)

    def write(self, data: bytes, /) -> None:
        """Queue bytes."""
        self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the peer takes them."""
        await self._writer.drain()

    async def aclose(self) -> None:
        """Close. Never raises for a peer that is gone."""
        self._writer.close()
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                await self._writer.wait_closed()
