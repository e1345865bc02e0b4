"""Disks that are full, damaged, torn or lost: refused by name, repaired from the others on command. Four real processes."""

import asyncio
import contextlib
import os
import sqlite3

import pytest

from moorline.errors import MoorlineError
from small_disk import small_disk

from .cluster import FIRST, FOURTH, NAMES, SECOND, THIRD, Cluster, addresses, consortium, moor

pytestmark = [pytest.mark.story, pytest.mark.timeout(300)]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(consortium(tmp_path, addresses()))


def flip(file, what, *, by=1):
    """Change one byte of every place where `what` is in a file."""
    data = bytearray(file.read_bytes())
    at = data.find(what)
    assert at >= 0
    while at >= 0:
        data[at] ^= by
        at = data.find(what, at + 1)
    file.write_bytes(data)


def tear(file):
    """The second half of the file never reached the disk."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


async def refused_and_repaired(cluster, process, damage):
    await process.kill()
    file = process.directory / "ledger.db"
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    for beside in ("ledger.db-wal", "ledger.db-shm"):
        (process.directory / beside).unlink(missing_ok=True)
    damage(file)
    await refuses(process, "ledger.database_corrupt")
    await repaired(cluster, process)


async def refuses(process, words):
    """It does not start, and says so."""
    said_before = len(process.log())
    await process.start(ready=False)
    assert await process.ended() == 2
    said = process.log()[said_before:]
    assert "ledger.database_corrupt" in said, said
    assert words in said, said


async def repaired(cluster, process):
    """From the others, on command."""
    code, told = await moor("ledger", "repair", "--config", process.directory / "authority.toml")
    assert (code, "repaired to height" in told) == (0, True), told
    assert list(process.directory.glob("ledger.db.damaged-*"))
    await process.start()
    await cluster.same()


async def test_damaged_databases_are_refused_by_name_and_repaired_from_the_others(cluster):
    """verifies that: a changed record, a damaged page and a torn file each keep an authority from starting; after
    `moor ledger repair` it has the others' state, and its signature counts again."""
    async with cluster.running():
        for _ in range(3):
            await cluster.write()
        code, told = await moor("ledger", "repair", "--config", cluster.processes[FOURTH].directory / "authority.toml")
        assert (code, "ledger.authority_running" in told) == (1, True), told
        await refused_and_repaired(cluster, cluster.processes[FOURTH], lambda file: flip(file, b"consortium.test", by=2))
        await refused_and_repaired(cluster, cluster.processes[FOURTH], tear)
        for _ in range(3):
            await cluster.write()
        await cluster.same()
        await cluster.processes[THIRD].kill()
        await cluster.write()  # a quorum needs the repaired one
        await cluster.one_history([FIRST, SECOND, FOURTH])


def flip_page(kind):
    """Damages the first page of a kind of b-tree page: 2 and 5 are inner ones, 10 and 13 leaves; 0 is the file's header."""

    def damage(file):
        data = bytearray(file.read_bytes())
        page = next((at for at in range(4096, len(data), 4096) if data[at] in kind), 0)
        for at in range(page + (16 if page == 0 else 0), page + 28):
            data[at] ^= 0xFF
        file.write_bytes(data)

    return damage


@pytest.mark.long
async def test_a_damaged_page_of_any_kind_and_a_damaged_log_are_refused_and_repaired(cluster):
    """verifies that: header, inner page, leaf and write-ahead log, one after the other; the others' history comes back."""
    async with cluster.running():
        process = cluster.processes[FOURTH]
        for kind in ((), (2, 5), (10, 13)):
            await cluster.write()
            await refused_and_repaired(cluster, process, flip_page(kind))
        for _ in range(3):
            await cluster.write()
        await cluster.same()
        await process.kill()
        log = process.directory / "ledger.db-wal"
        data = bytearray(log.read_bytes())
        data[32 + 24 + 100] ^= 1
        log.write_bytes(data)
        await refuses(process, "write-ahead log")
        await repaired(cluster, process)
        await cluster.one_history()


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system takes root")
async def test_a_sequencer_with_a_full_disk_makes_no_block_says_so_and_goes_on_with_room(cluster, tmp_path):
    """verifies that: nothing is acknowledged that is not on its disk; what waited is in the ledger once there is room."""
    with small_disk(tmp_path / "small") as small:
        process = cluster.processes[FIRST]
        config = process.directory / "authority.toml"
        config.write_text(config.read_text() + f'\ndatabase = "sqlite:///{small}/ledger.db"\n')
        async with cluster.running():
            _, before = await cluster.write()
            await cluster.same()
            filler = fill(small)
            waiting = asyncio.ensure_future(cluster.write())
            assert await process.ended() != 0
            assert "storage.full" in process.log()
            assert not waiting.done()
            filler.unlink()
            await process.start()
            _, data = await waiting
            await cluster.same()
            await cluster.one_history()
            assert await cluster.standing([before, data]) == [1, 1]
            await process.kill()


def fill(where):
    """A file that takes all the room there is."""
    filler = where / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system takes root")
async def test_a_full_disk_signs_nothing_says_so_and_goes_on_with_room(cluster, tmp_path):
    """verifies that: without room to record it an authority signs nothing, and the others go on; with room it follows."""
    with small_disk(tmp_path / "small") as small:
        config = cluster.processes[FOURTH].directory / "authority.toml"
        config.write_text(config.read_text() + f'\ndatabase = "sqlite:///{small}/ledger.db"\n')
        async with cluster.running():
            await cluster.write()
            await cluster.same()
            filler = fill(small)
            height = 0
            for _ in range(4):
                height, _ = await cluster.write()
            assert (await cluster.head(FOURTH)).height < height
            while "storage.full" not in cluster.processes[FOURTH].log():  # noqa: ASYNC110 - it says so when it next tries
                await asyncio.sleep(0.1)
            filler.unlink()
            if not cluster.processes[FOURTH].running():
                await cluster.processes[FOURTH].start()
            await cluster.same()
            await cluster.one_history()
            await cluster.processes[FOURTH].kill()


@pytest.mark.long
async def test_a_lost_disk_comes_back_from_a_snapshot(cluster):
    """verifies that: with nothing left but its keys an authority takes a verified snapshot, follows, and signs again."""
    config = cluster.processes[FOURTH].directory / "authority.toml"
    config.write_text(config.read_text() + "\nsnapshot_after = 1\n")
    async with cluster.running():
        for _ in range(4):
            await cluster.write()
        await cluster.processes[FOURTH].kill()
        for file in cluster.processes[FOURTH].directory.glob("ledger.db*"):
            file.unlink()
        await cluster.processes[FOURTH].start()
        await cluster.same()
        with pytest.raises(MoorlineError):
            await cluster.each[FOURTH]._first(lambda http: http.get_bytes("/v1/blocks/99999"))
        for _ in range(2):
            await cluster.write()
        await asyncio.gather(*(cluster.processes[name].kill() for name in (THIRD,)))
        await cluster.write()
        assert set(NAMES) - {THIRD} == {FIRST, SECOND, FOURTH}
        await cluster.one_history([FIRST, SECOND, FOURTH])
