"""`moor evidence`: what evidence says, whether it is authentic, and whether this build agrees with known cases.

Nothing here goes to the network. Exit codes: 0 affirming (or every case matches), 1 refused (or a case does not match),
2 could not decide.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from moorline.clock import Instant, SystemClock
from moorline.errors import EXIT_REFUSED, EXIT_UNDECIDED, EXIT_YES, Misconfigured
from moorline.rats import Outcome

if TYPE_CHECKING:
    from moorline.cli.evidence_cases import compare
    from moorline.cli.evidence_cases.appraisal import Verdict

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Inspect and appraise evidence, offline")

_MAX_FILE: Final = 16 * 1024 * 1024
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


@app.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Evidence, certificates, logs, in any order.")],
    *,
    as_json: _Json = False,
) -> None:
    """Print what each file is and says. Nothing is verified: every line is the file's own word.

    Kinds are detected by content; a file that could be of more than one kind is an error that names them.
    """
    from moorline.cli.evidence_cases import appraisal, facts

    contents = _read(files)
    kinds = appraisal.kinds_of(contents)
    found = {name: facts.facts_of(kind, contents[name]) for name, kind in kinds.items()}
    if as_json:
        listed = [{"file": name, "kind": kind, "facts": found[name]} for name, kind in kinds.items()]
        typer.echo(json.dumps({"verified": False, "files": listed}, indent=1))
        return
    typer.echo("not verified: these are the files' own words")
    for file, said in found.items():
        typer.echo(f"{file}: {kinds[file]}")
        for name, value in said.items():
            typer.echo(f"  {name:<28} {_text(value)}")


@app.command()
def appraise(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Evidence and endorsements, in any order.")],
    *,
    policy: Annotated[Path | None, typer.Option(metavar="P", help="Policy (TOML); without one only authenticity.")] = None,
    nonce: Annotated[str | None, typer.Option(metavar="HEX", help="The challenge the evidence must answer.")] = None,
    report_data: Annotated[str | None, typer.Option(metavar="HEX", help="The 64 bytes of report data to find.")] = None,
    at: Annotated[str | None, typer.Option(metavar="TIME", help="Time of appraisal, RFC 3339; default now.")] = None,
    collateral: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder of more endorsements.")] = None,
    as_json: _Json = False,
) -> None:
    """Say whether evidence is authentic and, with a policy, acceptable.

    Exit 0 affirming, 1 refused, 2 could not decide. What was not appraised is printed with the verdict.
    """
    from moorline.cli.evidence_cases import appraisal, policy_file

    more = [] if collateral is None else sorted(path for path in collateral.iterdir() if path.is_file())
    asked = appraisal.Asked(
        at=_instant(at),
        nonce=_hexadecimal("nonce", nonce),
        report_data=_hexadecimal("report-data", report_data),
        policy=None if policy is None else policy_file.parse_policy_file(policy.read_bytes()),
    )
    verdict = appraisal.appraise(_read([*files, *more]), asked)
    typer.echo(json.dumps(_verdict_json(verdict), indent=1) if as_json else "\n".join(_verdict_lines(verdict)))
    codes = {appraisal.AFFIRMING: EXIT_YES, appraisal.AUTHENTIC: EXIT_YES, appraisal.REFUSED: EXIT_REFUSED}
    raise typer.Exit(codes.get(verdict.status, EXIT_UNDECIDED))


def _read(files: list[Path]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for path in files:
        try:
            if path.stat().st_size > _MAX_FILE:
                raise Misconfigured("evidence.file", "a file is too large", expected=f"<= {_MAX_FILE} bytes", got=path)
            contents[str(path)] = path.read_bytes()
        except OSError as error:
            raise Misconfigured("evidence.file", "a file cannot be read", got=f"{path}: {error.strerror}") from None
    return contents


def _instant(at: str | None) -> Instant:
    if at is None:
        return SystemClock().now()
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise Misconfigured("evidence.time", "the time of appraisal is RFC 3339 with its zone", got=at)
    return Instant(int(moment.timestamp()))


def _hexadecimal(name: str, value: str | None) -> str | None:
    try:
        return None if value is None else bytes.fromhex(value).hex()
    except ValueError:
        raise Misconfigured("evidence.hex", "an option is not hexadecimal", got=name) from None


def _verdict_json(verdict: Verdict) -> dict[str, object]:
    return {
        "status": verdict.status,
        "authenticity_only": verdict.policy_digest is None,
        "family": verdict.family,
        "root": verdict.root,
        "policy_digest": verdict.policy_digest,
        "files": verdict.files,
        "facts": verdict.facts,
        "findings": [{**asdict(finding), "outcome": finding.outcome.value} for finding in verdict.findings],
        "not_appraised": list(verdict.not_appraised),
        "error": None if verdict.error is None else verdict.error.as_problem(),
    }


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = (
        ["authenticity only: no policy was given, nothing says whether this is acceptable"]
        if not verdict.policy_digest
        else []
    )
    lines.append(f"{verdict.status}: {verdict.family or 'unknown evidence'}")
    if verdict.error is not None:
        lines.append(f"  {verdict.error}")
    lines += [f"  {name:<28} {_text(value)}" for name, value in verdict.facts.items()]
    for finding in verdict.findings:
        lines.append(f"  {finding.outcome.value:<14} {finding.code}: {finding.says}")
        if finding.outcome is Outcome.NOT_MET:
            lines.append(
                f"    expected {finding.expected}; got {finding.got}; next: {finding.remedy or 'change the policy'}"
            )
    lines += [f"  not appraised  {gap}" for gap in verdict.not_appraised]
    return lines


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _line(row: compare.Row) -> str:
    mark = "skip" if row.got == "skipped" else "ok  " if row.match else "FAIL"
    got = row.reason if row.got == "skipped" else row.got
    line = f"{mark} {row.family + '/' + row.case:<52} expected {row.expected:<10} got {got:<10} {row.code or ''}"
    return line.rstrip() if row.match or row.got == "skipped" else f"{line.rstrip()}\n     {row.reason}"


def _summary(totals: dict[str, object]) -> str:
    families = totals["families"]
    assert isinstance(families, dict)  # compare.totals
    lines = [""]
    for name, counts in {**families, "all": totals}.items():
        columns = "  ".join(f"{column} {counts[column]:>4}" for column in ("matched", "mismatched", "skipped"))
        lines.append(f"{name:<10} {columns}")
    return "\n".join(lines)
