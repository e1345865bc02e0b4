"""Bad peers at every port of every service: garbage, half-open connections, stalled ones, slow readers. Others are served.

`PORTS` lists every socket that any process of a running system listens on; `test_no_port_is_left_out` compares it with what
the kernel says. For each there is an honest request, whose answer is the proof that the service still serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.channel.messages import pack, reported, unpack_any
from moorline.cli.demo import federating, hosting
from moorline.cli.demo.world import AUTHORITIES, HSM, ORCHESTRATOR, VERIFIER
from moorline.errors import MoorlineError, Unavailable, from_problem
from moorline.host_agent.silicon import SiliconClient
from moorline.nfv import Role
from moorline.services.orchestrator_peers import LauncherLink
from moorline.wire import cbor, frames, keys, schema
from moorline.wire.http import HttpClient
from moorline.wire.launch import ChannelProfile
from moorline.wire.orchestration import LaunchReply
from moorline.wire.session import EvidenceFormat, Hello, Problem, SessionRole

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]

SERVED_S = 10.0
HALF_OPEN = 100
STALLED = 30
SLOW = 6


@dataclass(frozen=True)
class Port:
    """A listening socket: where it is, in what a peer talks, and an honest request that returns when it was answered."""

    address: Callable[[Any], str]
    speaks: str  # "https", "http", "frames", "tls-frames"
    honest: Callable[[Any], Awaitable[object]]


# Honest requests ---------------------------------------------------------------------------------------------------------


def https(address: Callable[[Any], str], name: Callable[[Any], str], path: str, *, operator: bool = False) -> Port:
    async def ask(system: Any) -> None:
        world = system.world
        identity = world.facts["operator"] if operator else None
        async with HttpClient(
            f"https://{address(system)}", server_name=name(system), roots_pem=world.roots_pem, identity=identity
        ) as client:
            await client.get_bytes(path)

    return Port(address, "https", ask)


async def ask_admin(system: Any) -> None:
    async with system.world.alpha.admin() as admin:
        await admin.get_json("/v1/pool")


async def ask_host_agent(system: Any) -> None:
    """Its only caller is the orchestrator: an operator is refused, in words."""
    port = PORTS["host agent"]
    async with HttpClient(
        f"https://{port.address(system)}",
        server_name=system.world.alpha.name_of(Role.HOST, "h1"),
        roots_pem=system.world.roots_pem,
        identity=system.world.facts["operator"],
    ) as client:
        with pytest.raises(MoorlineError, match="http.not_authorised"):
            await client.get_json("/v1/guests")


async def ask_session(system: Any) -> None:
    """A hello is answered with a challenge."""
    hello = Hello(
        version=1,
        role=SessionRole.FUNCTION,
        formats=(EvidenceFormat.SNP,),
        kem_public=ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint),
        signing_public=keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key()),
        profile=ChannelProfile.TLS,
        fields=b"",
    )
    reader, writer = await connected(system, PORTS["broker sessions"])
    writer.write(frames.frame(pack(hello)))
    await writer.drain()
    kind, _ = unpack_any(await frames.read_frame(reader, deadline_s=SERVED_S))
    writer.transport.abort()
    assert kind == "challenge"


async def ask_launcher(system: Any) -> None:
    """An intent that is none is answered with a typed refusal."""
    reply = schema.decode(LaunchReply, await LauncherLink(system.world.facts["launcher_address"]).exchange(b"\xa0"))
    assert reply.grant is None
    assert from_problem(cbor.decode(reply.problem or b"")).code == "message.fields"


async def ask_function(system: Any) -> None:
    await federating.store_and_read(system.world, "device-1")


async def ask_silicon(system: Any) -> None:
    client = SiliconClient(hosting.silicon_socket(system.world, "h1"))
    assert (await client.status("records-1")).state == "running"


def named(role: Role, identifier: str, provider: str = "alpha") -> Callable[[Any], str]:
    return lambda system: system.world.providers[provider].name_of(role, identifier)


def authority(number: int) -> Port:
    return https(
        lambda system: system.world.consortium.endpoints[number].url.removeprefix("https://"),
        lambda system: system.world.consortium.endpoints[number].server_name,
        "/v1/checkpoint",
    )


PORTS = {
    "sequencer": authority(0),
    "cosigner": authority(1),
    "broker sessions": Port(lambda system: system.world.alpha.sessions, "tls-frames", ask_session),
    "broker https": https(lambda system: system.world.alpha.https, named(Role.HSM, HSM), "/v1/ca-bundle"),
    "broker admin": Port(lambda system: f"unix:{system.world.alpha.admin_socket}", "http", ask_admin),
    "verifier": https(
        lambda system: system.world.facts["verifier_address"], named(Role.VERIFIER, VERIFIER), "/v1/hosts", operator=True
    ),
    "orchestrator": https(
        lambda system: system.world.facts["orchestrator_address"],
        named(Role.ORCHESTRATOR, ORCHESTRATOR),
        "/v1/functions",
        operator=True,
    ),
    "host agent": Port(lambda system: hosting.host(system.world, "h1").address, "https", ask_host_agent),
    "launcher": Port(lambda system: system.world.facts["launcher_address"], "frames", ask_launcher),
    "function": Port(lambda system: system.world.facts["function"]["address"], "tls-frames", ask_function),
    "silicon": Port(lambda system: f"unix:{hosting.silicon_socket(system.world, 'h1')}", "frames", ask_silicon),
}


async def served(system: Any, name: str) -> None:
    """An honest peer gets its answer, in time; it asks again if it was turned away for the moment."""
    async with asyncio.timeout(SERVED_S):
        while True:
            with contextlib.suppress(Unavailable):
                await PORTS[name].honest(system)
                return
            await asyncio.sleep(0.1)


# The stories ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PORTS)
async def test_garbage_ends_its_connection_only(system, name):
    port = PORTS[name]
    for garbage in (
        os.urandom(4096),
        b"\x00" * 4096,
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x40\x00" * 100,
    ):
        reader, writer = await dialled(port.address(system))
        writer.write(garbage)
        with contextlib.suppress(ConnectionError):
            writer.write_eof()
            async with asyncio.timeout(SERVED_S):
                await reader.read()  # until the service hangs up
        writer.transport.abort()
    await served(system, name)


@pytest.mark.parametrize("name", PORTS)
async def test_garbage_in_the_protocol_is_refused_in_words(system, name):
    """Inside TLS where there is TLS: the peer learns a code. A function's port lets nobody talk who shows no certificate."""
    port = PORTS[name]
    if port.speaks in ("https", "http"):
        answer = await said(system, port, b"\x01\x02\x03 nonsense\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
        assert b"http.request_malformed" in answer
        await served(system, name)
        return
    answer = await said(system, port, frames.frame(b"\x01\x02\x03 nonsense"))
    if name == "function":
        assert answer == b""  # TLS 1.3 itself refuses, with the alert certificate_required
    else:
        code = code_of(name, frames_in(answer))
        assert code.split(".")[0] in ("message", "cbor", "session"), code
    await served(system, name)


@pytest.mark.parametrize("name", PORTS)
async def test_a_huge_frame_or_body_is_not_waited_for(system, name):
    port = PORTS[name]
    if port.speaks in ("https", "http"):
        answer = await said(system, port, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert b"http.body_too_large" in answer, answer[:200]
    else:
        answer = await said(system, port, (64 << 20).to_bytes(frames.HEADER, "big") + b"x")
        assert answer == b"" if name == "function" else code_of(name, frames_in(answer)) == "frame.too_large"
    await served(system, name)


@pytest.mark.parametrize("name", PORTS)
async def test_half_open_connections_shut_nobody_out(system, name):
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(HALF_OPEN):
            _, writer = await dialled(PORTS[name].address(system))
            stack.callback(writer.transport.abort)
        await served(system, name)


@pytest.mark.parametrize("name", PORTS)
async def test_stalled_peers_shut_nobody_out(system, name):
    """They begin to speak as honest peers do, and stop in the middle."""
    port = PORTS[name]
    start = {
        "http": b"POST /v1/epochs HTTP/1.1\r\nhost: x\r\ncontent-le",
        "https": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf",
        "frames": (1000).to_bytes(frames.HEADER, "big") + b"half",
        "tls-frames": (1000).to_bytes(frames.HEADER, "big") + b"half",
    }[port.speaks]
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(STALLED):
            _, writer = await connected(system, port)
            stack.callback(writer.transport.abort)
            writer.write(start)
            await writer.drain()
        await served(system, name)


@pytest.mark.parametrize("name", PORTS)
async def test_slow_readers_shut_nobody_out(system, name):
    """They ask and ask, and read no answer."""
    port = PORTS[name]
    ask = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" if port.speaks in ("https", "http") else frames.frame(b"\xa0")
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(SLOW):
            _, writer = await connected(system, port, receive_buffer=4096)
            stack.callback(writer.transport.abort)
            writer.transport.pause_reading()
            for _ in range(200):
                writer.write(ask)
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.5):  # the service stops reading when we do not: then there is nothing to drain
                    await writer.drain()
        await served(system, name)


async def test_a_crowd_of_silent_peers_shuts_nobody_out(system):
    """More connections than the service keeps open, all with TLS done, none with a question."""
    port = PORTS["verifier"]
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(300):
            _, writer = await connected(system, port)
            stack.callback(writer.transport.abort)
        await served(system, "verifier")


async def test_no_port_is_left_out(system):
    """What the kernel says the processes listen on, one of each kind of process, is what was tested here."""
    listening = {
        name: sockets_of(system.stage.processes[name].pid)
        for name in (*AUTHORITIES[:2], "broker-alpha", "verifier", "orchestrator", "host-h1", "launcher", "silicon-h1")
    }
    known = {port.address(system) for port in PORTS.values()}
    inside = ("/out-broker", "/in")  # sockets in a guest's own directory: the guest's end of a relay
    found = {address for addresses in listening.values() for address in addresses if not address.endswith(inside)}
    assert found <= known, found - known
    assert all(listening.values()), listening


async def test_everybody_is_still_there(system):
    assert system.stage.dead() == []
    for name in PORTS:
        await served(system, name)


# Peers -------------------------------------------------------------------------------------------------------------------


async def dialled(address: str, *, receive_buffer: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A plain connection."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        where: Any = address.removeprefix("unix:")
    else:
        sock = socket.socket()
        host, _, port = address.rpartition(":")
        where = (host, int(port))
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
    await asyncio.get_running_loop().sock_connect(sock, where)
    return await asyncio.open_connection(sock=sock)


async def connected(
    system: Any, port: Port, *, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection in the port's protocol: with TLS done, where it begins with TLS."""
    reader, writer = await dialled(port.address(system), receive_buffer=receive_buffer)
    if port.speaks in ("https", "tls-frames"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        async with asyncio.timeout(SERVED_S):
            await writer.start_tls(context)
    return reader, writer


async def said(system: Any, port: Port, first: bytes) -> bytes:
    """Everything the service answers to `first`, until it hangs up or falls silent."""
    reader, writer = await connected(system, port)
    answer = bytearray()
    try:
        writer.write(first)
        with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
            while True:
                async with asyncio.timeout(2.0):
                    part = await reader.read(65536)
                if not part:
                    break
                answer += part
    finally:
        writer.transport.abort()
    return bytes(answer)


def frames_in(answer: bytes) -> bytes:
    assert len(answer) > frames.HEADER, answer
    return answer[frames.HEADER : frames.HEADER + int.from_bytes(answer[: frames.HEADER], "big")]


def code_of(name: str, body: bytes) -> str:
    """The code of a refusal, as the protocol of that port carries it."""
    if name == "launcher":
        reply = schema.decode(LaunchReply, body)
        return from_problem(cbor.decode(reply.problem or b"")).code
    if name == "silicon":
        kind, problem = cbor.decode(body)
        assert kind == "problem"
        return from_problem(problem).code
    kind, item = unpack_any(body)
    assert kind == "problem"
    return reported(schema.from_item(Problem, item).problem).code


def sockets_of(pid: int) -> list[str]:
    """The listening sockets of a process, as addresses."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text("ascii").splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            host, port = fields[1].split(":")
            found.append(f"{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}")
    for line in Path(f"/proc/{pid}/net/unix").read_text("utf-8").splitlines()[1:]:
        fields = line.split()
        if fields[3] == "00010000" and fields[6] in inodes and len(fields) > 7:
            found.append(f"unix:{fields[7]}")
    return found
