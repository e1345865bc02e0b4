"""Services in the background: ready or the reason why not, one at a time, and gone when they are told to go.

verifies that: SIGTERM and SIGINT end a service with exit code 0; its first line of output says it is ready; logs are JSON.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from moorline import cli
from moorline.cli import running
from moorline.errors import Conflict, Unavailable

SERVICE = """
import asyncio, sys
from moorline.services import process
from moorline.errors import Misconfigured

async def main(log):
    if sys.argv[1] == "refuses":
        raise Misconfigured("test.refused", "it cannot run", got="x")
    log.info("begins")
    process.announce_ready("test", address="nowhere")
    await asyncio.Event().wait()

sys.exit(process.run("test", main))
"""


@pytest.fixture
def service():
    child = subprocess.Popen(
        [sys.executable, "-c", SERVICE, "serves"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield child
    child.kill()
    child.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_a_service_cleanly(service, number):
    assert json.loads(service.stdout.readline()) == {"ready": True, "service": "test", "address": "nowhere"}
    service.send_signal(number)
    _, logs = service.communicate(timeout=20)
    assert service.returncode == 0
    said = [json.loads(line) for line in logs.splitlines()]
    assert [line["event"] for line in said] == ["begins", "stopped"]
    assert {line["service"] for line in said} == {"test"}


def test_a_service_that_refuses_says_its_code_and_exits_by_it():
    done = subprocess.run([sys.executable, "-c", SERVICE, "refuses"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(done.stderr)["code"] == "test.refused"


@pytest.fixture
def authority(tmp_path):
    both = ["--authority", "a-1=127.0.0.1:0", "--authority", "a-2=127.0.0.1:0"]
    assert cli.run(["init", "consortium", "--dir", str(tmp_path), "--domain", "consortium.test", *both]) == 0
    config = tmp_path / "authorities" / "a-1" / "authority.toml"
    yield config
    running.stop(config)


def in_background(config):
    running.start(config, background=True, serve=lambda: 0, words=["authority", "run", "--config", str(config)])


def test_a_service_in_the_background_is_ready_when_the_command_returns_and_runs_once(authority, capsys):
    in_background(authority)
    assert "authority: ready, name a-1, address 127.0.0.1:" in capsys.readouterr().out
    with pytest.raises(Conflict, match=r"run\.already_running"):
        in_background(authority)
    assert cli.run(["authority", "stop", "--config", str(authority)]) == 0
    assert running.running(authority) is None


def test_a_service_that_cannot_start_says_why(authority, capsys):
    authority.write_text('name = "a-1"\nlisten = "127.0.0.1:0"\ndirectory = "nowhere"\n')
    with pytest.raises(Unavailable) as refusal:
        in_background(authority)
    assert refusal.value.code == "run.not_ready"
    assert "ledger.authority_folder" in str(refusal.value.got)


def test_settings_can_be_looked_at_without_starting_anything(authority, capsys):
    assert cli.run(["authority", "check", "--config", str(authority)]) == 0
    authority.write_text(authority.read_text() + 'nmae = "x"\n')
    assert cli.run(["authority", "check", "--config", str(authority)]) == 2
    assert "did you mean name?" in capsys.readouterr().err


def test_a_process_that_only_has_the_same_number_is_not_the_service(tmp_path):
    (tmp_path / "x.pid").write_text(str(os.getpid()))
    assert running.running(tmp_path / "no-such-service.toml") is None
    assert running.running(tmp_path / "x.toml") is None
