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
