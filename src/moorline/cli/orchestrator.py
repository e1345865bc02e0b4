"""`moor orchestrator`: run the orchestrator. What operators do with it is `moor vnf`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moorline.cli import running

if TYPE_CHECKING:
    from moorline.services.orchestrator import OrchestratorSettings

app = typer.Typer(no_args_is_help=True)


@app.callback()
def orchestrator() -> None:
    """Run the orchestrator (MANO)."""


@app.command()
def run(config: running.Config, *, background: running.Background = False) -> None:
    """Serve until stopped; one JSON line on standard output says when and where."""

    def serve() -> int:
        from moorline.services import orchestrator as service
        from moorline.services import process

        loaded = _settings(config)
        return process.run("orchestrator", lambda log: service.run(loaded, log))

    running.start(config, background=background, serve=serve, words=["orchestrator", "run", "--config", str(config)])


def _settings(config: Path) -> OrchestratorSettings:
    from moorline.services import orchestrator as service
    from moorline.services import settings

    return settings.load(service.OrchestratorSettings, config, service="orchestrator")


running.register(app, check=_settings)
