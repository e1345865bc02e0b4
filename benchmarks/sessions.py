"""Thousands of open sessions in one broker process: what each costs in memory, in descriptors, and those who ask meanwhile.

Each is a real attested session over TLS 1.3 with evidence, launch and certificate, opened by this process against alpha's
broker. The first few hundred warm the broker up (code, pools, caches) and are not counted. The limit beside it is a bare TLS
connection of the same library, both ends' buffers released.
"""

import asyncio
import contextlib
import gc
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import broker as pools
import live
from OpenSSL import SSL

from moorline.channel.identity import TlsIdentity, settings
from moorline.cli.demo import hosting
from moorline.cli.demo.stage import Stage
from moorline.simulators.silicon import Silicon

COUNT = int(os.environ.get("MOOR_BENCH_SESSIONS", "5000"))
WARM = 200
AT_ONCE = 8


def resident_kib(pid):
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1])
    raise SystemExit("the kernel does not say")


def bare_kib():
    """What the library alone keeps of a TLS connection that was established and is silent."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding

    from moorline.clock import Instant, Validity
    from moorline.wire import certificates

    key = ec.generate_private_key(ec.SECP256R1())
    root = certificates.root_certificate(
        key, name="bare", validity=Validity(not_before=Instant(0), not_after=Instant(1 << 32)), serial=1
    )
    identity = TlsIdentity(key=key, chain=(root.public_bytes(Encoding.DER),))
    server_context, client_context = settings(identity), settings(None)
    kept = []
    for _ in range(600):
        server, client = SSL.Connection(server_context, None), SSL.Connection(client_context, None)
        server.set_accept_state()
        client.set_connect_state()
        for one, other in ((client, server), (server, client), (client, server)):
            with contextlib.suppress(SSL.WantReadError):
                one.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                other.bio_write(one.bio_read(1 << 16))
        with contextlib.suppress(SSL.WantReadError):
            server.do_handshake()
        kept.append(server)
        if len(kept) == 100:
            gc.collect()
            before = resident_kib(os.getpid())
    gc.collect()
    return (resident_kib(os.getpid()) - before) / 500


async def opened(world, silicon, names, links):
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(name):
        async with gate:
            links.append(await pools.function(world, silicon, name))

    await asyncio.gather(*(one(name) for name in names))


async def served(link):
    """How long a renewal takes, with all the others open."""
    took = []
    for _ in range(30):
        started = time.perf_counter()
        await link._session.call("renew", b"")  # noqa: SLF001 - the link says when it renews by itself
        took.append((time.perf_counter() - started) * 1000)
    return statistics.median(took)


async def measured(directory):
    os.environ.update(MOOR_BROKER_LEASE_COUNT=str(2 * COUNT), MOOR_BROKER_POOL_HIGH="256")
    stage = Stage(directory, keep=False)
    world, links = None, []
    try:
        world = await live.build(stage)
        pid = world.alpha.broker.pid
        silicon = Silicon(hosting.host(world, "h1").chip)
        await opened(world, silicon, [f"warm-{number}" for number in range(WARM)], links)
        alone, before = await served(links[0]), resident_kib(pid)
        started, cpu = time.perf_counter(), live.cpu_seconds(pid)
        await opened(world, silicon, [f"open-{number}" for number in range(COUNT - WARM)], links)
        took, used = time.perf_counter() - started, live.cpu_seconds(pid) - cpu
        after = resident_kib(pid)
        crowded = await served(links[-1])
        alive = sum(not link._session.closed for link in links)  # noqa: SLF001 - as above
        print(
            f"open sessions                 {alive:8d}      in one process, {before / 1024:.0f} MiB before, {after / 1024:.0f} after"
        )
        print(f"bare TLS connection           {bare_kib():8.1f} KiB  1.00")
        each = (after - before) / (COUNT - WARM)
        print(f"memory an attested session    {each:8.1f} KiB  (the broker's own pages, whatever they hold)")
        print(
            f"opened meanwhile              {(COUNT - WARM) / took:8.0f} /s   {(COUNT - WARM) / used:.0f} /s a core of the broker"
        )
        print(f"a renewal with {WARM:5d} open     {alone:8.1f} ms")
        print(f"a renewal with {alive:5d} open     {crowded:8.1f} ms")
    finally:
        if world is not None:
            with contextlib.suppress(Exception):
                await world.aclose()
        stage.close()


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < COUNT + 512:
        raise SystemExit(f"this process may open {most} descriptors; {COUNT} sessions need more")
    with tempfile.TemporaryDirectory(prefix="moor-bench-") as folder:
        asyncio.run(measured(Path(folder)))
