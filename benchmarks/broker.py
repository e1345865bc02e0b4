"""The broker: launch tokens consumed on both databases, keys from the pool over an established session, open sessions.

Each figure stands beside its limit in the same run: consumption beside bare durable commits of the same database, keys from the
pool beside keys made on demand over the same sessions, memory beside nothing at all.
"""

import asyncio
import contextlib
import gc
import hashlib
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import live

from moorline.cli.demo import attack_tools, hosting
from moorline.cli.demo.stage import Stage
from moorline.clock import Instant
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.storage.broker_launches import Launch
from moorline.storage.broker_pool import PoolEntry
from moorline.storage.broker_store import BrokerStore
from moorline.wire import launch, schema
from moorline.wire.guest import FunctionConfiguration
from moorline.wire.session import KeyKind, RekeyCall
from moorline.workload_agent.broker import attest
from moorline.workload_agent.launch import Launch as FunctionLaunch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from postgres import Cluster, programs

SECONDS = float(os.environ.get("MOOR_BENCH_SECONDS", "3"))
NOW = Instant(1_800_000_000)
LATER = Instant(NOW + 1000)
KEYS = int(os.environ.get("MOOR_BENCH_KEYS", "400"))
SESSIONS = 16
FEW = 4


# Launch tokens ---------------------------------------------------------------------------------------------------------


def wanted(number):
    digest = hashlib.sha256(number.to_bytes(8, "big")).digest()
    return Launch(
        launcher=b"L" * 32,
        epoch=1,
        sequence=number,
        kem_digest=digest,
        signing_digest=digest,
        session="benchmark",
        service="records",
        profile="tls",
        tenant="t",
        instance=f"i-{number}",
        generation=1,
        host="h1",
    )


def in_threads(count, work):
    """Calls of `work` a second by so many threads, for SECONDS."""
    numbers, done, until = itertools.count(), [0] * count, time.perf_counter() + SECONDS

    def run(index):
        while time.perf_counter() < until:
            work(next(numbers))
            done[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / SECONDS


def consumption(name, url):
    store = BrokerStore.open(url)
    store.admit_launcher(launcher=b"L" * 32, ticket=b"t", measurement=b"m", chip=b"c", session="l", at=NOW)
    store.open_epoch(epoch=1, opened=NOW, not_after=LATER, grace_s=0, wrapped=b"")
    store.grant_lease(launcher=b"L" * 32, epoch=1, count=1 << 40, not_after=LATER, counter=1, at=NOW)
    store.add_to_pool("records", "tls", [PoolEntry(public=b"%d" % n, wrapped=b"w") for n in range(60_000)])

    def bare(number):
        with store.transaction() as c:
            store.set_fact_in(c, "bare", number)

    first = itertools.count()
    limit = in_threads(1, bare)
    print(f"{name}, bare durable commits     {limit:8.0f} /s   1.00")
    for threads in (1, 8, 32):
        rate = in_threads(
            threads,
            lambda _: store.consume(
                wanted(next(first)),
                advance=lambda _c: None,
                not_after=LATER,
                at=NOW,
                storage=b"wrapped",
                nonce=b"n" * 32,
            ),
        )
        print(f"{name}, consumed, {threads:2d} at once       {rate:8.0f} /s   {rate / limit:.2f}")
    store.close()


@contextlib.contextmanager
def cluster(folder):
    """A PostgreSQL cluster on the disk that SQLite is on."""
    folder.mkdir()
    user = "postgres"
    if os.geteuid() == 0:
        import pwd

        for path in (folder.parent, folder):
            path.chmod(0o755)  # the server's user must get to its own folder
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    else:
        user = os.environ["USER"]
    made = Cluster(programs(), folder, user)
    made.run("initdb", "-D", str(made.data), "--auth=trust", "--encoding=UTF8", "--no-locale", "-U", user)
    made.start()
    try:
        yield made
    finally:
        made.stop("immediate")


# Keys over an established session --------------------------------------------------------------------------------------


async def function(world, silicon, instance):
    """A function's attested session."""
    return await attested(world, silicon, await attack_tools.mint(world, instance, life_s=300))


async def attested(world, silicon, made):
    fields = made.fields
    held = FunctionLaunch(
        encoded_fields=launch.encode_fields(fields),
        fields=fields,
        token=made.token,
        configuration=schema.decode(FunctionConfiguration, made.configuration),
        trust=world.consortium.trust,
        package=b"",
    )
    context = GuestContext(
        measurement=fields.measurement,
        host_data=launch.commitment(fields),
        policy=guest_policy(debug=False),
        report_id=os.urandom(32),
    )
    return await attest(world.alpha.sessions, held, live.ChipReports(silicon, context))


async def rekeyed(world, links, kind, count):
    """Keys a second, a second of the broker's CPU, and the 99th percentile in ms."""
    call, took = schema.encode(RekeyCall(kind=kind)), []

    async def one(link):
        for _ in range(count // len(links)):
            started = time.perf_counter()
            await link._session.call("rekey", call)  # noqa: SLF001 - the link has no public way to ask for many
            took.append(time.perf_counter() - started)

    gc.collect()
    gc.freeze()  # this process holds the whole demo: its garbage collector must not be in the broker's percentiles
    gc.disable()
    before, started = live.cpu_seconds(world.alpha.broker.pid), time.perf_counter()
    await asyncio.gather(*(one(link) for link in links))
    gc.enable()
    wall, cpu = time.perf_counter() - started, live.cpu_seconds(world.alpha.broker.pid) - before
    return len(took) / wall, len(took) / max(cpu, 0.01), statistics.quantiles(took, n=100)[98] * 1000


async def filled(world, kind):
    async with world.alpha.admin() as admin:
        while True:
            pools = (await admin.get_json("/v1/pool"))["pools"]
            if any(one["profile"] == kind.value and one["ready"] >= KEYS for one in pools):
                return
            await asyncio.sleep(0.2)


def shown(kind, how, flying, measured, demand):
    wall, core, p99 = measured
    ratio = core / demand[1]
    print(
        f"{kind.value:9s} {how:13s} {flying:3d} at once {wall:6.0f} /s {core:6.0f} /s/core   p99 {p99:6.1f} ms   {ratio:.2f}"
    )


async def pools(folder):
    os.environ.update(MOOR_BROKER_POOL_HIGH=str(KEYS), MOOR_BROKER_POOL_LOW="1")
    stage = Stage(folder, keep=False)
    world = None
    try:
        world = await live.build(stage)
        silicon = Silicon(hosting.host(world, "h1").chip)
        links = [await function(world, silicon, f"pool-{number}") for number in range(SESSIONS)]
        for kind, count in ((KeyKind.P256, KEYS), (KeyKind.RSA2048, 100)):
            demand = await rekeyed(world, links, kind, SESSIONS * 5)  # nothing is ready yet
            if kind is KeyKind.RSA2048:
                await asyncio.sleep(15)
            shown(kind, "on demand", SESSIONS, demand, demand)
            for flying in (FEW, SESSIONS):
                if kind is KeyKind.P256:
                    await filled(world, kind)
                shown(kind, "from the pool", flying, await rekeyed(world, links[:flying], kind, count // 2), demand)
        # Each session has one request in flight, and asks again at once. CPU is all of the broker's: renewal checks, the next
        # keys for the pool, certificates, transactions. With so many in flight, the p99 of a machine that is not alone is its.
        print("(target 1,000 /s/core from the pool, p99 10 ms; client and broker on the same cores)")
        for link in links:
            await link.aclose()
    finally:
        if world is not None:
            with contextlib.suppress(Exception):
                await world.aclose()
        stage.close()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="moor-bench-") as name:
        folder = Path(name)
        consumption("SQLite    ", f"sqlite:///{folder / 'broker.db'}")
        if programs() is not None:
            with cluster(folder / "pg") as made:
                consumption("PostgreSQL", made.url())
    with tempfile.TemporaryDirectory(prefix="moor-bench-") as name:
        asyncio.run(pools(Path(name)))


if __name__ == "__main__":
    main()
