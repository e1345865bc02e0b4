"""Attacks on launches, by those who hold genuine ones: the administrator of a host, and a compromised orchestrator.

They share one genuine launch on h1. Every attempt changes one thing about it; the control is the very same launch with
nothing changed, which is possible because a launch that was refused is not used up.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Final

from moorline.cli.demo import hardware, operating
from moorline.cli.demo.attack_tools import (
    Minted,
    Outcome,
    Started,
    function_configuration,
    mint,
    once,
    order_of,
    refused_with,
    sha256,
    started,
    time_passes,
    tried,
)
from moorline.cli.demo.world import World
from moorline.clock import Instant
from moorline.simulators.manufacturer import open_chip
from moorline.wire.orchestration import GuestOrder

_SHORT_LIFE_S: Final = 10
_DEBUG_RULE: Final = "snp.debug"


async def genuine_launch(world: World) -> Minted:
    """The launch that is attacked."""
    return await once(world, "genuine launch", lambda: mint(world, "records-genuine"))


async def genuine_guest(world: World) -> Started:
    """The same launch, unharmed, on the host it was made for; it goes on serving devices."""

    async def start() -> Started:
        return await started(world, order_of(world, await genuine_launch(world), "genuine"))

    return await once(world, "genuine guest", start)


async def _with_control(world: World, name: str, order: GuestOrder, *, machine: str = "h1") -> Outcome:
    code, control = await asyncio.gather(tried(world, order, machine=machine), genuine_guest(world))
    return Outcome(code=code, control=control.problem is None, says=f"unchanged, the same launch goes active ({name})")


async def token_for_other_package(world: World) -> Outcome:
    """Package, fields and HOST_DATA all of another package; only the token was minted for the genuine one."""
    minted = await genuine_launch(world)
    other = await asyncio.to_thread(operating.signed_by_stranger)
    fields = dataclasses.replace(minted.fields, package_digest=sha256(other))
    order = order_of(world, dataclasses.replace(minted, fields=fields), "other-package")
    return await _with_control(world, "with the package it was minted for", dataclasses.replace(order, package=other))


async def configuration_swapped_by_host(world: World) -> Outcome:
    """The host hands the genuine guest another configuration: one that serves another contract."""
    minted = await genuine_launch(world)
    swapped = function_configuration(world, contracts=("mallory-reads-everything",))
    order = dataclasses.replace(order_of(world, minted, "swapped"), configuration=swapped)
    return await _with_control(world, "with its own configuration", order)


async def launch_on_other_host(world: World) -> Outcome:
    """Everything genuine, started on h4, whose chip is as good as the one it was placed on."""
    order = order_of(world, await genuine_launch(world), "elsewhere")
    return await _with_control(world, "on h1", order, machine="h4")


async def debug_guest(world: World) -> Outcome:
    """Everything genuine, started so that the host can read the guest's memory."""
    order = order_of(world, await genuine_launch(world), "debugged")
    guest, control = await asyncio.gather(started(world, order, debug=True), genuine_guest(world))
    await guest.end()
    broken = "" if guest.problem is None else guest.problem.got or ""
    return Outcome(
        # The code says that the policy is not met; only the rule about debugging counts here.
        code=guest.code if broken.startswith(_DEBUG_RULE) else None,
        control=control.problem is None,
        says=f"rule broken: {broken}; without the debug bit the same launch goes active",
    )


async def token_in_time(world: World) -> Outcome:
    """The control of `token_expired`: of two launches of the same short life one is used at once. The other has to wait."""
    in_time, too_late = await asyncio.gather(
        mint(world, "records-in-time", life_s=_SHORT_LIFE_S), mint(world, "records-too-late", life_s=_SHORT_LIFE_S)
    )
    control = await tried(world, order_of(world, in_time, "in-time"))
    world.facts["too late"] = (too_late, control)
    return Outcome(code=None, control=control is None, says="waiting for its time to pass", unfinished=True)


async def token_expired(world: World) -> Outcome:
    """A launch used after its time, which has really passed."""
    too_late, control = world.facts["too late"]
    await time_passes(Instant(too_late.fields.not_after))
    code = await tried(world, order_of(world, too_late, "too-late"))
    return Outcome(
        code=code, control=control is None, says=f"another launch good for {_SHORT_LIFE_S} s, used in time, goes active"
    )


async def chip_not_registered(world: World) -> Outcome:
    """A compromised orchestrator intends a launch on h1, with a chip nobody registered for it. Control: h1's own chip."""
    chip = open_chip(world.stage.directory / "silicon" / "chips" / hardware.MANAGEMENT)
    code = await refused_with(mint(world, "records-genuine", chip=chip.chip_id))
    control = await refused_with(genuine_launch(world))
    return Outcome(code=code, control=control is None, says="naming h1's registered chip, the same intent gets its token")
