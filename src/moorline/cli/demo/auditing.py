"""Step 12: the log of the whole run in one file, verified offline by a process that has nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from moorline.cli.demo import federating, keeping
from moorline.cli.demo.world import ORCHESTRATOR, VERIFIER, World
from moorline.errors import MoorlineError, Refused
from moorline.nfv import Role

LOGS: Final = 3
WHOLE: Final = "whole"


async def audit(world: World) -> str:
    """`moor log export`, `moor log verify`, and `moor log verify` of the file with one bit of an entry flipped."""
    exported = await export(world, WHOLE)
    verified = await verify(world, exported)
    entries = sum(log["entries"] for log in verified["logs"])
    if len(verified["logs"]) != LOGS:
        raise Refused("demo.logs_missing", "the export does not hold every log", expected=LOGS, got=len(verified["logs"]))
    changed = bytearray(exported.read_bytes())
    changed[changed.index(b"launch-consumed")] ^= 1
    other = exported.with_name("changed.log")
    other.write_bytes(changed)
    try:
        await verify(world, other)
    except MoorlineError as error:
        found = error
    else:
        raise Refused("demo.change_not_found", "a changed byte was not found")
    return (
        f"{entries} entries of {len(verified['logs'])} logs verified offline against the ledger anchor of height "
        f"{verified['anchor']['height']}; one bit changed: {found.code}, {found.says}"
    )


async def export(world: World, name: str) -> Path:
    """One file with the logs of alpha's broker, orchestrator and verifier."""
    target = exported_file(world, name)
    orchestrator = world.alpha.name_of(Role.ORCHESTRATOR, ORCHESTRATOR)
    await federating.moor(
        *("log", "export", "-o", str(target)),
        *("--from", f"unix:{world.alpha.admin_socket}"),
        *("--from", f"https://{world.facts['orchestrator_address']}|{orchestrator}"),
        *("--from", f"https://{world.facts['verifier_address']}|{world.alpha.name_of(Role.VERIFIER, VERIFIER)}"),
        *("--as", str(keeping.operator_file(world))),
    )
    return target


def exported_file(world: World, name: str) -> Path:
    """Where an export lies, or a changed copy of one."""
    return world.stage.path("audit") / f"{name}.log"


async def verify(world: World, exported: Path) -> dict[str, Any]:
    """`moor log verify` in a process that is given the file and the trust file only. Raises what it refuses with."""
    return await federating.moor("log", "verify", str(exported), "--trust", str(world.trust_file))
