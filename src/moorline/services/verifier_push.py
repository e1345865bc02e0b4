"""Changes of verdict pushed to receivers: Security Event Tokens by HTTP POST (RFC 8935), in order, until they are taken.

A receiver is configured by operators (verifier.toml, `[[receivers]]`). For each one:

1. its cursor is read from the database; a receiver that is new begins at the newest event; of several processes over one
   database, the one that watches the receiver (services.verifier_watch) tells it;
2. the next event is signed by the verifier key, for this receiver's audience, and posted over TLS 1.3 to a server whose
   certificate chains to the receiver's own roots;
3. only 202 Accepted moves the cursor, durably, before the next event is posted. Anything else, a redirect too, is a failure:
   it is recorded, and the same event is posted again after a pause that doubles up to RETRY_MAX_S, with jitter; a
   Retry-After of the receiver is kept to, up to the same bound.

Nothing is skipped: an event that its receiver will not take holds up those behind it, and the metric and
`GET /v1/receivers` say so. A crash between 202 and the cursor repeats one event, under the same `jti`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog
from cryptography import x509
from fastapi import FastAPI, Request

from moorline.clock import Clock
from moorline.errors import Misconfigured, MoorlineError, Unavailable
from moorline.nfv import Role, parse_name
from moorline.services import http, metrics
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.verifier_parts import Sign
from moorline.storage.verifier_deliveries import Deliveries
from moorline.storage.verifier_events import VerdictEvent
from moorline.wire import security_event
from moorline.wire.http import HttpClient
from moorline.wire.http_get import Answer
from moorline.wire.security_event import SecurityEvent

RETRY_MIN_S: Final = 1.0
RETRY_MAX_S: Final = 300.0
_WAIT_S: Final = 20.0
_NOT_MINE_S: Final = 1.0
_ACCEPTED: Final = 202
_LOG: Final = structlog.stdlib.get_logger("verifier")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverSettings:
    """Somebody who is told of every verdict gained and lost."""

    name: str
    """Its name here: under it the verifier remembers how far it has been told."""
    url: str
    """Where it takes Security Event Tokens: https://HOST[:PORT]/PATH."""
    audience: str
    """What the tokens are addressed to; the receiver refuses any other."""
    roots: Path
    """The root certificates its server's certificate must chain to, PEM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """A receiver as it is posted to."""

    name: str
    base_url: str
    path: str
    server_name: str
    audience: str
    roots_pem: bytes


def receivers(configured: tuple[ReceiverSettings, ...]) -> tuple[Receiver, ...]:
    """The receivers of the settings. Raises Misconfigured (`push.receiver_*`)."""
    found = tuple(_receiver(one) for one in configured)
    names = [one.name for one in found]
    if len(set(names)) != len(names):
        raise Misconfigured("push.receiver_twice", "two receivers have one name", got=sorted(names))
    return found


def _receiver(one: ReceiverSettings) -> Receiver:
    parts = urlsplit(one.url)
    if parts.scheme != "https" or not parts.hostname or parts.username is not None or parts.query or parts.fragment:
        raise Misconfigured(
            "push.receiver_url", "events are pushed over HTTPS", expected="https://HOST[:PORT]/PATH", got=one.url
        )
    try:
        roots_pem = one.roots.read_bytes()
        x509.load_pem_x509_certificates(roots_pem)
    except (OSError, ValueError) as error:
        raise Misconfigured(
            "push.receiver_roots",
            "a receiver's root certificates cannot be read",
            expected="certificates, PEM",
            got=f"{one.roots}: {type(error).__name__}",
        ) from None
    return Receiver(
        name=parse_name(one.name, "receiver"),
        base_url=f"https://{parts.netloc}",
        path=parts.path or "/",
        server_name=parts.hostname,
        audience=one.audience,
        roots_pem=roots_pem,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushing:
    """What pushing needs of its process. `sleep` waits; `jitter` gives a number from 0 to 1."""

    authority: AttestationAuthority
    verifier: str
    deliveries: Deliveries
    sign: Sign
    clock: Clock
    sleep: Callable[[float], Awaitable[None]]
    jitter: Callable[[], float]
    mine: Callable[[str], bool] = lambda _: True
    """Whether this process is the one that tells a receiver now."""


async def keep_telling(pushing: Pushing, receiver: Receiver) -> None:
    """Push to one receiver until cancelled."""
    async with HttpClient(receiver.base_url, server_name=receiver.server_name, roots_pem=receiver.roots_pem) as client:
        away = 0
        while True:
            if not pushing.mine(receiver.name):
                await pushing.sleep(_NOT_MINE_S)
                continue
            try:
                await _tell(pushing, receiver, client)
                away = 0
            except MoorlineError as error:  # the database: nothing can be written down, nothing is lost
                away += 1
                _LOG.warning("event not pushed", receiver=receiver.name, **error.as_problem())
                await pushing.sleep(pause_s(away, error, pushing.jitter()))


async def _tell(pushing: Pushing, receiver: Receiver, client: HttpClient) -> None:
    held = await asyncio.to_thread(pushing.deliveries.begin, receiver.name, at=pushing.clock.now())  # 1
    try:
        events, _ = await pushing.authority.events(after=held.cursor, wait_s=_WAIT_S)
        for event in events:
            if not pushing.mine(receiver.name):
                return
            await _push(pushing, receiver, client, event)  # 2
            at = pushing.clock.now()
            await asyncio.to_thread(pushing.deliveries.accepted, receiver.name, event.cursor, at=at)  # 3
    except MoorlineError as error:
        failures = await asyncio.to_thread(_failed, pushing, receiver, error)
        await pushing.sleep(pause_s(failures, error, pushing.jitter()))


def pause_s(failures: int, error: MoorlineError, jitter: float) -> float:
    """How long to wait after the `failures`th failure in a row; `jitter` is from 0 to 1."""
    doubled = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(failures - 1, 16))
    asked = error.retry_after_s if isinstance(error, Unavailable) else 0.0
    return max(doubled * (0.5 + jitter / 2), min(asked, RETRY_MAX_S))


async def _push(pushing: Pushing, receiver: Receiver, client: HttpClient, event: VerdictEvent) -> None:
    said = SecurityEvent(
        verifier=pushing.verifier,
        host=event.host,
        kind=event.kind,
        cursor=event.cursor,
        at=event.at,
        code=event.code,
        result_expires=event.result_expires,
    )
    message = security_event.signing_input(said, audience=receiver.audience, issued=pushing.clock.now())
    (signature,) = await pushing.sign((message,))
    token = security_event.assemble(message, signature)
    headers = {"content-type": security_event.MEDIA_TYPE, "accept": "application/json"}
    answer = await client.answer("POST", receiver.path, content=token, headers=headers)
    if answer.status != _ACCEPTED:
        raise Unavailable(
            "push.not_accepted",
            "the receiver did not take the event",
            expected="202 Accepted (RFC 8935 2.2)",
            got=f"HTTP {answer.status}",
            remedy="ask whoever runs the receiver; the event is pushed again",
            retry_after_s=_retry_after_s(answer),
        )


def _retry_after_s(answer: Answer) -> float:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0.0


def _failed(pushing: Pushing, receiver: Receiver, error: MoorlineError) -> int:
    now = pushing.clock.now()
    failures = pushing.deliveries.begin(receiver.name, at=now).failures + 1
    pushing.deliveries.failed(receiver.name, failures, error.code, at=now)
    _LOG.warning("event not pushed", receiver=receiver.name, failures=failures, code=error.code, got=error.got)
    return failures


def add_routes(app: FastAPI, deliveries: Deliveries, authority: AttestationAuthority, *, trust_domain: str) -> None:
    """Who is told, how far, and what keeps the others; for operators."""

    def behind() -> metrics.Values:
        newest = authority.newest_event()
        return {(one.receiver,): float(newest - one.cursor) for one in deliveries.all()}

    metrics.measured(
        app,
        "moorline_verifier_receiver_behind",
        "Events that a receiver has not taken yet",
        behind,
        labels=("receiver",),
    )

    @app.get("/v1/receivers")
    async def told(request: Request) -> dict[str, object]:
        """Receivers of pushed events: how far each was told, and why it was not told more."""
        http.require(request, Role.OPERATOR, trust_domain=trust_domain)
        newest = authority.newest_event()
        return {
            "newest": newest,
            "receivers": [
                {
                    "receiver": one.receiver,
                    "cursor": one.cursor,
                    "behind": newest - one.cursor,
                    "failures": one.failures,
                    "code": one.code,
                    "at": one.at,
                }
                for one in deliveries.all()
            ],
        }
