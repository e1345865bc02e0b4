"""`moor log`: export the secure logs of a provider's services into one file, verify it anywhere, read it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import acting, operator_identity, render
from moorline.errors import EXIT_REFUSED, Misconfigured

if TYPE_CHECKING:
    from moorline.clock import Instant
    from moorline.ledger.light_client import LedgerTrust
    from moorline.wire.http import ClientIdentity

app = typer.Typer(no_args_is_help=True)

_SHOWN_DETAILS: Final = 200
File = Annotated[Path, typer.Argument(help="A file that moor log export wrote.")]


@app.callback()
def log() -> None:
    """Export, verify and read secure logs."""


@app.command()
def export(
    source: Annotated[
        list[str],
        typer.Option("--from", help="unix:ADMIN-SOCKET or the broker's directory; https://ADDRESS|SERVER-NAME of others."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    *,
    operator: Annotated[
        Path | None, typer.Option("--as", envvar="MOOR_OPERATOR", help="operator.toml: as whom to ask services.")
    ] = None,
    roots: Annotated[Path | None, typer.Option(help="In place of --as: root certificates, PEM.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="In place of --as: the operator's certificate chain, PEM.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="In place of --as: the operator's private key, PEM.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Write all logs into one file, with checkpoints signed now and the ledger's proof of them.

    Exit code 1 if a broker would not sign the log of a service any more: somebody changed its database. The file is written
    all the same, for moor log verify to say which entry it was.
    """
    from moorline.cli.log_collect import collected

    identity: ClientIdentity | None = None
    roots_pem = b""
    if roots is not None and certificate is not None and key is not None:
        identity, roots_pem = operator_identity.of_files(roots, certificate, key)
    elif operator is not None:
        identity, roots_pem = operator_identity.read(operator)
    with render.progress("waiting for the anchor"):
        found = asyncio.run(collected(source, identity=identity, roots_pem=roots_pem))
    render.new_file(output, found.data)
    told: dict[str, Any] = {
        "file": str(output),
        "bytes": len(found.data),
        "height": found.height,
        "entries": found.entries,
        "refused": {name: error.as_problem() for name, error in found.refused.items()},
    }
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo(f"wrote {output}: {len(found.data)} bytes, anchored at height {found.height}")
        for name, count in found.entries.items():
            typer.echo(f"  {name}: {count} entries")
        for name, error in found.refused.items():
            typer.echo(f"  {name}: its broker does not sign it any more: {error}", err=True)
        typer.echo(f"next: moor log verify {output} --trust trust.cbor")
    if found.refused:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def verify(
    file: File,
    trust: Annotated[Path, typer.Option(help="Trust file (trust.cbor) of the ledger.")],
    *,
    at: Annotated[str | None, typer.Option(help="Judge it at this time (RFC 3339, or seconds); now if left out.")] = None,
    max_age: Annotated[int | None, typer.Option(help="Refuse a ledger proof older than this, in seconds.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept that logs are left out of the file.")] = False,
    as_json: render.AsJson = False,
) -> None:
    """Verify a file offline: every entry, checkpoint and the anchor. Says what is established, and what is not."""
    from moorline.clock import rendered
    from moorline.ledger import audit_export

    now = _instant(at)
    found = audit_export.verify(render.read(file), _trust(trust, now), now=now, max_age_s=max_age, partial=partial)
    established, not_established = found.established(), found.not_established(now=now, max_age_s=max_age)
    if as_json:
        told = {
            "ok": True,
            "provider": found.provider,
            "hsm": found.hsm,
            "logs": [
                {"log": one.log, "entries": len(one.entries), "signed_at": rendered(one.signed_at)} for one in found.logs
            ],
            "missing": list(found.missing),
            "anchor": {
                "size": found.anchor.size,
                "root": found.anchor.root.hex(),
                "height": found.height,
                "time": rendered(found.proven_at),
                "age_s": now - found.proven_at,
            },
            "established": list(established),
            "not_established": list(not_established),
        }
        typer.echo(json.dumps(told))
        return
    typer.echo("established:")
    for line in established:
        typer.echo(f"  {line}")
    typer.echo("not established:")
    for line in not_established:
        typer.echo(f"  {line}")


@app.command()
def show(
    file: File,
    *,
    name: Annotated[str | None, typer.Option("--log", help="Only this log, such as broker/hsm-1.")] = None,
    event: Annotated[str | None, typer.Option(help="Only this event, such as launch-consumed.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Show entries, oldest first. Nothing is verified here: what is shown may have been changed."""
    from moorline.audit.export import parse
    from moorline.audit.log import parse_entry
    from moorline.clock import Instant, rendered

    found = [
        (one.log, parse_entry(data))
        for one in parse(render.read(file)).logs
        if name in (None, one.log)
        for data in one.entries
    ]
    rows = [
        {
            "time": rendered(Instant(entry.time)),
            "log": log_name,
            "number": entry.number,
            "event": entry.event,
            "subject": entry.subject,
            "details": entry.details if as_json else _shown(entry.details),
        }
        for log_name, entry in sorted(found, key=lambda pair: (pair[1].time, pair[0], pair[1].number))
        if event in (None, entry.event)
    ]
    render.table(
        rows,
        ("time", "log", "number", "event", "subject", "details"),
        key="entries",
        as_json=as_json,
        empty="no such entry",
    )


def _shown(details: dict[str, str]) -> str:
    text = " ".join(f"{name}={value if len(value) <= 24 else value[:16] + '…'}" for name, value in details.items())
    return text if len(text) <= _SHOWN_DETAILS else text[: _SHOWN_DETAILS - 1] + "…"


def _trust(path: Path, now: Instant) -> LedgerTrust:
    from moorline.ledger.light_client import LedgerTrust

    found = LedgerTrust.parse(render.read(path))
    acting.remind(found, path, now=now)
    return found


def _instant(text: str | None) -> Instant:
    from datetime import datetime

    from moorline.clock import Instant, SystemClock

    if text is None:
        return SystemClock().now()
    try:
        return Instant(int(text) if text.isdigit() else int(datetime.fromisoformat(text).timestamp()))
    except ValueError:
        raise Misconfigured("audit.time", "this is no time", expected="2026-11-23T18:00:00Z, or seconds", got=text) from None
