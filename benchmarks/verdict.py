"""A verdict falls: how long until the broker acts on it, for each of many functions on that host.

One host of the demo really drifts (a program that nobody allowed runs into its IMA list and PCR 10), its agent attests, and the
authority's event becomes durable: that moment is zero, seen in the authority's database. Then, function by function: the push
that ends its session, the first renewal that is refused, and the first launch to which no sealed key is given any more. The
limit beside it is one request to the broker over an open session.
"""

import asyncio
import contextlib
import os
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import broker as pools
import live

from moorline.cli.demo import attack_tools, drifting, hosting
from moorline.cli.demo.stage import Stage
from moorline.errors import MoorlineError
from moorline.simulators.silicon import Silicon

FUNCTIONS = int(os.environ.get("MOOR_BENCH_FUNCTIONS", "60"))
RENEWING = 10
LAUNCHES = 80
DEADLINE_S = 60


async def fallen(database):
    """When the authority's loss of h1 became durable (monotonic seconds)."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
        query = "SELECT count(*) FROM events WHERE host = 'h1' AND kind = 'verdict_lost'"
        (before,) = reader.execute(query).fetchone()
        while reader.execute(query).fetchone() == (before,):
            await asyncio.sleep(0.001)
        return time.perf_counter()


async def ended(link):
    why = await link._session.ended()  # noqa: SLF001 - the link says it only to its own function
    return time.perf_counter(), why.code


async def renewals(link):
    """When a renewal is not answered any more, and why."""
    try:
        while True:
            await link._session.call("renew", b"")  # noqa: SLF001 - as above
            await asyncio.sleep(0.02)
    except MoorlineError as error:
        return time.perf_counter(), error.code


async def launches(world, silicon, minted):
    """When a launch gets no sealed key any more, and why."""
    for made in minted:
        try:
            link = await pools.attested(world, silicon, made)
        except MoorlineError as error:
            return time.perf_counter(), error.code
        await link.aclose()
    return time.perf_counter(), "all launches were released"


def shown(what, outcomes, zero):
    after = sorted((at - zero) * 1000 for at, _ in outcomes)
    codes = ", ".join(sorted({code for _, code in outcomes}))
    p99 = statistics.quantiles(after, n=100)[98] if len(after) > 1 else after[0]
    print(f"{what:24s} {len(after):4d}   p50 {statistics.median(after):8.1f} ms   p99 {p99:8.1f} ms   {codes}")


async def request_ms(link):
    took = []
    for _ in range(50):
        started = time.perf_counter()
        await link._session.call("time", b"")  # noqa: SLF001 - as above
        took.append(time.perf_counter() - started)
    return statistics.median(took) * 1000


async def measured(directory):
    stage = Stage(directory, keep=False)
    world = None
    try:
        world = await live.build(stage)
        silicon = Silicon(hosting.host(world, "h1").chip)
        minted = [await attack_tools.mint(world, f"released-{number}", life_s=300) for number in range(LAUNCHES)]
        links = [await pools.function(world, silicon, f"drift-{number}") for number in range(FUNCTIONS + RENEWING)]
        bare = await request_ms(links[0])
        watching = asyncio.create_task(fallen(stage.path("alpha", "verifier") / "verifier.db"))
        pushed = [asyncio.create_task(ended(link)) for link in links[:FUNCTIONS]]
        refused = [asyncio.create_task(renewals(link)) for link in links[FUNCTIONS:]]
        await asyncio.to_thread(drifting._run_something, hosting.host(world, "h1"))  # noqa: SLF001 - the demo's own drift
        withheld = asyncio.create_task(launches(world, silicon, minted))
        async with asyncio.timeout(DEADLINE_S):
            zero = await watching
            outcomes = [await asyncio.gather(*pushed), await asyncio.gather(*refused), [await withheld]]
    finally:
        if world is not None:
            with contextlib.suppress(Exception):
                await world.aclose()
        stage.close()
    print(f"a request over a session         p50 {bare:8.1f} ms")
    for what, found in zip(("session ended by push", "renewal refused", "sealed key withheld"), outcomes, strict=True):
        shown(what, found, zero)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="moor-bench-") as folder:
        asyncio.run(measured(Path(folder)))
