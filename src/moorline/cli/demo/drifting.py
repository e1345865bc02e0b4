"""Step 10: h1 runs something nobody allowed. Its verdict falls, its function ends keys first, and comes back on h4."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from moorline.attesters.tpm import Tpm
from moorline.cli.demo import federating, hosting, operating
from moorline.cli.demo.world import World
from moorline.errors import Refused, Unavailable, from_problem
from moorline.rats import Tier
from moorline.simulators import firmware

RELAUNCH_DEADLINE_S: Final = 60.0
INSTANCE: Final = "records-1"


async def drift(world: World) -> str:
    """Something really runs into h1's IMA list and PCR 10; what follows is the orchestrator's and the broker's doing."""
    await _start_spare(world)
    started = time.time()
    await asyncio.to_thread(_run_something, hosting.host(world, "h1"))
    async with operating.orchestrator(world) as client:
        function = await _until_elsewhere(client)
    world.facts["function"] = function
    halted, destroyed, stopped, active = _times(function)
    (clean_up, *_) = function["clean_ups"]
    if "storage-key" not in clean_up["destroyed"]:
        raise Refused("demo.keys_not_destroyed", "the clean-up destroyed no storage key", got=clean_up["destroyed"])
    await federating.reconnect(world)
    parts = (
        f"halted {halted - started:.1f} s after the drift (h1 attests every {hosting.PERIOD_S:.0f} s)",
        f"keys destroyed, identity revoked at height {clean_up['revoked_at_height']} after {destroyed - halted:.1f} s more",
        f"guest stopped after {stopped - destroyed:.1f} s",
        f"generation {function['generation']} active on {function['host']} after {active - stopped:.1f} s",
        "the device reconnected",
    )
    return ", ".join(parts)


async def _start_spare(world: World) -> None:
    spare = hosting.host(world, "h4")
    hosting.start_agent(world, spare)
    verdict = await hosting.verdict(world, "h4")
    if verdict.status is not Tier.AFFIRMING:
        refusal = verdict.first_refusal()
        raise Refused(
            "demo.spare_not_affirmed", "h4 should be in good standing", got=None if refusal is None else refusal.code
        )


def _run_something(one: hosting.Host) -> None:
    assert one.tpm is not None
    with Tpm.open(one.tpm.tcti) as tpm:
        firmware.execute(tpm, one.directory / "logs", "/usr/bin/xmrig", b"SIMULATED miner")


async def _until_elsewhere(client: Any) -> Any:  # noqa: ANN401 - HttpClient and JSON
    deadline = asyncio.get_running_loop().time() + RELAUNCH_DEADLINE_S
    while True:
        function: Any = await client.get_json(f"/v1/functions/{INSTANCE}")
        if function["state"] == "active" and function["generation"] > 1:
            if function["host"] != "h4":
                raise Refused(
                    "demo.relaunch_unexpected", "the function came back elsewhere", expected="h4", got=function["host"]
                )
            return function
        if function["state"] == "failed":
            raise from_problem(function["problem"])
        if asyncio.get_running_loop().time() > deadline:
            raise Unavailable("demo.relaunch_slow", "the function did not come back in time", got=function)
        await asyncio.sleep(0.05)


def _times(function: Any) -> tuple[float, float, float, float]:  # noqa: ANN401 - JSON
    """When generation 1 was halted, its keys destroyed, its guest stopped, and generation 2 active (Unix time)."""
    at = {(event["generation"], event["state"]): event["at_ms"] / 1000 for event in function["events"]}
    return at[1, "halting"], at[1, "stopping"], at[1, "cleaned"], at[2, "active"]
