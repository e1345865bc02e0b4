"""A frame reader takes what it is ready to take, waits as long as it is ready to wait, and never longer or more."""

import asyncio

import pytest

from moorline.errors import Malformed, Unavailable
from moorline.wire import frames


def reader(data: bytes, *, closed: bool) -> asyncio.StreamReader:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    if closed:
        stream.feed_eof()
    return stream


async def test_a_frame_comes_back_as_it_was_sent():
    assert await frames.read_frame(reader(frames.frame(b"body"), closed=True), deadline_s=1) == b"body"


async def test_a_frame_that_announces_too_much_is_refused_before_its_body_arrives():
    with pytest.raises(Malformed, match="frame.too_large"):
        await frames.read_frame(reader(b"\xff\xff\xff\xff", closed=False), cap=1000, deadline_s=5)


@pytest.mark.parametrize("data", [b"", b"\x00\x00", b"\x00\x00\x00\x05abc"])
async def test_a_peer_that_closes_early_is_malformed(data):
    with pytest.raises(Malformed, match="frame.truncated"):
        await frames.read_frame(reader(data, closed=True), deadline_s=1)


async def test_a_peer_that_stalls_is_dropped_at_the_deadline():
    with pytest.raises(Unavailable, match="peer.timeout"):
        await frames.read_frame(reader(b"\x00\x00\x00\x05abc", closed=False), deadline_s=0.05)
