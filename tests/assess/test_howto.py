"""The how-tos for operators of hosts, typed as their readers would type them: every block in order, in an empty directory.

verifies that: every command stands there as it works, and what the page says comes out does.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
pytestmark = [pytest.mark.story, pytest.mark.timeout(300)]


def walkthrough():
    path = Path(__file__).parents[1] / "walkthrough" / "test_walkthrough.py"
    spec = importlib.util.spec_from_file_location("walkthrough_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WALK = walkthrough()


@pytest.fixture
def reader():
    """A directory with a short path, `moor` on the path, and nobody left when the reader goes."""
    directory = Path(f"/tmp/moor-howto-{os.getpid()}")
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


@pytest.mark.parametrize(
    "page",
    [
        "assess-a-host",
        "update-packages-without-alarms",
        "write-a-policy",
        pytest.param("enrol-a-fleet", marks=pytest.mark.long),  # most of its commands are the walkthrough's
    ],
)
def test_every_block_of_the_page_does_what_the_page_says(reader, page):
    text = WALK.with_free_ports((HOWTO / f"{page}.md").read_text("utf-8"))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOOR")}
    environment = {**clean, "PATH": f"{reader / 'bin'}:{os.environ['PATH']}", "COLUMNS": "200"}
    output = ""
    for kind, block in re.findall(r"^```(sh|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind == "text":
            line = WALK.missing_line(block, output)
            assert line is None, f"the page promises {line!r}; what came out:\n{output}"
            continue
        file = reader / "work.log"
        with file.open("wb") as out:  # services stay behind and keep their output: a pipe would never end
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=reader / "work",
                env=environment,
                check=False,
            )
        output = file.read_text("utf-8", errors="replace")
        assert done.returncode == 0, f"{block}\n{output}\n{WALK.last_logs(reader)}"
    assert [str(left) for left in (reader / "work").rglob("*.pid")] == []


def test_the_policy_of_the_page_is_a_policy():
    """The key that the fleet page waives is a field that the verifier knows."""
    import dataclasses
    import tomllib

    from moorline.policy.host import HostPolicy

    (block,) = re.findall(r"^```toml\n(.*?)^```$", (HOWTO / "enrol-a-fleet.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    waived = tomllib.loads(block)["not_required"]
    assert waived
    assert set(waived) <= {field.name for field in dataclasses.fields(HostPolicy)}
