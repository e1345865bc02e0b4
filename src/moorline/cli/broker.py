"""`moor broker`: run a provider's broker. What its people do with it is `moor hsm`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moorline.cli import running

if TYPE_CHECKING:
    from moorline.services.broker_settings import BrokerSettings

app = typer.Typer(no_args_is_help=True, help="The process in front of a provider's HSM.")


@app.callback()
def noun() -> None:
    """The process in front of a provider's HSM."""


@app.command()
def run(config: running.Config, *, background: running.Background = False) -> None:
    """Serve attested sessions, enrolment and the admin socket until stopped."""

    def serve() -> int:
        from moorline.services import broker_run, process

        loaded = _settings(config)

        async def main(_: object) -> None:
            await broker_run.run(loaded, ready=lambda bound: process.announce_ready("broker", **bound))

        return process.run("broker", main)

    running.start(config, background=background, serve=serve, words=["broker", "run", "--config", str(config)])


def _settings(config: Path) -> BrokerSettings:
    from moorline.services import settings
    from moorline.services.broker_settings import BrokerSettings

    return settings.load(BrokerSettings, config, service="broker")


running.register(app, check=_settings)
