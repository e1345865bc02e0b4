"""The walkthrough, typed as its reader would type it: every block in order, in an empty directory, with real processes.

verifies that: every command of docs/walkthrough.md works as it stands there; what the page says comes out does; nothing that
was started is left running.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = [pytest.mark.story, pytest.mark.timeout(600)]


def with_free_ports(text: str) -> str:
    """The page with ports nobody uses: its reader chooses them, and so does this test."""
    wanted = sorted(set(re.findall(r"127\.0\.0\.1:7\d\d\d", text)))
    held = [socket.socket() for _ in wanted]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        chosen = {old: f"127.0.0.1:{one.getsockname()[1]}" for old, one in zip(wanted, held, strict=True)}
    finally:
        for one in held:
            one.close()
    return re.sub(r"127\.0\.0\.1:7\d\d\d", lambda found: chosen[found.group()], text)


def words(line: str) -> str:
    return " ".join(line.split())


def missing_line(expected: str, output: str) -> str | None:
    """The first line of `expected` that does not come out, in its order; the ellipsis stands for anything."""
    lines = iter([words(line) for line in output.splitlines()])
    for line in expected.splitlines():
        pattern = ".*".join(re.escape(words(part)) for part in line.split("…"))
        pattern = pattern.replace(".*", r"\s*.*\s*")
        if not any(re.fullmatch(pattern, found) for found in lines):
            return line
    return None


@pytest.fixture
def reader():
    """A directory with a short path, `moor` on the path, and nobody left when the reader goes."""
    directory = Path(f"/tmp/moor-walk-{os.getpid()}")
    (directory / "bin").mkdir(parents=True)
    command = directory / "bin" / "moor"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m moorline.cli "$@"\n')
    command.chmod(0o755)
    (directory / "work").mkdir()
    yield directory
    for file in (directory / "work").rglob("*.pid"):
        try:
            os.killpg(int(file.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            continue
    shutil.rmtree(directory)


@pytest.mark.parametrize("page", ["walkthrough.md", "walkthrough-consortium.md"])
def test_every_block_of_the_page_does_what_the_page_says(reader, page):
    text = with_free_ports((DOCS / page).read_text("utf-8"))
    blocks = re.findall(r"^```(sh|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOOR")}
    environment = {**clean, "PATH": f"{reader / 'bin'}:{os.environ['PATH']}", "COLUMNS": "200"}
    shell = subprocess.Popen(
        ["bash", "-eu", "-o", "pipefail"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=reader / "work",
        env=environment,
    )
    output = ""
    try:
        for kind, block in blocks:
            if kind == "text":
                line = missing_line(block, output)
                assert line is None, f"the page promises {line!r}; what came out:\n{output}"
                continue
            shell.stdin.write(f"{block}\nprintf '\\n---done---\\n'\n")
            shell.stdin.flush()
            output = ""
            for line in shell.stdout:
                if line == "---done---\n":
                    break
                output += line
            else:
                pytest.fail(f"a command failed:\n{block}\n{output}\n{last_logs(reader)}")
    finally:
        shell.stdin.close()
        shell.wait(20)
    left = [str(file) for file in (reader / "work").rglob("*.pid")]
    assert left == []


def last_logs(reader: Path) -> str:
    """The end of every log, for whoever mends the page."""
    logs = sorted((reader / "work").rglob("*.log"))
    return "\n".join(f"{log}: {log.read_text('utf-8', errors='replace')[-400:]}" for log in logs)
