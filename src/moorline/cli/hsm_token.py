"""`moor hsm serve` and `moor hsm inspect`: own a token for several brokers, and look at what a token holds and can do."""

from __future__ import annotations

import json
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

    app.command()(inspect)


def inspect(
    broker: Annotated[
        Path | None, typer.Option("--broker", envvar="MOOR_BROKER", help="Ask the broker that has the token open.")
    ] = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Open the SoftHSM token here; nothing may run.")] = None,
    module: Annotated[str | None, typer.Option(help="Open a token of this PKCS#11 module, a path; nothing may run.")] = None,
    *,
    slot: Annotated[int | None, typer.Option(help="With --module: the token in this slot.")] = None,
    label: Annotated[str | None, typer.Option(help="With --module: the token of this label.")] = None,
    pin_file: Annotated[Path | None, typer.Option(help="With --module: where the PIN is (mode 0600).")] = None,
    pin_environment: Annotated[
        str | None, typer.Option(help="With --module: the variable that holds the PIN. Without either it is asked for.")
    ] = None,
    as_json: render.AsJson = False,
) -> None:
    """Show a token: its health, what it lacks and what follows, its keys, and which key does what."""
    if [broker, directory, module].count(None) != 2:
        raise typer.BadParameter("give one of --broker, --dir and --module")
    named = {"slot": slot, "label": label, "pin_file": pin_file, "pin_environment": pin_environment}
    if module is None and any(value is not None for value in named.values()):
        raise typer.BadParameter("name a token of a module: --module PATH")
    if broker is not None:
        found = _asked(broker)
    else:
        found = _opened(_in_module(module, **named) if module is not None else _in_directory(directory or Path()))
    if as_json:
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


def _opened(location: TokenLocation) -> dict[str, Any]:
    from moorline.hsm.token import open_token
    from moorline.hsm.token.inspection import report

    with render.progress("looking at the token"), open_token(location) as token:
        return asdict(report(token))


def _in_directory(directory: Path) -> TokenLocation:
    from moorline.hsm.token.softhsm import location_in

    return location_in(directory)


def _in_module(path: str, **named: Any) -> TokenLocation:  # noqa: ANN401 - the fields of a TokenLocation
    from moorline.hsm.token import TokenLocation

    asked = named["pin_file"] is None and named["pin_environment"] is None
    return TokenLocation(module=path, pin_prompt=asked, **named)
