"""How the demo looks: a line a step while it runs, two tables at the end; colour only on a terminal."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from moorline.cli.demo.report import STEPS, Report


class View:
    """Live progress on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(highlight=False, quiet=quiet)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self._console, transient=True
        )
        self._task = self._progress.add_task("setting up", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def doing(self, what: str) -> None:
        """Say what is going on now."""
        self._progress.update(self._task, description=what)

    def done(self, step: str, *, ok: bool, ms: int, says: str) -> None:
        """One line for a step that ended."""
        mark = "[green]yes[/green]" if ok else "[red]NO[/red] "
        self._console.print(f"{mark} {step:<10} {ms / 1000:6.1f} s  {escape(says)}", soft_wrap=True)

    def attacked(self, attack: str, *, refused: bool, says: str) -> None:
        """One line for an attack that ended."""
        mark = "[green]refused[/green]" if refused else "[red]NOT REFUSED[/red]"
        self._console.print(f"    attack {attack}: {mark}  [dim]{escape(says)}[/dim]", soft_wrap=True)

    def say(self, text: str) -> None:
        """Any other line."""
        self._console.print(text, soft_wrap=True)

    def tables(self, report: Report) -> None:
        """The two tables of the end."""
        steps = Table(title="Steps", title_justify="left")
        for column in ("step", "ok", "ms", "what happened"):
            steps.add_column(column, justify="right" if column == "ms" else "left", overflow="fold")
        for step in report.steps.values():
            steps.add_row(
                step.id,
                _mark(ok=step.ok),
                "" if step.ms is None else str(step.ms),
                STEPS[step.id] if step.ok else escape(step.says),
            )
        attacks = Table(title="Attacks", title_justify="left")
        for column in ("attack", "refused", "by", "code"):
            attacks.add_column(column, overflow="fold")
        for attack in report.attacks.values():
            attacks.add_row(attack.id, _mark(ok=attack.refused), attack.by, attack.code or escape(attack.says))
        self._console.print(steps)
        self._console.print(attacks)

    def kept(self, directory: Path, lines: list[str]) -> None:
        """How to talk to a system that was kept."""
        self._console.print(f"\nThe system is up; its state and logs are in {directory}")
        for line in lines:
            self._console.print(f"  {line}", soft_wrap=True)


def _mark(*, ok: bool) -> str:
    return "[green]yes[/green]" if ok else "[red]no[/red]"
