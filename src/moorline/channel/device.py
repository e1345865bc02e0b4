"""The device channel, PFS profile: mutual TLS 1.3, standing proven first, then requests (PROTOCOLS.md 7).

Both ends do the same things before a byte of the application is taken:

1. the peer's certificate chain holds: `verification.chains`, to the consortium root;
2. the device asks its home HSM about this very connection (`ask_home`);
3. the first frame of the peer is its `Status`: a ledger proof bundle of its own standing, and its HSM's word on this;
4. the caller's `judge` takes all of it together: provider, HSM or issuing CA, own revocation, contract, both HSMs, age;
5. what was judged is good for `max_age_s`: the client sends a new `Status` before that, the server answers with its own,
   and whoever has nothing fresh from its peer by then ends the connection.

A function whose HSM says no still sends that word in its `Status`, and then ends: so the home HSM learns of it.
So a revocation reaches a live connection after commit + max_age + the time to the next judgement, at the latest.
This module knows no ledger: `judge` does, and must raise for anything it cannot prove.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from moorline.channel import tls
from moorline.channel.answers import ANSWER_DEADLINE_S, respond
from moorline.channel.messages import RECORD_CAP, pack, reported, unpack, unpack_any
from moorline.channel.stream import tell
from moorline.clock import Clock
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.verification.chains import VerifiedChain, verify_chain
from moorline.wire import schema
from moorline.wire.access import EXPORTER_LABEL
from moorline.wire.device import Request, Response, Status
from moorline.wire.session import Problem

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """What TLS says of a connection. `binding`: keying material that only its two ends have; 32 bytes.

    `post_quantum`: whether the keys were agreed with ML-KEM too.
    """

    binding: bytes
    post_quantum: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a function's HSM says of a connection: its signed statement, and the refusal that follows if it is a no."""

    statement: bytes
    refusal: MoorlineError | None = None


Judge = Callable[[VerifiedChain, Status, Secured], Awaitable[None]]
"""The device's: (the peer's chain, what it sent, the connection); raises MoorlineError to refuse."""
Admit = Callable[[VerifiedChain, Status, Secured], Awaitable[Word]]
"""The function's: likewise; its HSM's word, for the device to see. Raises when there is no word to give."""
AskHome = Callable[[VerifiedChain, Secured], Awaitable[bytes]]
"""The statement of the device's home HSM about a connection with this peer."""
Bundle = Callable[[], Awaitable[bytes]]
"""A fresh ledger proof bundle of this end's own standing."""
Answer = Callable[[VerifiedChain, bytes], Awaitable[bytes]]
"""The function's answer to a request of the peer."""

_LOG: Final = logging.getLogger("moorline.channel.device")
_HYBRID: Final = "MLKEM"
_JUDGE_DEADLINE_S: Final = 20.0
_WRITE_DEADLINE_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    """How one end proves its own standing and judges its peer's."""

    roots: tuple[bytes, ...]
    clock: Clock
    bundle: Bundle
    max_age_s: int

    def chain(self, certificates: tuple[bytes, ...]) -> VerifiedChain:
        """Judged again each time: certificates are short-lived."""
        return verify_chain(certificates[0], certificates[1:], self.roots, self.clock.now())

    def verify(self, certificates: tuple[bytes, ...]) -> None:
        self.chain(certificates)

    async def status(self, access: bytes) -> bytes:
        return pack(Status(bundle=await self.bundle(), access=access))


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeviceStanding(_Standing):
    judge: Judge
    ask_home: AskHome


@dataclass(frozen=True, slots=True, kw_only=True)
class _FunctionStanding(_Standing):
    admit: Admit

    async def admitted(self, stream: tls.TlsStream, status: Status) -> VerifiedChain:
        """Judge a device and send it our own status, whatever our HSM says; raises what refuses."""
        chain = self.chain(stream.peer_certificates)
        word = await _in_time(self.admit(chain, status, secured(stream)))
        await stream.write_frame(await self.status(word.statement), deadline_s=_WRITE_DEADLINE_S)
        if word.refusal is not None:
            raise word.refusal
        return chain


def secured(stream: tls.TlsStream) -> Secured:
    """What both ends of this connection find alike."""
    return Secured(binding=stream.export(EXPORTER_LABEL, b""), post_quantum=_HYBRID in stream.group.upper())


async def _in_time(judging: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_JUDGE_DEADLINE_S):
            return await judging
    except TimeoutError:
        raise Unavailable("device.not_judged", "the peer's standing could not be judged in time") from None


# The device's end ------------------------------------------------------------------------------------------------------


class DeviceConnection:
    """A connection to a function whose standing was judged less than `max_age_s` ago, or closed."""

    def __init__(self, stream: tls.TlsStream, standing: _DeviceStanding, peer: VerifiedChain) -> None:
        self._stream = stream
        self._standing = standing
        self._turn = asyncio.Lock()
        self._next = 0
        self._judged_at = asyncio.get_running_loop().time()
        self.peer = peer
        self.closed = False
        self._ended_by: MoorlineError | None = None
        self._renewal = asyncio.get_running_loop().create_task(self._renew_for_ever())

    async def request(self, body: bytes) -> bytes:
        """The function's answer. One request at a time; others wait.

        Raises the error the function reported (the connection goes on), Refused("device.status_stale") if the peer's
        standing is too old, and closes the connection on anything else.
        """
        async with self._turn:
            self._alive()
            if self._age() > self._standing.max_age_s:
                await self.aclose()
                raise _stale(self._standing.max_age_s)
            response = await self._closing_on_failure(self._exchange(body))
        if response.problem is not None:
            raise reported(response.problem)
        return response.body

    async def renew(self) -> None:
        """Exchange and judge standing again; done by itself every half `max_age_s`."""
        async with self._turn:
            self._alive()
            self.peer = await self._closing_on_failure(_statuses(self._stream, self._standing))
            self._judged_at = asyncio.get_running_loop().time()

    async def aclose(self) -> None:
        """End the connection."""
        self.closed = True
        if self._renewal is not asyncio.current_task():
            self._renewal.cancel()
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    def _age(self) -> float:
        return asyncio.get_running_loop().time() - self._judged_at

    def _alive(self) -> None:
        if self._ended_by is not None:
            raise self._ended_by  # such as the refusal at a renewal that nobody was waiting for
        if self.closed:
            raise Unavailable("device.closed", "the connection is gone", remedy="connect again")

    async def _closing_on_failure(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except MoorlineError as error:
            self._ended_by = error
            await tell(self._stream, error)
            await self.aclose()
            raise
        except BaseException:
            await self.aclose()
            raise

    async def _exchange(self, body: bytes) -> Response:
        request = Request(id=self._next, body=body)
        self._next += 1
        await self._stream.write_frame(pack(request), deadline_s=_WRITE_DEADLINE_S)
        frame = await self._stream.read_frame(cap=RECORD_CAP, deadline_s=ANSWER_DEADLINE_S)
        response = unpack(Response, frame, max_bytes=RECORD_CAP)
        if response.id != request.id:
            raise NotAuthentic("device.response_mismatch", "the answer is to another request", expected=request.id)
        return response

    async def _renew_for_ever(self) -> None:
        with suppress(MoorlineError):  # a failed renewal has closed the connection; the next request says so
            while True:
                await asyncio.sleep(self._standing.max_age_s / 2)
                await self.renew()


async def connect(  # noqa: PLR0913 - one connection, and everything a device decides about it
    address: str,
    *,
    identity: tls.TlsIdentity,
    roots: tuple[bytes, ...],
    clock: Clock,
    bundle: Bundle,
    ask_home: AskHome,
    judge: Judge,
    max_age_s: int,
    deadline_s: float = 10.0,
) -> DeviceConnection:
    """A connection to the function at `address`, both ends judged. `judge` must also say whether it is the one wanted."""
    standing = _DeviceStanding(roots=roots, clock=clock, bundle=bundle, ask_home=ask_home, judge=judge, max_age_s=max_age_s)
    stream = await tls.connect(address, identity=identity, verify=standing.verify, deadline_s=deadline_s)
    try:
        peer = await _statuses(stream, standing)
    except MoorlineError as error:
        await tell(stream, error)
        await stream.aclose()
        raise
    except BaseException:
        await stream.aclose()
        raise
    return DeviceConnection(stream, standing, peer)


async def _statuses(stream: tls.TlsStream, standing: _DeviceStanding) -> VerifiedChain:
    """Standing for standing; the function's chain if it holds and both HSMs let the device in."""
    chain, made = standing.chain(stream.peer_certificates), secured(stream)
    access = await _in_time(standing.ask_home(chain, made))
    await stream.write_frame(await standing.status(access), deadline_s=_WRITE_DEADLINE_S)
    status = unpack(Status, await stream.read_frame(deadline_s=_JUDGE_DEADLINE_S))
    await _in_time(standing.judge(chain, status, made))
    return chain


# The function's end ----------------------------------------------------------------------------------------------------


async def serve(  # noqa: PLR0913 - one port, and everything a function decides about it
    listen: str,
    *,
    identity: Callable[[], tls.TlsIdentity],
    roots: tuple[bytes, ...],
    clock: Clock,
    bundle: Bundle,
    admit: Admit,
    answer: Answer,
    max_age_s: int,
    plain: Callable[[tls.PlainStream], Awaitable[None]] | None = None,
    max_connections: int = 64,
    handshake_deadline_s: float = 5.0,
) -> tls.TlsServer:
    """A running port. A refused peer is told why; an error of `answer` goes to its peer; the service goes on.

    `plain` takes devices of the profile without forward secrecy (channel.nopfs) at the same port.
    """
    standing = _FunctionStanding(roots=roots, clock=clock, bundle=bundle, admit=admit, max_age_s=max_age_s)

    async def accept(stream: tls.TlsStream) -> None:
        try:
            await _serve_peer(stream, standing, answer)
        except MoorlineError as error:
            _LOG.info("device refused", extra={"code": error.code, "peer": stream.peer_address})
            await tell(stream, error)
        except Exception:  # the top of this connection: the peer learns that it failed, never why
            _LOG.exception("device connection failed")
            await tell(stream, Unavailable("device.internal", "the function could not go on"))

    return await tls.listen(
        listen,
        identity=identity,
        verify=standing.verify,
        accept=accept,
        plain=plain,
        max_connections=max_connections,
        handshake_deadline_s=handshake_deadline_s,
    )


async def _serve_peer(stream: tls.TlsStream, standing: _FunctionStanding, answer: Answer) -> None:
    loop = asyncio.get_running_loop()
    status = unpack(Status, await stream.read_frame(deadline_s=_WRITE_DEADLINE_S))
    peer = await standing.admitted(stream, status)
    judged_at = loop.time()
    while True:
        left = judged_at + standing.max_age_s - loop.time()
        frame = await _next_frame(stream, left, standing.max_age_s)
        if frame is None:
            return
        kind, item = unpack_any(frame, max_bytes=RECORD_CAP)
        if kind == "status":
            peer = await standing.admitted(stream, schema.from_item(Status, item))
            judged_at = loop.time()
        elif kind == "request":
            response = await respond(peer, schema.from_item(Request, item), answer)
            await stream.write_frame(pack(response), deadline_s=_WRITE_DEADLINE_S)
        elif kind == "problem":
            raise reported(schema.from_item(Problem, item).problem)
        else:
            raise Malformed("device.message_unexpected", "this message has no place here", got=kind)


async def _next_frame(stream: tls.TlsStream, left_s: float, max_age_s: int) -> bytes | None:
    """The next frame, None if the peer went away between frames; stale standing ends the connection."""
    if left_s <= 0:
        raise _stale(max_age_s)
    try:
        return await stream.read_frame(cap=RECORD_CAP, deadline_s=left_s)
    except MoorlineError as error:
        if error.code == "frame.truncated":
            return None
        if error.code == "peer.timeout":
            raise _stale(max_age_s) from None
        raise


def _stale(max_age_s: int) -> Refused:
    return Refused(
        "device.status_stale",
        "the peer has not proven its standing lately",
        expected=f"within {max_age_s} s",
        remedy="send a fresh status",
    )
