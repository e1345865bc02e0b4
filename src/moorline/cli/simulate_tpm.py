"""`moor simulate-tpm`: SIMULATED TPMs and boots for demonstrations and tests; they count only where that is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="SIMULATED TPMs, boots and file executions.")


@app.command()
def manufacturer(
    directory: Annotated[Path, typer.Option("--dir", help="Where the maker lives; made if it is not there.")],
    host: Annotated[list[str] | None, typer.Option("--tpm", help="Make this TPM too, if it is not there.")] = None,
) -> None:
    """Make a SIMULATED maker of TPMs, and TPMs; print where its anchor and the TPMs are, as JSON."""
    from moorline.clock import SystemClock
    from moorline.simulators.tpm import SimulatedTpm, SimulatedTpmManufacturer

    maker = (
        SimulatedTpmManufacturer.open(directory)
        if (directory / "root.der").exists()
        else SimulatedTpmManufacturer.create(directory, now=SystemClock().now())
    )
    made: dict[str, str] = {}
    for name in host or []:
        where = directory / "tpms" / name
        if not where.exists():
            SimulatedTpm.manufacture(where, maker)
        made[name] = str(where)
    typer.echo(json.dumps({"anchor": str(maker.root_path), "tpms": made}))


@app.command()
def boot(
    tcti: Annotated[str, typer.Option("--tcti", help="The TPM, just started: swtpm:path=...")],
    logs: Annotated[Path, typer.Option("--logs", help="Directory for the boot log and the IMA list.")],
    profile: Annotated[str, typer.Option("--profile", help="good or changed-kernel.")] = "good",
) -> None:
    """Measure one SIMULATED boot into a TPM and write its logs."""
    from moorline.attesters.tpm import Tpm
    from moorline.simulators import firmware

    if profile not in firmware.PROFILES:
        raise typer.BadParameter(" or ".join(firmware.PROFILES), param_hint="--profile")
    with Tpm.open(tcti) as tpm:
        firmware.boot(tpm, logs, firmware.PROFILES[profile])


@app.command()
def execute(
    tcti: Annotated[str, typer.Option("--tcti", help="The TPM of the host.")],
    logs: Annotated[Path, typer.Option("--logs", help="Directory of its logs.")],
    path: Annotated[str, typer.Option("--path", help="The file's path on the host.")],
    content: Annotated[Path, typer.Option("--content", help="A file with the bytes that are run.")],
) -> None:
    """Measure one more SIMULATED file execution: an IMA entry, and PCR 10 extended with it."""
    from moorline.attesters.tpm import Tpm
    from moorline.simulators import firmware

    with Tpm.open(tcti) as tpm:
        firmware.execute(tpm, logs, path, content.read_bytes())
