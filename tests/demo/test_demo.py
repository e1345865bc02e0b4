"""The demo, as a newcomer runs it: the whole story on real processes, and what it does when it cannot go on.

verifies that: every step succeeds; every attack is refused by the process under attack with the registered code, while the
same request without the malicious change succeeds; the report is written in any case; nothing is left behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moorline.cli.demo.report import ATTACKS, STEPS

MOOR = [sys.executable, "-m", "moorline.cli"]
pytestmark = [pytest.mark.story, pytest.mark.timeout(240)]


def processes_below(directory: Path) -> list[str]:
    """Command lines of processes that mention the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
            if str(directory) in line:
                found.append(line)
    return found


class Told:
    """What came of talking to a system that was kept, and of stopping it."""

    def __init__(self, directory):
        self.lines = (directory / "talk.txt").read_text("utf-8").splitlines()
        self.said = [
            subprocess.run(line, shell=True, capture_output=True, text=True, check=False) for line in self.lines[:-1]
        ]


def _said(line):
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One run for all that is asked of it: the system is kept, talked to, and stopped."""
    directory = Path(f"/tmp/moor-story-{os.getpid()}")
    report = tmp_path_factory.mktemp("report") / "r.json"
    arguments = ["--keep", "--report", str(report), "--dir", str(directory)]
    done = subprocess.run([*MOOR, "demo", *arguments], capture_output=True, text=True, check=False)
    try:
        told = Told(directory) if done.returncode == 0 else None
    finally:
        if (directory / "stop").exists():
            subprocess.run(["sh", str(directory / "stop")], check=True, timeout=30)
    return done, json.loads(report.read_text("utf-8")), directory, told


def test_the_whole_story_ends_well(story):
    done, report, _, _ = story
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["ok"] is True
    assert report["version"] == 1
    assert report["engine"] == "embedded"


@pytest.mark.parametrize("step", STEPS)
def test_step(story, step):
    _, report, _, _ = story
    assert [row["id"] for row in report["steps"]] == list(STEPS)
    row = next(row for row in report["steps"] if row["id"] == step)
    assert row["ok"] is True, row["says"]
    assert row["ms"] > 0


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(story, attack):
    _, report, _, _ = story
    assert [row["id"] for row in report["attacks"]] == list(ATTACKS)
    row = next(row for row in report["attacks"] if row["id"] == attack)
    assert row["code"] == ATTACKS[attack].code, row["says"]
    assert row["control"] is True, row["says"]
    assert row["refused"] is True


def test_a_system_that_is_kept_can_be_talked_to(story):
    _, _, _, told = story
    assert len(told.lines) == 5
    for line, said in zip(told.lines, told.said, strict=False):
        assert said.returncode == 0, f"{line}: {said.stderr}"
        assert said.stdout.strip()


def test_nothing_is_left_behind_once_it_is_stopped(story):
    _, _, directory, _ = story
    assert not directory.exists()
    assert processes_below(directory) == []


@pytest.mark.long
def test_a_demo_that_is_not_kept_leaves_nothing_behind_by_itself(tmp_path):
    """The clean-up itself is shown on every run below that ends early; this is the one after the whole story."""
    directory, report = Path(f"/tmp/moor-gone-{os.getpid()}"), tmp_path / "r.json"
    arguments = ["--report", str(report), "--dir", str(directory)]
    done = subprocess.run([*MOOR, "demo", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text("utf-8"))["ok"] is True
    assert not directory.exists()
    assert processes_below(directory) == []


def test_a_demo_that_cannot_go_on_says_so_and_reports_all_steps_and_attacks(tmp_path):
    report = tmp_path / "r.json"
    directory = Path(f"/tmp/moor-broken-{os.getpid()}")
    bare = tmp_path / "bin"
    bare.mkdir()  # a machine without swtpm: nothing else of the demo's tools is missing
    for tool in ("softhsm2-util", "bwrap", "ldd"):
        found = next(
            (Path(place) / tool for place in ("/usr/bin", "/usr/sbin", "/bin") if (Path(place) / tool).exists()), None
        )
        if found is not None:
            (bare / tool).symlink_to(found)
    done = subprocess.run(
        [*MOOR, "demo", "--report", str(report), "--dir", str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(bare)},
    )
    told = json.loads(report.read_text("utf-8"))
    assert done.returncode == 1
    assert told["ok"] is False
    assert [row["id"] for row in told["steps"]] == list(STEPS)
    assert [row["id"] for row in told["attacks"]] == list(ATTACKS)
    failed = next(row for row in told["steps"] if not row["ok"])
    assert "swtpm" in failed["says"]
    assert all(row["ms"] is None and not row["ok"] for row in told["steps"][told["steps"].index(failed) + 1 :])
    assert not directory.exists()
    assert processes_below(directory) == []


def test_ctrl_c_cleans_up_and_still_reports(tmp_path):
    report = tmp_path / "r.json"
    directory = Path(f"/tmp/moor-stopped-{os.getpid()}")
    demo = subprocess.Popen(
        [*MOOR, "demo", "--report", str(report), "--dir", str(directory)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (directory / "logs" / "authority-4.out").exists():
        assert time.monotonic() < deadline
        assert demo.poll() is None
        time.sleep(0.02)
    demo.send_signal(signal.SIGINT)
    assert demo.wait(60) == 2
    told = json.loads(report.read_text("utf-8"))
    assert [row["id"] for row in told["steps"]] == list(STEPS)
    assert told["ok"] is False
    assert not directory.exists()
    assert processes_below(directory) == []


def test_a_directory_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("keep me")
    done = subprocess.run([*MOOR, "demo", "--dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "demo.directory_not_empty" in done.stderr
    assert (tmp_path / "mine").read_text() == "keep me"


def test_an_unknown_option_is_a_usage_error():
    assert subprocess.run([*MOOR, "demo", "--fast"], capture_output=True, check=False).returncode == 64
