"""`moor ledger up`, as somebody tries it for the first time: it starts, answers, stops, and goes on where it was."""

import json
import signal
import subprocess
import sys
import time

import networks
import pytest

pytestmark = pytest.mark.story
MOOR = [sys.executable, "-m", "moorline.cli"]


def started(directory, engine):
    words = [*MOOR, "ledger", "up", "--dir", str(directory), "--engine", engine, "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, json.loads(line)


def stopped(process):
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def shown(directory):
    files = ["--trust", str(directory / "trust.cbor"), "--genesis", str(directory / "genesis.cbor")]
    words = [*MOOR, "ledger", "show", "parameter/max_age_s", *files, "--json"]
    for _ in range(40):  # after a restart the first proof comes with the first block
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0:
            break
        time.sleep(0.5)
    return done


@pytest.mark.parametrize("engine", ["embedded", "cometbft"])
def test_it_starts_answers_with_proofs_and_stops(tmp_path, engine):
    """verifies that: either engine comes up with one command, clients use one command, and nothing is left running."""
    if engine == "cometbft":
        networks.cometbft()
    directory = tmp_path / "ledger"
    process, said = started(directory, engine)
    try:
        assert [one["engine"] for one in said["authorities"]] == [engine] * 4
        done = shown(directory)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "30" in done.stdout
    finally:
        code, words = stopped(process)
    assert (code, words.strip()) == (0, "stopped")
    left = subprocess.run(["pgrep", "-f", str(directory)], capture_output=True, text=True, check=False).stdout
    assert left == ""


@pytest.mark.long
def test_started_again_it_is_the_same_ledger(tmp_path):
    networks.cometbft()
    directory = tmp_path / "ledger"
    for _ in range(2):
        process, _ = started(directory, "cometbft")
        try:
            assert shown(directory).returncode == 0
        finally:
            assert stopped(process)[0] == 0


def test_a_folder_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "genesis.cbor").write_bytes(b"mine")
    words = [*MOOR, "ledger", "up", "--dir", str(tmp_path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "ledger.not_a_ledger" in done.stdout) == (2, True), done.stdout
    assert (tmp_path / "genesis.cbor").read_bytes() == b"mine"
