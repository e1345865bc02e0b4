"""An assessment for people at a terminal. What came from the machine is printed as text, never as markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import typer

from moorline.clock import rendered
from moorline.policy.sec009.assessment import Assessment, Status
from moorline.policy.sec009.report import Difference

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: Final = {
    Status.MET: "green",
    Status.NOT_MET: "red",
    Status.DECLARED: "yellow",
    Status.NOT_PROBED: "cyan",
    Status.SERVICE: "blue",
}
_WIDE: Final = 200


def show(found: Assessment, *, verbose: bool) -> None:
    """The whole report; `verbose` adds the evidence of every capability."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False)
    with console.capture() as drawn:
        met = sum(one.status is Status.MET for one in found.capabilities)
        console.print(Text(f"SEC009 assessment of {found.host}, {rendered(found.at)}", style="bold"))
        console.print(f"{met} of {len(found.capabilities)} capabilities are there, as far as this machine says of itself.")
        if not found.privileged:
            console.print("Not run as root: what only root may read is not_probed. sudo moor host assess sees more.")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("capability", "status", "level", "class", "what was found"):
            table.add_column(column, overflow="fold")
        for one in found.capabilities:
            said = ": ".join(part for part in (one.value, one.reason) if part) or "-"
            level = one.assurance.word if one.assurance else "-"
            kind = f"{one.variability}, {one.attestable.replace('_', ' ')}"
            table.add_row(one.id, Text(one.status.value, style=_STYLES[one.status]), level, kind, Text(said))
            if verbose:
                lines = [*one.evidence, *([f"improve: {one.improve}"] if one.improve else [])]
                for line in lines:
                    table.add_row("", "", "", "", Text(line, style="dim"))
        console.print(table)
        _conclusions(console, found)
    typer.echo("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def _conclusions(console: Console, found: Assessment) -> None:
    from rich.text import Text

    console.print()
    console.print(Text("Measures (table 11)", style="bold"))
    for status in Status:
        of = [f"{one.id} {one.title}" for one in found.measures if one.status is status]
        if of:
            console.print(Text.assemble((f"  {status.value:<11}", _STYLES[status]), "; ".join(of)))
    console.print(
        Text(f"Approach: {found.approach} (derived; measures by services are the deployment's to run)", style="bold")
    )
    console.print()
    console.print(Text("Use cases (table 9)", style="bold"))
    for case in found.use_cases:
        verdict = ("yes", "green") if case.may_host else ("not yet", "red")
        console.print(Text.assemble(f"  {case.id} {case.title}: ", verdict))
        if case.missing:
            console.print(Text(f"      missing: {', '.join(case.missing)}"))
    steps = {change.id: change for case in found.use_cases for change in case.roadmap}
    if steps:
        console.print()
        console.print(Text("Roadmap: the fewest changes for each use case", style="bold"))
        for change in steps.values():
            cases = ", ".join(case.id for case in found.use_cases if change in case.roadmap)
            console.print(Text(f"  {change.says} [{change.effort}] for {cases}"))
            console.print(Text(f"      {change.how}", style="dim"))


def differences(found: Iterable[Difference]) -> None:
    """What changed, a line each: + better, - worse, ~ another value."""
    for one in found:
        mark = "~" if one.better is None else "+" if one.better else "-"
        typer.echo(f"{mark} {one.kind} {one.id}: {one.before} -> {one.after}")
