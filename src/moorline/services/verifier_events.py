"""Changes of verdict over HTTP: pages to ask for, and a stream of server-sent events that goes on by itself.

Both give events after a cursor. A reader that keeps the cursor of the last event it has acted on resumes without loss or
duplicates, also over a restart of either side; a browser or any SSE client does so with `Last-Event-ID`. A stream ends by
itself after STREAM_S, because a certificate may have ended meanwhile; the reader comes back. So it does, and with nothing
lost, when the process stops: readers are let go before it does. Whether its reader still stands, an open stream asks again
every KEEP_ALIVE_S: it ends where the door would not open any more, and the reader is told why when it comes back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from moorline.errors import Malformed, MoorlineError, Unavailable
from moorline.nfv import Role
from moorline.services import http
from moorline.services.attestation_authority import AttestationAuthority
from moorline.storage.verifier_events import VerdictEvent

STREAM_S: Final = 600.0
STREAM_PATH: Final = "/v1/events/stream"
KEEP_ALIVE_S: Final = 10.0
MAX_STREAMS: Final = 64
STREAM_TYPE: Final = "text/event-stream"
_READERS: Final = (Role.ORCHESTRATOR, Role.HSM, Role.OPERATOR)
_WAIT_MAX_S: Final = 20
_RETRY_MS: Final = 2000


def add_routes(
    app: FastAPI, authority: AttestationAuthority, *, trust_domain: str, guard: http.Guard, stream_s: float = STREAM_S
) -> None:
    """The routes under /v1/events, for those of the verifier's own trust domain who act on verdicts.

    `guard` is the application's, which judged a reader before its stream began.
    """
    room = asyncio.Semaphore(MAX_STREAMS)
    http.before_it_stops(app, authority.release_readers)

    @app.get("/v1/events")
    async def events(request: Request, after: int = 0, wait_s: float = 0) -> dict[str, object]:
        """Events after a cursor, as soon as there is one, or none after `wait_s`."""
        http.require(request, *_READERS, trust_domain=trust_domain)
        if not 0 <= wait_s <= _WAIT_MAX_S:
            raise _not_asked_right(f"wait_s {wait_s}")
        found, newest = await authority.events(after=_cursor(str(after)), wait_s=wait_s)
        return {
            "events": [dataclasses.asdict(one) for one in found],
            "next": found[-1].cursor if found else after,
            "newest": newest,
        }

    @app.get(STREAM_PATH)
    async def stream(request: Request, after: int = 0) -> StreamingResponse:
        """Server-sent events after `Last-Event-ID`, or after `after` where the reader has none yet."""
        http.require(request, *_READERS, trust_domain=trust_domain)
        last = _cursor(request.headers.get("last-event-id", str(after)))
        await authority.events(after=last, wait_s=0)  # a cursor of the future is refused before the stream begins
        if room.locked():
            raise Unavailable(
                "events.streams_busy",
                "too many readers stream events",
                expected=f"<= {MAX_STREAMS}",
                remedy="come back, or ask for pages (GET /v1/events)",
            )
        lines = _lines(authority, last, room, stream_s, functools.partial(guard, request))
        return StreamingResponse(lines, media_type=STREAM_TYPE, headers={"cache-control": "no-store"})


def rendered(event: VerdictEvent) -> str:
    """One event as a reader of a stream gets it (WHATWG HTML 9.2)."""
    said = json.dumps(dataclasses.asdict(event), separators=(",", ":"))
    return f"id: {event.cursor}\nevent: {event.kind}\ndata: {said}\n\n"


async def _lines(
    authority: AttestationAuthority,
    after: int,
    room: asyncio.Semaphore,
    stream_s: float,
    require_standing: Callable[[], Awaitable[None]],
) -> AsyncIterator[str]:
    now, released = asyncio.get_running_loop().time, authority.released
    ends, ask_at = now() + stream_s, now() + KEEP_ALIVE_S
    async with room:
        yield f"retry: {_RETRY_MS}\n\n"
        while now() < ends and not released.is_set():
            found, _ = await authority.events(after=after, wait_s=max(0.0, min(ends, ask_at) - now()))
            if now() >= ask_at:
                try:
                    await require_standing()
                except MoorlineError:  # revoked, or nobody can say: the reader comes back, and hears which
                    return
                ask_at = now() + KEEP_ALIVE_S
            for event in found:
                after = event.cursor
                yield rendered(event)
            if not found:
                yield ": nothing new\n\n"  # also finds out that the reader has gone


def _cursor(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and int(text) < 1 << 63):
        raise _not_asked_right(f"cursor {text[:32]}")
    return int(text)


def _not_asked_right(got: str) -> Malformed:
    return Malformed(
        "events.request",
        "a cursor is a number this verifier gave, and wait_s a short time",
        expected=f"wait_s 0..{_WAIT_MAX_S}",
        got=got,
    )
