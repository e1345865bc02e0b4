"""`moor host`: run the agent of a host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def host() -> None:
    """Run the agent of a host."""


@app.command()
def run(config: Annotated[Path, typer.Option("--config", help="host.toml")]) -> None:
    """Attest this host and start guests for its orchestrator until stopped."""
    from moorline.services import host as service
    from moorline.services import process, settings

    loaded = settings.load(service.HostSettings, config)
    raise typer.Exit(process.run("host", lambda log: service.run(loaded, log)))
