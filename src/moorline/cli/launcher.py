"""`moor launcher`: run the launcher enclave and the relay around it, and sign the ticket that lets it in once."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import acting, render, running

if TYPE_CHECKING:
    from moorline.services.launcher_parent import LauncherSettings

app = typer.Typer(no_args_is_help=True)


@app.callback()
def launcher() -> None:
    """Run the launcher enclave."""


@app.command()
def run(config: running.Config, *, background: running.Background = False) -> None:
    """Have the silicon start the enclave and relay for it until stopped."""

    def serve() -> int:
        from moorline.services import launcher_parent, process

        loaded = _settings(config)
        return process.run("launcher", lambda log: launcher_parent.run(loaded, log))

    running.start(config, background=background, serve=serve, words=["launcher", "run", "--config", str(config)])


@app.command()
def ticket(
    provider: acting.As,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the ticket.")],
    *,
    chip: Annotated[Path | None, typer.Option(help="Directory of the SIMULATED chip of the launcher's machine.")] = None,
    chip_id: Annotated[str | None, typer.Option(help="The chip's id in hex, of a real machine.")] = None,
    life_s: Annotated[int, typer.Option("--life", min=30, max=3600, help="Seconds the ticket is good for.")] = 300,
    as_json: render.AsJson = False,
) -> None:
    """Sign a one-time ticket for a launcher of this installation's measurement on one chip. Each start needs a new one."""
    from moorline.clock import SystemClock
    from moorline.hsm.provider import load_provider_key, sign_launcher_ticket
    from moorline.services.launcher_parent import ENTRY
    from moorline.simulators.guest_image import measure
    from moorline.wire.session import LauncherTicket

    acts = acting.provider(provider)
    with render.progress("measuring the launcher"):
        measurement = measure(ENTRY)
    made = LauncherTicket(
        ledger_id=acts.trust().ledger_id,
        provider=acts.name,
        ticket=secrets.token_bytes(32),
        measurement=measurement,
        chip=_chip(chip, chip_id),
        not_after=SystemClock().now() + life_s,
    )
    render.new_file(output, sign_launcher_ticket(load_provider_key(acts.settings.key), made))
    render.files(
        [output], as_json=as_json, then=["moor launcher run, before the ticket expires"], measurement=measurement.hex()
    )


def _chip(directory: Path | None, chip_id: str | None) -> bytes:
    if (directory is None) == (chip_id is None):
        raise typer.BadParameter("give --chip or --chip-id")
    if directory is not None:
        from moorline.simulators.manufacturer import open_chip

        return open_chip(directory).chip_id
    try:
        return bytes.fromhex(chip_id or "")
    except ValueError:
        raise typer.BadParameter("a chip id is hex", param_hint="--chip-id") from None


def _settings(config: Path) -> LauncherSettings:
    from moorline.services import launcher_parent, settings

    return settings.load(launcher_parent.LauncherSettings, config, service="launcher")


running.register(app, check=_settings)
