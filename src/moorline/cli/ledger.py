"""`moor ledger`: read and prove what the consortium agreed on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moorline.ledger.client import LedgerClient
    from moorline.ledger.light_client import LedgerTrust, ProvenState

app = typer.Typer(no_args_is_help=True)

_Keys = Annotated[list[str], typer.Argument(help="Keys such as provider/alpha.")]
_Trust = Annotated[Path, typer.Option(help="Trust file (trust.cbor) of the ledger.")]
_Genesis = Annotated[Path, typer.Option(help="Genesis file (genesis.cbor): where the authorities are.")]


@app.callback()
def ledger() -> None:
    """Read and prove what the consortium agreed on."""


@app.command()
def show(key: _Keys, trust: _Trust, genesis: _Genesis) -> None:
    """Show what keys hold, proven by a quorum of authorities."""
    _print(_verified(_fetch(genesis, key), _trust(trust)), key)


@app.command()
def prove(
    key: _Keys,
    genesis: _Genesis,
    output: Annotated[Path, typer.Option(help="Where to write the proof bundle.")],
) -> None:
    """Fetch a proof bundle for keys and write it to a file, for somebody else to verify."""
    output.write_bytes(_fetch(genesis, key))
    typer.echo(f"{output}: {output.stat().st_size} bytes; next: moor ledger verify {output} --trust FILE")


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="A proof bundle.")], trust: _Trust) -> None:
    """Verify a proof bundle offline and show what it proves."""
    from moorline.ledger.proof import parse_bundle

    data = bundle.read_bytes()
    _print(_verified(data, _trust(trust)), [entry.key for entry in parse_bundle(data).records])


def _trust(path: Path) -> LedgerTrust:
    from moorline.ledger.light_client import LedgerTrust

    return LedgerTrust.parse(path.read_bytes())


def _verified(bundle: bytes, trust: LedgerTrust) -> ProvenState:
    from moorline.clock import SystemClock
    from moorline.ledger.light_client import verify_bundle

    return verify_bundle(bundle, trust, now=SystemClock().now())


def _fetch(genesis: Path, keys: list[str]) -> bytes:
    import asyncio

    async def fetched() -> bytes:
        async with _client(genesis) as client:
            return await client.prove(keys)

    return asyncio.run(fetched())


def _client(genesis: Path) -> LedgerClient:
    from moorline.ledger.ceremony import endpoints, pem_of
    from moorline.ledger.client import LedgerClient
    from moorline.ledger.genesis import parse

    found = parse(genesis.read_bytes())
    return LedgerClient(endpoints(found), roots_pem=pem_of(found.roots))


def _print(state: ProvenState, keys: list[str]) -> None:
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
    typer.echo(json.dumps({"height": state.height, "time": rendered(state.time), "records": shown}, indent=2))


def _readable(item: object) -> object:
    if isinstance(item, bytes):
        return item.hex()
    if isinstance(item, list):
        return [_readable(element) for element in item]
    if isinstance(item, dict):
        return {str(key): _readable(value) for key, value in item.items()}
    return item
