"""Naming a token, its PIN, and losing it: wrong PINs are tried once, a token that went away is found again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.errors import Misconfigured, Unavailable
from moorline.hsm.token import LocalToken, TokenLocation, initialise_softhsm, open_token
from moorline.hsm.token import location as locations


@pytest.fixture
def location(tmp_path) -> TokenLocation:
    return initialise_softhsm(tmp_path / "t", label="named")


def test_a_token_is_named_in_three_ways(location):
    """verifies that: a token can be named by label, serial number and slot, and all that are given must hold."""
    with open_token(location) as token:
        found = token.module.find(location)
        serial, slot = found.serial.decode().strip(), found.slot.slot_id
    with open_token(replace(location, label=None, serial=serial)) as token:
        assert len(token.random(4)) == 4
        assert token.module.find(token.location).slot.slot_id is not None
    for wrong in (replace(location, serial="0" * 16), replace(location, slot=slot + 1)):
        with pytest.raises(Misconfigured) as caught:
            open_token(wrong)
        assert caught.value.code == "token.login"
    for unnamed in (replace(location, label=None), replace(location, pin_file=None), replace(location, pin_prompt=True)):
        with pytest.raises(Misconfigured) as caught:
            open_token(unnamed)
        assert caught.value.code == "token.location"


# -- the PIN ---------------------------------------------------------------------------------------------------------------


def counting(monkeypatch) -> list[str]:
    """Every PIN that really reaches the module."""
    from moorline.hsm.token.sessions import Sessions

    tried: list[str] = []
    real = Sessions._login

    def login(self, token, pin):
        tried.append(pin)
        return real(self, token, pin)

    monkeypatch.setattr(Sessions, "_login", login)
    return tried


def test_a_wrong_pin_is_tried_once_and_never_again(location, monkeypatch):
    """verifies that: neither this process nor one that a supervisor starts again uses up the token's tries."""
    tried = counting(monkeypatch)
    right = location.pin_file.read_text()
    location.pin_file.write_text("00000000")
    for _ in range(5):
        with pytest.raises(Misconfigured) as caught:
            open_token(location)
        assert caught.value.code == "token.pin_refused"
        assert "00000000" not in str(caught.value)
    assert tried == ["00000000"]
    mark = location.pin_file.with_name("pin.refused")
    assert "00000000" not in mark.read_text()
    assert mark.stat().st_mode & 0o077 == 0
    location.pin_file.write_text(right)
    with open_token(location) as token:
        assert len(token.random(4)) == 4
    assert tried == ["00000000", right]
    assert not mark.exists()


def test_a_mark_that_cannot_be_read_counts_as_refused(location, monkeypatch):
    """verifies that: not knowing whether a PIN was refused is no reason to use up a try."""
    tried = counting(monkeypatch)
    location.pin_file.with_name("pin.refused").write_text("{")
    with pytest.raises(Misconfigured) as caught:
        open_token(location)
    assert caught.value.code == "token.pin_refused"
    assert tried == []


def test_the_last_try_is_left_to_people(location, monkeypatch):
    """verifies that: a token that says one more wrong PIN locks it gets none from us."""
    from pkcs11 import TokenFlag

    tried = counting(monkeypatch)
    with open_token(location) as token:
        tried.clear()

        class Warned:
            flags = TokenFlag.TOKEN_INITIALIZED | TokenFlag.USER_PIN_FINAL_TRY

        with pytest.raises(Misconfigured) as caught:
            token.sessions._require_tries_left(Warned())
    assert caught.value.code == "token.pin_last_try"
    assert tried == []


def test_a_pin_from_the_environment_leaves_it(location, monkeypatch):
    """verifies that: the variable is gone for child processes once it was read, and the token still opens again."""
    monkeypatch.setenv("MOOR_TEST_PIN", location.pin_file.read_text())
    where = replace(location, pin_file=None, pin_environment="MOOR_TEST_PIN")
    for _ in range(2):
        with open_token(where) as token:
            assert len(token.random(4)) == 4
        assert "MOOR_TEST_PIN" not in os.environ
    locations._KEPT.clear()
    with pytest.raises(Misconfigured) as caught:
        open_token(where)
    assert caught.value.code == "token.pin_environment"


def test_a_pin_that_is_typed(location, monkeypatch):
    """verifies that: the terminal is asked once; nothing typed is refused."""
    asked = []
    pin = location.pin_file.read_text()
    monkeypatch.setattr(locations.getpass, "getpass", lambda text: asked.append(text) or pin)
    where = replace(location, pin_file=None, pin_prompt=True)
    for _ in range(2):
        with open_token(where) as token:
            assert len(token.random(4)) == 4
    assert len(asked) == 1
    locations._KEPT.clear()
    monkeypatch.setattr(locations.getpass, "getpass", lambda _: "")
    with pytest.raises(Misconfigured) as caught:
        open_token(where)
    assert caught.value.code == "token.pin_prompt"


# -- losing the token ------------------------------------------------------------------------------------------------------


def eager(token: LocalToken) -> LocalToken:
    """Without the pause between two attempts to find a token again."""
    token.sessions._tried = float("-inf")
    return token


def away(location: TokenLocation) -> tuple[Path, Path]:
    tokens = location.pin_file.parent / "tokens"
    return tokens, tokens.with_name("away")


def test_a_token_that_goes_and_comes_back(location):
    """verifies that: while a token is away every answer is "gone", never "no such key" or "counter at 0"."""
    with open_token(location) as token:
        token.generate_ec_key("signer")
        token.generate_wrapping_key("wrapping")
        token.advance("state-counter")
        sealed = token.seal("wrapping", b"secret", b"here")
        tokens, gone = away(location)
        tokens.rename(gone)
        for ask in (
            lambda: token.ecdsa("signer", bytes(32)),
            lambda: token.unseal("wrapping", sealed, b"here"),
            lambda: token.counter("state-counter"),
            lambda: token.advance("state-counter"),
            lambda: token.has_secret("launch-key-1"),
            lambda: token.has_key("signer"),
            lambda: token.destroy_secret("wrapping"),
            lambda: token.ec_point("unknown"),
            token.inspect,
            token.destroy_everything,
        ):
            token.sessions._suspect = False  # each is the first to find it away
            with pytest.raises(Unavailable) as caught:
                ask()
            assert caught.value.code in ("token.gone", "token.failed")
        gone.rename(tokens)
        eager(token)
        assert token.counter("state-counter") == 1
        assert token.unseal("wrapping", sealed, b"here") == b"secret"
        assert len(token.ecdsa("signer", bytes(32))) == 64
        assert token.advance("state-counter") == 2


def test_sessions_that_died_are_opened_again(location):
    """verifies that: CKR_SESSION_HANDLE_INVALID on every lane is survived without anybody noticing."""
    with open_token(location) as token:
        token.generate_ec_key("signer")
        token.module.native.finalize()
        token.module.native.initialize_for_threads()  # as a driver restart does, behind everybody's back
        assert len(token.ecdsa("signer", bytes(32))) == 64


def test_two_tokens_of_one_module_survive_one_anothers_loss(location):
    """verifies that: handles of before a restart are never used after it: no token works with another one's key."""
    from moorline.hsm.token import initialise_token

    other = replace(location, label="other", pin_file=location.pin_file.with_name("pin-other"))
    initialise_token(other)
    with open_token(location) as first, open_token(other) as second:
        points = [token.generate_ec_key("signer") for token in (first, second)]
        tokens, gone = away(location)
        tokens.rename(gone)
        with pytest.raises(Unavailable):
            first.ecdsa("signer", bytes(32))
        gone.rename(tokens)
        stop, wrong = threading.Event(), []

        def ask(token, point):
            while not stop.is_set():
                try:
                    if token.ec_point("signer") != point:
                        wrong.append(point)
                    token.ecdsa("signer", bytes(32))
                except Unavailable:
                    eager(token)

        threads = [threading.Thread(target=ask, args=pair) for pair in zip((first, second) * 2, points * 2, strict=True)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                first.module.restart(first.module.incarnation)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        for token, point in zip((first, second), points, strict=True):
            assert eager(token).ec_point("signer") == point


def test_a_restart_at_the_last_moment_gives_nobody_another_tokens_key(location, monkeypatch):
    """verifies that: who looked before a restart and enters behind it signs with the own key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

    from moorline.hsm.keys import point_key
    from moorline.hsm.token import initialise_token
    from moorline.hsm.token.module import Module

    other = replace(location, label="other", pin_file=location.pin_file.with_name("pin-other"))
    initialise_token(other)
    with open_token(location) as first, open_token(other) as second:
        points = [token.generate_ec_key("signer") for token in (first, second)]
    entered, armed = Module.in_use, []

    def restarted_meanwhile(module):
        if armed:
            armed.clear()
            module.restart(module.incarnation)
            eager(second).ecdsa("signer", bytes(32))  # takes the numbers of sessions and keys that the first had
        return entered(module)

    monkeypatch.setattr(Module, "in_use", restarted_meanwhile)
    digest = os.urandom(32)
    with open_token(location, lanes=1) as first:
        first.ecdsa("signer", digest)
        with open_token(other, lanes=1) as second:
            armed.append(True)
            raw = first.ecdsa("signer", digest)
        assert not armed
        signature = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        algorithm = ec.ECDSA(Prehashed(hashes.SHA256()))
        point_key(points[0]).verify(signature, digest, algorithm)
        with pytest.raises(InvalidSignature):
            point_key(points[1]).verify(signature, digest, algorithm)


def test_a_damaged_object_file_is_a_missing_key_and_no_crash(location):
    """verifies that: an object file of garbage is a refusal that names the key; the other keys go on."""
    (folder,) = [each for each in (location.pin_file.parent / "tokens").iterdir() if each.is_dir()]
    with open_token(location) as token:
        token.generate_ec_key("one")
        files = list(folder.glob("*.object"))
        token.generate_ec_key("two")
    for each in files:
        if each.name != "token.object":
            each.write_bytes(os.urandom(200))
    with open_token(location) as token:
        assert len(token.ecdsa("two", bytes(32))) == 64
        with pytest.raises((Misconfigured, Unavailable)) as caught:
            token.ecdsa("one", bytes(32))
        assert caught.value.code in ("token.key_missing", "token.failed")


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


READ_ONLY = """
import sys
from pathlib import Path
from moorline.errors import MoorlineError
from moorline.hsm.token import open_token
from moorline.hsm.token.softhsm import location_in

def tried(what):
    try:
        what()
    except MoorlineError as error:
        return error.code
    return "done"

with open_token(location_in(Path(sys.argv[1]))) as token:
    before = token.counter("c")
    print(tried(lambda: token.ecdsa("k", bytes(32))), tried(lambda: token.unseal("w", Path(sys.argv[2]).read_bytes(), b"x")))
    print(tried(lambda: token.generate_ec_key("new")), tried(lambda: token.import_mac_key("m", bytes(32))))
    print(tried(lambda: token.advance("c")), token.counter("c") == before)
    print(tried(lambda: token.destroy_key("k")), token.has_key("k"))
"""


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_token_directory_that_became_read_only(tmp_path):
    """verifies that: on a read-only file system keys that are there work; what cannot be made or undone is said."""
    location = initialise_softhsm(tmp_path / "t", label="t")
    with open_token(location) as token:
        token.generate_ec_key("k")
        token.generate_wrapping_key("w")
        token.advance("c")
        (tmp_path / "sealed").write_bytes(token.seal("w", b"m", b"x"))
    tokens = tmp_path / "t" / "tokens"
    assert tokens.is_dir()
    command = ["bwrap", "--dev-bind", "/", "/", "--ro-bind", str(tokens), str(tokens)]
    command += [sys.executable, "-c", READ_ONLY, str(tmp_path / "t"), str(tmp_path / "sealed")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    works, makes, counts, destroys = (line.split() for line in done.stdout.splitlines())
    assert works == ["done", "done"]
    assert "done" not in makes
    assert counts[0] != "done"
    assert counts[1] == "True"
    assert destroys[0] != "done"
    assert destroys[1] == "True"
    with open_token(location) as token:  # writable again
        assert not token.has_key("new")
        assert not token.has_secret("m")
        assert token.advance("c") == 2


def test_a_full_token_says_so_and_keeps_what_it_has(tmp_path):
    """verifies that: no space for an object is a refusal; nothing half made is used, and it works again with space."""
    import subprocess

    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        location = initialise_softhsm(directory / "t", label="small")
        with open_token(location) as token:
            token.advance("state-counter")
            token.generate_ec_key("signer")
            filler = directory / "filler"
            _fill(filler)
            for attempt in (lambda: token.advance("state-counter"), lambda: token.generate_ec_key("more")):
                with pytest.raises(Unavailable):
                    attempt()
                eager(token)
            assert token.counter("state-counter") == 1
            assert len(token.ecdsa("signer", bytes(32))) == 64
            assert not token.has_key("more")
            filler.unlink()
            assert eager(token).advance("state-counter") == 2
            assert len(token.generate_ec_key("more")) == 65
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
        shutil.rmtree(directory, ignore_errors=True)
