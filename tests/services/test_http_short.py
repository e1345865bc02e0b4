"""The short way of a request: the same answers as by the long one, in order, for whoever asks plainly."""

import asyncio
import ssl
import sys
from pathlib import Path

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moorline.errors import Refused, Unavailable
from moorline.services import http, http_connection
from moorline.services.http_short import ShortWay, parse_whole

sys.path.insert(0, str(Path(__file__).parent))

from http_pki import NAME, PKI, SERVER

PLAIN = b"POST /echo HTTP/1.1\r\nhost: v\r\ncontent-length: 3\r\n\r\nabc"
FIELDS = st.sampled_from(
    [
        *(b"host: v", b"Host:v", b"host: w", b"accept: */*", b"accept:", b"user-agent: a\tb", b"x-other: 1", b" folded"),
        *(
            b"content-length: 3",
            b"content-length: 03",
            b"content-length: +3",
            b"content-length : 3",
        ),
        *(b"transfer-encoding: chunked", b"expect: 100-continue", b"content-length: 3, 3", b"upgrade: h2c", b"\x00: 1"),
        *(b"connection: close", b"connection: keep-alive"),
    ]
)
TARGETS = st.sampled_from([b"/echo", b"/echo?x=1", b"/%65cho", b"//echo", b"http://v/echo", b"*", b"/echo#x", b"/e cho"])
ENDS = st.sampled_from([b"\r\n", b"\n", b"\r"])


@st.composite
def requests(draw):
    end = draw(st.one_of(st.just(b"\r\n"), ENDS))
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2"]))
    line = draw(st.sampled_from([b"POST", b"POST", b"GET", b"post"])) + b" " + draw(TARGETS) + b" " + version
    head = end.join([line, *draw(st.lists(FIELDS, max_size=5)), b"", b""])
    return head + draw(st.sampled_from([b"abc", b"ab", b"abcd", b"", b"3\r\nabc\r\n0\r\n\r\n"]))


@given(requests())
@example(PLAIN)
def test_what_goes_the_short_way_is_what_h11_reads(data):
    """verifies that: a request has one reading: what is taken here is one whole request to h11, and no byte more"""
    whole = parse_whole(data)
    if whole is None:
        assert data != PLAIN
        return
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(data)
    request, body, end = peer.next_event(), bytearray(), None
    assert (request.method, request.target, request.http_version) == (b"POST", whole[0].encode(), b"1.1")
    while not isinstance(end := peer.next_event(), h11.EndOfMessage):
        body += end.data
    assert bytes(body) == whole[1]
    assert peer.trailing_data == (b"", False)
    assert peer.their_state is h11.DONE


@pytest.fixture
async def served():
    asked = []

    async def echo(body):
        asked.append(body)
        if body == b"no":
            raise Refused("test.no", "no", expected="yes")
        if body == b"away":
            raise Unavailable("test.away", "away", retry_after_s=7)
        if body == b"bug":
            raise ZeroDivisionError
        if body == b"never":
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        return body[::-1]

    short = ShortWay(lambda target: echo if target == "/echo" else None, "application/cbor")
    app = http.application("test", short=short)

    @app.post("/echo")
    async def long_way(request: http.Request) -> http.Response:
        asked.append(b"the long way")
        return http.Response((await request.body())[::-1], media_type="application/cbor")

    chain, key = PKI.identity(SERVER)
    bound = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        http.serve(
            app,
            listen="127.0.0.1:0",
            identity=http.TlsIdentity(chain_pem=chain, key_pem=key),
            client_roots_pem=PKI.roots_pem,
            ready=bound.set_result,
        )
    )
    yield Peer(await bound), asked, task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Peer:
    def __init__(self, address):
        self.address = address

    async def connect(self):
        context = ssl.create_default_context(cadata=PKI.roots_pem.decode())
        host, _, port = self.address.rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=NAME)
        return self

    def send(self, body, extra=b""):
        self.writer.write(b"POST /echo HTTP/1.1\r\nhost: v\r\n%scontent-length: %d\r\n\r\n" % (extra, len(body)) + body)

    async def answer(self):
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return head, await self.reader.readexactly(length)


async def test_both_ways_give_one_answer_and_the_plain_one_is_short(served):
    peer, asked, _ = served
    await peer.connect()
    peer.send(b"abc")
    short, body = await peer.answer()
    assert (body, asked) == (b"cba", [b"abc"])
    peer.send(b"abc", extra=b"x-other: 1\r\n")
    long, body = await peer.answer()
    assert (body, asked) == (b"cba", [b"abc", b"the long way"])
    for head in (short, long):
        assert head.startswith(b"HTTP/1.1 200 ")
        assert {b"content-type: application/cbor", b"content-length: 3"} <= set(head.lower().split(b"\r\n"))
        assert b"\r\ndate: " in head.lower()
    peer.writer.write(PLAIN[:-1])  # not whole in one read
    await peer.writer.drain()
    await asyncio.sleep(0.05)
    peer.writer.write(PLAIN[-1:])
    assert (await peer.answer())[1] == b"cba"
    assert asked[-1] == b"the long way"
    peer.send(b"abc")
    assert (await peer.answer())[1] == b"cba"
    assert asked[-1] == b"abc", "a connection that went the long way once goes the short one again"


async def test_who_does_not_wait_for_answers_gets_them_in_order(served):
    peer, _, _ = served
    await peer.connect()
    for number in range(40):
        peer.send(b"n%d" % number, extra=b"x-other: 1\r\n" if number % 7 == 3 else b"")
        if number % 3 == 0:
            await asyncio.sleep(0.002)
    assert [(await peer.answer())[1] for _ in range(40)] == [(b"n%d" % number)[::-1] for number in range(40)]


async def test_refusals_are_problems_and_a_defect_is_not_told(served):
    peer, _, _ = served
    await peer.connect()
    for body, line, said in ((b"no", b" 403 ", b'"code": "test.no"'), (b"away", b" 503 ", b'"code": "test.away"')):
        peer.send(body)
        head, answer = await peer.answer()
        assert line in head.split(b"\r\n")[0]
        assert b"application/problem+json" in head
        assert said in answer
    assert b"retry-after: 7\r\n" in head
    peer.send(b"bug")
    head, answer = await peer.answer()
    assert b" 500 " in head.split(b"\r\n")[0]
    assert answer == b""
    assert await peer.reader.read() == b""


async def test_an_answer_that_does_not_come_is_told_and_the_work_is_ended(served, monkeypatch):
    monkeypatch.setattr(http_connection, "REQUEST_DEADLINE_S", 0.2)
    peer, _, _ = served
    await peer.connect()
    peer.send(b"never")
    head, answer = await peer.answer()
    assert b" 503 " in head.split(b"\r\n")[0]
    assert b'"code": "http.deadline"' in answer
    assert await peer.reader.read() == b""


async def test_a_service_that_stops_answers_first(served):
    peer, _, task = served
    await peer.connect()
    peer.send(b"abc")
    await asyncio.sleep(0.005)
    task.cancel()
    assert (await peer.answer())[1] == b"cba"
    assert await peer.reader.read() == b""
