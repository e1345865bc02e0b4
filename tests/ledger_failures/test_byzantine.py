"""One of four authorities lies, in every way with a name: the honest ones keep one history, evidence names it."""

import asyncio
import json
from pathlib import Path

import pytest

from moorline.errors import MoorlineError

from .cluster import FIRST, FOURTH, SECOND, THIRD, Cluster, addresses, consortium, moor

pytestmark = [pytest.mark.story, pytest.mark.timeout(300)]
HONEST = (SECOND, THIRD, FOURTH)
SHOWN = {"invalid": "invalid-block", "misstated": "wrong-execution", "backwards": "time-runs-back"}


@pytest.fixture
def cluster(tmp_path):
    return Cluster(consortium(tmp_path, addresses()))


async def evidence(cluster):
    """What `moor ledger evidence list` shows, once there is something."""
    genesis = cluster.real.made.directory / "genesis.cbor"
    while True:
        code, said = await moor("ledger", "evidence", "list", "--genesis", genesis, "--json")
        assert code == 0, said
        found = json.loads(said)["evidence"]
        if found:
            return found
        await asyncio.sleep(0.3)


async def test_a_sequencer_that_shows_two_blocks_is_named_and_replaced(cluster, tmp_path):
    """verifies that: one history; the evidence names the maker and verifies offline from a file; a changed one does not."""
    async with cluster.running({FIRST: "two_blocks"}):
        await cluster.write(through=THIRD)
        found = await evidence(cluster)
        assert {one for row in found for one in row["offenders"]} == {FIRST}
        directory, file = cluster.real.made.directory, tmp_path / "evidence.cbor"
        arguments = (found[0]["id"], "--genesis", directory / "genesis.cbor", "-o", file)
        assert (await moor("ledger", "evidence", "export", *arguments))[0] == 0
        code, said = await moor("ledger", "evidence", "verify", file, "--trust", directory / "trust.toml")
        assert (code, FIRST in said) == (0, True), said
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        assert (await moor("ledger", "evidence", "verify", file, "--trust", directory / "trust.toml"))[0] in {1, 2}
        await cluster.one_history(HONEST)
        await cluster.processes[FIRST].kill()
        await cluster.promote(SECOND, HONEST)
        await cluster.write(through=THIRD)
        await cluster.same(HONEST)


async def test_a_cosigner_that_signs_two_heads_is_named(cluster):
    async with cluster.running({FOURTH: "two_heads"}):
        await cluster.write()
        await cluster.processes[THIRD].kill()  # from now on the liar's signature is in the notes
        await cluster.write()
        await cluster.write()
        found = await evidence(cluster)
        assert [row["offenders"] for row in found] == [[FOURTH]] * len(found)
        assert not any(row["forked"] for row in found)
        await cluster.processes[THIRD].start()
        await cluster.write()
        await cluster.one_history((FIRST, SECOND, THIRD))


async def test_a_sequencer_that_lies_about_time_makes_no_block_and_a_late_cosigner_no_harm(cluster):
    """verifies that: nobody signs a block of yesterday; a cosigner whose clock is a day off signs nothing, and has the same
    state as everybody."""
    async with cluster.running({FOURTH: "clock_off"}):
        await cluster.write()
        await cluster.same((FIRST, SECOND, THIRD))
        await cluster.one_history((FIRST, SECOND, THIRD))
        height = (await cluster.head(SECOND)).height
        await cluster.processes[FIRST].kill()
        await cluster.processes[FIRST].start(odd="clock_off")
        await asyncio.sleep(2.5)
        assert (await cluster.head(SECOND)).height == height
        await cluster.processes[FOURTH].kill()
        await cluster.processes[FOURTH].start()
        await cluster.promote(SECOND, HONEST)
        await cluster.write(through=THIRD)
        await cluster.same(HONEST)


@pytest.mark.parametrize(
    "lie", ["misstated", *(pytest.param(lie, marks=pytest.mark.long) for lie in ("invalid", "backwards", "censor"))]
)
async def test_a_sequencer_that_cheats_its_senders_is_replaced_by_the_operators(cluster, lie):
    """verifies that: blocks with invalid transactions, of another state than the rules give, or of a time that runs back,
    get no signature and name their maker; a censored sender gets no receipt, of which there is no evidence; after the
    operators' word the same transaction is in the ledger."""
    async with cluster.running({FIRST: lie}):
        await cluster.same()
        waiting = asyncio.ensure_future(cluster.write(by=THIRD, through=THIRD))
        await asyncio.sleep(1.5)
        assert not waiting.done()
        named = [(row["kind"], row["offenders"]) for row in (await evidence(cluster) if lie in SHOWN else [])]
        assert all(one == (SHOWN[lie], [FIRST]) for one in named)
        await cluster.promote(SECOND, HONEST)
        await cluster.processes[FIRST].kill()
        await waiting
        await cluster.same(HONEST)
        if lie == "invalid":
            assert "ledger.block_invalid" in cluster.processes[FIRST].log()


def faketime():
    """Debian's libfaketime; it is preloaded, so it turns the clock of what asks libc: Python, and not Go (CometBFT)."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@pytest.mark.long
@pytest.mark.skipif(faketime() is None, reason="libfaketime is not installed")
@pytest.mark.parametrize("days", [-1, 1])
async def test_a_clock_that_is_a_day_off_for_all_its_authority_does_changes_no_history(cluster, days):
    """verifies that: the whole process lives a day off, certificates and all: it serves nobody and follows nobody; others
    go on, and with its clock right it has their history."""
    victim = cluster.processes[FOURTH]
    async with cluster.running():
        await cluster.write()
        await cluster.same()
        await victim.kill()
        words = (f"LD_PRELOAD={faketime()}", f"FAKETIME={days:+}d", "FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1")
        victim.prefix = ["env", *words]
        await victim.start()
        height, _ = await cluster.write()
        await cluster.same((FIRST, SECOND, THIRD))
        with pytest.raises(MoorlineError):
            await cluster.head(FOURTH)
        victim.prefix = []
        await victim.kill()
        await victim.start()
        await cluster.same()
        assert await cluster.one_history() >= height
