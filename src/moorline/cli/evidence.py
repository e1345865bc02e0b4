"""`moor evidence`: what evidence says, whether it is authentic, and whether this build agrees with known cases.

Nothing here goes to the network. Exit codes: 0 affirming (or every case matches), 1 refused (or a case does not match),
2 could not decide.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import render
from moorline.clock import Instant, SystemClock
from moorline.errors import EXIT_REFUSED, EXIT_UNDECIDED, EXIT_YES, Misconfigured
from moorline.rats import Outcome, Tier

if TYPE_CHECKING:
    from moorline.cli.evidence_cases import compare
    from moorline.cli.evidence_cases.appraisal import Verdict
    from moorline.cli.evidence_cases.record import Record

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Inspect and appraise evidence, offline")

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
    from moorline.cli.evidence_cases import appraisal, facts, gathered

    contents = gathered.read(files)
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
def appraise(  # noqa: PLR0913 - the options are those of the question
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Evidence and endorsements, in any order.")],
    *,
    policy: Annotated[Path | None, typer.Option(metavar="P", help="Policy (YAML); without one only authenticity.")] = None,
    refs: Annotated[
        list[Path] | None, typer.Option(metavar="R", help="Signed reference values: a file or a folder; repeat.")
    ] = None,
    nonce: Annotated[str | None, typer.Option(metavar="HEX", help="The challenge the evidence must answer.")] = None,
    report_data: Annotated[str | None, typer.Option(metavar="HEX", help="The 64 bytes of report data to find.")] = None,
    at: Annotated[str | None, typer.Option(metavar="TIME", help="Time of appraisal, RFC 3339; default now.")] = None,
    collateral: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A collateral store, or a folder of endorsements.")
    ] = None,
    token: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the verdict as a signed EAR.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="K", help="Key to sign it with: P-256, PEM.")] = None,
    audience: Annotated[str, typer.Option(metavar="NAME", help="Whom the EAR is for.")] = "evidence",
    store: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep everything for `replay` in a new folder.")] = None,
    marks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Highest serials of reference values seen; read and renewed.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Say whether evidence is authentic and, with a policy, acceptable.

    Exit 0 affirming, 1 refused, 2 could not decide. What was not appraised is printed with the verdict.
    """
    from moorline.cli.evidence_cases import appraisal, gathered, record, tokens

    if (token is None) != (key is None):
        raise Misconfigured("evidence.token_key", "a token and the key that signs it are given together")
    signer = None if key is None else tokens.signer(render.read(key))
    asked = record.Record(
        at=_instant(at),
        nonce=_hexadecimal("nonce", nonce),
        report_data=_hexadecimal("report-data", report_data),
        policy=None if policy is None else render.read(policy),
        files=gathered.with_collateral(gathered.read(files), collateral),
        references=gathered.read(gathered.spread(refs or [])),
        highest=gathered.marks(marks),
        audience=audience,
        verdict={},
        token=None,
    )
    verdict = _appraised(asked)
    signed = None
    if signer is not None and token is not None:
        signed = tokens.sign(verdict.result(nonce=_bound(asked)), signer, audience=audience)
        token.write_text(signed + "\n")
    if store is not None:
        record.write(store, dataclasses.replace(asked, verdict=verdict.as_json(), token=signed))
    if marks is not None:
        gathered.raise_marks(marks, verdict.references)
    typer.echo(json.dumps(verdict.as_json(), indent=1) if as_json else "\n".join(_verdict_lines(verdict)))
    if verdict.status == appraisal.UNDECIDED and collateral is not None:
        for need in gathered.lacking(asked.files, collateral):
            typer.echo(f"the store lacks {need.items[0]}: {need.why}", err=True)
    codes = {appraisal.AFFIRMING: EXIT_YES, appraisal.AUTHENTIC: EXIT_YES, appraisal.REFUSED: EXIT_REFUSED}
    raise typer.Exit(codes.get(verdict.status, EXIT_UNDECIDED))


@app.command()
def replay(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `appraise --store DIR` wrote.")],
    *,
    as_json: _Json = False,
) -> None:
    """Compute a verdict again from what was kept, at the time it was made for, and say whether it is the same.

    The token, if there is one, must say the same too; its signature is for whoever knows the key. Exit 0 the same,
    1 another, 2 the record cannot be read or was changed.
    """
    from moorline.cli.evidence_cases import record, tokens

    kept = record.read(directory)
    verdict = _appraised(kept)
    again = json.loads(json.dumps(verdict.as_json()))
    different = sorted(name for name in {*again, *kept.verdict} if again.get(name) != kept.verdict.get(name))
    if kept.token is not None and not tokens.says(kept.token, verdict.result(nonce=_bound(kept)), audience=kept.audience):
        different.append("token")
    if as_json:
        typer.echo(json.dumps({"same": not different, "different": different, "status": verdict.status}))
    elif not different:
        typer.echo(f"the same verdict: {verdict.status}, of {verdict.as_json()['at']}")
    else:
        typer.echo(f"another verdict: {verdict.status}; it was {kept.verdict.get('status')}")
        for name in different:
            typer.echo(f"  {name:<18} was {_text(kept.verdict.get(name))}\n{'':<20} is  {_text(again.get(name))}")
    raise typer.Exit(EXIT_REFUSED if different else EXIT_YES)


@app.command("sign-references")
def sign_references(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Reference values as people write them (YAML).")],
    *,
    key: Annotated[Path, typer.Option(metavar="K", help="Key to sign with: P-256, P-384 or Ed25519, PEM.")],
    out: Annotated[Path, typer.Option(metavar="R", help="Where to write the signed set.")],
) -> None:
    """Sign a set of reference values, release by release, for `appraise --refs`."""
    from moorline.cli.evidence_cases import tokens
    from moorline.policy import reference_sets, reference_text

    values = reference_text.parse_reference_set(render.read(file))
    out.write_bytes(reference_sets.sign(values, tokens.any_signer(render.read(key))))
    typer.echo(f"wrote {out}: {values.name}, serial {values.serial}, {len(values.releases)} releases")


@app.command()
def collect(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for what is collected.")],
    *,
    nonce: Annotated[str | None, typer.Option(metavar="HEX", help="Challenge of TPM quotes; default random.")] = None,
    report_data: Annotated[
        str | None, typer.Option(metavar="HEX", help="64 bytes for SNP, TDX, CCA, SGX; default random.")
    ] = None,
    tcti: Annotated[str | None, typer.Option(metavar="T", help="TPM, as swtpm:path=... or device:/dev/tpmrm0.")] = None,
    bank: Annotated[str, typer.Option(metavar="HASH", help="PCR bank to quote.")] = "sha256",
    root: Annotated[Path, typer.Option(metavar="DIR", help="Where this machine's file system begins.")] = Path("/"),
    as_json: _Json = False,
) -> None:
    """Collect evidence about this machine: TPM, configfs-tsm (SNP, TDX, CCA), Gramine, Nitro; whatever is there.

    Exit 2 if there is nothing to collect from. Writes one file a piece of evidence, for `inspect` and `appraise`.
    """
    from moorline.cli.evidence_cases import collecting

    found = collecting.collect(
        out,
        nonce=bytes.fromhex(_hexadecimal("nonce", nonce) or secrets.token_hex(32)),
        report_data=bytes.fromhex(_hexadecimal("report-data", report_data) or secrets.token_hex(64)),
        tcti=tcti,
        bank=bank,
        root=root,
    )
    if as_json:
        typer.echo(json.dumps(found.as_json()))
    else:
        typer.echo("\n".join(found.lines()))
    raise typer.Exit(EXIT_YES if found.files else EXIT_UNDECIDED)


def _appraised(asked: Record) -> Verdict:
    """The verdict about a record: the same now and at any later time."""
    from moorline.cli.evidence_cases import appraisal
    from moorline.policy import language

    return appraisal.appraise(
        dict(asked.files),
        appraisal.Asked(
            at=Instant(asked.at),
            nonce=asked.nonce,
            report_data=asked.report_data,
            policy=None if asked.policy is None else language.parse_policy(asked.policy),
            references=tuple(asked.references.values()),
            highest=asked.highest,
        ),
    )


def _bound(asked: Record) -> bytes:
    """What the evidence had to be bound to: the EAR's nonce."""
    return bytes.fromhex(asked.nonce or asked.report_data or "")


def _instant(at: str | None) -> Instant:
    if at is None:
        return SystemClock().now()
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise Misconfigured(
            "evidence.time", "the time of appraisal is RFC 3339 with its zone", got=at, remedy="as in 2026-11-23T12:00:00Z"
        )
    return Instant(int(moment.timestamp()))


def _hexadecimal(name: str, value: str | None) -> str | None:
    try:
        return None if value is None else bytes.fromhex(value).hex()
    except ValueError:
        raise Misconfigured(
            "evidence.hex", "an option is not hexadecimal", got=name, remedy="digits 0-9 and a-f, two for each byte"
        ) from None


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = []
    if not verdict.policy_digest:
        lines.append("authenticity only: no policy was given, nothing says whether this is acceptable")
    lines.append(f"{verdict.status}: {verdict.family or 'unknown evidence'}")
    lines.append(f"  {'rests on':<28} {verdict.root.value if verdict.root else 'nothing that was established'}")
    if verdict.policy_digest:
        vector = ", ".join(f"{claim} {tier.word}" for claim, tier in verdict.vector.items() if tier is not Tier.NONE)
        lines.append(f"  {'level':<28} {verdict.level.word}")
        lines.append(f"  {'trust vector':<28} {vector or 'nothing affirmed'}")
    lines += [f"  {name:<28} {_text(value)}" for name, value in verdict.facts.items()]
    for finding in verdict.findings:
        lines.append(f"  {finding.outcome.value:<14} {finding.code}: {finding.says}")
        if finding.outcome is Outcome.NOT_MET or verdict.error is not None:
            said = (("expected", finding.expected), ("got", finding.got), ("next", finding.remedy))
            lines += [f"    {word} {text}" for word, text in said if text is not None]
    lines += [f"  not appraised  {gap}" for gap in verdict.not_appraised]
    return lines


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _line(row: compare.Row) -> str:
    mark = "skip" if row.got == "skipped" else "ok  " if row.match else "FAIL"
    got = row.reason if row.got == "skipped" else row.got
    line = f"{mark} {row.family + '/' + row.case:<52} expected {row.expected:<10} got {got:<10} {row.code or ''}"
    shown = line.rstrip() if row.match or row.got == "skipped" else f"{line.rstrip()}\n     {row.reason}"
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files are bytes, and need not be text


def _summary(totals: dict[str, object]) -> str:
    families = totals["families"]
    assert isinstance(families, dict)  # compare.totals
    lines = [""]
    for name, counts in {**families, "all": totals}.items():
        columns = "  ".join(f"{column} {counts[column]:>4}" for column in ("matched", "mismatched", "skipped"))
        lines.append(f"{name:<10} {columns}")
    return "\n".join(lines)
