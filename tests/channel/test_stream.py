"""Streams on their sockets: frames cut anywhere, peers that read slowly or never, and descriptors that run out."""

import asyncio
import os
import resource
import socket
import sys
from pathlib import Path

import pytest

from moorline.channel import listener, tls
from moorline.errors import MoorlineError, Unavailable
from moorline.wire.frames import frame

sys.path.insert(0, str(Path(__file__).parent))

from test_tls import echo, judge, listening


async def connected(consortium, server):
    return await tls.connect(server.address, identity=None, verify=judge(consortium))


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 7, 1000, 16 * 1024])
async def test_a_frame_is_whole_however_it_was_cut(consortium, cut):
    body = os.urandom(2003 if cut < 8 else 50_000)
    async with await listening(consortium) as server:
        stream = await connected(consortium, server)
        sent = frame(body) + frame(b"") + frame(b"last")
        for start in range(0, len(sent), cut):
            stream.write(sent[start : start + cut])  # a TLS record each
            if start % (cut * 64) == 0:
                await asyncio.sleep(0)
        for expected in (body, b"", b"last"):
            assert await stream.read_frame(deadline_s=5) == expected
        await stream.aclose()


async def test_frames_that_come_together_are_read_one_by_one(consortium):
    read = asyncio.Queue()

    async def accept(stream):
        await asyncio.sleep(0.05)  # all of them are there before the first is asked for
        for _ in range(3):
            await read.put(await stream.read_frame(deadline_s=5))

    async with await listening(consortium, accept=accept) as server:
        stream = await connected(consortium, server)
        stream.write(b"".join(frame(bytes([number])) for number in range(3)))
        assert [await asyncio.wait_for(read.get(), 5) for _ in range(3)] == [b"\0", b"\1", b"\2"]
        await stream.aclose()


async def test_what_nobody_reads_stays_with_who_sends_it(consortium):
    """verifies that: a peer that pours without being asked is held up, and fills no memory here."""
    gone = asyncio.Event()

    async def accept(stream):
        await gone.wait()
        assert len(stream._plain) == 0

    async with await listening(consortium, accept=accept) as server:
        stream = await connected(consortium, server)
        with pytest.raises(Unavailable, match="peer.timeout"):
            await stream.write_frame(bytes(64 << 20), deadline_s=0.3)  # no socket takes so many
        gone.set()
        stream.close()


@pytest.mark.parametrize("path", ["tcp", "unix"])
async def test_a_slow_reader_gets_all_that_was_sent(consortium, tmp_path, path):
    bodies = [os.urandom(1 << 20) for _ in range(8)]
    written = []

    async def accept(stream):
        for body in bodies:
            await stream.write_frame(body, deadline_s=10)
            written.append(body)
        await stream.read_frame(deadline_s=10)

    async with await listening(
        consortium, f"unix:{tmp_path}/s" if path == "unix" else "127.0.0.1:0", accept=accept
    ) as server:
        stream = await connected(consortium, server)
        await asyncio.sleep(0.1)
        assert len(written) < len(bodies)  # it waits for us
        for body in bodies:
            assert await stream.read_frame(cap=1 << 20, deadline_s=10) == body
        await stream.write_frame(b"", deadline_s=5)
        await stream.aclose()


async def test_a_closed_stream_says_so_and_touches_no_descriptor(consortium):
    """verifies that: once closed, a stream writes to nobody who was given its descriptor's number since."""
    async with await listening(consortium) as server:
        stream = await connected(consortium, server)
        waiting = asyncio.create_task(stream.read_frame(deadline_s=5))
        await asyncio.sleep(0)
        number = stream._number
        stream.close()
        left, right = socket.socketpair()
        with left, right:
            os.dup2(left.fileno(), number) if left.fileno() != number else None
            with pytest.raises(Unavailable, match="peer.gone"):
                await waiting
            with pytest.raises(Unavailable, match="peer.gone"):
                await stream.write_frame(b"x", deadline_s=1)
            with pytest.raises(Unavailable, match="peer.gone"):
                await stream.read_frame(deadline_s=1)
            await stream.linger()
            await stream.aclose()
            right.settimeout(0)
            with pytest.raises(BlockingIOError):
                right.recv(1)
            if left.fileno() != number:
                os.close(number)


async def test_a_stream_that_is_closed_while_it_lingers_leaves_its_number_to_others(consortium):
    """verifies that: who is hung up on while its last words are read is not looked for under a number that others get."""
    async with await listening(consortium) as server:
        stream = await connected(consortium, server)
        lingering = asyncio.create_task(stream.linger())
        await asyncio.sleep(0)
        watched = asyncio.get_running_loop()._selector.get_map()
        assert stream._number in watched
        stream.close()
        assert stream._number not in watched
        await lingering


async def test_whoever_never_stops_talking_is_not_listened_to_for_ever(consortium):
    async def accept(stream):
        await stream.linger()
        lingered.set()

    async def talk(stream):
        while True:
            await stream.write_frame(bytes(1 << 20), deadline_s=5)

    lingered = asyncio.Event()
    async with await listening(consortium, accept=accept) as server:
        stream = await connected(consortium, server)
        with pytest.raises(Unavailable, match="peer.gone"):
            await talk(stream)
        assert lingered.is_set()
        stream.close()


async def test_a_wait_that_ended_leaves_nothing_that_ends_the_next(consortium):
    """verifies that: one timer serves all waits, and each wait has its own deadline, longer or shorter than the last."""
    async with await listening(consortium) as server:
        stream = await connected(consortium, server)
        for deadline_s in (5, 0.2, 5):
            await stream.write_frame(b"x", deadline_s=5)
            assert await stream.read_frame(deadline_s=deadline_s) == b"x"
        asking = asyncio.create_task(stream.read_frame(deadline_s=5))
        await asyncio.sleep(0.3)  # past what the second read was given
        await stream.write_frame(b"y", deadline_s=5)
        assert await asking == b"y"
        with pytest.raises(Unavailable, match="peer.timeout"):
            await stream.read_frame(deadline_s=0.1)
        await stream.aclose()


async def test_what_a_dead_process_left_at_a_path_keeps_nobody_from_listening(consortium, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/s")
    async with await listening(consortium, f"unix:{tmp_path}/s") as server:
        stream = await connected(consortium, server)
        await stream.write_frame(b"x", deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == b"x"
        await stream.aclose()
    (tmp_path / "file").write_text("not a socket")
    with pytest.raises(OSError, match="in use"):
        await listening(consortium, f"unix:{tmp_path}/file")


async def test_a_port_that_ran_out_of_descriptors_serves_again(consortium, monkeypatch, caplog):
    """verifies that: where no descriptor is left connections wait, and are taken once there is one."""
    monkeypatch.setattr(listener, "_ACCEPT_AGAIN_S", 0.05)
    async with await listening(consortium, accept=echo) as server:
        host, port = tls.parse_address(server.address)
        knocking = socket.create_connection((host, port))  # taken by the kernel, not yet by the server
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            await asyncio.sleep(0.15)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "no connection can be taken now" in caplog.text
        stream = await connected(consortium, server)
        await stream.write_frame(b"x", deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == b"x"
        await stream.aclose()
        knocking.close()


async def test_a_name_with_several_addresses_is_tried_address_by_address(consortium):
    async with await listening(consortium, "127.0.0.1:0") as server:
        port = server.address.rpartition(":")[2]
        stream = await tls.connect(
            f"localhost:{port}", identity=None, verify=judge(consortium)
        )  # ::1 first, where there is one
        await stream.write_frame(b"x", deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == b"x"
        await stream.aclose()
    with pytest.raises(MoorlineError, match="peer.unreachable"):
        await tls.connect(f"localhost:{port}", identity=None, verify=judge(consortium))
