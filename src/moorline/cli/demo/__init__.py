"""`moor demo`: the whole story on this machine, in real processes, ending with two tables.

Exit 0 if every step succeeded and every attack was refused, 1 if anything failed, 2 if it could not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    *,
    report: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file, whatever happens.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the system up and print how to talk to it.")] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where state lives: a directory that is empty or not there yet.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Two providers that never met, one function, one device, and an attacker who fails: all on this machine."""
    from moorline.cli.demo.play import play

    raise typer.Exit(play(report_file=report, keep=keep, directory=directory, as_json=as_json))
