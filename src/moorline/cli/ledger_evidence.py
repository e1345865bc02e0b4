"""`moor ledger evidence`: what shows that an authority lied, and who."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moorline.cli import acting, render
from moorline.errors import Refused

if TYPE_CHECKING:
    from moorline.ledger.finding import Finding
    from moorline.ledger.light_client import LedgerTrust

app = typer.Typer(no_args_is_help=True)

_Genesis = Annotated[
    Path, typer.Option(envvar="MOOR_GENESIS", help="Genesis file (genesis.cbor): where the authorities are.")
]
_Id = Annotated[str, typer.Argument(help="The evidence's id, or the beginning of it (moor ledger evidence list).")]
_LONG = 2000  # a block may be megabytes; all of it is in what `export` writes
_COLUMNS = ("id", "kind", "height", "offenders", "forked")


@app.callback()
def evidence() -> None:
    """Show, carry away and verify evidence that an authority lied."""


@app.command(name="list")
def list_evidence(genesis: _Genesis, *, as_json: render.AsJson = False) -> None:
    """List the evidence that the authorities have, verified."""
    rows = [_row(data, finding) for data, finding in _all(genesis)]
    render.table(rows, _COLUMNS, key="evidence", as_json=as_json, empty="no evidence: nobody was seen to lie")


@app.command()
def show(identifier: _Id, genesis: _Genesis, *, as_json: render.AsJson = False) -> None:
    """Show one piece of evidence: who signed what, twice."""
    data, finding = _one(identifier, genesis)
    render.facts({**_row(data, finding), "signed": _signed(data)}, as_json=as_json)


@app.command()
def export(
    identifier: _Id,
    genesis: _Genesis,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Write one piece of evidence to a file, for anybody to verify."""
    data, finding = _one(identifier, genesis)
    output.write_bytes(data)
    then = [f"moor ledger evidence verify {output} --trust trust.toml"]
    render.files([output], as_json=as_json, then=then, offenders=", ".join(finding.offenders))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="Evidence (moor ledger evidence export).")],
    trust: Annotated[Path, typer.Option(envvar="MOOR_TRUST", help="Trust file of the ledger: trust.toml, or trust.cbor.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Verify evidence offline, with the trust file and nothing else. Exit code 0: it shows that those it names lied."""
    from moorline.ledger import evidence as format_
    from moorline.ledger import trust_file

    believed = trust_file.parse(render.read(trust), lambda name: render.read(trust.parent / name))
    acting.remind(believed, trust)
    data = render.read(file)
    render.facts(_row(data, format_.verify(data, believed)), as_json=as_json)


def _all(genesis: Path) -> list[tuple[bytes, Finding]]:
    """Everything the authorities show, once each; what does not verify is left out, since anybody can answer garbage."""
    import asyncio

    from moorline.errors import MoorlineError
    from moorline.ledger import evidence as format_
    from moorline.ledger.genesis import parse

    trust: LedgerTrust = parse(render.read(genesis)).trust()

    async def fetched() -> list[bytes]:
        async with acting.ledger_client(genesis) as client:
            return await client.evidence()

    with render.progress("asking the authorities"):
        answers = asyncio.run(fetched())
    found = []
    for data in sorted(set(answers)):
        try:
            found.append((data, format_.verify(data, trust)))
        except MoorlineError:
            continue
    return sorted(found, key=lambda one: (one[1].height, one[0]))


def _one(identifier: str, genesis: Path) -> tuple[bytes, Finding]:
    from moorline.ledger.evidence import identify

    found = [one for one in _all(genesis) if identify(one[0]).startswith(identifier)]
    if len(found) != 1:
        raise Refused(
            "ledger.evidence_unknown",
            "there is not exactly one piece of evidence with this id",
            got=len(found),
            remedy="moor ledger evidence list",
        )
    return found[0]


def _row(data: bytes, finding: Finding) -> dict[str, Any]:
    from moorline.ledger.evidence import identify

    return {
        "id": identify(data),
        "kind": finding.kind.value,
        "height": finding.height,
        "offenders": list(finding.offenders),
        "forked": finding.forked,
        **({} if finding.fault is None else {"fault": finding.fault}),
    }


def _signed(data: bytes) -> list[str]:
    """What was signed, for people: two things of one kind, or the parts of the one that is wrong by itself."""
    from moorline.ledger import misconduct
    from moorline.ledger.evidence import MAX_EVIDENCE_BYTES, TWICE, Evidence, kind_of
    from moorline.wire import cbor, schema

    if kind_of(data) not in TWICE:
        body = cbor.decode(misconduct.parse(data).body, max_bytes=MAX_EVIDENCE_BYTES)
        return [_cut(f"{name}: {render.plain(value)}") for name, value in body.items()] if isinstance(body, dict) else []
    found = schema.decode(Evidence, data, max_bytes=MAX_EVIDENCE_BYTES)
    return [note.decode("utf-8") for note in found.notes] or [one.header.hex() for one in found.proposals]


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text)} characters)"
