"""One connection of an HTTP service: uvicorn's protocol, with the peer's certificate, patience, room, and a short way.

uvicorn does not hand the client certificate to the application (FINDINGS.md, TLS), so its HTTP protocol class is extended
here by what it lacks. The certificate's part is due for removal when uvicorn fills the ASGI `tls` extension itself.
"""

from __future__ import annotations

import asyncio
import json
from asyncio import sslproto
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import h11
import structlog
from prometheus_client import Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from moorline.errors import Malformed, MoorlineError, Unavailable
from moorline.services.http_short import Answering, ShortWay, parse_whole
from moorline.wire.http import PROBLEM_TYPE

IDLE_S: Final = 15
HEADERS_S: Final = 10.0
REQUEST_DEADLINE_S: Final = 30.0
ROOM: Final = 256
PEER: Final = "moorline.peer"
_LAST_WORD_S: Final = 1.0
_READ_AT_ONCE: Final = 16 * 1024
"""Plaintext of one TLS record. asyncio (3.11 to 3.14) holds so much for each connection, or 256 KiB."""
_LOG: Final = structlog.stdlib.get_logger("http")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

sslproto.SSLProtocol.max_size = _READ_AT_ONCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Connections:
    """How many connections may be open, and how many seconds one may ask nothing."""

    room: int = ROOM
    idle_s: int = IDLE_S


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol that remembers the DER of the client certificate TLS verified, and waits for nobody long.

    Whoever connects and does not ask in time is told so and hung up on. When `room` connections are open, the one that has
    asked nothing for longest makes room for the next, so that silent peers, however many, shut nobody out. A request that
    `short` answers is answered without the application.
    """

    room: int = ROOM
    idle_s: float = IDLE_S
    short: ShortWay | None = None
    answered: Counter | None = None
    _waiting_since: float = 0.0
    _until: float | None = None
    _patience: asyncio.TimerHandle | None = None
    answering: asyncio.Future[bytes] | None = None
    _behind: bytes = b""
    _stopping: bool = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember whom TLS verified, and begin to wait."""
        super().connection_made(transport)
        self._wait(HEADERS_S)
        self._make_room()
        tls = transport.get_extra_info("ssl_object")
        peer_der = tls.getpeercert(binary_form=True) if tls is not None else None
        inner = self.app

        async def with_peer(scope: Scope, receive: Receive, send: Send) -> None:
            scope[PEER] = peer_der
            try:
                await inner(scope, receive, send)
            except asyncio.CancelledError:  # the service stops, has said so, and is told nothing by a traceback
                self.transport.close()

        self.app = with_peer

    def connection_lost(self, exc: Exception | None) -> None:
        """End what was under way for a peer that is gone."""
        self._wait(None)
        if self._patience is not None:
            self._patience.cancel()
        if self.answering is not None:
            self.answering.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Answer shortly where that is possible, else leave it to h11."""
        if self.answering is not None:
            self._behind += data  # of a peer that does not wait for its answer: no more is read until it has it
            self.flow.pause_reading()
            return
        if self.short is not None and self._is_idle():
            whole = parse_whole(data)
            answering = None if whole is None else self.short.find(whole[0])
            if whole is not None and answering is not None:
                self._answer_shortly(answering, whole[1])
                return
        super().data_received(data)
        if not self._waits():
            self._wait(None)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait(self.idle_s + HEADERS_S)
        super().on_response_complete()
        if not self._waits():  # the next request was there already
            self._wait(None)

    def send_400_response(self, msg: str) -> None:
        """Say in the words of this system that this is no HTTP."""
        self._last_word(Malformed("http.request_malformed", msg))

    def shutdown(self) -> None:
        """Close, after the answer that is being made."""
        if self.answering is not None:
            self._stopping = True  # after the answer
        else:
            super().shutdown()

    # The short way ---------------------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        """Nothing of a request is with h11, and the peer reads what it is sent."""
        return (
            self._waits()
            and self.conn.their_state is h11.IDLE
            and not self.conn.trailing_data[0]
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def _answer_shortly(self, answering: Answering, body: bytes) -> None:
        self._unset_keepalive_if_required()
        self._wait(REQUEST_DEADLINE_S)
        task = asyncio.ensure_future(answering(body))
        self.answering = task
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Future[bytes]) -> None:
        self.answering = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, MoorlineError):  # a defect, which uvicorn would end in the same way
            _LOG.error("a request could not be answered", exc_info=error)
        if not self.transport.is_closing():
            self._write(error, b"" if error is not None else task.result())

    def _write(self, error: BaseException | None, body: bytes) -> None:
        assert self.short is not None
        status, media_type = 200, self.short.media_type
        if isinstance(error, MoorlineError):
            status, body, media_type = error.http_status, problem(error), PROBLEM_TYPE
        elif error is not None:
            status, media_type = 500, "text/plain"
        fields = b"".join(name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers)
        if isinstance(error, Unavailable):
            fields += b"retry-after: %d\r\n" % max(1, round(error.retry_after_s))
        line = f"HTTP/1.1 {status} \r\ncontent-length: {len(body)}\r\ncontent-type: {media_type}\r\n"
        self.transport.write(line.encode("ascii") + fields + b"\r\n" + body)
        self._count(status)
        if self._stopping or status == 500:
            self.transport.close()
        else:
            self._go_on()

    def _count(self, status: int) -> None:
        self.server_state.total_requests += 1
        if self.answered is not None:
            self.answered.labels("POST", f"{status // 100}xx").inc()

    def _go_on(self) -> None:
        """Wait for the next request, or read it: of a peer that did not wait it is there."""
        self._wait(self.idle_s + HEADERS_S)
        behind, self._behind = self._behind, b""
        self.flow.resume_reading()
        if behind:
            self.data_received(behind)

    # Patience --------------------------------------------------------------------------------------------------------

    def _waits(self) -> bool:
        return self.answering is None and (self.cycle is None or self.cycle.response_complete)

    def _wait(self, seconds: float | None) -> None:
        """Be patient for so long from now, or for ever. One timer serves: it looks again when it was put off."""
        self._waiting_since = self.loop.time()
        self._until = None if seconds is None else self._waiting_since + seconds
        if self._until is not None and (self._patience is None or self._patience.when() > self._until):
            self._look_at(self._until)

    def _look_at(self, when: float) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_at(when, self._look)

    def _look(self) -> None:
        self._patience = None
        if self._until is None:
            return
        if self.loop.time() < self._until:
            self._look_at(self._until)
        elif self.answering is not None:
            self.answering.cancel()
            self._last_word(Unavailable("http.deadline", "the request took too long", expected=f"<= {REQUEST_DEADLINE_S} s"))
        else:
            self._last_word(Unavailable("http.deadline", "the request did not come in time"), status=408)

    def _last_word(self, error: MoorlineError, *, status: int | None = None) -> None:
        body = problem(error)
        head = f"HTTP/1.1 {status or error.http_status} \r\ncontent-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\n"
        if not self.transport.is_closing():
            self.transport.write(head.encode("ascii") + b"connection: close\r\n\r\n" + body)
            self.transport.close()
            self.loop.call_later(_LAST_WORD_S, self._abort)  # also if the peer reads nothing

    def _abort(self) -> None:
        if self in self.connections:  # a transport that is gone cannot be aborted
            self.transport.abort()

    def _make_room(self) -> None:
        if len(self.connections) >= self.room:
            waiting = [one for one in self.connections if isinstance(one, Connection) and one._waits()]  # noqa: SLF001
            if waiting:
                min(waiting, key=lambda one: one._waiting_since).transport.abort()  # noqa: SLF001 - of the same class


def problem(error: MoorlineError) -> bytes:
    """The body of a refusal (RFC 9457)."""
    return json.dumps(
        {"type": "about:blank", "status": error.http_status, "title": error.says, **error.as_problem()}
    ).encode()
