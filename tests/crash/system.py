"""The whole system as real processes, each of which can be told to die at a step and started again.

The processes run from a copy of the source, so that the guests' measurement stays what the ledger registered while somebody
edits. Built of the demo's own acts: what is crashed here is what the demo shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import moorline
from moorline.cli.demo import founding, hardware, hosting, operating
from moorline.cli.demo.stage import Process, Stage
from moorline.cli.demo.world import AUTHORITIES, CONTRACT, HSM, SERVICE, World, free_addresses, now
from moorline.errors import Unavailable
from moorline.hsm.provider import sign_launcher_ticket
from moorline.services import settings
from moorline.services.launcher_parent import LauncherSettings
from moorline.simulators import guest_image
from moorline.simulators.manufacturer import open_chip
from moorline.storage.steps import VARIABLE
from moorline.wire.session import LauncherTicket

POLL_S = 0.05
DEATH_S = 30.0
LAUNCH_S = 60.0


class Stageable(Stage):
    """A stage that remembers how each process was started, and gives each a file that can tell it to die."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, keep=False)
        self._started: dict[str, tuple[tuple[str, ...], str]] = {}

    def spawn(self, name: str, *arguments: str, module: str = "moorline.cli") -> Process:
        self._started[name] = (arguments, module)
        os.environ[VARIABLE] = str(self.order(name))
        try:
            return super().spawn(name, *arguments, module=module)
        finally:
            del os.environ[VARIABLE]

    def order(self, name: str) -> Path:
        """The file that holds the step at which process `name` is to die."""
        return self.path("kill") / name

    def again(self, name: str) -> Process:
        """Start a process that died as it was started before."""
        assert not self.processes[name].running(), name
        arguments, module = self._started[name]
        return self.spawn(name, *arguments, module=module)


class System:
    """A consortium with two providers; alpha has hosts, a launcher, an orchestrator and an onboarded package."""

    def __init__(self, world: World, stage: Stageable) -> None:
        self.world, self.stage = world, stage

    # -- dying and coming back ----------------------------------------------------------------------------------------

    def arm(self, process: str, step: str) -> None:
        """Process dies at `step`, the next time it gets there."""
        draft = self.stage.path("kill") / f".{process}"
        draft.write_text(step, "utf-8")
        draft.replace(self.stage.order(process))

    async def died(self, process: str, *, within_s: float = DEATH_S) -> None:
        """Return when the process was killed by itself; fails if it was not."""
        one = self.stage.processes[process]
        deadline = time.monotonic() + within_s
        while one.running():
            assert time.monotonic() < deadline, f"{process} did not get there: {one.last_words()}"
            await asyncio.sleep(POLL_S)
        assert not self.stage.order(process).exists()

    async def again(self, process: str) -> None:
        """Start it again and wait until it is ready."""
        one = self.stage.again(process)
        if process == "broker-alpha":
            self.world.alpha.broker = one
        await one.wait_ready()

    async def killed_at(self, process: str, step: str, act: Any) -> list[Any]:
        """Do `act()` while the process is to die at `step`; it dies and comes back. What the act gave, or raised."""
        self.arm(process, step)
        doing = asyncio.ensure_future(act())
        await self.died(process)
        await self.again(process)
        return await asyncio.gather(doing, return_exceptions=True)

    def kill(self, process: str) -> None:
        """SIGKILL from outside, wherever it is."""
        one = self.stage.processes[process]
        os.kill(one.pid, 9)
        one.reap(time.monotonic() + 5)

    # -- functions ----------------------------------------------------------------------------------------------------

    async def request(self, instance: str, **changes: Any) -> None:
        """Ask for a function until the orchestrator has taken the request; the same id is the same function."""
        asked = {
            "service": SERVICE,
            "package": self.world.facts["package"],
            "tenant": operating.TENANT,
            "contracts": [CONTRACT],
            "id": instance,
            **changes,
        }

        await hosting.verdict(self.world, "h1")  # after a crash before: until the host stands again

        async def ask() -> None:
            async with operating.orchestrator(self.world) as client:
                await client.post_json("/v1/functions", asked)

        await self.persistently(ask)

    async def function(self, instance: str) -> dict[str, Any]:
        """A function as the orchestrator sees it."""

        async def ask() -> Any:
            async with operating.orchestrator(self.world) as client:
                return await client.get_json(f"/v1/functions/{instance}")

        return await self.persistently(ask)

    async def settled(self, instance: str, *, states: tuple[str, ...] = ("active", "failed")) -> dict[str, Any]:
        """The function once it is in one of `states`."""
        deadline = time.monotonic() + LAUNCH_S
        while True:
            row = await self.function(instance)
            if row["state"] in states:
                return row
            assert time.monotonic() < deadline, row
            await asyncio.sleep(POLL_S)

    async def active(self, instance: str) -> dict[str, Any]:
        """The function once it serves; fails with the reason if it will not."""
        row = await self.settled(instance)
        assert row["state"] == "active", row["problem"]
        return row

    async def end(self, instance: str) -> None:
        """End a function; asked for until it is done."""

        async def ask() -> None:
            async with operating.orchestrator(self.world) as client:
                await client.send("DELETE", f"/v1/functions/{instance}", headers={"accept": "application/json"})

        await self.persistently(ask)
        await self.settled(instance, states=("ended", "failed"))

    async def persistently(self, ask: Any) -> Any:
        """Ask until there is an answer; a peer that is away is asked again, a refusal is raised."""
        deadline = time.monotonic() + LAUNCH_S
        while True:
            try:
                return await ask()
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(POLL_S)

    # -- what the broker remembers --------------------------------------------------------------------------------------

    def rows(self, query: str, *values: object, provider: str = "alpha") -> list[tuple[Any, ...]]:
        """Rows of a broker's database, read beside the running broker."""
        path = self.world.providers[provider].directory / "broker" / "broker.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute(query, values).fetchall()

    def launches(self, instance: str) -> list[tuple[Any, ...]]:
        """State and public key of every launch consumed under this name."""
        return self.rows("SELECT state, public, kem_digest, signing_digest FROM launches WHERE instance = ?", instance)

    def alarms(self, provider: str = "alpha") -> list[tuple[Any, ...]]:
        """Alarms, oldest first."""
        return self.rows("SELECT code, first, second FROM alarms ORDER BY alarm", provider=provider)

    async def admin(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Alpha's operator at the broker's socket: POST with a body, else GET."""

        async def ask() -> Any:
            async with self.world.alpha.admin() as admin:
                return await (admin.get_json(path) if body is None else admin.post_json(path, body))

        return await self.persistently(ask)

    # -- launchers ------------------------------------------------------------------------------------------------------

    def launcher(self, name: str) -> tuple[str, ...]:
        """The command line of a launcher with a new ticket, under the name and on the port of alpha's own if it is that."""
        directory = self.world.stage.path("alpha", name)
        chip = open_chip(self.stage.directory / "silicon" / "chips" / hardware.MANAGEMENT)
        ticket = LauncherTicket(
            ledger_id=self.world.consortium.trust.ledger_id,
            provider="alpha",
            ticket=os.urandom(32),
            measurement=guest_image.measure(operating.LAUNCHER_ENTRY),
            chip=chip.chip_id,
            not_after=now() + 300,
        )
        (directory / "ticket.cose").write_bytes(sign_launcher_ticket(self.world.alpha.key, ticket))
        if not (directory / "launcher.toml").exists():
            configured = LauncherSettings(
                provider="alpha",
                hsm=HSM,
                name=name,
                listen=free_addresses(1)[0],
                state=directory / "state",
                silicon=f"unix:{hosting.silicon_socket(self.world, hardware.MANAGEMENT)}",
                broker=self.world.alpha.sessions,
                ticket=directory / "ticket.cose",
                trust=self.world.trust_file,
            )
            settings.write(configured, directory / "launcher.toml")
        return ("launcher", "run", "--config", str(directory / "launcher.toml"))

    # -- the ledger -------------------------------------------------------------------------------------------------------

    def require_one_chain(self) -> None:
        """No two authorities have, or signed, different blocks at one height; no height is missing."""
        chains = {name: self._ledger_rows(name, "SELECT height, body FROM blocks") for name in AUTHORITIES}
        signed = {name: self._ledger_rows(name, "SELECT height, body FROM signed") for name in AUTHORITIES}
        merged: dict[int, bytes] = {}
        for name, rows in chains.items():
            heights = sorted(height for height, _ in rows)
            assert heights == list(range(1, len(heights) + 1)), name
            for height, body in rows:
                assert merged.setdefault(height, body) == body, f"{name} has another block at {height}"
        for name, rows in signed.items():
            for height, body in rows:
                assert merged.get(height, body) == body, f"{name} signed another block at {height}"

    def heights(self) -> list[int]:
        """How far each authority is."""
        return [self._ledger_rows(name, "SELECT COALESCE(MAX(height), 0), 0 FROM blocks")[0][0] for name in AUTHORITIES]

    def times_applied(self, transaction_id: bytes) -> list[int]:
        """How often each authority has applied a transaction."""
        query = f"SELECT COUNT(*), 0 FROM applied WHERE id = x'{transaction_id.hex()}'"
        return [self._ledger_rows(name, query)[0][0] for name in AUTHORITIES]

    def _ledger_rows(self, authority: str, query: str) -> list[tuple[Any, ...]]:
        path = self.world.consortium.directory / "authorities" / authority / "ledger.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()


@contextlib.asynccontextmanager
async def running():
    """A System, gone afterwards with everything it started."""
    directory = Path(tempfile.mkdtemp(prefix="moor-"))
    patch = pytest.MonkeyPatch()
    stage = Stageable(directory / "s")
    try:
        _run_from_copy(patch, directory / "source")
        patch.setattr(hosting, "PERIOD_S", 2.0)  # a verifier that comes back knows soon who stands
        world = await founding.found_consortium(stage)
        try:
            await _built(world)
            yield System(world, stage)
        finally:
            await world.aclose()
    finally:
        stage.close()
        patch.undo()
        shutil.rmtree(directory, ignore_errors=True)


async def _built(world: World) -> None:
    await founding.admit_providers(world)
    await founding.start_brokers(world)
    await hosting.start_hosts(world)
    await operating.start_launcher(world)
    await operating.onboard_package(world)
    await operating.agree_contract(world)


def _run_from_copy(patch: pytest.MonkeyPatch, source: Path) -> None:
    shutil.copytree(Path(moorline.__file__).parent, source / "moorline")
    patch.setenv("PYTHONPATH", str(source))
    measured: dict[str, bytes] = {}

    def measure(entry: str) -> bytes:
        if entry not in measured:
            command = [sys.executable, "-m", "moorline.cli", "simulate", "measure", "--entry", entry]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured[entry] = bytes.fromhex(said.strip())
        return measured[entry]

    patch.setattr(guest_image, "measure", measure)
