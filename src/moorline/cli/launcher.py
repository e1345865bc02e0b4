"""`moor launcher`: run the launcher enclave and the relay around it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def launcher() -> None:
    """Run the launcher enclave."""


@app.command()
def run(config: Annotated[Path, typer.Option("--config", help="launcher.toml")]) -> None:
    """Have the silicon start the enclave and relay for it until stopped."""
    from moorline.services import launcher_parent, process, settings

    loaded = settings.load(launcher_parent.LauncherSettings, config)
    raise typer.Exit(process.run("launcher", lambda log: launcher_parent.run(loaded, log)))
