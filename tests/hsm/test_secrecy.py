"""Secrets stay where they belong: canaries are looked for in command lines, logs, errors, environments and cores."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moorline.errors import MoorlineError, from_problem
from moorline.hsm.keys import WRAPPING
from moorline.hsm.token import RemoteToken, initialise_softhsm, open_token
from moorline.services import settings
from moorline.services.token_owner import TokenOwnerSettings

sys.path.insert(0, str(Path(__file__).parent))
from canaries import command_lines, dumps_core

STORAGE_KEY = b"canary-storage-key-5a1f"
HMAC_SECRET = b"canary-hmac-secret-77d2-32-bytes!"
POOL_KEY = b"canary-pool-private-key-91c4"


def test_the_pin_of_a_new_token_is_in_no_command_line(tmp_path):
    """verifies that: while tokens are made, a watcher of all command lines never sees a PIN, and no program is started."""
    seen, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(command_lines())

    watcher = threading.Thread(target=watch)
    watcher.start()
    pins = []
    officer = "canary-officer-pin-30b1"
    try:
        while len(pins) < 5 or len(seen) <= 5:  # on a busy machine the watcher gets few looks
            number = len(pins)
            location = initialise_softhsm(tmp_path / str(number), label=f"t{number}", so_pin=officer)
            pins.append(location.pin_file.read_text().encode())
    finally:
        stop.set()
        watcher.join()
    assert len(seen) > 5
    for pin in (*pins, officer.encode()):
        assert not any(pin in lines for lines in seen)


@pytest.fixture
def owned(tmp_path):
    """`moor hsm serve` as a real process, its PIN given in the environment."""
    location = initialise_softhsm(tmp_path / "t", label="alpha")
    with open_token(location) as token:
        token.generate_wrapping_key(WRAPPING)
        token.generate_ec_key("issuing-ca")
    pin = location.pin_file.read_text()
    config = tmp_path / "token.toml"
    chosen = TokenOwnerSettings(
        token_module=location.module,
        token_label="alpha",
        token_pin_environment="CANARY_PIN",
        softhsm_conf=Path(location.environment["SOFTHSM2_CONF"]),
        socket=tmp_path / "own" / "token.sock",
    )
    settings.write(chosen, config)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "moorline.cli", "hsm", "serve", "--config", str(config)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=out, env={**os.environ, "CANARY_PIN": pin}, cwd=tmp_path
        )
        assert json.loads(process.stdout.readline())["ready"] is True
        yield process, chosen.socket, pin, log, tmp_path
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_nothing_that_was_planted_comes_out(owned):
    """verifies that: PIN, storage key, pool key and HMAC secret are in no log, error, command line or core of the owner."""
    process, path, pin, log, directory = owned
    errors: list[str] = []
    with RemoteToken(path) as token:
        token.import_mac_key("launch-key-1", HMAC_SECRET)
        token.mac("launch-key-1", b"m")
        sealed = [token.seal(WRAPPING, secret, b"here") for secret in (STORAGE_KEY, POOL_KEY)]
        assert token.unseal(WRAPPING, sealed[0], b"here") == STORAGE_KEY
        for attempt in (
            lambda: token.unseal(WRAPPING, sealed[0], b"there"),
            lambda: token.import_mac_key("launch-key-1", HMAC_SECRET),
            lambda: token.import_mac_key("not-a-role", HMAC_SECRET),
            lambda: token.seal("not-a-role", STORAGE_KEY, b""),
            lambda: token.mac("launch-key-2", HMAC_SECRET),
        ):
            with pytest.raises(MoorlineError) as caught:
                attempt()
            errors.append(json.dumps(caught.value.as_problem()) + str(caught.value) + repr(caught.value))
            assert from_problem(caught.value.as_problem()).code == caught.value.code
    assert not dumps_core(process.pid)
    lines = command_lines()
    process.send_signal(signal.SIGABRT)  # dumps core wherever it may; unlike SIGQUIT, nobody above ignores it
    process.wait(10)
    assert not [each for each in directory.iterdir() if each.name.startswith("core")]
    said = log.read_bytes() + "".join(errors).encode() + lines
    for secret in (pin.encode(), STORAGE_KEY, POOL_KEY, HMAC_SECRET):
        assert secret not in said
        assert secret.hex().encode() not in said


def test_a_process_with_secrets_cannot_be_looked_into(tmp_path):
    """verifies that: after `keep_secrets` a process is not dumpable and leaves no core, though its limit allowed one."""
    script = (
        "import ctypes, os, resource\n"
        "from moorline.secrecy import keep_secrets\n"
        "libc = ctypes.CDLL(None)\n"
        "print(libc.prctl(3, 0, 0, 0, 0), end=' ')\n"
        "keep_secrets()\n"
        "print(libc.prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE), flush=True)\n"
        "os.abort()\n"
    )

    def allow_cores() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))

    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=allow_cores,
        timeout=60,
        check=False,
    )
    assert done.stdout.split(maxsplit=1) == ["1", "0 (0, 0)\n"]
    assert done.returncode == -signal.SIGABRT
    assert list(tmp_path.iterdir()) == []


def test_the_lack_of_a_token_is_said_at_the_start(owned):
    """verifies that: what the probe found stands in the log of the owner, and a whole token lacks nothing."""
    log = owned[3].read_text()
    said = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    (token,) = [each for each in said if each["event"] == "token"]
    assert token["lacks"] == 0
