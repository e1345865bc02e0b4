"""The broker's end of attested sessions: a port that serves many at once (PROTOCOLS.md 4).

There is a bound on all sessions and a smaller one on those not yet active, so that peers who stall take nothing from those
who do not. Every step has a deadline, a frame before activation is at most 256 KiB, and an error is told to the peer in a
`Problem` that ends its connection.
"""

from __future__ import annotations

import asyncio
import logging
import secrets as randomness
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, Self, TypeVar

from moorline.channel import tls
from moorline.channel.messages import LAST_WORD, RECORD_CAP, encode_problem
from moorline.channel.session import (
    HANDSHAKE_CAP,
    Activate,
    Appraise,
    Claim,
    Effect,
    MakeChallenge,
    Responder,
    Send,
    SessionFacts,
    Sign,
    State,
)
from moorline.channel.stream import tell
from moorline.clock import Clock, Instant, SystemClock
from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Activation, Call, Reply

T = TypeVar("T")

_LOG: Final = logging.getLogger("moorline.channel.session")
_CALL_DEADLINE_S: Final = 30.0
_IDLE_DEADLINE_S: Final = 24 * 3600.0
_PROBLEM_DEADLINE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Broker:
    """What a broker's process supplies, and its bounds."""

    facts: SessionFacts
    bundle: Callable[[], Awaitable[bytes]]
    appraise: Callable[[Claim], Awaitable[bytes]]
    activate: Callable[[Claim], Awaitable[Activation]]
    call: Callable[[Claim, str, bytes], Awaitable[bytes]]
    sign: Callable[[str, bytes], Awaitable[bytes]] | None
    ended: Callable[[Claim], Awaitable[None]] | None
    clock: Clock
    max_handshakes: int
    step_deadline_s: float
    challenge_life_s: int


class SessionServer:
    """A broker's session port, already listening."""

    def __init__(self, server: tls.TlsServer, reception: _Reception) -> None:
        self._server = server
        self._reception = reception
        self.address = server.address

    def end(self, nonce: bytes, reason: MoorlineError) -> bool:
        """End the session whose claim has this nonce; its peer is told why. False if there is none (any more)."""
        return self._reception.end(nonce, reason)

    async def serve_forever(self) -> None:
        """Until cancelled."""
        await self._server.serve_forever()

    async def aclose(self) -> None:
        """Stop listening and end every session."""
        await self._server.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


async def serve_sessions(  # noqa: PLR0913 - one port, and everything that a broker decides about it
    listen: str,
    *,
    identity: Callable[[], tls.TlsIdentity],
    facts: SessionFacts,
    bundle: Callable[[], Awaitable[bytes]],
    appraise: Callable[[Claim], Awaitable[bytes]],
    activate: Callable[[Claim], Awaitable[Activation]],
    call: Callable[[Claim, str, bytes], Awaitable[bytes]],
    sign: Callable[[str, bytes], Awaitable[bytes]] | None = None,
    ended: Callable[[Claim], Awaitable[None]] | None = None,
    clock: Clock | None = None,
    max_sessions: int = 256,
    max_handshakes: int = 64,
    step_deadline_s: float = 10.0,
    challenge_life_s: int = 60,
) -> SessionServer:
    """A running session port.

    `appraise` decides about a claim and returns the role's secrets; `activate` is called once, after message 5 verified;
    `call` answers requests of an active session. A MoorlineError from `bundle`, `appraise` or `activate` goes to the peer
    and ends its session; one from `call` goes to the peer and the session goes on. `sign` makes COSE_Sign1 (purpose,
    payload) by the HSM key; without it the HPKE-only profile is refused. `ended` is called once for each session
    that reached `appraise`, when its connection is gone.
    """
    broker = _Broker(
        facts=facts,
        bundle=bundle,
        appraise=appraise,
        activate=activate,
        call=call,
        sign=sign,
        ended=ended,
        clock=clock or SystemClock(),
        max_handshakes=max_handshakes,
        step_deadline_s=step_deadline_s,
        challenge_life_s=challenge_life_s,
    )
    reception = _Reception(broker)
    server = await tls.listen(
        listen,
        identity=identity,
        verify=None,
        accept=reception.accept,
        max_connections=max_sessions,
        handshake_deadline_s=step_deadline_s,
    )
    return SessionServer(server, reception)


class _Cut:
    """How one session is ended from outside, at any point after its connection was taken."""

    def __init__(self, machine: Responder) -> None:
        self.machine = machine
        self._reason: MoorlineError | None = None
        self._until: asyncio.Timeout | None = None

    def now(self, reason: MoorlineError) -> None:
        """End it; the first reason stands."""
        if self._reason is None and self._until is not None:
            self._reason = reason
            self._until.reschedule(asyncio.get_running_loop().time())

    def late(self) -> None:
        """A step of the broker's own took too long."""
        self.now(_late())

    async def around(self, work: Awaitable[None]) -> None:
        """`work`, until it ends or is cut: then the reason is raised."""
        try:
            async with asyncio.timeout(None) as self._until:
                await work
        except TimeoutError:
            if self._reason is None:
                raise
            raise self._reason from None
        finally:
            self._until = None


class _Reception:
    """Counts the handshakes under way, and knows every session there is."""

    def __init__(self, broker: _Broker) -> None:
        self._broker = broker
        self._greeting = 0
        self._silent: dict[_Cut, None] = {}  # have not shown evidence yet; in order of arrival
        self._claimed: dict[bytes, _Cut] = {}  # by the nonce of their claim

    def end(self, nonce: bytes, reason: MoorlineError) -> bool:
        """End the session of this claim, if there is one."""
        cut = self._claimed.get(nonce)
        if cut is not None:
            cut.now(reason)
        return cut is not None

    async def _attend(self, session: _ServedSession) -> None:
        self._greeting += 1
        try:
            await session.handshake()
        finally:
            self._greeting -= 1
        await session.serve()

    def _made_room(self) -> bool:
        """Whoever came first and has not shown evidence yet goes: silent peers, however many, shut nobody out."""
        first = next(iter(self._silent), None)
        if first is not None:
            del self._silent[first]
            first.now(Unavailable("session.busy", "too many sessions are being opened", retry_after_s=2))
        return first is not None

    def _shown(self, cut: _Cut, claim: Claim) -> None:
        """Evidence came: from now on this session is known by its claim."""
        self._silent.pop(cut, None)
        self._claimed[claim.nonce] = cut

    async def accept(self, stream: tls.TlsStream) -> None:
        """One connection, from its first frame to its end."""
        if self._greeting >= self._broker.max_handshakes and not self._made_room():
            await tell(stream, Unavailable("session.busy", "too many sessions are being opened", retry_after_s=2))
            return
        machine = Responder(facts=self._broker.facts, export=stream.export, peer_address=stream.peer_address)
        cut = _Cut(machine)
        self._silent[cut] = None
        try:
            session = _ServedSession(self._broker, stream, machine, partial(self._shown, cut), cut.late)
            await cut.around(self._attend(session))
        except MoorlineError as error:
            code, role = error.code, machine.claim.role.value if machine.claim else None
            _LOG.info("session ended", extra={"code": code, "role": role, "peer": stream.peer_address})
            if machine.hpke_only and machine.state is State.ACTIVE:
                await _tell_sealed(stream, machine, error)
            else:
                await tell(stream, error)
        except Exception:  # the top of this session: the peer learns that it failed, never why; the log does
            _LOG.exception("session failed")
            await tell(stream, Unavailable("session.internal", "the broker could not go on with this session"))
        finally:
            self._silent.pop(cut, None)
            machine.end()
            if machine.claim is not None:
                self._claimed.pop(machine.claim.nonce, None)
                if self._broker.ended is not None:
                    await asyncio.shield(self._broker.ended(machine.claim))


@dataclass(frozen=True, slots=True)
class _ServedSession:
    broker: _Broker
    stream: tls.TlsStream
    machine: Responder
    shown: Callable[[Claim], None]
    late: Callable[[], None]

    async def handshake(self) -> None:
        while self.machine.state is not State.ACTIVE:
            body = await self.stream.read_frame(cap=HANDSHAKE_CAP, deadline_s=self.broker.step_deadline_s)
            await self._run(self.machine.receive(body, self.broker.clock.now()))

    async def serve(self) -> None:
        while True:
            try:
                body = await self.stream.read_frame(cap=RECORD_CAP, deadline_s=_IDLE_DEADLINE_S)
            except MoorlineError as error:
                if error.code == "frame.truncated":
                    return  # the peer went away between two records: the ordinary end
                raise
            call = self.machine.open(Call, body)
            assert isinstance(call, Call)
            reply = await self._answer(call)
            sealed = self.machine.seal(reply)
            await self.stream.write_frame(sealed, deadline_s=self.broker.step_deadline_s)

    async def _answer(self, call: Call) -> Reply:
        assert self.machine.claim is not None
        try:
            async with asyncio.timeout(_CALL_DEADLINE_S):
                body = await self.broker.call(self.machine.claim, call.operation, call.body)
        except MoorlineError as error:
            return Reply(id=call.id, body=b"", problem=encode_problem(error))
        except TimeoutError:
            return Reply(id=call.id, body=b"", problem=encode_problem(_late()))
        return Reply(id=call.id, body=body, problem=None)

    async def _run(self, effects: list[Effect]) -> None:
        broker, machine = self.broker, self.machine
        for effect in effects:
            if isinstance(effect, Send):
                await self.stream.write_frame(effect.body, deadline_s=broker.step_deadline_s)
            elif isinstance(effect, MakeChallenge):
                proof = await self._in_time(broker.bundle())
                expires = Instant(broker.clock.now() + broker.challenge_life_s)
                await self._run(machine.challenged(nonce=randomness.token_bytes(32), expires=expires, bundle=proof))
            elif isinstance(effect, Sign):
                await self._run(machine.signed(await self._signature(effect)))
            elif isinstance(effect, Appraise):
                self.shown(effect.claim)
                secrets = await self._in_time(broker.appraise(effect.claim))
                await self._run(machine.accepted(key=randomness.token_bytes(32), secrets=secrets))
            elif isinstance(effect, Activate):
                activation = await self._in_time(broker.activate(effect.claim))
                await self._run(machine.activated(activation))

    async def _signature(self, wanted: Sign) -> bytes:
        if self.broker.sign is None:
            raise Refused("session.profile_not_offered", "this broker signs no messages", expected=ChannelProfile.TLS.value)
        return await self._in_time(self.broker.sign(wanted.purpose, wanted.payload))

    async def _in_time(self, work: Awaitable[T]) -> T:
        """`work` of a step, which ends the session if it takes too long. The connection's one timer watches over it."""
        self.stream.patience.begin(_CALL_DEADLINE_S, self.late)
        try:
            return await work
        finally:
            self.stream.patience.end()


def _late() -> Unavailable:
    return Unavailable("session.timeout", "the broker did not decide in time", expected=f"{_CALL_DEADLINE_S} s")


async def _tell_sealed(stream: tls.TlsStream, machine: Responder, error: MoorlineError) -> None:
    """The last word of an HPKE-only session, as a record: a proxy must not be able to speak it."""
    with suppress(MoorlineError):
        last = Reply(id=LAST_WORD, body=b"", problem=encode_problem(error))
        await stream.write_frame(machine.seal(last), deadline_s=_PROBLEM_DEADLINE_S)
        await stream.linger()
