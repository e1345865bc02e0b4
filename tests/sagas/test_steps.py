"""Steps are named by literals, documented, and cost nothing to who is not told to die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moorline.errors import Misconfigured
from moorline.storage import steps

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "steps.md"
DIES = """
import sys
from moorline.storage.steps import reached
for name in sys.argv[1:]:
    reached(name)
print("lived")
"""


def run(told, *names):
    environment = {**os.environ, steps.VARIABLE: str(told)}
    return subprocess.run([sys.executable, "-c", DIES, *names], capture_output=True, text=True, env=environment, check=False)


def test_the_page_lists_every_step_and_no_other():
    listed = {line.split("`")[1] for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")}
    assert listed == steps.names()


def test_a_process_dies_at_its_step_and_at_no_other():
    assert run("broker.launch.consumed", "broker.launch.confirmed").stdout == "lived\n"
    died = run("broker.launch.consumed", "broker.launch.confirmed", "broker.launch.consumed")
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, "")


def test_a_file_kills_once(tmp_path):
    order = tmp_path / "order"
    assert run(order, "broker.launch.consumed").stdout == "lived\n"
    order.write_text("broker.launch.consumed\n")
    assert run(order, "broker.launch.consumed").returncode == -signal.SIGKILL
    assert run(order, "broker.launch.consumed").stdout == "lived\n"


def test_an_unknown_step_is_refused_at_the_start(monkeypatch):
    monkeypatch.setenv(steps.VARIABLE, "broker.launch.consumd")
    with pytest.raises(Misconfigured, match="steps.unknown"):
        steps.check_environment()
    monkeypatch.setenv(steps.VARIABLE, "broker.launch.consumed")
    steps.check_environment()
    monkeypatch.delenv(steps.VARIABLE)
    steps.check_environment()
    steps.reached("broker.launch.consumed")


def test_a_name_that_is_not_a_literal_is_found():
    with pytest.raises(Misconfigured, match="steps.not_literal"):
        steps._names_in("reached(name)", "x.py")
