"""The device channel without forward secrecy, both ends, over a plain stream (PROTOCOLS.md 7; docs/spec/no-pfs-channel.md).

1. the device says who it is and its nonce; nothing of that is believed yet
2. the function gets its keys from its broker, which checks device and contract and claims the key for this instance alone;
   then it answers with its own nonce
3. the device gets the same keys from its home HSM
4. requests and answers, sealed under one key a direction. The first request that opens shows that the device's home HSM gave
   it the key: only then the application hears of it
5. the keys end after `max_age` or with their counters; whoever wants to go on connects again and is judged again

Who records this traffic and gets hold of the pair key later can read it: that is why the contract must allow the profile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, Self

from moorline.channel.answers import ANSWER_DEADLINE_S, respond
from moorline.channel.messages import RECORD_CAP, pack, problem_frame, reported, unpack
from moorline.channel.records import Direct
from moorline.channel.tls import dial
from moorline.clock import Clock, Instant
from moorline.errors import MoorlineError, NotAuthentic, Unavailable
from moorline.wire import schema
from moorline.wire.device import Request, Response
from moorline.wire.frames import read_frame, write_frame
from moorline.wire.nopfs import DeviceKeys, Direction, FunctionKeyReply, NoPfsHello, NoPfsOffer, NoPfsRecord

_LOG: Final = logging.getLogger("moorline.channel.nopfs")
_HELLO_CAP: Final = 4096
_DEADLINE_S: Final = 20.0
_WRITE_DEADLINE_S: Final = 10.0
_OVERHEAD: Final = 256


class Stream(Protocol):
    """A byte stream both ways."""

    async def readexactly(self, n: int, /) -> bytes:
        """Exactly n bytes, or asyncio.IncompleteReadError."""
        ...

    def write(self, data: bytes, /) -> None:
        """Queue bytes."""
        ...

    async def drain(self) -> None:
        """Wait until the peer takes them."""
        ...

    async def aclose(self) -> None:
        """Close."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What the function's side answers a hello with: the offer, and the keys behind it."""

    offer: NoPfsOffer
    keys: FunctionKeyReply


Offer = Callable[[NoPfsHello], Awaitable[Offered]]
"""The function's keys for a hello, from its broker; raises to refuse."""
Fetch = Callable[[NoPfsHello, NoPfsOffer], Awaitable[DeviceKeys]]
"""The device's keys for an offer it wants, from its home HSM; raises to refuse."""
Answer = Callable[[str, bytes], Awaitable[bytes]]
"""The application's answer to a request of this device (SPIFFE ID)."""


# The device's end ------------------------------------------------------------------------------------------------------


class NoPfsConnection:
    """A connection whose keys come from the device's home HSM; closed at the first failure."""

    def __init__(self, stream: Stream, keys: DeviceKeys, clock: Clock) -> None:
        ends = {"count": keys.count, "not_after": Instant(keys.not_after)}
        self._stream, self._clock = stream, clock
        self._out = Direct(keys.to_function, keys.key_id, Direction.TO_FUNCTION, **ends)  # type: ignore[arg-type]
        self._in = Direct(keys.to_device, keys.key_id, Direction.TO_DEVICE, **ends)  # type: ignore[arg-type]
        self._turn = asyncio.Lock()
        self._next = 0
        self.closed = False

    async def request(self, body: bytes) -> bytes:
        """The function's answer. One request at a time. Raises what the function reports, NotAuthentic (`nopfs.*`)."""
        async with self._turn:
            if self.closed:
                raise Unavailable("device.closed", "the connection is gone", remedy="connect again")
            try:
                response = await self._exchange(body)
            except BaseException:
                await self.aclose()
                raise
        if response.problem is not None:
            raise reported(response.problem)
        return response.body

    async def aclose(self) -> None:
        """End the connection; its keys are of no use afterwards."""
        self.closed = True
        await self._stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()

    async def _exchange(self, body: bytes) -> Response:
        request = Request(id=self._next, body=body)
        self._next += 1
        record = self._out.seal(schema.encode(request), now=self._clock.now())
        await write_frame(self._stream, pack(record), deadline_s=_WRITE_DEADLINE_S)
        frame = await read_frame(self._stream, cap=RECORD_CAP + _OVERHEAD, deadline_s=ANSWER_DEADLINE_S)
        answer = unpack(NoPfsRecord, frame, max_bytes=RECORD_CAP + _OVERHEAD)
        response = schema.decode(Response, self._in.open(answer, now=self._clock.now()), max_bytes=RECORD_CAP)
        if response.id != request.id:
            raise NotAuthentic("device.response_mismatch", "the answer is to another request", expected=request.id)
        return response


async def connect(
    address: str, *, hello: NoPfsHello, fetch: Fetch, clock: Clock, deadline_s: float = 10.0
) -> NoPfsConnection:
    """A connection to the function at `address`. `fetch` must also say whether the offer is the function wanted."""
    stream = await dial(address, deadline_s=deadline_s)
    try:
        await write_frame(stream, pack(hello), deadline_s=_WRITE_DEADLINE_S)
        offer = unpack(NoPfsOffer, await read_frame(stream, cap=_HELLO_CAP, deadline_s=_DEADLINE_S))
        return NoPfsConnection(stream, await fetch(hello, offer), clock)
    except BaseException:
        await stream.aclose()
        raise


# The function's end ----------------------------------------------------------------------------------------------------


async def serve(stream: Stream, *, offer: Offer, answer: Answer, clock: Clock) -> None:
    """One device, until it goes or its keys end. A refused peer is told why; nothing is raised but cancellation."""
    try:
        await _served(stream, offer, answer, clock)
    except MoorlineError as error:
        if error.code != "frame.truncated":
            _LOG.info("device refused", extra={"code": error.code})
            with suppress(MoorlineError):
                await write_frame(stream, problem_frame(error), deadline_s=1.0)


async def _served(stream: Stream, offer: Offer, answer: Answer, clock: Clock) -> None:
    hello = unpack(NoPfsHello, await read_frame(stream, cap=_HELLO_CAP, deadline_s=_WRITE_DEADLINE_S))
    offered = await offer(hello)
    keys = offered.keys
    ends = {"count": keys.count, "not_after": Instant(keys.not_after)}
    reading = Direct(keys.to_function, keys.key_id, Direction.TO_FUNCTION, **ends)  # type: ignore[arg-type]
    writing = Direct(keys.to_device, keys.key_id, Direction.TO_DEVICE, **ends)  # type: ignore[arg-type]
    await write_frame(stream, pack(offered.offer), deadline_s=_WRITE_DEADLINE_S)
    while True:
        left = max(1, keys.not_after - clock.now())
        frame = await read_frame(stream, cap=RECORD_CAP + _OVERHEAD, deadline_s=left)
        record = unpack(NoPfsRecord, frame, max_bytes=RECORD_CAP + _OVERHEAD)
        request = schema.decode(Request, reading.open(record, now=clock.now()), max_bytes=RECORD_CAP)
        response = await respond(hello.device, request, answer)
        sealed = writing.seal(schema.encode(response), now=clock.now())
        await write_frame(stream, pack(sealed), deadline_s=_WRITE_DEADLINE_S)
