"""`moor verifier`: run an attestation authority, and sign what it judges by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import render, running, verifier_events, verifier_reload

if TYPE_CHECKING:
    from moorline.services.verifier_settings import VerifierSettings

app = typer.Typer(no_args_is_help=True, help="The attestation authority of a provider.")


@app.command()
def run(
    config: running.Config,
    *,
    production: Annotated[
        bool,
        typer.Option("--production", help="Use the shipped production policy: makers' own roots and nothing simulated."),
    ] = False,
    listen: Annotated[str | None, typer.Option("--listen", help="host:port instead of the configured one.")] = None,
    database: Annotated[Path | None, typer.Option("--database", help="SQLite file instead of the configured one.")] = None,
    background: running.Background = False,
) -> None:
    """Run the verifier until it is stopped."""

    def serve() -> int:
        from moorline.services import process, verifier, verifier_settings

        configured = _settings(config)
        if production:
            configured = verifier_settings.production(configured)
        if listen is not None:
            configured = dataclasses.replace(configured, listen=listen)
        if database is not None:
            configured = dataclasses.replace(configured, database=database)
        return process.run("verifier", lambda _: verifier.run(configured))

    words = ["verifier", "run", "--config", str(config), *(["--production"] if production else [])]
    words += [] if listen is None else ["--listen", listen]
    words += [] if database is None else ["--database", str(database)]
    running.start(config, background=background, serve=serve, words=words)


@app.command("sign-reference-values")
def sign_reference_values(
    values: Annotated[Path, typer.Argument(help="An unsigned set of reference values.")],
    key: Annotated[Path, typer.Option(help="The reference signer's private key (PEM).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the signed set.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Sign a set of reference values: from then on the verifier accepts what it lists, while it is valid."""
    from moorline.policy import reference_values
    from moorline.services.orchestrator import load_signer
    from moorline.wire import schema

    found = schema.decode(reference_values.ReferenceValues, render.read(values), max_bytes=reference_values.MAX_BYTES)
    render.new_file(output, reference_values.sign(found, load_signer(key)))
    then = [f"moor provider register reference-values {found.name} --file {output} --as DIR"]
    render.files([output], as_json=as_json, then=then, name=found.name, serial=str(found.serial))


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


def _settings(config: Path) -> VerifierSettings:
    from moorline.services import settings, verifier_settings

    configured = settings.load(verifier_settings.VerifierSettings, config, service="verifier")
    verifier_settings.require_policy(configured)
    return configured


app.command()(verifier_events.events)
app.command()(verifier_reload.reload)
running.register(app, check=_settings)
