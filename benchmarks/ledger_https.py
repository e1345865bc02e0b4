"""Transactions through an authority's HTTPS interface: one a request, and a hundred a request.

    ./dev bench ledger_https

The sequencer is a process of its own, as a service is: uvicorn, TLS 1.3, its engine with a worker beside. The cosigners are
charged with their signatures only, as if they ran on machines of their own (benchmarks/ledger.py, "others elsewhere"). The
senders are this process, on the same two cores: connections with a client certificate (mTLS), requests put together before the
clock starts, answers read to their end and no further. Beside it what the same engine takes without HTTPS, in this run.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ledger as engine_alone
from ledger import NAMES, Chain, Elsewhere, Telling, World, made_world
from moorline.clock import Instant
from moorline.ledger import batch, ceremony, checkpoint
from moorline.ledger.engines.node import Node
from moorline.ledger.engines.office import Office
from moorline.ledger.engines.verifiers import Verifiers
from moorline.services.authority import collect_rarely
from moorline.services.authority_routes import authority_app
from moorline.services.http import TlsIdentity, serve

SENT = 4_000
SINGLE = 150
CONNECTIONS = 100
BATCH = 100
IN_FLIGHT = 3


class Alone(Office):
    """An authority that sequences, with cosigners elsewhere."""

    def _sequencer(self) -> Telling:
        return Telling(self.node, self._peers, verifiers=self._verifiers)

    async def _ask_around(self) -> None:
        """Nobody else is here."""


def identity_of(world: World, name: str) -> TlsIdentity:
    chain, key = ceremony.tls_identity(world.authorities[name], "consortium.test", now=Instant(int(time.time())))
    return TlsIdentity(chain_pem=chain, key_pem=key)


async def served(world: World, node: Node) -> None:
    verifiers = Verifiers()
    await verifiers.started()
    office = Alone(node, {name: Elsewhere(world, name) for name in NAMES[1:]}, verifiers=verifiers)
    task = asyncio.ensure_future(office.run())
    collect_rarely()
    await serve(
        authority_app(node, office),
        listen="127.0.0.1:0",
        identity=identity_of(world, NAMES[0]),
        client_roots_pem=ceremony.pem_of(world.made.genesis.roots),
        ready=lambda address: print(address, flush=True),
    )
    task.cancel()


class Door:
    """One kept connection to the authority."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def opened(cls, address: str, context: ssl.SSLContext, name: str) -> Door:
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name))

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer; whatever is no 200 ends the benchmark."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        return await self.reader.readexactly(int(length))


def request(target: str, body: bytes) -> bytes:
    head = f"POST {target} HTTP/1.1\r\nhost: a\r\ncontent-type: application/cbor\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def client_context(world: World, folder: Path) -> tuple[ssl.SSLContext, str]:
    """With a certificate of another authority, and the name that the first one's certificate has."""
    context = ssl.create_default_context(cadata=ceremony.pem_of(world.made.genesis.roots).decode())
    shown = identity_of(world, NAMES[1])
    file = folder / "client.pem"
    file.write_bytes(shown.chain_pem + shown.key_pem)
    context.load_cert_chain(file)
    return context, world.made.endpoints[0].server_name


async def sent_through(address: str, world: World, folder: Path, requests: Sequence[bytes], *, doors: int) -> list[float]:
    """How long all of them took, and then each; seconds."""
    context, name = client_context(world, folder)
    opened = [await Door.opened(address, context, name) for _ in range(doors)]
    left, took = iter(requests), []

    async def through(door: Door) -> None:
        for one in left:
            began = time.perf_counter()
            answer = await door.ask(one)
            took.append(time.perf_counter() - began)
            if one.startswith(b"POST /v1/transactions/batch"):
                assert all(isinstance(found, bytes) for found in batch.parse_answers(answer, BATCH))

    began = time.perf_counter()
    await asyncio.gather(*map(through, opened))
    whole = time.perf_counter() - began
    for door in opened:
        door.writer.close()
    return [whole, *took]


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def height_at(address: str, world: World, folder: Path) -> int:
    context, name = client_context(world, folder)
    door = await Door.opened(address, context, name)
    note = await door.ask(b"GET /v1/checkpoint HTTP/1.1\r\nhost: a\r\n\r\n")
    door.writer.close()
    return checkpoint.parse_note(note).checkpoint.height


def prepared(world: World, height: int, start: int, a_request: int, count: int) -> list[bytes]:
    sent = world.revocations(count, height, start << 40)
    if a_request == 1:
        return [request("/v1/transactions", one) for one in sent]
    parts = [sent[at : at + a_request] for at in range(0, count, a_request)]
    return [request("/v1/transactions/batch", batch.encode(part)) for part in parts]


def measured(world: World, folder: Path, address: str, pid: int) -> None:
    for start, (a_request, doors, count) in enumerate(
        ((1, CONNECTIONS, SENT), (BATCH, 1, SENT), (BATCH, IN_FLIGHT, SENT), (1, 1, SINGLE)), start=8
    ):
        height = asyncio.run(height_at(address, world, folder))
        requests, before = prepared(world, height, start, a_request, count), cpu_of(pid)
        whole, *took = asyncio.run(sent_through(address, world, folder, requests, doors=doors))
        cpu, took = (cpu_of(pid) - before) / count * 1e6, sorted(took)
        print(
            f"   {a_request:>3} a request, {doors:>3} connections {count / whole:8,.0f} tx/s"
            f"   {cpu:4.0f} us of the authority's CPU a transaction"
            f"   request p50 {statistics.median(took) * 1e3:6.1f} p99 {took[int(len(took) * 0.99)] * 1e3:6.1f} ms"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        world = made_world(folder)
        node = world.node(NAMES[0])
        chain = Chain(world, node)
        chain.admit()
        chain.grow(1_000, 0, "1,000 keys")
        peers = {name: Elsewhere(world, name) for name in NAMES[1:]}
        for groups in (1, IN_FLIGHT):
            found, cpu, _ = engine_alone.rate(
                world, node, lambda verifiers: Telling(node, peers, verifiers=verifiers), groups=groups, start=groups << 40
            )
            print(f"   without HTTPS, {groups} batch of {BATCH} in flight      {found:8,.0f} tx/s   {cpu:4.0f} us of CPU")
        node.store.close()
        kept = folder / "world.pickle"
        kept.write_bytes(pickle.dumps((world.made, str(folder))))
        with subprocess.Popen([sys.executable, __file__, str(kept)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                address = process.stdout.readline().strip()
                measured(world, folder, address, process.pid)
            finally:
                process.terminate()


def serve_what_is_kept(kept: Path) -> None:
    made, folder = pickle.loads(kept.read_bytes())
    loaded = {name: ceremony.load_authority(made.directory / "authorities" / name) for name in NAMES}
    world = World(made, loaded, None, Path(folder))
    asyncio.run(served(world, world.node(NAMES[0])))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve_what_is_kept(Path(sys.argv[1]))
    else:
        main()
