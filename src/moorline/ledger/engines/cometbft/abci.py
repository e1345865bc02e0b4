"""ABCI 2.0 over a stream: CometBFT asks, the application answers, in order.

A message is a protobuf Request or Response behind its length as a varint. CometBFT opens four connections (consensus,
mempool, query, snapshot); on each, answers come in the order of the requests, and are sent at the latest when it asks
for a Flush; it asks for one behind nearly every request, and both answers leave in one write. Nothing an application
raises is hidden: the request is answered with an exception, and CometBFT stops rather than go on with an application
that does not know its state.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final

from google.protobuf.message import DecodeError

from moorline.errors import Malformed
from moorline.ledger.engines.cometbft.canonical import varint
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb

MAX_MESSAGE_BYTES: Final = 64 << 20
READ_BYTES: Final = 256 << 10
_MAX_VARINT: Final = 5
_FLUSHED: Final = pb.Response(flush=pb.ResponseFlush()).SerializeToString()
Answer = Callable[[pb.Request], Awaitable[pb.Response]]


class Frames:
    """Cuts what arrives into messages. Feed it what was read; `end` when there is no more."""

    def __init__(self, *, at_most: int = MAX_MESSAGE_BYTES) -> None:
        self._at_most = at_most
        self._held = bytearray()

    def fed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete now, in order. Raises Malformed("comet.frame_malformed")."""
        held, at = self._held, 0
        held += data
        while (found := self._length(held, at)) is not None:
            start, length = found
            if start + length > len(held):
                break
            at = start + length
            yield bytes(held[start:at])
        del held[:at]

    def end(self) -> None:
        """Raises Malformed("comet.frame_malformed") if a message was begun and did not arrive."""
        if self._held:
            raise Malformed("comet.frame_malformed", "the stream ends within a message")

    def _length(self, held: bytearray, at: int) -> tuple[int, int] | None:
        """Where the next message starts and how long it is; None until that has arrived."""
        length = 0
        for place, byte in enumerate(held[at : at + _MAX_VARINT]):
            length |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if length > self._at_most:
                    raise Malformed(
                        "comet.frame_malformed", "the message is too large", expected=f"<= {self._at_most}", got=length
                    )
                return at + place + 1, length
        if len(held) - at >= _MAX_VARINT:
            raise Malformed("comet.frame_malformed", "a length has five bytes at most")
        return None


async def messages(reader: asyncio.StreamReader, *, at_most: int = MAX_MESSAGE_BYTES) -> AsyncIterator[list[bytes]]:
    """The messages of a stream, those that arrived together together. Raises Malformed("comet.frame_malformed")."""
    frames = Frames(at_most=at_most)
    while data := await reader.read(READ_BYTES):
        if found := list(frames.fed(data)):
            yield found
    frames.end()


def framed(message: bytes) -> bytes:
    """A message behind its length."""
    return varint(len(message)) + message


class AbciServer:
    """Serves one application to one CometBFT. `on_error` is told what an application raised, before CometBFT is."""

    def __init__(self, answer: Answer, on_error: Callable[[str, Exception], None]) -> None:
        self._answer, self._on_error = answer, on_error
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self, path: str, ready: Callable[[], None]) -> None:
        """Listen on a unix socket until cancelled."""
        server = await asyncio.start_unix_server(self._connected, path)
        try:
            ready()
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self.converse(reader, writer)
        except (OSError, Malformed, DecodeError) as error:
            self._on_error("connection", error)
        except asyncio.CancelledError:
            pass  # this server ends: nobody waits for the task of a connection
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests until it ends, those that arrived together with one write."""
        async for asked in messages(reader):
            said = []
            for data in asked:
                response, last = await self._said(data)
                said.append(framed(response))
                if last:
                    break
            writer.write(b"".join(said))
            await writer.drain()
            if last:
                return

    async def _said(self, data: bytes) -> tuple[bytes, bool]:
        """The encoded answer, and whether it is the last on this connection."""
        request = pb.Request()
        request.ParseFromString(data)
        kind = request.WhichOneof("value")
        if kind == "flush":
            return _FLUSHED, False
        try:
            return (await self._answer(request)).SerializeToString(), False
        except Exception as error:
            # The top of the application: CometBFT must hear of it, and stop.
            self._on_error(str(kind), error)
            return pb.Response(exception=pb.ResponseException(error=str(error))).SerializeToString(), True
