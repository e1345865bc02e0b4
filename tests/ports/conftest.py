"""One running system for all ports, with a function that a device uses."""

import sys
from pathlib import Path

import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[1] / "crash"))
from system import running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system():
    from moorline.cli.demo import federating, operating

    async with running() as built:
        await operating.launch_function(built.world)
        await federating.enrol(built.world, "device-1")
        yield built
