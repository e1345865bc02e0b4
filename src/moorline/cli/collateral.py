"""`moor collateral`: what vendors say about hardware, kept fresh, carried to machines offline, and what comes next.

Only `fetch` uses the network. Exit codes: 0 everything is as it should be, 1 something was refused or falls out of date,
2 something could not be decided or had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moorline.cli import collateral_options as options
from moorline.cli import render
from moorline.cli.collateral_add import add
from moorline.cli.collateral_fetch import fetch
from moorline.cli.collateral_forecast import forecast
from moorline.clock import Instant, rendered
from moorline.errors import EXIT_REFUSED, EXIT_YES, Malformed, Misconfigured

if TYPE_CHECKING:
    from moorline.storage.collateral_store import StoredItem

app = typer.Typer(no_args_is_help=True, help="Keep what vendors say about hardware")


@app.callback()
def collateral() -> None:
    """Keep what vendors say about hardware: fetch it, list it, carry it, and see what comes next."""


app.command()(fetch)
app.command()(add)


@app.command(name="list")
def list_items(
    *,
    store: options.Store,
    expiring_within: Annotated[
        int | None, typer.Option("--expiring-within", metavar="DAYS", min=0, help="Exit 1 if an item does, or has.")
    ] = None,
    at: options.At = None,
    as_json: render.AsJson = False,
) -> None:
    """List what the store holds, what it vouches for, and until when."""
    from moorline.storage.collateral_store import open_collateral

    now = options.instant(at)
    items = open_collateral(store, create=False).items()
    rows = [_row(item, now) for item in items]
    columns = ("item", "state", "evaluation", "number", "issued", "expires", "root", "endorses")
    render.table(rows, columns, key="items", as_json=as_json, empty="the store holds nothing")
    if expiring_within is not None:
        limit = now + expiring_within * options.DAY_S
        due = [item for item in items if item.judged.validity.not_after <= limit]
        raise typer.Exit(EXIT_REFUSED if due else EXIT_YES)


def _row(item: StoredItem, now: Instant) -> dict[str, Any]:
    from moorline.verification.collateral import freshness

    judged = item.judged
    return {
        "item": str(item.name),
        "state": freshness(judged.validity, now).value,
        "evaluation": judged.evaluation,
        "number": judged.number,
        "issued": rendered(judged.issued),
        "expires": rendered(judged.validity.not_after),
        "root": judged.root.value,
        "endorses": judged.endorses,
        "source": item.source,
        "fetched": rendered(item.fetched),
    }


@app.command()
def export(
    *,
    store: options.Store,
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Private key (PEM) that signs: Ed25519, P-256, P-384.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The bundle.")],
    at: options.At = None,
    as_json: render.AsJson = False,
) -> None:
    """Write what the store holds and is current into one signed file."""
    from moorline.storage.collateral_store import open_collateral
    from moorline.verification.collateral import Freshness, freshness
    from moorline.wire import cose
    from moorline.wire.collateral_bundle import BundledItem, seal
    from moorline.wire.keys import KeySigner

    now = options.instant(at)
    items = open_collateral(store, create=False).items()
    current = [item for item in items if freshness(item.judged.validity, now) is Freshness.CURRENT]
    if not current:
        raise Misconfigured("collateral.nothing_current", "the store holds nothing that is current", got=len(items))
    signer = KeySigner(options.private_key(key))
    bundled = [
        BundledItem(name=str(item.name), source=item.source, fetched=item.fetched, data=item.data) for item in current
    ]
    render.new_file(output, seal(bundled, signer, created=now))
    left = [str(item.name) for item in items if item not in current]
    found = {
        "bundle": str(output),
        "items": len(current),
        "signer": cose.key_id(signer.public_key()).hex(),
        "created": rendered(now),
        "left out, not current": left,
    }
    render.facts(found, as_json=as_json, then=f"moor collateral import {output} --signer PUBLIC-KEY.pem --store PATH")


@app.command(name="import")
def import_bundle(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `moor collateral export` wrote.")],
    *,
    signer: Annotated[list[Path], typer.Option("--signer", metavar="FILE", help="Public key (PEM) to accept. Repeatable.")],
    store: options.Store,
    snp_anchors: options.SnpAnchors = None,
    intel_root: options.IntelRoots = None,
    tpm_root: options.TpmRoots = None,
    at: options.At = None,
    as_json: render.AsJson = False,
) -> None:
    """Verify a bundle's signer, then each item; store what is authentic, current and not older than what was held.

    Each item is reported. Exit 1 if the signer or an item was refused, 2 if one could not be judged.
    """
    from moorline.storage.collateral_intake import Offered, root_first, take
    from moorline.storage.collateral_store import open_collateral
    from moorline.verification.collateral import ItemName
    from moorline.wire import cose
    from moorline.wire.collateral_bundle import open_bundle

    now = options.instant(at)
    opened, key = open_bundle(render.read(bundle), [options.public_key(path) for path in signer])
    if opened.created > now:
        raise Malformed(
            "bundle.from_the_future",
            "the bundle was made after now",
            expected=f"<= {rendered(now)}",
            got=opened.created,
            remedy="look at this machine's clock, and at that of the machine that made it",
        )
    anchors = options.anchors_of(snp_anchors, intel_root, tpm_root)
    by_name = {ItemName.parse(item.name): item for item in opened.items}
    target = open_collateral(store, create=True)
    outcomes = []
    for name in root_first(by_name):
        item = by_name[name]
        offered = Offered(name=name, data=item.data, source=item.source, fetched=Instant(item.fetched))
        outcomes.append(take(offered, target, anchors=anchors, now=now))
    if as_json:
        found = {"signer": cose.key_id(key).hex(), "created": rendered(Instant(opened.created))}
        typer.echo(json.dumps({**found, "items": [options.outcome_row(one) for one in outcomes]}, indent=1))
    else:
        typer.echo(f"signed by {cose.key_id(key).hex()} at {rendered(Instant(opened.created))}")
        for outcome in outcomes:
            typer.echo(options.outcome_line(outcome))
    raise typer.Exit(options.exit_code(outcomes))


app.command()(forecast)
