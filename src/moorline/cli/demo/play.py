"""Playing the demo: steps in order, attacks where their victims stand, the report in any case, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import typer

from moorline.cli.demo import (
    attacks,
    attacks_broker,
    attacks_certificates,
    attacks_launches,
    attacks_ledger,
    attacks_sessions,
    auditing,
    drifting,
    federating,
    founding,
    hosting,
    keeping,
    operating,
)
from moorline.cli.demo.attack_tools import Outcome
from moorline.cli.demo.report import ATTACKS, STEPS, Report
from moorline.cli.demo.stage import Stage
from moorline.cli.demo.view import View
from moorline.cli.demo.world import World, since
from moorline.errors import EXIT_REFUSED, EXIT_UNDECIDED, EXIT_YES, Misconfigured, MoorlineError

Act = Callable[[World], Awaitable[str]]
Attempt = Callable[[World], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A step, and the attacks whose victims stand once it is done: some in order, others `at_once` beside them."""

    step: str
    act: Act
    attacks: dict[str, Attempt] = field(default_factory=dict)
    at_once: dict[str, Attempt] = field(default_factory=dict)


SCENES: Final = (
    Scene(step="ledger", act=founding.admit_providers, attacks={"provider_not_admitted": attacks.provider_not_admitted}),
    Scene(
        step="hsms",
        act=founding.start_brokers,
        attacks={"oversized_message": attacks.oversized_message},
        at_once={"evidence_reflected": attacks_sessions.evidence_reflected},
    ),
    Scene(
        step="hosts",
        act=hosting.start_hosts,
        attacks={"host_kernel_changed": attacks.host_kernel_changed, "quote_replayed": attacks.quote_replayed},
        at_once={"evidence_relayed_from_other_session": attacks_sessions.evidence_relayed_from_other_session},
    ),
    Scene(
        step="launcher",
        act=operating.start_launcher,
        attacks={"simulated_root_in_production": attacks.simulated_root_in_production},
        at_once={
            "launcher_wrong_measurement": attacks_sessions.launcher_wrong_measurement,
            "launcher_without_ticket": attacks_sessions.launcher_without_ticket,
        },
    ),
    Scene(
        step="package",
        act=operating.onboard_package,
        attacks={
            "package_tampered": attacks.package_tampered,
            "package_signed_by_stranger": attacks.package_signed_by_stranger,
        },
    ),
    Scene(step="placement", act=operating.explain_placement),
    Scene(
        step="launch",
        act=operating.launch_function,
        attacks={
            "rogue_vnf_without_token": attacks.rogue_vnf_without_token,
            "token_replayed": attacks.token_replayed,
            "device_of_ungranted_provider": attacks.device_before_contract,
        },
        at_once={
            "token_expired": attacks_launches.token_in_time,
            "token_for_other_package": attacks_launches.token_for_other_package,
            "chip_not_registered": attacks_launches.chip_not_registered,
            "debug_guest": attacks_launches.debug_guest,
            "configuration_swapped_by_host": attacks_launches.configuration_swapped_by_host,
            "launch_on_other_host": attacks_launches.launch_on_other_host,
        },
    ),
    Scene(
        step="contract",
        act=operating.agree_contract,
        at_once={"ledger_proof_stale": attacks_ledger.ledger_proof_fresh},
    ),
    Scene(
        step="device",
        act=federating.use_function,
        attacks={"device_of_ungranted_provider": attacks.device_after_contract},
        at_once={
            "token_expired": attacks_launches.token_expired,
            "ledger_proof_stale": attacks_ledger.ledger_proof_stale,
            "ledger_head_without_quorum": attacks_ledger.ledger_head_without_quorum,
            "ledger_rollback": attacks_ledger.ledger_rollback,
            "instance_revoked": attacks_ledger.instance_revoked,
            "issuing_ca_not_registered": attacks_certificates.issuing_ca_not_registered,
            "certificate_outside_name_constraint": attacks_certificates.certificate_outside_name_constraint,
        },
    ),
    Scene(
        step="drift",
        act=drifting.drift,
        # Alone: it stops beta's broker for a while, and beta's devices ask that for each connection.
        at_once={"broker_database_restored": attacks_broker.broker_database_restored},
    ),
    Scene(step="revocation", act=federating.suspend_and_reinstate),
    Scene(step="audit", act=auditing.audit, attacks={"audit_entry_removed": attacks_broker.audit_entry_removed}),
)


def play(*, report_file: Path | None, keep: bool, directory: Path | None, as_json: bool) -> int:
    """The whole demo; its exit code."""
    report = Report()
    try:
        with View(quiet=as_json) as view:
            return _staged(report, view, keep=keep, directory=directory)
    finally:
        if report_file is not None:
            report.write(report_file)
        if as_json:
            typer.echo(json.dumps(report.as_json(), indent=2))


def _staged(report: Report, view: View, *, keep: bool, directory: Path | None) -> int:
    made = directory is None or not directory.exists()
    where = _prepared(directory)
    stage: Stage | None = None
    try:
        stage = Stage(where, keep=keep)
        finished = asyncio.run(_until_told(stage, report, view))
    finally:
        kept = keep and stage is not None and bool(stage.processes)
        if stage is not None and not kept:
            view.doing("stopping everything")
            stage.close()
        if not kept:
            _emptied(where, remove=made)
    view.tables(report)
    if kept:
        view.kept(where, _how_to_talk(where))
    if not finished:
        view.say("interrupted; everything was stopped and removed" if not kept else "interrupted")
        return EXIT_UNDECIDED
    return EXIT_YES if report.ok else EXIT_REFUSED


async def _until_told(stage: Stage, report: Report, view: View) -> bool:
    """Play until the end or a stop signal; False if stopped."""
    task = asyncio.ensure_future(_scenes(stage, report, view))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


async def _scenes(stage: Stage, report: Report, view: View) -> None:
    world: World | None = None
    try:
        for scene in SCENES:
            view.doing(STEPS[scene.step])
            started = time.monotonic()
            try:
                if world is None:
                    world = await founding.found_consortium(stage)
                    world.facts["hosts"] = {}
                says, ok = await scene.act(world), True
            except (MoorlineError, OSError, AssertionError, KeyError) as error:
                says, ok = _what_failed(stage, error), False
            step = report.steps[scene.step]
            step.ok, step.ms, step.says = ok, since(started), says
            view.done(scene.step, ok=ok, ms=step.ms, says=says)
            if not ok or world is None:
                return
            await _attacked(world, report, view, scene)
    finally:
        if world is not None:
            keeping.how_to_talk(world)
            await world.aclose()


async def _attacked(world: World, report: Report, view: View, scene: Scene) -> None:
    async with asyncio.TaskGroup() as group:
        for name, attempt in scene.at_once.items():
            group.create_task(_attempt(world, report, view, name, attempt))
        for name, attempt in scene.attacks.items():
            await _attempt(world, report, view, name, attempt)


async def _attempt(world: World, report: Report, view: View, name: str, attempt: Attempt) -> None:
    view.doing(f"attack: {ATTACKS[name].tries}")
    attack = report.attacks[name]
    try:
        outcome = await attempt(world)
    except (MoorlineError, OSError, AssertionError, KeyError) as error:
        attack.says = _what_failed(world.stage, error)
    else:
        attack.code, attack.control, attack.says = outcome.code, outcome.control, outcome.says
        if outcome.unfinished:
            return
    view.attacked(name, refused=attack.refused, says=attack.says)


def _what_failed(stage: Stage, error: Exception) -> str:
    dead = ", ".join(f"{process.name}: {process.last_words()}" for process in stage.dead())
    said = str(error) if isinstance(error, MoorlineError) else f"{type(error).__name__}: {error}"
    return f"{said}; ended: {dead}" if dead else said


def _prepared(directory: Path | None) -> Path:
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="moor-"))
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise Misconfigured(
            "demo.directory_not_empty",
            "the directory is not empty",
            got=directory,
            remedy="name one that is empty or not there",
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory.resolve()


def _emptied(directory: Path, *, remove: bool) -> None:
    if remove:
        shutil.rmtree(directory, ignore_errors=True)
        return
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _how_to_talk(where: Path) -> list[str]:
    talk = where / "talk.txt"
    return talk.read_text("utf-8").splitlines() if talk.exists() else []
