"""`moor orchestrator`: run the orchestrator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def orchestrator() -> None:
    """Run the orchestrator (MANO)."""


@app.command()
def run(config: Annotated[Path, typer.Option("--config", help="orchestrator.toml")]) -> None:
    """Serve until stopped; one JSON line on standard output says when and where."""
    from moorline.services import orchestrator as service
    from moorline.services import process, settings

    loaded = settings.load(service.OrchestratorSettings, config)
    raise typer.Exit(process.run("orchestrator", lambda log: service.run(loaded, log)))
