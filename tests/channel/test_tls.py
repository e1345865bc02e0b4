"""TLS streams: 1.3 only, hybrid key agreement, no resumption, the caller's judgement before the first byte."""

import asyncio
import contextlib
import socket
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import mldsa
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL
from OpenSSL._util import lib

from moorline.channel import tls
from moorline.channel.messages import reported
from moorline.clock import Instant
from moorline.errors import Misconfigured, MoorlineError, NotAuthentic, Unavailable
from moorline.verification.chains import verify_chain
from moorline.wire import cbor


def judge(consortium):
    def verify(certificates):
        verify_chain(certificates[0], certificates[1:], consortium.roots, Instant(consortium.now))

    return verify


async def echo(stream):
    with contextlib.suppress(MoorlineError):
        while True:
            await stream.write_frame(await stream.read_frame(deadline_s=5), deadline_s=5)


@pytest.fixture(params=["tcp", "unix"])
def where(request, tmp_path):
    return "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"


async def listening(consortium, where="127.0.0.1:0", *, mutual=False, accept=echo, path="hsm/hsm-1", **more):
    identity = consortium.identity(path, issuer=consortium.hsm if path.startswith("hsm") else consortium.ca)
    verify = judge(consortium) if mutual else None
    return await tls.listen(where, identity=lambda: identity, verify=verify, accept=accept, **more)


async def test_a_frame_goes_there_and_back(consortium, where):
    async with await listening(consortium, where) as server:
        stream = await tls.connect(server.address, identity=None, verify=judge(consortium))
        assert stream.group == "X25519MLKEM768"
        assert len(stream.peer_certificates) == 4
        body = bytes(range(256)) * 900  # more than one record, more than one read
        await stream.write_frame(body, deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == body
        await stream.aclose()


async def test_both_ends_export_the_same_and_another_connection_does_not(consortium):
    seen = []

    async def accept(stream):
        seen.append(stream.export("EXPORTER-moorline-function", b"context"))
        await echo(stream)

    async with await listening(consortium, accept=accept) as server:
        mine = []
        for _ in range(2):
            stream = await tls.connect(server.address, identity=None, verify=judge(consortium))
            mine.append(stream.export("EXPORTER-moorline-function", b"context"))
            await stream.write_frame(b"x", deadline_s=5)
            await stream.read_frame(deadline_s=5)
            assert stream.export("EXPORTER-moorline-launcher", b"context") != mine[-1]
            assert stream.export("EXPORTER-moorline-function", b"other") != mine[-1]
            await stream.aclose()
    assert seen == mine
    assert mine[0] != mine[1]


async def test_a_client_with_a_good_chain_is_let_in_and_a_stranger_learns_why_not(consortium, stranger):
    async with await listening(consortium, mutual=True) as server:
        good = consortium.identity("device/d-1")
        stream = await tls.connect(server.address, identity=good, verify=judge(consortium))
        await stream.write_frame(b"x", deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == b"x"
        await stream.aclose()
        bad = stranger.identity("device/d-1")
        stream = await tls.connect(server.address, identity=bad, verify=judge(consortium))
        kind, problem = cbor.decode(await stream.read_frame(deadline_s=5))
        assert kind == "problem"
        assert reported(problem["problem"]).code in {"chain.untrusted", "chain.signature"}
        await stream.aclose()


async def test_no_client_certificate_is_refused_where_one_is_due(consortium):
    async with await listening(consortium, mutual=True) as server:
        stream = await tls.connect(server.address, identity=None, verify=judge(consortium))
        with pytest.raises(MoorlineError):
            await stream.read_frame(deadline_s=5)
        await stream.aclose()


async def test_a_server_under_another_root_is_refused_before_a_byte_is_sent(consortium, stranger):
    heard = []

    async def accept(stream):
        with contextlib.suppress(MoorlineError):
            heard.append(await stream.read_frame(deadline_s=5))

    async with await listening(stranger, accept=accept) as server:
        with pytest.raises(NotAuthentic) as caught:
            await tls.connect(server.address, identity=None, verify=judge(consortium))
    assert caught.value.code.startswith("chain.")
    assert [cbor.decode(said)[0] for said in heard] in ([], ["problem"])  # at most why


@pytest.mark.parametrize("version", [SSL.TLS1_2_VERSION])
async def test_older_tls_is_refused(consortium, version):
    async with await listening(consortium) as server:
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_max_proto_version(version)
        with pytest.raises(SSL.Error):
            await raw_handshake(context, server.address)


async def test_a_session_is_never_resumed(consortium):
    async with await listening(consortium) as server:
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_session_cache_mode(SSL.SESS_CACHE_CLIENT)
        connection, reader, writer = await raw_handshake(context, server.address)
        await raw_echo(connection, reader, writer)
        session = connection.get_session()
        writer.close()
        again, reader, writer = await raw_handshake(context, server.address, session)
        await raw_echo(again, reader, writer)
        assert not lib.SSL_session_reused(again._ssl)
        writer.close()


async def test_garbage_ends_one_connection_and_not_the_service(consortium):
    async with await listening(consortium) as server:
        host, port = tls.parse_address(server.address)
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\x16\x03\x01\xff\xff" + bytes(2000)):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(garbage)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 5)
            writer.close()
        stream = await tls.connect(server.address, identity=None, verify=judge(consortium))
        await stream.write_frame(b"x", deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == b"x"
        await stream.aclose()


async def test_one_who_never_speaks_is_dropped_at_the_deadline(consortium):
    async with await listening(consortium, handshake_deadline_s=0.2) as server:
        host, port = tls.parse_address(server.address)
        reader, writer = await asyncio.open_connection(host, port)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_connections_beyond_the_bound_are_closed(consortium):
    async with await listening(consortium, max_connections=1) as server:
        first = await tls.connect(server.address, identity=None, verify=judge(consortium))
        with pytest.raises(MoorlineError):
            await tls.connect(server.address, identity=None, verify=judge(consortium))
        await first.aclose()


async def test_silent_peers_beyond_the_bound_make_room(consortium):
    async with await listening(consortium, max_connections=4) as server:
        host, _, port = server.address.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(12)]
        stream = await tls.connect(server.address, identity=None, verify=judge(consortium))
        await stream.write_frame(b"anybody?", deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == b"anybody?"
        await stream.aclose()
        for _, writer in silent:
            writer.transport.abort()


async def test_one_who_hangs_up_in_the_handshake_is_unavailable():
    async def reset(_reader, writer):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with await asyncio.start_server(reset, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        for _ in range(20):  # whether it is noticed while sending or receiving is a matter of luck
            with pytest.raises(Unavailable, match="peer.gone"):
                await tls.connect(f"{host}:{port}", identity=None, verify=lambda _: None)


async def test_nobody_there_is_unavailable(consortium, tmp_path):
    with pytest.raises(Unavailable) as caught:
        await tls.connect(f"unix:{tmp_path}/nobody", identity=None, verify=judge(consortium))
    assert caught.value.code == "peer.unreachable"


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", ":1", "a:99999", "a:b"])
def test_an_address_is_exact(address):
    with pytest.raises(MoorlineError) as caught:
        tls.parse_address(address)
    assert caught.value.code == "address.malformed"


async def test_a_key_of_another_certificate_is_a_misconfiguration(consortium):
    one, other = consortium.identity("device/d-1"), consortium.identity("device/d-2")
    mixed = tls.TlsIdentity(key=one.key, chain=other.chain)
    with pytest.raises(MoorlineError) as caught:
        await tls.connect("127.0.0.1:9", identity=mixed, verify=judge(consortium))
    assert caught.value.code == "tls.identity"


async def raw_handshake(context, address, session=None):
    host, port = tls.parse_address(address)
    reader, writer = await asyncio.open_connection(host, port)
    connection = SSL.Connection(context, None)
    connection.set_connect_state()
    if session is not None:
        connection.set_session(session)
    while True:
        try:
            connection.do_handshake()
            break
        except SSL.WantReadError:
            await raw_flush(connection, writer)
            connection.bio_write(await reader.read(65536) or b"\0")
    await raw_flush(connection, writer)
    return connection, reader, writer


async def raw_flush(connection, writer):
    with contextlib.suppress(SSL.WantReadError):
        while True:
            writer.write(connection.bio_read(65536))
    await writer.drain()


async def raw_echo(connection, reader, writer):
    connection.send(b"\0\0\0\1x")
    await raw_flush(connection, writer)
    answer = b""
    while not answer:
        try:
            answer = connection.recv(100)
        except SSL.WantReadError:
            connection.bio_write(await reader.read(65536))


async def test_no_end_of_ours_opens_a_connection_with_an_experimental_key(consortium):
    """verifies that: an ML-DSA-65 identity is refused before anything is sent, and says which kinds serve."""
    key = mldsa.MLDSA65PrivateKey.generate()
    leaf = consortium.leaf("svc/records/i-1", key=key).public_bytes(Encoding.DER)
    identity = tls.TlsIdentity(key=key, chain=(leaf, *consortium.intermediates))
    async with await listening(consortium, mutual=True) as server:
        with pytest.raises(Misconfigured) as caught:
            await tls.connect(server.address, identity=identity, verify=judge(consortium))
    assert caught.value.code == "tls.key_unsupported"


async def test_a_server_that_has_nothing_to_show_refuses_and_goes_on(consortium):
    """verifies that: while there is no identity connections are closed, and once there is one they are served."""
    shown = []

    def identity():
        if not shown:
            raise Misconfigured("test.no_identity", "not yet")
        return shown[0]

    async with await tls.listen("127.0.0.1:0", identity=identity, verify=None, accept=echo) as server:
        with pytest.raises(Unavailable):
            await tls.connect(server.address, identity=None, verify=judge(consortium))
        shown.append(consortium.identity("hsm/hsm-1", issuer=consortium.hsm))
        stream = await tls.connect(server.address, identity=None, verify=judge(consortium))
        await stream.write_frame(b"x", deadline_s=5)
        assert await stream.read_frame(deadline_s=5) == b"x"
        await stream.aclose()
