"""`moor broker`: run a provider's broker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The process in front of a provider's HSM.")


@app.callback()
def noun() -> None:
    """The process in front of a provider's HSM."""


@app.command()
def run(config: Annotated[Path, typer.Option(help="Settings file (broker.toml).")]) -> None:
    """Serve attested sessions, enrolment and the admin socket until stopped."""
    from moorline.services import broker, process, settings

    async def main(_: object) -> None:
        loaded = settings.load(broker.BrokerSettings, config)
        await broker.run(loaded, ready=lambda bound: process.announce_ready("broker", **bound))

    raise typer.Exit(process.run("broker", main))
