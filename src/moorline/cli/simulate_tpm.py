"""`moor simulate-tpm`: SIMULATED TPMs and boots for demonstrations and tests; they count only where that is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moorline.cli import render, running

if TYPE_CHECKING:
    from moorline.simulators.tpm import SimulatedTpm

_DAY_S: Final = 24 * 3600
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
def run(
    directory: Annotated[Path, typer.Option("--dir", help="The TPM's directory (moor simulate-tpm manufacturer).")],
    *,
    background: running.Background = False,
) -> None:
    """Power a SIMULATED TPM on, until stopped. A TPM that starts again has booted: its PCRs are reset."""

    def serve() -> int:
        from moorline.services import process
        from moorline.simulators.tpm import SimulatedTpm

        return process.run("tpm", lambda _: _powered(SimulatedTpm(directory)))

    words = ["simulate-tpm", "run", "--dir", str(directory)]
    running.start(directory / "tpm", background=background, serve=serve, words=words)


@app.command()
def stop(
    directory: Annotated[list[Path], typer.Option("--dir", help="The TPM's directory; may be repeated.")],
) -> None:
    """Power off TPMs that `run --background` left on."""
    for one in directory:
        running.stop(one / "tpm")


@app.command("reference-values")
def reference_values(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the set, unsigned.")],
    *,
    name: Annotated[str, typer.Option(help="Name of the set.")] = "good",
    days: Annotated[int, typer.Option(min=1, max=366, help="How long it is valid.")] = 30,
    as_json: render.AsJson = False,
) -> None:
    """Write what a host measures that boots the SIMULATED good profile: for `moor verifier sign-reference-values`."""
    from moorline.clock import Instant, SystemClock
    from moorline.simulators import firmware
    from moorline.wire import schema

    now = SystemClock().now()
    ends = Instant(now + days * _DAY_S)
    values = firmware.reference_values(firmware.GOOD, name=name, not_before=Instant(now - 60), not_after=ends)
    render.new_file(output, schema.encode(values))
    render.files([output], as_json=as_json, then=[f"moor verifier sign-reference-values {output} --key FILE --output FILE"])


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


async def _powered(tpm: SimulatedTpm) -> None:
    import asyncio

    from moorline.services import process

    await asyncio.to_thread(tpm.start)
    try:
        process.announce_ready("tpm", tcti=tpm.tcti)
        await asyncio.to_thread(tpm.wait)
    finally:
        tpm.stop()
