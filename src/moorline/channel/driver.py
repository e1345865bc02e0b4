"""The attested session on asyncio: what the machines of `session.py` ask for is done here (PROTOCOLS.md 4).

Both ends: every step has a deadline, a frame before activation is at most 256 KiB, an error of either end is told to the
other in a `Problem` and ends the connection. The broker's end serves many at once, with a bound on all sessions and a
smaller one on those not yet active, so that peers who stall take nothing from those who do not.
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

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from moorline.channel import tls
from moorline.channel.messages import RECORD_CAP, encode_problem, problem_frame, reported
from moorline.channel.session import (
    HANDSHAKE_CAP,
    VERSION,
    Activate,
    Appraise,
    Claim,
    Collect,
    Effect,
    Initiator,
    JudgeBroker,
    KemKey,
    MakeChallenge,
    Responder,
    Send,
    SessionFacts,
    Sign,
    State,
)
from moorline.clock import Clock, Instant, SystemClock
from moorline.errors import MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.wire.keys import PublicKey
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Activation, Call, Challenge, EvidenceFormat, Hello, Reply, SessionRole

__all__ = [
    "Claim",
    "ClientSession",
    "Collected",
    "KemKey",
    "SessionFacts",
    "SessionServer",
    "answered",
    "new_kem",
    "open_session",
    "serve_sessions",
]

T = TypeVar("T")

_LOG: Final = logging.getLogger("moorline.channel.session")
_CALL_DEADLINE_S: Final = 30.0
_IDLE_DEADLINE_S: Final = 24 * 3600.0
_PROBLEM_DEADLINE_S: Final = 1.0
_ASK_AGAIN_S: Final = 0.5
LAST_WORD: Final = (1 << 32) - 1
"""The id of the reply that ends an HPKE-only session; no call has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Evidence as an attester collected it over the binding, and what a verifier may need with it."""

    format: EvidenceFormat
    evidence: bytes
    endorsements: bytes


VerifyBroker = Callable[[Challenge, tuple[bytes, ...]], Awaitable[PublicKey | None]]
"""Judges the broker by its challenge (with ledger proof) and its TLS certificates (DER, leaf first); raises to refuse.

For the HPKE-only profile the certificates are a proxy's and say nothing: what it returns is the HSM key on the ledger.
"""
Prove = Callable[[Challenge, bytes], Awaitable[bytes | None]]
"""The role's proof over H(message 2)."""
CollectEvidence = Callable[[bytes, Challenge], Awaitable[Collected]]
"""Evidence over the 64-byte binding."""


# The attester's end ----------------------------------------------------------------------------------------------------


class ClientSession:
    """An active session, attester's end. `secrets` is what message 4 brought, `activation` message 6."""

    def __init__(self, stream: tls.TlsStream, machine: Initiator, activation: Activation, challenge: Challenge) -> None:
        self._stream = stream
        self._machine = machine
        self._turn = asyncio.Lock()
        self._next = 0
        self._awaited: asyncio.Future[Reply] | None = None
        self.secrets = machine.secrets
        self.activation = activation
        self.challenge = challenge
        self._reading = asyncio.ensure_future(self._read())

    @property
    def closed(self) -> bool:
        """True once the session can carry nothing more."""
        return self._machine.state is not State.ACTIVE

    async def call(self, operation: str, body: bytes, *, deadline_s: float = _CALL_DEADLINE_S) -> bytes:
        """The broker's answer. One call at a time; others wait their turn.

        Raises the error the broker reported; the session goes on after it. Raises Unavailable("session.closed"), or the
        reason the broker gave, when the session is gone. Anything that breaks the stream closes it: an answer that comes too
        late must never be taken for the answer to the next question.
        """
        async with self._turn:
            if self.closed:
                raise self._reading.result() if self._reading.done() else _closed()
            try:
                reply = await self._exchange(operation, body, deadline_s)
            except BaseException:
                await self.aclose()
                raise
        if reply.problem is not None:
            raise reported(reply.problem)
        return reply.body

    async def ended(self) -> MoorlineError:
        """Waits until the session is gone; why it is: what the broker said at the end, or how the connection broke."""
        return await asyncio.shield(self._reading)

    async def aclose(self) -> None:
        """End the session."""
        self._machine.end()
        self._reading.cancel()
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def _read(self) -> MoorlineError:
        """Take what the broker sends as it comes, so that its last word is heard at once and not at the next call."""
        why: MoorlineError = _closed()
        try:
            while True:
                body = await self._stream.read_frame(cap=RECORD_CAP, deadline_s=_IDLE_DEADLINE_S)
                reply = self._machine.open(Reply, body)
                assert isinstance(reply, Reply)
                if reply.id == LAST_WORD and reply.problem is not None:
                    why = reported(reply.problem)
                    break
                if self._awaited is None or self._awaited.done():
                    raise NotAuthentic("session.record_invalid", "an answer came that nobody asked for", got=reply.id)
                self._awaited.set_result(reply)
        except MoorlineError as error:
            # Without TLS of the broker, whatever is no record of this session is a word of whoever carries it.
            unsaid = error.code == "frame.truncated" or self._machine.hpke_only
            why = _closed() if unsaid else error
        except asyncio.CancelledError:
            pass  # closed from this end, and this task ends with it
        self._machine.end()
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_exception(why)
        return why

    async def _exchange(self, operation: str, body: bytes, deadline_s: float) -> Reply:
        call = Call(id=self._next, operation=operation, body=body)
        self._next += 1
        awaited: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._awaited = awaited
        try:
            await self._stream.write_frame(self._machine.seal(call), deadline_s=deadline_s)
            async with asyncio.timeout(deadline_s):
                reply = await awaited
        except TimeoutError:
            raise Unavailable("peer.timeout", "the broker did not answer in time", expected=f"{deadline_s} s") from None
        finally:
            self._awaited = None
            if not awaited.cancel() and not awaited.cancelled():
                awaited.exception()  # also when sending failed first: nobody else will ask for it
        if reply.id != call.id:
            raise NotAuthentic("session.record_invalid", "the answer is to another call", expected=call.id, got=reply.id)
        return reply


def _closed() -> Unavailable:
    return Unavailable("session.closed", "the session with the broker is gone", remedy="open a new one")


async def open_session(  # noqa: PLR0913 - a role is these things, and each must be said
    address: str,
    *,
    role: SessionRole,
    formats: tuple[EvidenceFormat, ...],
    fields: bytes,
    signing_public: bytes,
    verify_broker: VerifyBroker,
    prove: Prove,
    collect: CollectEvidence,
    profile: ChannelProfile = ChannelProfile.TLS,
    kem: KemKey | None = None,
    learned: Callable[[bytes], None] | None = None,
    deadline_s: float = 10.0,
) -> ClientSession:
    """An active session with the broker at `address`, or the reason why there is none.

    `verify_broker` runs on message 2, before any proof or evidence leaves; it must judge both the TLS certificates and the
    ledger proof in the challenge, for nothing before it did. `kem` is given by who may have to ask again: the broker answers
    a launch a second time only for the same two keys (PROTOCOLS.md 3); all others let a fresh one be made. `learned` is
    told what message 4 brought before message 5 is sent: if the answer to that is lost, the broker has confirmed and will
    not say it again. `deadline_s` bounds each step of the peer. Raises what the callables raise, what the broker
    reported, `session.*`, `tls.*`, `frame.*` and `peer.*`.
    """
    stream = await tls.connect(address, identity=None, verify=_present, deadline_s=deadline_s)
    try:
        kem = kem or new_kem()
        hello = Hello(
            version=VERSION,
            role=role,
            formats=formats,
            kem_public=kem.public,
            signing_public=signing_public,
            profile=profile,
            fields=fields,
        )
        machine = Initiator(hello=hello, kem=kem, export=stream.export)
        attester = _Attester(stream, machine, verify_broker, prove, collect, learned, deadline_s)
        await attester.run(machine.start())
        while machine.state is not State.ACTIVE:
            body = await stream.read_frame(cap=HANDSHAKE_CAP, deadline_s=deadline_s)
            effects = machine.receive(body)
            attester.tell_learned()
            await attester.run(effects)
    except MoorlineError as error:
        await _tell(stream, error)
        await stream.aclose()
        raise
    except BaseException:
        await stream.aclose()
        raise
    assert machine.activation is not None
    assert machine.challenge is not None
    return ClientSession(stream, machine, machine.activation, machine.challenge)


async def answered(ask: Callable[[], Awaitable[ClientSession]], *, within_s: float) -> ClientSession:
    """The session that `ask` opens, asked again while nobody answers: a refusal is an answer, a broken connection is not.

    Raises the refusal at once, and what kept it from an answer once `within_s` seconds have passed, or at once if the broker
    says to come back later than that.
    """
    ends = asyncio.get_running_loop().time() + within_s
    while True:
        try:
            return await ask()
        except MoorlineError as error:
            soon = isinstance(error, Unavailable) and error.retry_after_s <= within_s
            unanswered = soon or error.code == "frame.truncated"
            if not unanswered or asyncio.get_running_loop().time() >= ends:
                raise
        await asyncio.sleep(_ASK_AGAIN_S)


def new_kem() -> KemKey:
    """A fresh pair for one session, or for one session and its retries."""
    return KemKey.of(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())


@dataclass(frozen=True, slots=True)
class _Attester:
    stream: tls.TlsStream
    machine: Initiator
    verify_broker: VerifyBroker
    prove: Prove
    collect: CollectEvidence
    learned: Callable[[bytes], None] | None
    deadline_s: float

    def tell_learned(self) -> None:
        if self.learned is not None and self.machine.state is State.ACTIVATION:
            self.learned(self.machine.secrets)

    async def run(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                await self.stream.write_frame(effect.body, deadline_s=self.deadline_s)
            elif isinstance(effect, JudgeBroker):
                self.machine.judged(await self.verify_broker(effect.challenge, self.stream.peer_certificates))
                proof = await self.prove(effect.challenge, effect.digest)
                await self.run(self.machine.proven(proof))
            elif isinstance(effect, Collect):
                assert self.machine.challenge is not None
                found = await self.collect(effect.binding, self.machine.challenge)
                await self.run(self.machine.collected(found.format, found.evidence, found.endorsements))


def _present(certificates: tuple[bytes, ...]) -> None:
    # The chain is judged together with the ledger proof, on message 2 (`verify_broker`); until then nothing of ours is sent
    # that a stranger could use.
    if not certificates:
        raise NotAuthentic("tls.no_certificate", "the broker showed no certificate")


# The broker's end ------------------------------------------------------------------------------------------------------


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
            await _tell(stream, Unavailable("session.busy", "too many sessions are being opened", retry_after_s=2))
            return
        machine = Responder(facts=self._broker.facts, export=stream.export, peer_address=stream.peer_address)
        cut = _Cut(machine)
        self._silent[cut] = None
        try:
            await cut.around(self._attend(_ServedSession(self._broker, stream, machine, partial(self._shown, cut))))
        except MoorlineError as error:
            code, role = error.code, machine.claim.role.value if machine.claim else None
            _LOG.info("session ended", extra={"code": code, "role": role, "peer": stream.peer_address})
            if machine.hpke_only and machine.state is State.ACTIVE:
                await _tell_sealed(stream, machine, error)
            else:
                await _tell(stream, error)
        except Exception:  # the top of this session: the peer learns that it failed, never why; the log does
            _LOG.exception("session failed")
            await _tell(stream, Unavailable("session.internal", "the broker could not go on with this session"))
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
            body = await _bounded(self.broker.call(self.machine.claim, call.operation, call.body), _CALL_DEADLINE_S)
        except MoorlineError as error:
            return Reply(id=call.id, body=b"", problem=encode_problem(error))
        return Reply(id=call.id, body=body, problem=None)

    async def _run(self, effects: list[Effect]) -> None:
        broker, machine = self.broker, self.machine
        for effect in effects:
            if isinstance(effect, Send):
                await self.stream.write_frame(effect.body, deadline_s=broker.step_deadline_s)
            elif isinstance(effect, MakeChallenge):
                proof = await _bounded(broker.bundle(), _CALL_DEADLINE_S)
                expires = Instant(broker.clock.now() + broker.challenge_life_s)
                await self._run(machine.challenged(nonce=randomness.token_bytes(32), expires=expires, bundle=proof))
            elif isinstance(effect, Sign):
                await self._run(machine.signed(await self._signature(effect)))
            elif isinstance(effect, Appraise):
                self.shown(effect.claim)
                secrets = await _bounded(broker.appraise(effect.claim), _CALL_DEADLINE_S)
                await self._run(machine.accepted(key=randomness.token_bytes(32), secrets=secrets))
            elif isinstance(effect, Activate):
                activation = await _bounded(broker.activate(effect.claim), _CALL_DEADLINE_S)
                await self._run(machine.activated(activation))

    async def _signature(self, wanted: Sign) -> bytes:
        if self.broker.sign is None:
            raise Refused("session.profile_not_offered", "this broker signs no messages", expected=ChannelProfile.TLS.value)
        return await _bounded(self.broker.sign(wanted.purpose, wanted.payload), _CALL_DEADLINE_S)


async def _bounded(work: Awaitable[T], deadline_s: float) -> T:
    try:
        async with asyncio.timeout(deadline_s):
            return await work
    except TimeoutError:
        raise Unavailable("session.timeout", "the broker did not decide in time", expected=f"{deadline_s} s") from None


async def _tell_sealed(stream: tls.TlsStream, machine: Responder, error: MoorlineError) -> None:
    """The last word of an HPKE-only session, as a record: a proxy must not be able to speak it."""
    with suppress(MoorlineError):
        last = Reply(id=LAST_WORD, body=b"", problem=encode_problem(error))
        await stream.write_frame(machine.seal(last), deadline_s=_PROBLEM_DEADLINE_S)
        await stream.linger()


async def _tell(stream: tls.TlsStream, error: MoorlineError) -> None:
    """The peer learns why, if it still listens."""
    with suppress(MoorlineError):
        await stream.write_frame(problem_frame(error), deadline_s=_PROBLEM_DEADLINE_S)
        await stream.linger()
