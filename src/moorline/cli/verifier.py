"""`moor verifier`: run an attestation authority, and sign what it judges by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The attestation authority of a provider.")


@app.command()
def run(
    config: Annotated[Path, typer.Option("--config", help="verifier.toml")],
    production: Annotated[  # noqa: FBT002 - a command-line flag
        bool,
        typer.Option("--production", help="Use the shipped production policy: makers' own roots and nothing simulated."),
    ] = False,
    listen: Annotated[str | None, typer.Option("--listen", help="host:port instead of the configured one.")] = None,
    database: Annotated[Path | None, typer.Option("--database", help="SQLite file instead of the configured one.")] = None,
) -> None:
    """Run the verifier until it is stopped."""
    from moorline.services import process, settings, verifier

    configured = settings.load(verifier.VerifierSettings, config)
    if production:
        configured = verifier.production(configured)
    if listen is not None:
        configured = dataclasses.replace(configured, listen=listen)
    if database is not None:
        configured = dataclasses.replace(configured, database=database)
    raise typer.Exit(process.run("verifier", lambda _: verifier.run(configured)))


@app.command("show-reference-values")
def show_reference_values(
    file: Annotated[Path, typer.Argument(help="A signed set of reference values.")],
    signer: Annotated[Path, typer.Option("--signer", help="Public key (DER) that must have signed it.")],
) -> None:
    """Verify a signed set of reference values and print what it accepts, as JSON."""
    from moorline.clock import SystemClock
    from moorline.policy import reference_values
    from moorline.wire import keys

    key = keys.parse_public(signer.read_bytes())
    values = reference_values.parse_verified(file.read_bytes(), (key,), now=SystemClock().now())
    shown = dataclasses.asdict(values)
    for name, held in shown.items():
        if isinstance(held, tuple):
            shown[name] = [digest.hex() for digest in held]
    shown["files"] = {path: [digest.hex() for digest in digests] for path, digests in values.files.items()}
    typer.echo(json.dumps(shown, indent=1, sort_keys=True))
