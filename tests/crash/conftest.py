"""One running system for all crashes of this folder."""

import sys
from pathlib import Path

import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))
from system import running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system():
    async with running() as built:
        yield built
