"""How nouns answer: facts and tables for people, one JSON object for programs, and a line while something takes its time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from moorline.clock import Instant, rendered
from moorline.errors import Misconfigured

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="The one value that the next command needs, and nothing else.")]

_TIMES: Final = ("at", "not_after")
_WIDE: Final = 240
"""Columns where output goes to a file or a pipe: a table is not folded to a screen that is not there."""


def facts(found: Mapping[str, Any], *, as_json: bool, then: str | None = None) -> None:
    """Names and values; `then` says what to do next."""
    if as_json:
        typer.echo(json.dumps(found))
        return
    width = max(len(name) for name in found)
    for name, value in found.items():
        typer.echo(f"{name:<{width}}  {_said(value, name)}")
    if then is not None:
        typer.echo(f"next: {then}")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, key: str, as_json: bool, empty: str) -> None:
    """Rows under their column names; `empty` is said where there is none. JSON is {key: rows}."""
    if as_json:
        typer.echo(json.dumps({key: list(rows)}))
        return
    if not rows:
        typer.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(_said(row.get(column), column) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False)
    with console.capture() as drawn:
        console.print(shown)
    typer.echo("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def files(paths: Sequence[Path], *, as_json: bool, then: Sequence[str], **more: str) -> None:
    """What was written, and what to do next."""
    if as_json:
        typer.echo(json.dumps({"written": [str(path) for path in paths], "next": list(then), **more}))
        return
    for path in paths:
        typer.echo(f"wrote {path}")
    for name, value in more.items():
        typer.echo(f"{name}: {value}")
    for number, step in enumerate(then):
        typer.echo(f"{'next:' if number == 0 else '     '} {step}")


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """A line on standard error while something that can take more than a second is under way."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def read(path: Path) -> bytes:
    """A file somebody named on the command line. Raises Misconfigured("cli.file")."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Misconfigured(
            "cli.file", "the file cannot be read", got=f"{path}: {error.strerror}", remedy="check the path"
        ) from None


def new_file(path: Path, data: bytes, *, mode: int = 0o666) -> Path:
    """A file that was not there before; a directory that is missing is made. Raises Misconfigured("cli.file_exists").

    A secret is written with mode 0600 from its first byte on. One that could not be written whole is not left behind.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_free(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise _taken(path) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def require_free(path: Path) -> None:
    """Raises Misconfigured("cli.file_exists"); for before an effect whose outcome is to be written there."""
    if path.exists():
        raise _taken(path)


def _taken(path: Path) -> Misconfigured:
    return Misconfigured(
        "cli.file_exists", "there is such a file already", got=path, remedy="move it away, or choose another name"
    )


def _said(value: object, name: str = "") -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in _TIMES and isinstance(value, int):
        return rendered(Instant(value))
    if isinstance(value, list | tuple):
        return ", ".join(_said(each) for each in value) or "-"
    return str(value)


def plain(item: object) -> object:
    """Decoded CBOR as JSON has it: bytes in hex."""
    if isinstance(item, bytes):
        return item.hex()
    if isinstance(item, list):
        return [plain(element) for element in item]
    if isinstance(item, dict):
        return {str(key): plain(value) for key, value in item.items()}
    return item
