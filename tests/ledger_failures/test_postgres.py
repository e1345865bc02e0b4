"""Four authorities of the embedded engine that keep their ledger in PostgreSQL. Real processes, a real server."""

import asyncio

import pytest

from .cluster import FIRST, FOURTH, Cluster, addresses, consortium, moor

pytestmark = [pytest.mark.story, pytest.mark.long, pytest.mark.timeout(300)]


async def test_four_authorities_keep_their_ledger_in_postgresql(tmp_path, postgres):
    """verifies that: one dead goes on and comes back; a server that is killed under all of them takes nothing that was
    acknowledged, and they go on when it is back; repair is left to PostgreSQL's own tools."""
    cluster = Cluster(consortium(tmp_path, addresses()))
    for process in cluster.processes.values():
        config = process.directory / "authority.toml"
        config.write_text(config.read_text() + f'\ndatabase = "{postgres.url()}"\n')
    async with cluster.running():
        _, first = await cluster.write()
        await cluster.processes[FOURTH].kill()
        _, second = await cluster.write()
        code, said = await moor("ledger", "repair", "--config", cluster.processes[FOURTH].directory / "authority.toml")
        assert (code, "ledger.not_repairable" in said) == (2, True), said
        await asyncio.to_thread(postgres.stop, "immediate")
        await asyncio.to_thread(postgres.start)
        await cluster.processes[FOURTH].start()
        for process in cluster.processes.values():
            if not process.running():
                await process.start()
        _, third = await cluster.write()
        await cluster.same()
        await cluster.one_history()
        assert await cluster.standing([first, second, third]) == [1, 1, 1]
        assert not (cluster.processes[FIRST].directory / "ledger.db").exists()
