"""`moor authority`: one ledger node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def authority() -> None:
    """Run a ledger node."""


@app.command()
def run(config: Annotated[Path, typer.Option(help="authority.toml, as the genesis ceremony wrote it.")]) -> None:
    """Run an authority until it is told to stop (SIGTERM)."""
    from moorline.services import authority as service
    from moorline.services import process, settings

    found = settings.load(service.Settings, config)
    raise typer.Exit(process.run("authority", lambda log: service.run(found, log)))
