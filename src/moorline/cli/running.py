"""`moor NOUN run`: a service in the foreground, as a service manager wants it, or in the background, as a person does.

In the background the service writes beside its settings file: NAME.out (its ready line), NAME.log (structured logs) and
NAME.pid; the command returns when the ready line came, or says what kept it from coming. `moor NOUN stop` ends it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from moorline.cli import render
from moorline.errors import Conflict, Unavailable

Config = Annotated[Path, typer.Option("--config", help="The service's settings file.")]
Configs = Annotated[list[Path], typer.Option("--config", help="The service's settings file; may be repeated.")]
Background = Annotated[bool, typer.Option("--background", help="Return when the service is ready, and leave it running.")]
READY_S: Final = 60.0
STOP_S: Final = 15.0
_POLL_S: Final = 0.02


def start(config: Path, *, background: bool, serve: Callable[[], int], words: list[str]) -> None:
    """Run a service; `words` are the command line that runs it in the foreground."""
    if not background:
        raise typer.Exit(serve())
    already = running(config)
    if already is not None:
        raise Conflict("run.already_running", "this service runs already", got=f"process {already}", remedy="stop it first")
    out, log, pid = (config.with_suffix(suffix) for suffix in (".out", ".log", ".pid"))
    out.unlink(missing_ok=True)
    with out.open("wb") as out_file, log.open("ab") as log_file:
        child = subprocess.Popen(
            [sys.executable, "-m", "moorline.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=log_file,
            start_new_session=True,
        )
    pid.write_text(f"{child.pid}\n", "utf-8")
    with render.progress(f"waiting for {config.stem}"):
        said = _ready_line(child, out, log)
    typer.echo(f"{config.stem}: {_in_words(said)}")


def stop(config: Path) -> None:
    """SIGTERM to the service that runs with these settings, and wait until it is gone. One that does not run is fine."""
    pid = running(config)
    if pid is None:
        typer.echo(f"{config.stem}: does not run")
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while running(config) is not None:
        if time.monotonic() > deadline:
            raise Unavailable(
                "run.not_stopped",
                "the service does not stop",
                got=f"process {pid}",
                remedy=f"read {config.with_suffix('.log')}",
            )
        time.sleep(_POLL_S)
    config.with_suffix(".pid").unlink(missing_ok=True)
    typer.echo(f"{config.stem}: stopped")


def running(config: Path) -> int | None:
    """The process started in the background with these settings, if it lives. Another one with its number does not count."""
    try:
        pid = int(config.with_suffix(".pid").read_text("utf-8"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return None
    return pid if state != "Z" and config.name.encode() in b" ".join(words) else None


def register(app: typer.Typer, *, check: Callable[[Path], Any]) -> None:
    """Add `stop` and `check` to a noun with a service."""

    @app.command("stop")
    def stop_command(config: Configs) -> None:
        """Stop services that `run --background` left running, and wait until they are gone."""
        for one in config:
            stop(one)

    @app.command("check")
    def check_command(config: Config) -> None:
        """Read the settings file and the environment, and say what is wrong with them. Nothing is started."""
        check(config)
        typer.echo(f"{config}: good")


def _ready_line(child: subprocess.Popen[bytes], out: Path, log: Path) -> dict[str, Any]:
    deadline = time.monotonic() + READY_S
    while True:
        for line in out.read_bytes().splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if isinstance(said, dict) and said.get("ready") is True:
                return said
        ended = child.poll() is not None
        if ended or time.monotonic() > deadline:
            raise Unavailable(
                "run.not_ready",
                "the service ended before it was ready" if ended else "the service is not ready yet",
                got=_last_words(log),
                remedy=f"read {log}",
            )
        time.sleep(_POLL_S)


def _last_words(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    if not lines:
        return "it said nothing"
    try:
        said = json.loads(lines[-1])
        return f"{said.get('says') or said.get('event')} [{said.get('code')}] {said.get('got') or ''}".strip()
    except (ValueError, AttributeError):
        return lines[-1][-300:]


def _in_words(said: dict[str, Any]) -> str:
    facts = {name: value for name, value in said.items() if name not in ("ready", "service") and value}
    return "ready" + "".join(f", {name} {value}" for name, value in facts.items())
