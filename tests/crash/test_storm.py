"""Processes die at random moments, one after the other, while functions are launched and ended. Takes minutes."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

pytestmark = [pytest.mark.story, pytest.mark.long, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

VICTIMS = ("broker-alpha", "orchestrator", "verifier", "host-h1", "authority-1", "authority-2", "authority-3")
STORM_S = 120.0


async def test_a_storm_doubles_and_loses_nothing(system):
    chance = random.Random(1)  # the order of victims can be told again; the moments cannot
    ends = time.monotonic() + STORM_S
    launched: list[str] = []

    async def launch() -> None:
        while time.monotonic() < ends:
            instance = f"storm-{len(launched)}"
            launched.append(instance)
            await system.request(instance)
            row = await system.settled(instance)
            assert row["state"] in ("active", "failed")
            await system.end(instance)

    async def strike() -> None:
        while time.monotonic() < ends:
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            victim = chance.choice(VICTIMS)
            system.kill(victim)
            await system.again(victim)

    async with asyncio.TaskGroup() as group:
        group.create_task(launch())
        group.create_task(strike())
    assert len(launched) > 3
    for instance in launched:
        assert len(system.launches(instance)) <= 1 + len((await system.function(instance))["clean_ups"])
    publics = [public for (public,) in system.rows("SELECT public FROM launches")]
    assert len(publics) == len(set(publics)), "a key pair was handed out twice"
    allowed = {"launch.token_consumed", "broker.database_restored"}  # died after confirming, or between counter and commit
    assert {code for code, *_ in system.alarms()} <= allowed
    system.require_one_chain()
    await system.admin("/v1/epochs", {})
    await system.request("storm-after")
    assert (await system.settled("storm-after"))["state"] in ("active", "failed")
