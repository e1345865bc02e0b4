"""Steps: the moments right after something was made durable, where a process may die and must be able to go on (ADR 0004).

`reached("broker.launch.consumed")` stands directly behind the commit it names. It does nothing, unless the environment
variable MOOR_KILL_AT holds that name: then the process kills itself there with SIGKILL, as a power cut would. The variable
may also be the absolute path of a file that holds the name; the file is removed before the kill, so a process that is
started again with the same environment lives. Whoever sets a process's environment could kill it anyway: this gives nobody
a power.

The crash suite (tests/crash) kills real processes at every name there is; docs/reference/steps.md lists them.
"""

from __future__ import annotations

import ast
import os
import signal
import threading
from functools import cache
from pathlib import Path
from typing import Final

from moorline.errors import Misconfigured

VARIABLE: Final = "MOOR_KILL_AT"
_SOURCE: Final = Path(__file__).parents[1]


def reached(name: str) -> None:
    """Say that the step `name`, a string literal, is durable. Dies here if it was told to, else returns at once."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and _is_told(wanted, name):
        os.kill(os.getpid(), signal.SIGKILL)
        # The signal goes to the process, not to this thread: nothing of this thread may follow the step either.
        threading.Event().wait()


def check_environment() -> None:
    """Raises Misconfigured("steps.unknown") if MOOR_KILL_AT names a step that does not exist; for the start of a process."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and not wanted.startswith("/") and wanted not in names():
        raise Misconfigured(
            "steps.unknown",
            f"{VARIABLE} names no step of this program",
            got=wanted,
            remedy="see docs/reference/steps.md, or unset it",
        )


@cache
def names() -> frozenset[str]:
    """Every name that `reached` is called with in this program, read from its source; for tests and documentation."""
    found: set[str] = set()
    for path in sorted(_SOURCE.rglob("*.py")):
        source = path.read_text("utf-8")
        if "reached(" in source and path != Path(__file__):
            found.update(_names_in(source, path.name))
    return frozenset(found)


def _names_in(source: str, where: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("reached", "steps.reached"):
            found.add(_literal(node, where))
    return found


def _literal(node: ast.Call, where: str) -> str:
    argument = node.args[0] if len(node.args) == 1 and not node.keywords else None
    if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
        raise Misconfigured("steps.not_literal", "a step is not named by a literal", got=f"{where}:{node.lineno}")
    return argument.value


def _is_told(wanted: str, name: str) -> bool:
    if not wanted.startswith("/"):
        return wanted == name
    path = Path(wanted)
    try:
        if path.read_text("utf-8").strip() != name:
            return False
        path.unlink()
    except OSError:  # no file: nobody asks for a death; or another process took it
        return False
    return True
