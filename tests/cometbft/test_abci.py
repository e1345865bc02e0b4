"""The ABCI server over a real socket: framing, order, flush, and what happens when something is wrong."""

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed, Refused
from moorline.ledger.engines.cometbft import abci
from moorline.ledger.engines.cometbft.abci import AbciServer, Frames, framed, messages
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb


@contextlib.asynccontextmanager
async def served(path, answer):
    errors = []
    listening = asyncio.Event()
    server = AbciServer(answer, lambda where, error: errors.append((where, error)))
    serving = asyncio.ensure_future(server.serve(str(path), listening.set))
    await listening.wait()
    try:
        yield errors
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def echo(request):
    await asyncio.sleep(0)
    return pb.Response(echo=pb.ResponseEcho(message=request.echo.message))


async def responses(reader):
    """The answers, one by one."""
    async for together in messages(reader):
        for data in together:
            found = pb.Response()
            found.ParseFromString(data)
            yield found


async def response(reader):
    return await anext(responses(reader))


def asked(message):
    return framed(pb.Request(echo=pb.RequestEcho(message=message)).SerializeToString())


FLUSH = framed(pb.Request(flush=pb.RequestFlush()).SerializeToString())


async def test_four_connections_each_in_its_own_order(tmp_path):
    """verifies that: answers come in the order of the requests on every connection, flushed when asked to."""
    async with served(tmp_path / "app.sock", echo) as errors:
        connections = [await asyncio.open_unix_connection(str(tmp_path / "app.sock")) for _ in range(4)]
        for number, (_, writer) in enumerate(connections):
            writer.write(b"".join(asked(f"{number}.{part}") for part in range(50)) + FLUSH)
        for number, (reader, writer) in reversed(list(enumerate(connections))):
            answers = responses(reader)
            said = [(await anext(answers)).echo.message for _ in range(50)]
            assert said == [f"{number}.{part}" for part in range(50)]
            assert (await anext(answers)).WhichOneof("value") == "flush"
            writer.close()
        assert not errors


async def test_what_the_application_raises_reaches_cometbft_and_ends_the_connection(tmp_path):
    """verifies that: an application that does not know its state is not asked on: CometBFT stops at an exception."""

    async def broken(_request):
        raise Refused("ledger.wrong_height", "the block is not the next")

    async with served(tmp_path / "app.sock", broken) as errors:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "app.sock"))
        writer.write(asked("one") + asked("two"))
        assert "ledger.wrong_height" in (await response(reader)).exception.error
        assert await reader.read() == b""
        writer.close()
        assert [where for where, _ in errors] == ["echo"]


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff\xff\xff", b"\x80", b"\x05ab", b"\x03\xff\xff\xff", abci.framed(b"")[:0] + b"\xff\xff\xff\xff\x7f"],
)
async def test_bytes_that_are_no_message_end_the_connection_and_nothing_else(tmp_path, data):
    async with served(tmp_path / "app.sock", echo) as errors:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "app.sock"))
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        for _ in range(100):
            if errors:
                break
            await asyncio.sleep(0.01)
        assert [where for where, _ in errors] == ["connection"]
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "app.sock"))
        writer.write(asked("still here"))
        assert (await response(reader)).echo.message == "still here"
        writer.close()


@given(st.lists(st.binary(max_size=400), max_size=6), st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_messages_come_out_as_they_went_in_however_they_are_cut(sent, cuts):
    frames, stream, out = Frames(), b"".join(map(framed, sent)), []
    while stream:
        size = cuts.pop() if cuts else len(stream)
        out += frames.fed(stream[:size])
        stream = stream[size:]
    frames.end()
    assert out == sent


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_messages_or_malformed(pieces):
    frames = Frames(at_most=100)
    with contextlib.suppress(Malformed):
        for data in pieces:
            assert all(len(one) <= 100 for one in frames.fed(data))
        frames.end()
