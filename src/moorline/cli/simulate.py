"""`moor simulate`: SIMULATED hardware for demonstrations and tests. Nothing here counts where simulation is not allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import running

if TYPE_CHECKING:
    from moorline.services.silicon import SiliconSettings

app = typer.Typer(no_args_is_help=True, help="SIMULATED hardware: manufacturer, chips, silicon.")


@app.command()
def manufacturer(
    directory: Annotated[Path, typer.Option("--dir", help="Where the manufacturer lives; made if it is not there.")],
    chip: Annotated[
        list[str] | None, typer.Option("--chip", help="Make this chip too, if it is not there. Repeatable.")
    ] = None,
    product: Annotated[str, typer.Option(help="Product line of its chips: Milan, Genoa or Turin.")] = "Milan",
) -> None:
    """Make a SIMULATED chip manufacturer and chips; print where its anchors and chips are, as JSON."""
    from moorline.clock import SystemClock
    from moorline.evidence.snp import Product
    from moorline.simulators.manufacturer import create_manufacturer, open_chip

    if product not in {line.value for line in Product}:
        raise typer.BadParameter("Milan, Genoa or Turin", param_hint="--product")
    now = SystemClock().now()
    maker = create_manufacturer(directory, now=now, product=Product(product))
    chips = {name: maker.make_chip(name, now=now) for name in chip or []}
    made = {name: {"chip_id": open_chip(path).chip_id.hex(), "directory": str(path)} for name, path in chips.items()}
    typer.echo(json.dumps({"anchors": str(maker.anchors_path), "chips": made}))


@app.command()
def silicon(config: running.Config, *, background: running.Background = False) -> None:
    """Run the SIMULATED secure processor of one machine until it is stopped."""

    def serve() -> int:
        from moorline.services.silicon import run

        return run(_settings(config))

    running.start(config, background=background, serve=serve, words=["simulate", "silicon", "--config", str(config)])


@app.command()
def measure(
    entry: Annotated[str, typer.Option("--entry", help="Module of moorline that the guest runs.")],
) -> None:
    """Print the launch digest that a guest of this installation will have, as hex."""
    from moorline.simulators import guest_image

    typer.echo(guest_image.measure(entry).hex())


def _settings(config: Path) -> SiliconSettings:
    from moorline.services import settings
    from moorline.services.silicon import SiliconSettings

    return settings.load(SiliconSettings, config, service="silicon")


running.register(app, check=_settings)
