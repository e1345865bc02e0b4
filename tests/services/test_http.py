"""Every error is a typed problem, every body is capped, and who calls is known from the certificate TLS verified."""

import asyncio
import socket
import ssl
import sys
from pathlib import Path

import pytest
from fastapi import Request

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.nfv import Role
from moorline.services import http, http_connection
from moorline.wire.http import HttpClient

sys.path.insert(0, str(Path(__file__).parent))

from http_pki import NAME, PKI, SERVER, Pki

ROOM = 8


@pytest.fixture
async def address():
    app = http.application("test", body_cap=1000, deadline_s=0.5)

    @app.get("/mine")
    async def mine(request: Request) -> dict[str, str]:
        return {"caller": str(http.require(request, Role.OPERATOR, trust_domain="alpha.test"))}

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/json")
    async def as_json(body: dict[str, str]) -> int:
        return len(body)

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.Event().wait()

    chain, key = PKI.identity(SERVER)
    bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        http.serve(
            app,
            listen="127.0.0.1:0",
            identity=http.TlsIdentity(chain_pem=chain, key_pem=key),
            client_roots_pem=PKI.roots_pem,
            ready=bound.set_result,
            connections=http.Connections(room=ROOM),
        )
    )
    yield await bound
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def client(address: str, *, identity=None, server_name=NAME, roots=PKI.roots_pem) -> HttpClient:
    return HttpClient(f"https://{address}", server_name=server_name, roots_pem=roots, identity=identity)


async def test_the_caller_is_known_from_its_certificate(address):
    async with client(address, identity=PKI.client("spiffe://alpha.test/operator/ann")) as session:
        assert await session.get_json("/mine") == {"caller": "spiffe://alpha.test/operator/ann"}


async def test_no_part_of_an_answer_waits_for_an_acknowledgement(address, monkeypatch):
    """verifies that: Nagle's algorithm is off on accepted connections, or the body comes 40 ms after the head."""
    seen, made = [], http_connection.Connection.connection_made

    def connection_made(self, transport):
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(self, transport)

    monkeypatch.setattr(http_connection.Connection, "connection_made", connection_made)
    async with client(address, identity=PKI.client("spiffe://alpha.test/operator/ann")) as session:
        await session.get_json("/mine")
    assert seen
    assert all(seen)


async def test_a_caller_without_certificate_of_another_role_or_domain_is_refused(address):
    async with client(address) as session:
        with pytest.raises(NotAuthentic, match="http.no_client_certificate"):
            await session.get_json("/mine")
    for uri in ("spiffe://alpha.test/device/d-1", "spiffe://beta.test/operator/ann"):
        async with client(address, identity=PKI.client(uri)) as session:
            with pytest.raises(Refused, match="http.not_authorised"):
                await session.get_json("/mine")


async def test_a_certificate_of_a_stranger_does_not_get_through_the_handshake(address):
    async with client(address, identity=Pki().client("spiffe://alpha.test/operator/ann")) as session:
        with pytest.raises(MoorlineError) as refusal:
            await session.get_json("/mine")
    assert refusal.value.code in {"peer.unreachable", "peer.tls_not_trusted"}


async def test_a_server_of_another_name_or_root_is_not_spoken_to(address):
    for wrong in (client(address, server_name="v2.verifier.alpha.test"), client(address, roots=Pki().roots_pem)):
        async with wrong as session:
            with pytest.raises(NotAuthentic, match="peer.tls_not_trusted"):
                await session.get_json("/mine")


@pytest.mark.parametrize("path", ["/raw", "/json"])
async def test_a_body_over_the_cap_is_refused_whether_announced_or_not(address, path):
    async def drip():
        for _ in range(20):
            yield b"x" * 100

    async with client(address) as session:
        with pytest.raises(Malformed, match="http.body_too_large"):
            await session.send("POST", path, content=b"x" * 2000, headers={"content-type": "application/json"})
        with pytest.raises(Malformed, match="http.body_too_large"):
            await session.send("POST", path, content=drip(), headers={"content-type": "application/json"})


async def test_wrong_routes_methods_and_bodies_are_typed_problems(address):
    async with client(address) as session:
        with pytest.raises(Refused, match="http.no_such_route"):
            await session.get_json("/nowhere")
        with pytest.raises(Refused, match="http.method_not_allowed"):
            await session.get_json("/raw")
        with pytest.raises(Malformed, match="http.request_malformed"):
            await session.post_json("/json", [1])
        with pytest.raises(Unavailable, match="http.deadline"):
            await session.get_json("/slow")


async def test_garbage_on_the_port_does_not_stop_the_service(address):
    host, _, port = address.rpartition(":")
    for garbage in (b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"\xff" * 200):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(garbage)
    async with client(address) as session:
        assert await session.get_json("/healthz") == {"live": True, "ready": True, "why_not": None}
        assert b"moorline_http_requests" in await session.get_bytes("/metrics")


async def test_nobody_there_is_unavailable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with client(f"127.0.0.1:{free.getsockname()[1]}") as session:
            with pytest.raises(Unavailable, match="peer.unreachable"):
                await session.get_json("/healthz")


async def test_a_server_that_is_stopped_can_be_followed_by_another_on_the_same_port():
    chain, key = PKI.identity(SERVER)
    listen = "127.0.0.1:0"
    for _ in range(3):
        bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            http.serve(
                http.application("test"),
                listen=listen,
                identity=http.TlsIdentity(chain_pem=chain, key_pem=key),
                client_roots_pem=None,
                ready=bound.set_result,
            )
        )
        listen = await bound
        async with client(listen) as session:
            assert (await session.get_json("/healthz"))["ready"] is True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_who_asks_a_service_that_stops_is_told_so_in_our_words():
    """verifies that: a request under way when the service ends is answered 503 with a problem: its client asks on."""
    app, begun, said = http.application("test"), asyncio.Event(), []

    @app.get("/slow")
    async def slow() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def send(message):
        said.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": "/slow", "headers": [], "query_string": b"", "http_version": "1.1"}
    task = asyncio.ensure_future(app(scope, receive, send))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert said[0]["status"] == 503
    assert b'"code": "http.stopping"' in said[1]["body"]


async def test_a_request_that_does_not_end_is_told_over_the_wire_that_the_service_stops(monkeypatch, caplog):
    """verifies that: what is under way gets its time, then a 503 that names the reason; nothing is logged as a crash."""
    monkeypatch.setattr(http, "STOPPING_S", 0.1)
    app, begun, bound = http.application("test"), asyncio.Event(), asyncio.get_running_loop().create_future()

    @app.get("/slow")
    async def slow() -> None:
        begun.set()
        await asyncio.Event().wait()

    chain, key = PKI.identity(SERVER)
    identity = http.TlsIdentity(chain_pem=chain, key_pem=key)
    task = asyncio.create_task(
        http.serve(app, listen="127.0.0.1:0", identity=identity, client_roots_pem=None, ready=bound.set_result)
    )
    async with client(await bound) as session:
        asking = asyncio.create_task(session.get_json("/slow"))
        await begun.wait()
        task.cancel()
        with pytest.raises(Unavailable) as told:
            await asking
    await asyncio.gather(task, return_exceptions=True)
    assert told.value.code == "http.stopping"
    assert caplog.records == []


# Peers who stall --------------------------------------------------------------------------------------------------------


async def raw(address: str, first: bytes = b""):
    """A TLS connection that says `first` and then nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=PKI.roots_pem.decode())
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=NAME)
    writer.write(first)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("first", [b"", b"GET /slo", b"GET /raw HTTP/1.1\r\nhost: x\r\nx-endless: "])
async def test_who_does_not_ask_in_time_is_told_and_hung_up_on(address, monkeypatch, first):
    monkeypatch.setattr(http_connection, "HEADERS_S", 0.2)
    reader, writer = await raw(address, first)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code": "http.deadline"' in answer
    writer.close()


async def test_who_leaves_with_the_last_word_leaves_nothing_behind(address, monkeypatch):
    monkeypatch.setattr(http_connection, "HEADERS_S", 0.1)
    monkeypatch.setattr(http_connection, "_LAST_WORD_S", 0.2)
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    reader, writer = await raw(address)
    assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
    writer.close()
    await asyncio.sleep(0.5)
    assert complaints == []


async def test_garbage_is_answered_with_a_problem(address):
    reader, writer = await raw(address, b"\x00\x01\x02 what is this\r\n\r\n")
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code": "http.request_malformed"' in answer
    writer.close()


async def test_silent_peers_make_room_for_those_who_ask(address):
    first = await raw(address)
    silent = [await raw(address) for _ in range(ROOM + 2)]
    async with client(address) as session:
        assert await session.post_json("/json", {}) == 0
    assert await first[0].read() == b""  # the one who was silent longest
    for _, writer in (first, *silent):
        writer.close()


async def test_who_reads_nothing_is_dropped_and_others_are_served(address):
    stalled = [await raw(address, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 500) for _ in range(4)]
    async with client(address) as session:
        assert await session.post_json("/json", {}) == 0
    for _, writer in stalled:
        writer.transport.abort()
