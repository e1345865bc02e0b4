"""HTTP as all services speak it: TLS 1.3, client certificates in sight, bodies capped, every error a typed problem.

Routes deny by default: a route that says nothing about its caller is public on purpose and is listed in
docs/reference/endpoints.md, where a test compares. What is special about a connection is in services.http_connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import uvicorn
from cryptography import x509
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from uvicorn.server import ServerState

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.nfv import Role, SpiffeId
from moorline.services.http_connection import (
    PEER,
    REQUEST_DEADLINE_S,
    Connection,
    Connections,
    Receive,
    Scope,
    Send,
    problem,
)
from moorline.services.http_short import ShortWay
from moorline.wire import certificates
from moorline.wire.http import PROBLEM_TYPE, server_context

BODY_CAP: Final = 1 << 20
STOPPING_S: Final = 1.0
"""How long a server that stops waits for what is under way."""
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Guard = Callable[[Request], Awaitable[None]]
"""Raises what speaks against whoever asks; services.callers.Callers is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsIdentity:
    """What a server shows: certificate chain (leaf first) and key, PEM, in memory."""

    chain_pem: bytes
    key_pem: bytes


DEFAULT_CONNECTIONS: Final = Connections()


class _Limits:
    """Refuses bodies over the cap, announced or counted, and requests that take too long; counts what was answered."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        body_cap: int,
        deadline_s: float,
        streams: Mapping[str, float],
        answered: Counter,
    ) -> None:
        self._app, self._cap, self._deadline_s, self._streams = app, body_cap, deadline_s, streams
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._cap)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            exchange.take(int(announced) if announced.isdigit() else 0, announced_only=True)
            async with asyncio.timeout(self._streams.get(scope["path"], self._deadline_s)):
                await self._app(scope, exchange.receive, exchange.send)
        except TimeoutError:
            exchange.refusal = Unavailable(
                "http.deadline",
                "the request took too long",
                expected=f"<= {self._deadline_s} s",
                remedy="ask again; if it stays so, see whether ledger, database and token behind it answer",
            )
        except Malformed as error:
            exchange.refusal = exchange.refusal or error
        except asyncio.CancelledError:
            # The service ends. Whoever asked is told so in our words, and asks again or asks another.
            if exchange.status is None:
                await _problem_response(
                    Unavailable("http.stopping", "the service is stopping", remedy="ask again, or another")
                )(scope, receive, send)
            raise
        if exchange.refusal is not None and exchange.status is None:
            exchange.status = exchange.refusal.http_status
            await _problem_response(exchange.refusal)(scope, receive, send)
        self._answered.labels(scope["method"], f"{(exchange.status or 500) // 100}xx").inc()


class _Exchange:
    """One request under its body cap. Once refused, whatever the application answers is replaced by the refusal."""

    def __init__(self, receive: Receive, send: Send, cap: int) -> None:
        self._receive, self._send, self._cap, self._seen = receive, send, cap, 0
        self.refusal: MoorlineError | None = None
        self.status: int | None = None

    def take(self, size: int, *, announced_only: bool = False) -> None:
        total = size + (0 if announced_only else self._seen)
        self._seen = self._seen if announced_only else total
        if total > self._cap:
            self.refusal = Malformed(
                "http.body_too_large",
                "the request body is too large",
                expected=f"<= {self._cap} bytes",
                got=total,
                remedy="send less",
            )
            raise self.refusal

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self.take(len(message.get("body", b"")))
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.refusal is not None and self.status is None:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def application(
    title: str,
    *,
    body_cap: int = BODY_CAP,
    deadline_s: float = REQUEST_DEADLINE_S,
    streams: Mapping[str, float] = MappingProxyType({}),
    ready: Callable[[], str | None] = lambda: None,
    short: ShortWay | None = None,
    guard: Guard | None = None,
) -> FastAPI:
    """An application with problem+json errors, limits, `/healthz` and `/metrics`.

    `ready` returns None when the service can do its work, else why not; /healthz then answers 503 with that reason.
    `streams` are paths whose answer goes on, with seconds that each may take in place of `deadline_s`. `short` answers some
    of the routes when they are asked in the plainest way (services.http_short). `guard` judges whoever asks any route,
    before the route does (services.callers); without it a client certificate is worth what its chain is.
    """
    judged = [] if guard is None else [Depends(guard)]
    app = FastAPI(title=title, openapi_url=None, docs_url=None, redoc_url=None, dependencies=judged)
    registry = CollectorRegistry()
    app.state.metrics = registry
    Gauge("moorline_ready", "1 while the service can do its work", registry=registry).set_function(
        lambda: float(ready() is None)
    )
    requests = Counter(
        "moorline_http_requests", "Requests answered, by method and status class", ["method", "status"], registry=registry
    )

    async def on_error(_: Request, error: Exception) -> Response:
        return _problem_response(_as_moorline(error))

    for kind in (MoorlineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, on_error)

    @app.get("/healthz")
    async def healthz() -> Response:
        reason = ready()
        body = json.dumps({"live": True, "ready": reason is None, "why_not": reason})
        return Response(body, status_code=200 if reason is None else 503, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.state.short, app.state.answered = short, requests
    app.add_middleware(_Limits, body_cap=body_cap, deadline_s=deadline_s, streams=streams, answered=requests)
    return app


def peer_der(request: Request) -> bytes | None:
    """The client certificate (DER) that TLS verified against the listener's roots, or None."""
    der = request.scope.get(PEER)
    return der if isinstance(der, bytes) else None


def peer_certificate(request: Request) -> x509.Certificate:
    """The same, parsed. Raises NotAuthentic("http.no_client_certificate"). Which roots it chains to is the listener's."""
    der = peer_der(request)
    if der is None:
        raise NotAuthentic("http.no_client_certificate", "this route needs a client certificate")
    return certificates.parse_certificate(der)


def peer(request: Request) -> SpiffeId | None:
    """The SPIFFE ID of the client certificate that TLS verified, or None if the client showed none."""
    der = request.scope.get(PEER)
    return None if der is None else certificates.spiffe_id_of(certificates.parse_certificate(der))


def require(request: Request, *roles: Role, trust_domain: str) -> SpiffeId:
    """The caller, if it is of `trust_domain` and has one of `roles`. Raises NotAuthentic or Refused (`http.*`)."""
    caller = peer(request)
    if caller is None:
        raise NotAuthentic(
            "http.no_client_certificate",
            "this route needs a client certificate",
            expected=f"a certificate of {trust_domain}",
            remedy="connect with the identity issued to you",
        )
    if caller.trust_domain != trust_domain or caller.role not in roles:
        raise Refused(
            "http.not_authorised",
            "this caller may not use this route",
            expected=f"{'/'.join(roles)} of {trust_domain}",
            got=str(caller),
        )
    return caller


async def serve(
    app: FastAPI,
    *,
    listen: str,
    identity: TlsIdentity | None,
    client_roots_pem: bytes | None,
    ready: Callable[[str], None],
    on_context: Callable[[ssl.SSLContext], None] = lambda _: None,
    without_tls: bool = False,
    connections: Connections = DEFAULT_CONNECTIONS,
) -> None:
    """Serve until cancelled. `listen` is "host:port" (port 0: the kernel chooses) or "unix:/path" (mode 0600).

    `ready` is called once with the address really bound. With `client_roots_pem` a client may show a certificate, which must
    then chain to these roots; routes decide by `require` who must. `on_context` is handed the TLS context in use: whoever
    loads the next identity into it (wire.http.load_identity) renews it for new connections and disturbs none that is open.
    `without_tls` is for what proves itself and is secret to nobody: CRLs, OCSP, CA certificates, CMP messages.
    """
    config = uvicorn.Config(
        app,
        http=_protocol(app, connections),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=connections.idle_s,
        h11_max_incomplete_event_size=32 * 1024,
        limit_concurrency=2 * connections.room,
    )
    config.load()
    if identity is not None:
        config.ssl = server_context(identity.chain_pem, identity.key_pem)
        if client_roots_pem is not None:
            config.ssl.load_verify_locations(cadata=client_roots_pem.decode("ascii"))
            config.ssl.verify_mode = ssl.CERT_OPTIONAL
            config.ssl.verify_flags &= ~ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # an intermediate is no anchor
        on_context(config.ssl)
    elif not listen.startswith("unix:") and not without_tls:
        raise Refused("http.no_tls", "this service does not speak HTTP without TLS over TCP", remedy="give it an identity")
    sock, address = _bind(listen)
    server = _Server(config)
    ready(address)
    try:
        await server.serve(sockets=[sock])
    finally:
        # uvicorn closes these only when it ends by itself; left open, the loop would poll a dead descriptor and the next
        # server of this process, whose socket gets the same number, would never accept.
        for listener in getattr(server, "servers", ()):
            listener.close()
        sock.close()
        await _let_go(server.server_state, getattr(app.state, "last_words", []))


def before_it_stops(app: FastAPI, say: Callable[[], None]) -> None:
    """Have `say` called when a server of this application stops, so that those who wait for news are answered with none."""
    app.state.last_words = [*getattr(app.state, "last_words", []), say]


async def _let_go(state: ServerState, last_words: Iterable[Callable[[], None]]) -> None:
    """End all connections: once what is under way is answered; whoever is not in STOPPING_S is told to ask another."""
    for connection in list(state.connections):
        connection.shutdown()
    for say in last_words:
        say()
    shortly = {one.answering for one in state.connections if isinstance(one, Connection) and one.answering is not None}
    under_way = {*state.tasks, *shortly}
    if under_way:
        await asyncio.wait(under_way, timeout=STOPPING_S)
    for task in under_way:
        task.cancel()  # `_Limits` tells whoever asked
    await asyncio.gather(*under_way, return_exceptions=True)


def _protocol(app: FastAPI, connections: Connections) -> type[Connection]:
    chosen = {"room": connections.room, "idle_s": connections.idle_s, "short": getattr(app.state, "short", None)}
    return type("_Protocol", (Connection,), {**chosen, "answered": getattr(app.state, "answered", None)})


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the process decides when to stop (services.process)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:  # noqa: ANN401 - the base declares a generator of None
        yield


def _bind(listen: str) -> tuple[Any, str]:
    import os
    import socket

    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - a left-over socket of a killed process
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        sock.listen(128)
        return sock, listen
    host, _, port = listen.rpartition(":")
    # asyncio switches Nagle's algorithm off where the socket says it is TCP; else the body of an answer waits 40 ms for
    # the acknowledgement of its head.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, int(port)))
    sock.listen(4096)
    bound_host, bound_port = sock.getsockname()[:2]
    return sock, f"{bound_host}:{bound_port}"


def _as_moorline(error: Exception) -> MoorlineError:
    if isinstance(error, MoorlineError):
        return error
    if isinstance(error.__cause__, MoorlineError):
        return error.__cause__  # FastAPI wraps what reading the body raised, such as the body cap
    if isinstance(error, HTTPException):
        kind = Refused if error.status_code in (403, 404, 405) else Malformed
        code = {404: "http.no_such_route", 405: "http.method_not_allowed"}.get(error.status_code, "http.request")
        return kind(code, str(error.detail))
    return Malformed("http.request_malformed", "the request is not what this route takes", got=str(error)[:200])


def _problem_response(error: MoorlineError) -> Response:
    headers = {"retry-after": str(max(1, round(error.retry_after_s)))} if isinstance(error, Unavailable) else {}
    return Response(problem(error), status_code=error.http_status, media_type=PROBLEM_TYPE, headers=headers)
