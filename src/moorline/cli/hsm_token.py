"""`moor hsm serve` and `moor hsm inspect`: own a token for several brokers, and look at what a token holds and can do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import acting, render, running

if TYPE_CHECKING:
    from moorline.hsm.token import TokenLocation

_COLUMNS: Final = ("label", "kind", "type", "role", "sensitive", "extractable", "never_extractable", "local", "uses")


def register(app: typer.Typer) -> None:
    """Add the commands to `moor hsm`."""

    @app.command()
    def serve(config: running.Config, *, background: running.Background = False) -> None:
        """Own a token, and serve broker processes of this machine at a unix socket, until stopped."""

        def served() -> int:
            from moorline.services import process, settings, token_owner

            loaded = settings.load(token_owner.TokenOwnerSettings, config, service="token")

            async def main(_: object) -> None:
                await token_owner.run(loaded, ready=lambda path: process.announce_ready("token", address=path))

            return process.run("token", main)

        running.start(config, background=background, serve=served, words=["hsm", "serve", "--config", str(config)])

    @app.command()
    def inspect(
        broker: Annotated[
            Path | None, typer.Option("--broker", envvar="MOOR_BROKER", help="Ask the broker that has the token open.")
        ] = None,
        directory: Annotated[
            Path | None, typer.Option("--dir", help="Open the SoftHSM token here; nothing may run.")
        ] = None,
        *,
        as_json: render.AsJson = False,
    ) -> None:
        """Show a token: its health, what it lacks and what follows, its keys, and which key does what."""
        if (broker is None) == (directory is None):
            raise typer.BadParameter("give --broker or --dir")
        found = _asked(broker) if broker is not None else _opened(directory or Path())
        if as_json:
            import json

            typer.echo(json.dumps(found))
            return
        render.table(found["keys"], _COLUMNS, key="keys", as_json=False, empty="no keys; next: moor hsm init")
        typer.echo("")
        render.table(found["capabilities"], ("name", "present", "needs", "consequence"), key="c", as_json=False, empty="-")
        typer.echo("")
        names = [each["name"] for each in found["mechanisms"]]
        render.facts({**found["token"], "mechanisms": names}, as_json=False)


def _asked(broker: Path) -> dict[str, Any]:
    async def ask(client: Any) -> Any:  # noqa: ANN401 - HttpClient, imported late
        return await client.get_json("/v1/token")

    found: dict[str, Any] = acting.at_broker(broker, ask)
    return found


def _opened(directory: Path) -> dict[str, Any]:
    from moorline.hsm.token import open_token
    from moorline.hsm.token.inspection import report

    with render.progress("looking at the token"), open_token(_location(directory)) as token:
        return asdict(report(token))


def _location(directory: Path) -> TokenLocation:
    from moorline.hsm.token.softhsm import location_in

    return location_in(directory)
