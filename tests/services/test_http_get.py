"""A GET's short way has one reading of an answer, the library's, and leaves to that whatever is not plain."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, NotAuthentic, Refused, Unavailable
from moorline.wire import http as wire_http
from moorline.wire.http import HttpClient, server_context
from moorline.wire.http_get import parse_head

sys.path.insert(0, str(Path(__file__).parent))

from http_pki import NAME, PKI, SERVER, Pki

PLAIN = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n[]"


def by_h11(data):
    """Status, headers and body length as the library under httpx reads them; None if it refuses."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    try:
        head = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(head, h11.Response):
        return None
    return head.status_code, [(name.decode(), value.decode("latin-1")) for name, value in head.headers]


LINES = st.sampled_from(
    [
        *("content-length: 2", "Content-Length:2", "content-length: 2, 2", "content-length: +2", "content-length:\t2 "),
        *("transfer-encoding: chunked", "connection: close", "connection: keep-alive", "connection: upgrade"),
        *(
            "content-type: application/json",
            "x: y",
            "x : y",
            " folded",
            "bad name: 1",
            "x: caf\xe9",
            "content-encoding: gzip",
        ),
        *("date: Sat, 28 Nov 2026 00:00:00 GMT", "server: a", "set-cookie: a=b", "x:", "", "x: a\rb", "x: a\nb: c"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    status=st.sampled_from(
        ["HTTP/1.1 200 OK", "HTTP/1.1 404 ", "HTTP/1.1 204 No", "HTTP/1.0 200 OK", "HTTP/1.1 100 Go", "x"]
    ),
    lines=st.lists(LINES, max_size=4),
)
def test_a_head_has_one_reading(status, lines):
    """verifies that: what the short way takes, the library reads alike; and it takes no head without a length of its own."""
    data = "".join(f"{line}\r\n" for line in [status, *lines]).encode("latin-1") + b"\r\n"
    head = parse_head(data)
    if head is None:
        return
    code, headers = by_h11(data)
    assert (head.status, head.headers) == (code, dict(headers))
    assert len(headers) == len(head.headers)
    assert str(head.length) == head.headers["content-length"].lstrip("0") or head.length == 0
    assert head.kept is (head.headers.get("connection") != "close")
    assert "transfer-encoding" not in head.headers


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_none(data):
    head = parse_head(data)
    assert head is None or data.startswith(b"HTTP/1.1 ")


class Canned:
    """A TLS server that says what it was given, and counts connections and requests."""

    def __init__(self, *answers):
        self.answers, self.connections, self.requests = list(answers), 0, []

    async def serve(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                answer = self.answers.pop(0) if self.answers else PLAIN
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def served(canned, *, timeout_s=5.0, **client):
    server = await asyncio.start_server(canned.serve, "127.0.0.1", 0, ssl=server_context(*PKI.identity(SERVER)))
    port = server.sockets[0].getsockname()[1]
    named = {"server_name": NAME, "roots_pem": PKI.roots_pem} | client
    async with server, HttpClient(f"https://127.0.0.1:{port}", timeout_s=timeout_s, **named) as session:
        yield session


async def test_a_connection_serves_many_questions():
    canned = Canned()
    async with served(canned) as session:
        for _ in range(3):
            assert await session.get_json("/v1/a", [("key", "a/b:c"), ("key", "d e")]) == []
    assert canned.connections == 1
    assert canned.requests[0].startswith(b"GET /v1/a?key=a%2Fb%3Ac&key=d+e HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_a_connection_that_was_closed_meanwhile_costs_nobody_an_answer():
    canned = Canned(PLAIN, None)
    async with served(canned) as session:
        assert await session.get_json("/") == []
        assert await session.get_json("/") == []  # closed instead of answered: asked again
        assert await session.get_json("/") == []


@pytest.mark.parametrize(
    "odd",
    [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 40 + b"content-length: 2\r\n\r\n[]",
    ],
)
async def test_what_is_not_plain_is_read_by_the_library(odd):
    async with served(Canned(odd, odd)) as session:
        assert await session.get_json("/") == []


async def test_a_second_answer_nobody_asked_for_is_not_taken_for_the_next():
    """verifies that: bytes behind an answer end the kept connection, as the library has it, or are read as what they are."""
    canned = Canned(PLAIN + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfalse")
    async with served(canned) as session:
        assert await session.get_json("/") == []
        await asyncio.sleep(0.05)
        assert await session.get_json("/") == []


async def test_refusals_and_odd_bodies_are_typed_as_ever(monkeypatch):
    problem = b'{"kind":"Refused","code":"a.b","says":"no"}'
    head = b"HTTP/1.1 403 Forbidden\r\ncontent-type: application/problem+json\r\ncontent-length: %d\r\n\r\n"
    async with served(Canned(head % len(problem) + problem)) as session:
        with pytest.raises(Refused, match="a.b"):
            await session.get_json("/")
    async with served(Canned(b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\nno")) as session:
        with pytest.raises(Malformed, match="peer.problem_malformed"):
            await session.get_bytes("/")
    monkeypatch.setattr(wire_http, "ANSWER_CAP", 1000)
    large = b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + b"x" * 2000
    async with served(Canned(large, large)) as session:
        with pytest.raises(Malformed, match="peer.answer_too_large"):
            await session.get_bytes("/")


async def test_a_silent_server_and_a_stranger_are_found_out():
    async def silent(reader, _writer):
        await reader.read()

    canned = Canned()
    canned.serve = silent
    async with served(canned, timeout_s=0.3) as session:
        with pytest.raises(Unavailable, match="peer.unreachable"):
            await session.get_bytes("/")
    async with served(Canned(), roots_pem=Pki().roots_pem) as session:
        with pytest.raises(NotAuthentic, match="peer.tls_not_trusted"):
            await session.get_bytes("/")
