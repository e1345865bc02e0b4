"""Partitions 2|2 and 3|1, healed. Four real processes in four network namespaces."""

import asyncio
import os
import shutil

import pytest

from .cluster import FIRST, FOURTH, NAMES, SECOND, THIRD, Cluster, consortium
from .network import Network

pytestmark = [
    pytest.mark.story,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces take root and iproute2"),
]


async def test_partitions_heal_into_one_history(tmp_path):
    """verifies that: the side with a quorum and the sequencer goes on, a side without acknowledges nothing; when the link is
    back everybody has one history, with what was waiting in it."""
    with Network(4) as network:
        where = {name: network.address(number) for number, name in enumerate(NAMES)}
        prefixes = {name: network.prefix(number) for number, name in enumerate(NAMES)}
        cluster = Cluster(consortium(tmp_path, where), prefixes)
        async with cluster.running():
            await cluster.write()
            network.cut_off(3)  # 3|1
            await cluster.write()
            network.mend()
            await cluster.same()
            network.cut_off(2, 3)  # 2|2
            waiting = asyncio.ensure_future(cluster.write())
            await asyncio.sleep(3)
            assert not waiting.done()
            height = (await cluster.head(FIRST)).height
            await asyncio.sleep(1)
            assert (await cluster.head(FIRST)).height == height == (await cluster.head(SECOND)).height
            network.mend()
            _, data = await waiting
            await cluster.same()
            assert await cluster.one_history() > height
            assert await cluster.standing_once(data) == 1
            assert {await cluster.sequencer(name) for name in (FIRST, SECOND, THIRD, FOURTH)} == {FIRST}


@pytest.mark.long
async def test_a_sequencer_that_is_cut_off_is_replaced_and_follows_when_the_link_is_back(tmp_path):
    """verifies that: alone it acknowledges nothing and the three write nothing without it; promoted, another goes on with
    three; mended, the old one follows, and what it was told while alone stands once or not at all."""
    with Network(4) as network:
        where = {name: network.address(number) for number, name in enumerate(NAMES)}
        prefixes = {name: network.prefix(number) for number, name in enumerate(NAMES)}
        cluster = Cluster(consortium(tmp_path, where), prefixes)
        async with cluster.running():
            _, before = await cluster.write()
            await cluster.same()
            network.cut_off(0)
            height = (await cluster.head(SECOND)).height
            waiting = asyncio.ensure_future(cluster.write(through=SECOND))
            await asyncio.sleep(2)
            assert not waiting.done()
            assert (await cluster.head(SECOND)).height == height == (await cluster.head(FOURTH)).height
            await cluster.promote(SECOND, (SECOND, THIRD, FOURTH))
            _, data = await waiting
            await cluster.write(through=THIRD)
            network.mend()
            await cluster.same()
            assert await cluster.one_history() > height
            assert await cluster.standing([before, data]) == [1, 1]
            assert {await cluster.sequencer(name) for name in NAMES} == {SECOND}
