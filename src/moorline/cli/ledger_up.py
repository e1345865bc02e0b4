"""`moor ledger up`: a whole ledger of either engine on this machine, for trying things out and for tests of clients."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import render
from moorline.errors import Malformed, Misconfigured, Unavailable

if TYPE_CHECKING:
    from moorline.ledger.ceremony import Ceremony
    from moorline.services.authority import Settings

READY_S: Final = 90.0
STOP_S: Final = 20.0
_POLL_S: Final = 0.05
MIN_NODES: Final = 2
MAX_NODES: Final = 16


class Engine(StrEnum):
    """How authorities agree."""

    EMBEDDED = "embedded"
    COMETBFT = "cometbft"


def up(
    directory: Annotated[Path, typer.Option("--dir", help="Its folder; made if it is not there, gone on with if it is.")],
    *,
    engine: Annotated[Engine, typer.Option(help="How authorities agree; of a folder that is there: as it was made.")] = (
        Engine.COMETBFT
    ),
    nodes: Annotated[int, typer.Option(min=MIN_NODES, max=MAX_NODES, help="How many authorities.")] = 4,
    domain: Annotated[str, typer.Option(help="The consortium's DNS name.")] = "consortium.test",
    max_age_s: Annotated[int, typer.Option("--max-age", min=2, help="How old a ledger proof may be, in seconds.")] = 30,
    as_json: render.AsJson = False,
) -> None:
    """Hold a ceremony, start all authorities on loopback, and keep them running until interrupted (Ctrl-C, SIGTERM)."""
    if not (directory / "genesis.cbor").exists():
        _found(directory, engine, nodes, domain, max_age_s)
    settings = _settings(directory)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopping.set())
    authorities = [_Running(one, directory / "authorities" / one.name) for one in settings]
    try:
        with render.progress(f"starting {len(authorities)} authorities"):
            for one in authorities:
                one.start()
            for one in authorities:
                one.wait_ready(stopping)
        if not stopping.is_set():
            _show(directory, authorities, as_json=as_json)
        while not stopping.wait(_POLL_S):
            for one in authorities:
                one.require_running()
    finally:
        for one in authorities:
            one.terminate()
        for one in authorities:
            one.wait_gone()
    typer.echo("stopped", err=True)


class _Running:
    """One `moor authority run` as a child; its log is beside its settings."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self._folder = settings, folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    def start(self) -> None:
        words = ["authority", "run", "--config", str(self._folder / "authority.toml")]
        with (self._folder / "authority.out").open("wb") as out, (self._folder / "authority.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moorline.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,  # an interrupt at the terminal is ours to pass on
            )

    def wait_ready(self, stopping: threading.Event) -> None:
        deadline = time.monotonic() + READY_S
        while b'"ready": true' not in (self._folder / "authority.out").read_bytes():
            self.require_running()
            if stopping.is_set():
                return
            if time.monotonic() > deadline:
                raise self._trouble("an authority does not get ready")
            time.sleep(_POLL_S)

    def require_running(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise self._trouble("an authority ended")

    def terminate(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def wait_gone(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _trouble(self, says: str) -> Unavailable:
        log = self._folder / "authority.log"
        lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
        return Unavailable(
            "run.not_ready", says, got=f"{self.settings.name}: {lines[-1][:300] if lines else ''}", remedy=f"read {log}"
        )


def _found(directory: Path, engine: Engine, count: int, domain: str, max_age_s: int) -> None:
    """Ceremony, settings, and homes of a new ledger."""
    from moorline.clock import SystemClock
    from moorline.ledger.ceremony import genesis_ceremony
    from moorline.ledger.genesis import Parameters

    if engine is Engine.COMETBFT:
        from moorline.ledger.engines.cometbft.process import find

        find()  # before anything is written
    names = tuple(f"authority-{number}" for number in range(1, count + 1))
    addresses = _free_addresses(3 * count)
    made = genesis_ceremony(
        directory,
        names=names,
        consortium_domain=domain,
        simulated_allowed=True,
        parameters=Parameters(max_age_s=max_age_s),
        addresses=dict(zip(names, addresses, strict=False)),
        now=SystemClock().now(),
    )
    if engine is Engine.COMETBFT:
        _homes(made, names, addresses[:count], addresses[count : 2 * count], addresses[2 * count :])


def _homes(made: Ceremony, names: tuple[str, ...], listen: list[str], p2p: list[str], rpc: list[str]) -> None:
    from moorline.ledger.engines.cometbft import network
    from moorline.ledger.engines.cometbft.network import Ports
    from moorline.services import settings
    from moorline.services.authority import Settings
    from moorline.services.comet_settings import CometSettings

    network.make(made, {name: Ports(p2p=p2p[i], rpc=rpc[i]) for i, name in enumerate(names)})
    for i, name in enumerate(names):
        folder = made.directory / "authorities" / name
        (folder / "authority.toml").unlink(missing_ok=True)  # the ceremony's own, without this engine
        configured = Settings(
            name=name,
            listen=listen[i],
            directory=folder,
            cometbft=CometSettings(home=network.home_of(made, name), rpc=rpc[i]),
        )
        settings.write_commented(configured, folder / "authority.toml", head=f"Ledger authority {name}.")


def _settings(directory: Path) -> list[Settings]:
    from moorline.ledger import genesis
    from moorline.services import settings
    from moorline.services.authority import Settings

    try:
        found = genesis.parse(render.read(directory / "genesis.cbor"))
    except Malformed as error:
        raise Misconfigured("ledger.not_a_ledger", "the folder holds no ledger", got=f"{directory}: {error.says}") from None
    return [
        settings.load(Settings, directory / "authorities" / one.name / "authority.toml", service="authority")
        for one in found.authorities
    ]


def _show(directory: Path, authorities: list[_Running], *, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "authority": one.settings.name,
            "engine": Engine.EMBEDDED if one.settings.cometbft is None else Engine.COMETBFT,
            "serves at": f"https://{one.settings.listen}",
            "process": one.pid,
        }
        for one in authorities
    ]
    if as_json:
        typer.echo(json.dumps({"ready": True, "directory": str(directory.absolute()), "authorities": rows}))
        return
    render.table(rows, ("authority", "engine", "serves at", "process"), key="authorities", as_json=False, empty="none")
    trust, genesis = directory / "trust.cbor", directory / "genesis.cbor"
    typer.echo(f"next: moor ledger show parameter/max_age_s --trust {trust} --genesis {genesis}; Ctrl-C stops them")


def _free_addresses(count: int) -> list[str]:
    """Loopback addresses nobody listens on; all held at once so that they differ."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in held]
