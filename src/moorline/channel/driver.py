"""The attester's end of the attested session: what its machine asks for is done here (PROTOCOLS.md 4).

Every step has a deadline, a frame before activation is at most 256 KiB, and an error of either end is told to the other in a
`Problem` that ends the connection. The broker's end is `channel.session_port`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from moorline.channel import tls
from moorline.channel.messages import LAST_WORD, RECORD_CAP, reported
from moorline.channel.session import (
    HANDSHAKE_CAP,
    VERSION,
    Collect,
    Effect,
    Initiator,
    JudgeBroker,
    KemKey,
    Send,
    State,
)
from moorline.channel.stream import tell
from moorline.errors import MoorlineError, NotAuthentic, Unavailable
from moorline.wire.keys import PublicKey
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Activation, Call, Challenge, EvidenceFormat, Hello, Reply, SessionRole

_CALL_DEADLINE_S: Final = 30.0
_IDLE_DEADLINE_S: Final = 24 * 3600.0
_ASK_AGAIN_S: Final = 0.5


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
        await tell(stream, error)
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
