"""An assessment for people at a terminal. What came from the machine is printed as text, never as markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import typer

from moorline.clock import rendered
from moorline.policy.sec009.assessment import Assessment, Status
from moorline.policy.sec009.report import Difference
from moorline.policy.sec009.roadmap import Change

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: Final = {
    Status.MET: "green",
    Status.NOT_MET: "red",
    Status.DECLARED: "yellow",
    Status.NOT_PROBED: "cyan",
    Status.SERVICE: "blue",
}
_WORDS: Final = {
    Status.MET: "met",
    Status.DECLARED: "declared",
    Status.NOT_MET: "not met",
    Status.NOT_PROBED: "not probed",
}
_LEGEND: Final = (
    "met: found here. not_met: looked for, and not here. declared: somebody states it, nothing shows it.",
    "not_probed: could not be looked at, or takes a command of its own; counts as not here.",
    "Level asserted is this machine's own word; what a verifier found raises it (--result).",
)
_WIDE: Final = 200


def show(found: Assessment, *, verbose: bool) -> None:
    """The whole report, what matters most first; `verbose` adds the evidence of every capability."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False)
    with console.capture() as drawn:
        _headline(console, found)
        _capabilities(console, found, verbose=verbose)
        _measures(console, found)
        _use_cases(console, found)
        _roadmap(console, found)
        _what_next(console, found, verbose=verbose)
    typer.echo("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def _headline(console: Console, found: Assessment) -> None:
    """What somebody wants to know who reads five lines and no more."""
    from rich.text import Text

    console.print(Text(f"SEC009 assessment of {found.host}, {rendered(found.at)}", style="bold"))
    counts = [f"{sum(one.status is status for one in found.capabilities)} {_WORDS[status]}" for status in _WORDS]
    console.print(f"{len(found.capabilities)} capabilities: {', '.join(counts)}.")
    hosted = [case.id for case in found.use_cases if case.may_host]
    console.print(f"May host {', '.join(hosted) or 'none'} of {len(found.use_cases)} use cases.")
    first = _first(_steps(found))
    if first is not None:
        console.print(Text(f"First, for {len(first[1])} of them: {first[0].says}."))
    if not found.privileged:
        console.print("Not run as root: what only root may read is not_probed. sudo moor host assess sees more.")
    console.print()
    for line in _LEGEND:
        console.print(Text(line, style="dim"))
    console.print()


def _capabilities(console: Console, found: Assessment, *, verbose: bool) -> None:
    from rich.table import Table
    from rich.text import Text

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
    console.print()


def _measures(console: Console, found: Assessment) -> None:
    from rich.text import Text

    console.print(Text("Measures (table 11)", style="bold"))
    for one in found.measures:
        said = one.status.value if one.status is not Status.SERVICE else "a service's to show, not this host's"
        console.print(Text.assemble(f"  {one.id:<5}{one.title}: ", (said, _STYLES[one.status])))
    console.print(
        Text(f"Approach: {found.approach} (derived; measures by services are the deployment's to run)", style="bold")
    )
    console.print()


def _use_cases(console: Console, found: Assessment) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text("Use cases (table 9)", style="bold"))
    for case in found.use_cases:
        verdict = ("yes", "green") if case.may_host else ("not yet", "red")
        console.print(Text.assemble(f"  {case.id} {case.title}: ", verdict))
        if case.missing:
            console.print(Padding(Text(f"missing: {', '.join(case.missing)}"), (0, 0, 0, 6)))


def _roadmap(console: Console, found: Assessment) -> None:
    from rich.padding import Padding
    from rich.text import Text

    steps = _steps(found)
    if not steps:
        return
    console.print()
    console.print(Text("Roadmap: the fewest changes for each use case", style="bold"))
    for change, cases in steps:
        console.print(Text(f"  {change.says} [{change.effort}] for {', '.join(cases)}"))
        console.print(Padding(Text(change.how, style="dim"), (0, 0, 0, 6)))


def _what_next(console: Console, found: Assessment, *, verbose: bool) -> None:
    console.print()
    if not verbose:
        console.print("Why each line says what it says: moor host assess -v")
    console.print("To keep and compare: moor host assess --json > now.json; moor host assess diff now.json later.json")
    if any(one.status is Status.NOT_PROBED for one in found.capabilities):
        console.print("To try what takes time: moor host assess --slow; moor host probe -h")


def _first(steps: list[tuple[Change, list[str]]]) -> tuple[Change, list[str]] | None:
    """The change that waits for no other, for the most use cases, with the least effort."""
    given = frozenset[str]().union(*(change.provides for change, _ in steps))
    ready = [step for step in steps if not step[0].requires & given]
    return max(ready, key=lambda step: (len(step[1]), -step[0].weight), default=None)


def _steps(found: Assessment) -> list[tuple[Change, list[str]]]:
    """Each change of the roadmaps once, with the use cases it is for."""
    changes = {change.id: change for case in found.use_cases for change in case.roadmap}
    return [(one, [case.id for case in found.use_cases if one in case.roadmap]) for one in changes.values()]


def differences(found: Iterable[Difference]) -> None:
    """What changed, a line each: + better, - worse, ~ another value."""
    for one in found:
        mark = "~" if one.better is None else "+" if one.better else "-"
        typer.echo(f"{mark} {one.kind} {one.id}: {one.before} -> {one.after}")
