"""How a service that need not listen on the network says how it is: /healthz and /metrics on a unix socket (0600)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from moorline.services import http


@dataclass(slots=True, kw_only=True)
class Condition:
    """What the service last knew about itself. `standing` is ready; else `why` says why not. `changed` is a Unix time."""

    standing: bool = False
    why: str = "nothing is known yet"
    changed: float = 0.0

    def set(self, *, standing: bool, why: str = "") -> None:
        """Take what was heard now."""
        self.standing, self.why, self.changed = standing, why, time.time()

    def why_not(self) -> str | None:
        """For /healthz."""
        return None if self.standing else self.why


@contextlib.asynccontextmanager
async def told(
    socket: Path | None, title: str, condition: Condition, measure: Callable[[FastAPI, Condition], None]
) -> AsyncIterator[None]:
    """Serve the condition while the block runs; nothing if there is no socket to serve it on."""
    if socket is None:
        yield
        return
    app = http.application(title, ready=condition.why_not)
    measure(app, condition)
    bound = asyncio.Event()
    serving = asyncio.ensure_future(
        http.serve(app, listen=f"unix:{socket}", identity=None, client_roots_pem=None, ready=lambda _: bound.set())
    )
    binding = asyncio.ensure_future(bound.wait())
    try:
        await asyncio.wait({serving, binding}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        yield
    finally:
        for task in (serving, binding):
            task.cancel()
        await asyncio.gather(serving, binding, return_exceptions=True)
