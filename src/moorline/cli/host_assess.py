"""`moor host assess`: what this machine meets of SEC009, and the fewest changes for what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moorline.cli import render
from moorline.clock import SystemClock
from moorline.errors import EXIT_REFUSED, EXIT_YES, Misconfigured

if TYPE_CHECKING:
    from moorline.policy.sec009.assessment import Assessment, Observation
    from moorline.rats import CapabilityLevel
    from moorline.wire.keys import PublicKey

app = typer.Typer(invoke_without_command=True)

_NOTHING = "-"


@app.callback()
def assess(  # noqa: PLR0913 - each is an option of its own
    context: typer.Context,
    *,
    root: Annotated[Path, typer.Option(metavar="DIR", help="Where the machine's file system begins.")] = Path("/"),
    as_json: render.AsJson = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page; - is standard output.")] = None,
    sarif: Annotated[Path | None, typer.Option(metavar="FILE", help="Write SARIF 2.1.0; - is standard output.")] = None,
    require: Annotated[
        list[str] | None, typer.Option(metavar="USE_CASE", help="Exit 1 unless it may be hosted, such as 4.7; repeat.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the evidence of every capability.")] = False,
    slow: Annotated[bool, typer.Option("--slow", help="Run what takes seconds too: rate and health of entropy.")] = False,
    noise: Annotated[Path | None, typer.Option(metavar="FILE", help="With --slow: raw samples of the noise source.")] = None,
    probed: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What moor host probe --report wrote here today; repeat.")
    ] = None,
    result: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An attestation result (EAR) of the verifier about this host.")
    ] = None,
    verifier_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The verifier's public key (PEM), to verify --result.")
    ] = None,
    audience: Annotated[str | None, typer.Option(metavar="NAME", help="Whom --result is meant for.")] = None,
) -> None:
    """Assess a Linux machine against SEC009: capabilities, measures, approach, use cases, and what to change.

    Needs no set-up and no root; root sees more. Exit 0 once the report is made; 1 only if a use case of --require may not
    be hosted.
    """
    if context.invoked_subcommand is not None:
        return
    from moorline.attesters.probes import machine
    from moorline.attesters.probes.memory import privileged
    from moorline.attesters.probes.tree import Tree
    from moorline.policy.sec009.assessment import assess as judge
    from moorline.policy.sec009.catalogue import catalogue

    for case in require or ():
        if case not in catalogue().use_cases:  # 1 is an answer about a use case, not about a word that is none
            raise typer.BadParameter(f"{case}: a use case is one of {', '.join(catalogue().use_cases)}")
    if not root.is_dir():
        raise Misconfigured("assess.root", "there is no such directory", got=root, remedy="name where / of the machine is")
    if noise is not None and not slow:
        raise Misconfigured("assess.noise", "--noise is for --slow", remedy="add --slow")
    tree, now = Tree(root), SystemClock().now()
    attested = _attested(result, verifier_key, audience, host=machine.host_name(tree))
    observations = _probed(probed or [], host=machine.host_name(tree))
    if slow:
        from moorline.attesters.probes import slow as slow_probes

        with render.progress("asking the entropy source"):
            observations.extend(slow_probes.probe(tree, noise))
    observations.extend(machine.observe(tree, now))
    found = judge(observations, host=machine.host_name(tree), at=now, privileged=privileged(), attested=attested)
    _written(found, as_json=as_json, html=html, sarif=sarif, verbose=verbose)
    refused = [case for case in require or () if not found.use_case(case).may_host]
    for case in refused:
        typer.echo(f"{case} may not be hosted: {', '.join(found.use_case(case).missing)} missing", err=True)
    raise typer.Exit(EXIT_REFUSED if refused else EXIT_YES)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="The older report (JSON).")],
    after: Annotated[Path, typer.Argument(help="The newer report (JSON).")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Compare two reports. Exit 1 if anything is worse than it was."""
    from moorline.cli.assessing import terminal
    from moorline.policy.sec009 import report

    found = report.compare(report.parse_report(render.read(before)), report.parse_report(render.read(after)))
    worse = [one for one in found if one.better is False]
    if as_json:
        rows = [
            {"kind": one.kind, "id": one.id, "before": one.before, "after": one.after, "better": one.better} for one in found
        ]
        typer.echo(json.dumps({"differences": rows, "worse": len(worse)}))
    elif not found:
        typer.echo("nothing has changed")
    else:
        terminal.differences(found)
    raise typer.Exit(EXIT_REFUSED if worse else EXIT_YES)


def _written(found: Assessment, *, as_json: bool, html: Path | None, sarif: Path | None, verbose: bool) -> None:
    if [as_json, str(html) == _NOTHING, str(sarif) == _NOTHING].count(True) > 1:
        raise Misconfigured(
            "assess.outputs", "only one report can go to standard output", remedy="name a file for the others"
        )
    if html is not None:
        from moorline.cli.assessing import page

        _put(html, page.render(found))
    if sarif is not None:
        from moorline.cli.assessing import sarif as form

        _put(sarif, json.dumps(form.render(found), indent=1) + "\n")
    if as_json:
        from moorline.policy.sec009 import report

        typer.echo(json.dumps(report.as_json(found)))
    elif _NOTHING not in (str(html), str(sarif)):
        from moorline.cli.assessing import terminal

        terminal.show(found, verbose=verbose)


def _put(where: Path, text: str) -> None:
    if str(where) == _NOTHING:
        typer.echo(text, nl=False)
        return
    try:
        where.write_text(text, "utf-8")
    except OSError as error:
        raise Misconfigured(
            "assess.write",
            "the report cannot be written",
            got=f"{where}: {error.strerror}",
            remedy="name a file in a folder that is there, or - for standard output",
        ) from None
    typer.echo(f"wrote {where}", err=True)


def _probed(reports: list[Path], *, host: str) -> list[Observation]:
    from moorline.policy.sec009 import probed

    return [probed.parse_probed(render.read(path), host=host, now=SystemClock().now()) for path in reports]


def _attested(result: Path | None, key: Path | None, audience: str | None, *, host: str) -> tuple[CapabilityLevel, ...]:
    """The levels of a verified result about this host. What is not asked for lifts nothing."""
    given: list[Any] = [result, key, audience]
    if given.count(None) == len(given):
        return ()
    if result is None or key is None or audience is None:
        raise Misconfigured(
            "assess.result", "a result counts with the key and the audience it is verified against",
            expected="--result, --verifier-key and --audience", remedy="give all three, or none",
        )  # fmt: skip
    from moorline.errors import Refused
    from moorline.policy import ear
    from moorline.rats import Tier

    token = render.read(result).decode("ascii", "replace").strip()
    found = ear.parse_verified(token, _public_key(key), now=SystemClock().now(), audience=audience)
    if found.subject != f"host/{host}":
        raise Refused("assess.other_host", "the result is about another host", expected=f"host/{host}", got=found.subject)
    if found.status is not Tier.AFFIRMING:
        raise Refused("assess.not_affirming", "the verifier does not affirm this host", got=found.status.word)
    return found.capabilities


def _public_key(path: Path) -> PublicKey:
    from cryptography.hazmat.primitives import serialization

    from moorline.wire import keys

    try:
        key = serialization.load_pem_public_key(render.read(path))
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    except ValueError:
        raise Misconfigured(
            "assess.key", "the verifier's key cannot be read", expected="PEM, a public key", got=path
        ) from None
    return keys.parse_public(der)
