"""How a host asks its (simulated) secure processor to launch guests: the client of `wire.silicon`, over a unix socket.

One connection a request, so that a request that hangs or fails leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, TypeVar

from moorline.errors import Unavailable
from moorline.wire import frames, schema
from moorline.wire.silicon import GuestRequest, GuestStatus, LaunchGuest, Platform, PlatformRequest, decode_answer

T = TypeVar("T")

_DEADLINE_S: Final = 60.0


class SiliconClient:
    """Requests to the silicon at `address`: a path, or `unix:<path>` as the ready line says it.

    Every method raises the error the silicon answers with, and Unavailable("peer.unreachable") if it is not there.
    """

    def __init__(self, address: str | Path) -> None:
        self._path = Path(str(address).removeprefix("unix:"))

    async def launch(self, request: LaunchGuest) -> GuestStatus:
        """The started guest; its measurement is the silicon's own."""
        return await self._ask(request, GuestStatus)

    async def status(self, name: str) -> GuestStatus:
        """The guest as it is now; raises Refused("silicon.no_guest")."""
        return await self._ask(GuestRequest(op="status", name=name), GuestStatus)

    async def stop(self, name: str) -> GuestStatus:
        """The guest after SIGTERM, and SIGKILL three seconds later if it is still there."""
        return await self._ask(GuestRequest(op="stop", name=name), GuestStatus)

    async def kill(self, name: str) -> GuestStatus:
        """The guest after SIGKILL."""
        return await self._ask(GuestRequest(op="kill", name=name), GuestStatus)

    async def platform(self, entry: str) -> Platform:
        """Public facts of the chip, and the measurement that `entry` would have."""
        return await self._ask(PlatformRequest(op="platform", entry=entry), Platform)

    async def _ask(self, request: object, kind: type[T]) -> T:
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError as error:
            raise Unavailable(
                "peer.unreachable", "the silicon of this host is not there", got=f"{self._path}: {error.strerror}"
            ) from None
        try:
            await frames.write_frame(writer, schema.encode(request), deadline_s=_DEADLINE_S)
            return decode_answer(kind, await frames.read_frame(reader, deadline_s=_DEADLINE_S))
        finally:
            writer.close()
