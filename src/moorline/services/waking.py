"""An event that threads may set: who waits for it in the event loop is woken at once, and not when the loop next looks."""

from __future__ import annotations

import asyncio
import threading
from typing import Literal


class Wake(asyncio.Event):
    """As `asyncio.Event`, waited for in one event loop, and set from there or from a worker thread."""

    def __init__(self) -> None:
        super().__init__()
        self._waits: tuple[asyncio.AbstractEventLoop, int] | None = None

    async def wait(self) -> Literal[True]:
        """Return when it is set."""
        self._waits = asyncio.get_running_loop(), threading.get_ident()
        return await super().wait()

    def set(self) -> None:
        """Wake who waits. Nobody has to be there."""
        if self._waits is None or self._waits[1] == threading.get_ident():
            super().set()
        else:
            self._waits[0].call_soon_threadsafe(super().set)
