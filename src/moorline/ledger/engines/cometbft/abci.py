"""ABCI 2.0 over a stream: CometBFT asks, the application answers, in order.

A message is a protobuf Request or Response behind its length as a varint. CometBFT opens four connections (consensus,
mempool, query, snapshot); on each, answers come in the order of the requests, and are sent at the latest when it asks for a
Flush. Nothing an application raises is hidden: the request is answered with an exception, and CometBFT stops rather than go
on with an application that does not know its state.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from google.protobuf.message import DecodeError

from moorline.errors import Malformed
from moorline.ledger.engines.cometbft.canonical import varint
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb

MAX_MESSAGE_BYTES: Final = 64 << 20
_MAX_VARINT: Final = 5
Answer = Callable[[pb.Request], Awaitable[pb.Response]]


async def read_message(reader: asyncio.StreamReader, *, at_most: int = MAX_MESSAGE_BYTES) -> bytes | None:
    """The next message, or None at the end of the stream. Raises Malformed("comet.frame_malformed")."""
    length, shift = 0, 0
    for _ in range(_MAX_VARINT):
        byte = await reader.read(1)
        if not byte:
            if shift:
                raise Malformed("comet.frame_malformed", "the stream ends within a length")
            return None
        length |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            break
    else:
        raise Malformed("comet.frame_malformed", "a length has five bytes at most")
    if length > at_most:
        raise Malformed("comet.frame_malformed", "the message is too large", expected=f"<= {at_most}", got=length)
    try:
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        raise Malformed("comet.frame_malformed", "the stream ends within a message") from None


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
        """Answer one connection's requests until it ends."""
        while (data := await read_message(reader)) is not None:
            request = pb.Request()
            request.ParseFromString(data)
            kind = request.WhichOneof("value")
            if kind == "flush":
                writer.write(framed(pb.Response(flush=pb.ResponseFlush()).SerializeToString()))
                await writer.drain()
                continue
            try:
                response = await self._answer(request)
            except Exception as error:
                # The top of the application: CometBFT must hear of it, and stop.
                self._on_error(str(kind), error)
                writer.write(framed(pb.Response(exception=pb.ResponseException(error=str(error))).SerializeToString()))
                await writer.drain()
                return
            writer.write(framed(response.SerializeToString()))
