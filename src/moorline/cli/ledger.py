"""`moor ledger`: read and prove what the consortium agreed on."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import acting, ledger_contract, ledger_evidence, ledger_node, ledger_up, render

if TYPE_CHECKING:
    from moorline.clock import Instant
    from moorline.ledger.light_client import LedgerTrust, ProvenState

app = typer.Typer(no_args_is_help=True)
app.add_typer(ledger_contract.app, name="contract")
app.command()(ledger_up.up)

_LONG = 64


class Expected(StrEnum):
    """What somebody who verifies a proof expects of every key in it."""

    PRESENT = "present"
    ABSENT = "absent"


_Keys = Annotated[
    list[str],
    typer.Argument(help="Keys such as provider/alpha, hsm/alpha/hsm-1, contract/c1, revocation/instance/alpha/i1."),
]
_Trust = Annotated[Path, typer.Option(envvar="MOOR_TRUST", help="Trust file of the ledger: trust.toml, or trust.cbor.")]
_Genesis = Annotated[
    Path, typer.Option(envvar="MOOR_GENESIS", help="Genesis file (genesis.cbor): where the authorities are.")
]


@app.callback()
def ledger() -> None:
    """Read and prove what the consortium agreed on."""


@app.command()
def show(key: _Keys, trust: _Trust, genesis: _Genesis, *, as_json: render.AsJson = False) -> None:
    """Show what keys hold, proven by a quorum of authorities."""
    from moorline.clock import SystemClock

    keys = _named(key)
    believed = load_trust(trust)
    _print(_verified(_fetch(genesis, keys, believed), believed, SystemClock().now()), keys, as_json=as_json)


@app.command()
def prove(
    key: _Keys,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the proof bundle.")],
    genesis: _Genesis,
    trust: Annotated[
        Path | None, typer.Option(help="Whoever verifies has this trust file: leave out older changes of the authorities.")
    ] = None,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Fetch a proof bundle for keys and write it to a file, for somebody else to verify offline."""
    bundle = _fetch(genesis, _named(key), None if trust is None else load_trust(trust))
    output.write_bytes(bundle)
    then = [f"moor ledger verify {output} --trust trust.toml, within the ledger's proof age"]
    render.files([output], as_json=as_json, then=then, bytes=str(len(bundle)))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A proof bundle (moor ledger prove).")],
    trust: Annotated[
        Path | None, typer.Option(envvar="MOOR_TRUST", help="Trust file of the ledger: trust.toml, or trust.cbor.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Judge its age at this time (RFC 3339 or seconds); now if left out.")
    ] = None,
    max_age: Annotated[
        int | None, typer.Option(metavar="S", min=1, help="How old it may be, in seconds; else as the trust file says.")
    ] = None,
    expect: Annotated[Expected | None, typer.Option(help="Refuse a proof in which any key is otherwise.")] = None,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Verify a proof bundle offline, with the trust file and nothing else.

    Exit codes: 0 proven (as expected); 1 badly signed, stale, of another ledger, not as expected; 2 unreadable or no trust.
    """
    from moorline.errors import Misconfigured
    from moorline.ledger.proof import parse_bundle

    if trust is None:
        raise Misconfigured(
            "ledger.no_trust", "a proof proves nothing without a trust file", remedy="name one: --trust trust.toml"
        )
    data, now = render.read(bundle), _time(at)
    believed = load_trust(trust, now=now)
    if max_age is not None:
        believed = replace(believed, max_age_s=max_age)
    state = _verified(data, believed, now)
    keys = [entry.key for entry in parse_bundle(data).records]
    for key in keys if expect else ():
        if expect is Expected.PRESENT:
            state.record(key)
        else:
            state.absent(key)
    _print(state, keys, as_json=as_json)


@app.command()
def trust(
    genesis: _Genesis,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the trust file (TOML).")],
    renew: Annotated[
        Path | None,
        typer.Option(help="A trust file that still holds: write it anew with the authorities in force, known as of now."),
    ] = None,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Write the trust file of a genesis, or renew one before its trusting period ends; binary if its name ends in .cbor.

    Services and providers take the binary one. Compare the ledger id with the consortium's by another way before believing
    a new one.
    """
    from moorline.clock import SystemClock, rendered
    from moorline.ledger import trust_file
    from moorline.ledger.genesis import parse
    from moorline.ledger.light_client import renewed

    if renew is None:
        found, then = parse(render.read(genesis)).trust(), "compare the ledger id by another way"
    else:
        old = _read_trust(renew)
        found = renewed(_fetch(genesis, ["parameter/max_age_s"], old), old, now=SystemClock().now())
        then = f"put it in the place of {renew} everywhere"
    render.new_file(output, _binary(found) if output.suffix == ".cbor" else trust_file.render(found).encode())
    acting.remind(found, output, genesis=genesis)
    render.files([output], as_json=as_json, then=[then], ledger=found.ledger_id.hex(), ends=rendered(found.ends))


ledger_node.register(app)
app.add_typer(ledger_evidence.app, name="evidence")


def load_trust(path: Path, *, now: Instant | None = None) -> LedgerTrust:
    """The trust in a file named on the command line, TOML or binary; says on standard error if it ends soon."""
    found = _read_trust(path)
    acting.remind(found, path, now=now)
    return found


def _binary(trust: LedgerTrust) -> bytes:
    """For services, which need the root certificates too."""
    from moorline.errors import Misconfigured

    if not trust.roots:
        raise Misconfigured(
            "ledger.trust_no_roots",
            "a trust file in TOML names no root certificates, and a binary one needs them",
            remedy="renew the binary one (--renew trust.cbor), or write TOML (--output trust.toml)",
        )
    return trust.encode()


def _read_trust(path: Path) -> LedgerTrust:
    from moorline.ledger import trust_file

    return trust_file.parse(render.read(path), lambda name: render.read(path.parent / name))


def _named(keys: list[str]) -> list[str]:
    from moorline.ledger import key_names

    return [key_names.parse(key) for key in keys]


def _time(text: str | None) -> Instant:
    from moorline.clock import SystemClock, parse_instant

    if text is None:
        return SystemClock().now()
    try:
        return parse_instant(text)
    except ValueError:
        raise typer.BadParameter("a time is 2026-11-27T12:00:00Z, or seconds since 1970", param_hint="--at") from None


def _verified(bundle: bytes, trust: LedgerTrust, now: Instant) -> ProvenState:
    from moorline.ledger.light_client import verify_bundle

    return verify_bundle(bundle, trust, now=now)


def _fetch(genesis: Path, keys: list[str], known: LedgerTrust | None) -> bytes:
    import asyncio

    async def fetched() -> bytes:
        async with acting.ledger_client(genesis) as client:
            return await client.prove(keys, known=None if known is None else known.authorities)

    with render.progress("asking the authorities"):
        return asyncio.run(fetched())


def _print(state: ProvenState, keys: list[str], *, as_json: bool) -> None:
    from moorline.clock import rendered
    from moorline.errors import Refused
    from moorline.wire import cbor

    shown: dict[str, object] = {}
    for key in keys:
        try:
            shown[key] = render.plain(cbor.decode(state.record(key)))
        except Refused as error:
            if error.code != "ledger.absent":
                raise
            shown[key] = None
    if as_json:
        proven = {key: "absent" if record is None else "present" for key, record in shown.items()}
        facts = {"height": state.height, "time": rendered(state.time), "ledger": state.checkpoint.ledger_id.hex()}
        typer.echo(json.dumps({**facts, "proven": proven, "records": shown}))
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
