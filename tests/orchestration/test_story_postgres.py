"""Orchestrator and verifier of one provider on one PostgreSQL cluster, as real processes: a launch, a drift, a relaunch."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path

import pytest
import sqlalchemy

from moorline.cli.demo import drifting, federating, founding, hosting, operating
from moorline.cli.demo.stage import Stage

pytestmark = [pytest.mark.story, pytest.mark.long, pytest.mark.timeout(300)]

ACTS = (
    founding.admit_providers,
    founding.start_brokers,
    hosting.start_hosts,
    operating.start_launcher,
    operating.onboard_package,
    operating.launch_function,
    operating.agree_contract,
    federating.use_function,
)


def asked(url, query):
    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            return connection.exec_driver_sql(query).all()
    finally:
        engine.dispose()


@pytest.fixture
def place():
    """A short path: unix sockets are below it."""
    with tempfile.TemporaryDirectory(prefix="moor-pg-") as name:
        yield Path(name)


async def test_a_provider_lives_on_postgresql(postgres, place, monkeypatch):
    """verifies that: launch, loss of a verdict, clean-up and relaunch go their way with both databases in the cluster.

    The server is stopped and started in between: every service waits for it and goes on.
    """
    verifier, orchestrator = postgres.url(), postgres.url()
    monkeypatch.setenv("MOOR_VERIFIER_DATABASE_URL", verifier)
    monkeypatch.setenv("MOOR_ORCHESTRATOR_DATABASE_URL", orchestrator)
    stage = Stage(place, keep=False)
    world = None
    try:
        world = await founding.found_consortium(stage)
        world.facts["hosts"] = {}
        for act in ACTS:
            await act(world)
        await asyncio.to_thread(postgres.stop, "immediate")
        await asyncio.to_thread(postgres.start)
        said = await drifting.drift(world)
        assert "generation 2 active on h4" in said
        states = dict(asked(orchestrator, "SELECT instance, state FROM functions"))
        assert states["records-1"] == "active"
        kinds = [kind for (kind,) in asked(verifier, "SELECT kind FROM events WHERE host = 'h1' ORDER BY cursor")]
        assert kinds[-1] == "verdict_lost"
        assert [path for path in place.rglob("*.db") if path.stem in ("verifier", "orchestrator")] == []
    finally:
        if world is not None:
            with contextlib.suppress(Exception):
                await world.aclose()
        stage.close()
