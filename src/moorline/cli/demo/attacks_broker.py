"""Attacks on what is remembered: a broker's database put back, an entry taken out of the secure log."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, Final

from moorline.audit import export
from moorline.audit.log import LogEntry
from moorline.cli.demo import auditing, hardware
from moorline.cli.demo.attack_tools import Outcome, refused_with, tried
from moorline.cli.demo.attacks_sessions import launcher_guest, write_ticket
from moorline.cli.demo.world import World
from moorline.errors import Unavailable
from moorline.services import settings
from moorline.services.broker_settings import BrokerSettings
from moorline.simulators.manufacturer import SIMULATED_TCB
from moorline.wire import schema

_STOP_S: Final = 10.0
_DATABASE: Final = "broker.db*"
_HIDDEN: Final = "launch-consumed"


async def broker_database_restored(world: World) -> Outcome:
    """Beta's broker comes back with its database as it was before it leased launch numbers, to lease them once more.

    Control: it comes back likewise, with the database it had.
    """
    await _stop(world)
    directory = world.beta.directory / "broker"
    _let_launch(world, directory)
    backup = world.stage.path("attacker", "backup")
    _copy(directory, backup)
    await _start(world, "again")
    control = await _launcher(world, "launcher-again")
    await _stop(world)
    for file in directory.glob(_DATABASE):
        file.unlink()
    _copy(backup, directory)
    await _start(world, "restored")
    code = await _launcher(world, "launcher-restored")
    async with world.beta.admin() as admin:
        alarms: Any = await admin.get_json("/v1/alarms")
        opened: Any = await admin.post_json("/v1/epochs", {})
    raised = [alarm["code"] for alarm in alarms["alarms"]]
    return Outcome(
        code=code if raised else None,
        control=control is None,
        says=f"unrestored, it leases again; alarm {', '.join(raised) or 'NONE'}; epoch {opened['epoch']} ends the halt",
    )


def _let_launch(world: World, directory: Path) -> None:
    """Beta's operator lets its broker launch: anchors and minimum TCB, as alpha's has them."""
    configured = settings.load(BrokerSettings, directory / "broker.toml")
    tcb = (SIMULATED_TCB.boot_loader, SIMULATED_TCB.tee, SIMULATED_TCB.snp, SIMULATED_TCB.microcode)
    anchors = world.stage.directory / "silicon" / "anchors.cbor"
    settings.write(dataclasses.replace(configured, snp_anchors=anchors, snp_minimum_tcb=tcb), directory / "broker.toml")


async def _launcher(world: World, name: str) -> str | None:
    """A launcher enclave of beta asks for launch key and lease; the code with which the broker refused it."""
    ticket = await asyncio.to_thread(write_ticket, world, world.beta)
    return await tried(world, launcher_guest(world, world.beta, name, ticket), machine=hardware.MANAGEMENT)


async def _stop(world: World) -> None:
    broker = world.beta.broker
    assert broker is not None
    world.stage.processes.pop(broker.name)
    broker.stop()
    await asyncio.to_thread(broker.reap, time.monotonic() + _STOP_S)


async def _start(world: World, name: str) -> None:
    config = world.beta.directory / "broker" / "broker.toml"
    world.beta.broker = await world.stage.start(f"broker-beta-{name}", "broker", "run", "--config", str(config))


def _copy(source: Path, target: Path) -> None:
    for file in source.glob(_DATABASE):
        shutil.copy2(file, target / file.name)


async def audit_entry_removed(world: World) -> Outcome:
    """Alpha's operator takes the entry of a launch out of the exported log, and repairs all that needs no token to repair.

    Control: the file as it was exported. Both are judged by `moor log verify`, which has the file and the trust file only.
    """
    whole = auditing.exported_file(world, auditing.WHOLE)
    data = whole.read_bytes()
    log, number = _first(data, _HIDDEN)
    cut = auditing.exported_file(world, "without")
    cut.write_bytes(export.without(data, log=log, entry=number))
    code, control = await asyncio.gather(
        refused_with(auditing.verify(world, cut)), refused_with(auditing.verify(world, whole))
    )
    return Outcome(
        code=code, control=control is None, says=f"entry {number} of {log} is missed; as it was exported, the file verifies"
    )


def _first(data: bytes, event: str) -> tuple[str, int]:
    """Log and number of the first entry about an event."""
    for one in export.parse(data).logs:
        for encoded in one.entries:
            entry = schema.decode(LogEntry, encoded)
            if entry.event == event:
                return one.log, entry.number
    raise Unavailable("demo.nothing_to_hide", "no log tells of a launch", got=event)
