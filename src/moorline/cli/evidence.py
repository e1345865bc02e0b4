"""`moor evidence`: what evidence says, whether it is authentic, and whether this build agrees with known cases.

Nothing here goes to the network. Exit codes: 0 affirming (or every case matches), 1 refused (or a case does not match),
2 could not decide.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.errors import EXIT_REFUSED, EXIT_YES, Misconfigured

if TYPE_CHECKING:
    from moorline.cli.evidence_cases import compare

app = typer.Typer(no_args_is_help=True, help="Inspect and appraise evidence, offline")

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def evidence() -> None:
    """Inspect and appraise evidence, offline."""


@app.command()
def vectors(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with case folders below it.")],
    *,
    as_json: _Json = False,
) -> None:
    """Run every folder below DIR that has a case.json, and compare what comes out with what it expects.

    A case that is not run is shown as skipped, with the reason. Exit 1 if any case does not match, or if there is none.
    """
    from moorline.cli.evidence_cases import compare, families

    folders = compare.find_folders(directory)
    if not folders:
        raise Misconfigured("evidence.no_cases", "no case.json below this folder", got=directory)
    rows = []
    for row in compare.run_folders(folders, families.family_of):
        rows.append(row)
        if not as_json:
            typer.echo(_line(row))
    totals = compare.totals(rows)
    if as_json:
        typer.echo(json.dumps({"cases": [asdict(row) for row in rows], "totals": totals}, indent=1))
    else:
        typer.echo(_summary(totals))
    failed = any(not row.match and row.got != "skipped" for row in rows)
    raise typer.Exit(EXIT_REFUSED if failed else EXIT_YES)


def _line(row: compare.Row) -> str:
    mark = "skip" if row.got == "skipped" else "ok  " if row.match else "FAIL"
    got = row.reason if row.got == "skipped" else row.got
    line = f"{mark} {row.family + '/' + row.case:<52} expected {row.expected:<24} got {got:<10} {row.code or ''}"
    return line.rstrip() if row.match or row.got == "skipped" else f"{line.rstrip()}\n     {row.reason}"


def _summary(totals: dict[str, object]) -> str:
    families = totals["families"]
    assert isinstance(families, dict)  # compare.totals
    lines = [""]
    for name, counts in {**families, "all": totals}.items():
        columns = "  ".join(f"{column} {counts[column]:>4}" for column in ("matched", "mismatched", "skipped"))
        lines.append(f"{name:<10} {columns}")
    return "\n".join(lines)
