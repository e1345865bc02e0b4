"""The session port: which role gets which session, and what all active sessions may ask."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Final

import structlog

from moorline.channel.session import Claim, SessionFacts
from moorline.channel.session_port import SessionServer, serve_sessions
from moorline.errors import Conflict, MoorlineError, Refused
from moorline.ledger import standing
from moorline.services.broker import Broker
from moorline.services.broker_functions import FunctionSession, ResumedSession
from moorline.services.broker_host_sessions import HostSession
from moorline.services.broker_launchers import LauncherSession
from moorline.services.broker_peers import PeerSession
from moorline.services.broker_role import SessionOfRole, session_name
from moorline.wire import cbor, cose, schema
from moorline.wire.session import Activation, ProveCall, SessionRole

_KEYS_CAP: Final = 64
_LOG: Final = structlog.stdlib.get_logger("broker")

_ROLES: Final[dict[SessionRole, Callable[[Broker, Claim], SessionOfRole]]] = {
    SessionRole.LAUNCHER: LauncherSession,
    SessionRole.FUNCTION: FunctionSession,
    SessionRole.RESUME: ResumedSession,
    SessionRole.HOST: HostSession,
    SessionRole.PEER_HSM: PeerSession,
}


class Sessions:
    """The sessions that are open, by their claim; an ended one is forgotten."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._open: dict[bytes, SessionOfRole] = {}

    async def appraise(self, claim: Claim) -> bytes:
        """The secrets of message 4. Raises Refused("session.role") for a role this broker does not serve."""
        with self._working():
            return await self._appraise(claim)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        self._broker.open.working += 1
        try:
            yield
        finally:
            self._broker.open.working -= 1

    async def _appraise(self, claim: Claim) -> bytes:
        make = _ROLES.get(claim.role)
        if make is None:
            raise Refused("session.role", "this broker serves no such role", expected="/".join(_ROLES), got=claim.role)
        session = make(self._broker, claim)
        try:
            secrets = await session.appraise()
        except MoorlineError as refusal:
            # In the process's log, not in the secure log: strangers must not be able to fill that.
            _LOG.info("session refused", session=session_name(claim), **refusal.as_problem())
            raise
        self._open[claim.nonce] = session
        return secrets

    async def activate(self, claim: Claim) -> Activation:
        """Message 6."""
        session = self._of(claim)
        session.claim = claim  # what was only there to be appraised is not in it any more
        with self._working():
            return await session.activate()

    async def call(self, claim: Claim, operation: str, body: bytes) -> bytes:
        """`time` and `ledger.prove` for everybody, the rest by role."""
        session = self._of(claim)
        if operation == "time":
            return cbor.encode({"now": self._broker.clock.now()})
        if operation == "ledger.prove":
            keys = schema.decode(ProveCall, body).keys
            if not 0 < len(keys) <= _KEYS_CAP:
                raise Refused("broker.too_many_keys", "a proof is about 1 to 64 keys", got=len(keys))
            return await self._broker.ledger.bundle(keys)
        with self._working():
            return await session.call(operation, body)

    async def ended(self, claim: Claim) -> None:
        """The connection is gone."""
        self._broker.open.ended(claim.nonce)
        self._open.pop(claim.nonce, None)

    def _of(self, claim: Claim) -> SessionOfRole:
        session = self._open.get(claim.nonce)
        if session is None:
            raise Conflict("session.not_open", "there is no such session")
        return session


async def serve(broker: Broker) -> SessionServer:
    """The session port, listening."""
    sessions = Sessions(broker)
    settings = broker.settings

    async def bundle() -> bytes:
        return await broker.ledger.own_bundle(standing.hsm_keys(settings.provider, settings.hsm))

    async def sign(purpose: str, payload: bytes) -> bytes:
        return await asyncio.to_thread(cose.sign, purpose, payload, broker.identity.signer)

    server = await serve_sessions(
        settings.listen_sessions,
        identity=broker.tls.for_sessions,
        facts=SessionFacts(ledger_id=broker.trust.ledger_id, provider=settings.provider, hsm=settings.hsm),
        bundle=bundle,
        appraise=sessions.appraise,
        activate=sessions.activate,
        call=sessions.call,
        sign=sign,
        ended=sessions.ended,
        clock=broker.clock,
        max_sessions=settings.max_sessions,
    )
    broker.open.bind(server.end)
    return server
