"""`moor ledger`: read and prove what the consortium agreed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import acting, render

if TYPE_CHECKING:
    from moorline.ledger.light_client import LedgerTrust, ProvenState

app = typer.Typer(no_args_is_help=True)

_LONG = 64

_Keys = Annotated[list[str], typer.Argument(help="Keys such as provider/alpha.")]
_Trust = Annotated[Path, typer.Option(help="Trust file (trust.cbor) of the ledger.")]
_Genesis = Annotated[Path, typer.Option(help="Genesis file (genesis.cbor): where the authorities are.")]


@app.callback()
def ledger() -> None:
    """Read and prove what the consortium agreed on."""


@app.command()
def show(key: _Keys, trust: _Trust, genesis: _Genesis, *, as_json: render.AsJson = False) -> None:
    """Show what keys hold, proven by a quorum of authorities."""
    _print(_verified(_fetch(genesis, key), _trust(trust)), key, as_json=as_json)


@app.command()
def prove(
    key: _Keys,
    genesis: _Genesis,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the proof bundle.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Fetch a proof bundle for keys and write it to a file, for somebody else to verify."""
    bundle = _fetch(genesis, key)
    output.write_bytes(bundle)
    then = [f"moor ledger verify {output} --trust FILE, within the ledger's proof age"]
    render.files([output], as_json=as_json, then=then, bytes=str(len(bundle)))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A proof bundle.")], trust: _Trust, *, as_json: render.AsJson = False
) -> None:
    """Verify a proof bundle offline and show what it proves."""
    from moorline.ledger.proof import parse_bundle

    data = render.read(bundle)
    _print(_verified(data, _trust(trust)), [entry.key for entry in parse_bundle(data).records], as_json=as_json)


def _trust(path: Path) -> LedgerTrust:
    from moorline.ledger.light_client import LedgerTrust

    return LedgerTrust.parse(render.read(path))


def _verified(bundle: bytes, trust: LedgerTrust) -> ProvenState:
    from moorline.clock import SystemClock
    from moorline.ledger.light_client import verify_bundle

    return verify_bundle(bundle, trust, now=SystemClock().now())


def _fetch(genesis: Path, keys: list[str]) -> bytes:
    import asyncio

    async def fetched() -> bytes:
        async with acting.ledger_client(genesis) as client:
            return await client.prove(keys)

    return asyncio.run(fetched())


def _print(state: ProvenState, keys: list[str], *, as_json: bool) -> None:
    from moorline.clock import rendered
    from moorline.errors import Refused
    from moorline.wire import cbor

    shown: dict[str, object] = {}
    for key in keys:
        try:
            shown[key] = _readable(cbor.decode(state.record(key)))
        except Refused as error:
            if error.code != "ledger.absent":
                raise
            shown[key] = None
    if as_json:
        typer.echo(json.dumps({"height": state.height, "time": rendered(state.time), "records": shown}))
        return
    rows = [
        {"key": key, "field": name, "value": value}
        for key, record in shown.items()
        for name, value in (record.items() if isinstance(record, dict) else [("", "proven absent")])
    ]
    typer.echo(f"height {state.height}, {rendered(state.time)}, signed by a quorum")
    render.table(_once(rows), ("key", "field", "value"), key="records", as_json=False, empty="nothing asked")


def _once(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The same rows, each key said at its first one only and long values cut: the whole of them is in --json."""
    shown: list[dict[str, object]] = []
    last = None
    for row in rows:
        value = row["value"]
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        cut = text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text)} characters)"
        shown.append({**row, "key": "" if row["key"] == last else row["key"], "value": cut})
        last = row["key"]
    return shown


def _readable(item: object) -> object:
    if isinstance(item, bytes):
        return item.hex()
    if isinstance(item, list):
        return [_readable(element) for element in item]
    if isinstance(item, dict):
        return {str(key): _readable(value) for key, value in item.items()}
    return item
