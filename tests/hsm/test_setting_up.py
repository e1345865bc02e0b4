"""Setting an HSM up on the command line, wrongly: what is there is left as it is, and what cannot be done leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from moorline.cli import run
from moorline.clock import Instant
from moorline.errors import Misconfigured
from moorline.hsm import backup, ceremony, custody
from moorline.hsm.custody import Circle
from moorline.hsm.keys import ISSUING_CA
from moorline.hsm.token import open_token
from moorline.hsm.token.softhsm import location_in

NOW = Instant(1_800_000_000)
OWN = {name: (ec.generate_private_key(ec.SECP256R1()), x25519.X25519PrivateKey.generate()) for name in ("ada", "bo", "cy")}


def circle_of(*names: str) -> Circle:
    public = (custody.public_of(name, OWN[name][0].public_key(), OWN[name][1].public_key()) for name in names)
    return Circle(quorum=2, custodians=tuple(public))


def files_of(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("circle", [None, circle_of("bo", "cy")], ids=["without custodians", "with others"])
def test_an_hsm_that_was_set_up_is_left_as_it_is(tmp_path, circle):
    """verifies that: setting up over a token changes no byte of it: its name, its PIN and its custody stay good.

    Attack: new custodians over old ones make the officer's PIN nobody's, and every backup to come impossible.
    """
    directory = tmp_path / "t"
    first = ceremony.initialise(directory, label="alpha", circle=circle_of("ada", "bo"))
    before = files_of(directory)
    with pytest.raises(Misconfigured) as caught:
        ceremony.initialise(directory, label="other", circle=circle)
    assert caught.value.code == "token.directory_used"
    assert "alpha" not in (caught.value.remedy or "")
    assert files_of(directory) == before
    location = location_in(directory)
    with open_token(location) as token:
        assert token.has_key(ISSUING_CA)
    kept = backup.load_custody(first.location)
    shares = [custody.take_share(kept, name, OWN[name][1]) for name in ("ada", "bo")]
    made = backup.create(location, shares, tmp_path / "b", now=NOW)
    assert ISSUING_CA in {each.label for each in made.keys}


@pytest.mark.parametrize("label", ["", " ", " alpha", "alpha ", "x" * 33, "ä" * 17])
@pytest.mark.parametrize("circle", [None, circle_of("ada", "bo")], ids=["alone", "custodians"])
def test_a_label_that_no_token_can_have_leaves_nothing(tmp_path, label, circle):
    """verifies that: a label that the token would cut, or nobody could tell apart, is refused before anything is made."""
    with pytest.raises(Misconfigured) as caught:
        ceremony.initialise(tmp_path / "t", label=label, circle=circle)
    assert caught.value.code == "token.label"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_the_machine_refuses_is_said_in_words(tmp_path, capsys):
    """verifies that: a folder that cannot be made is an error with a code, in words and as JSON, and no traceback."""
    (tmp_path / "file").write_text("")
    words = ["hsm", "init", "--dir", str(tmp_path / "file" / "t"), "--label", "alpha"]
    assert run(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "[cli.machine]" in said.err
    assert str(tmp_path / "file") in said.err
    assert "next:" in said.err
    assert run([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "cli.machine"


def test_a_share_is_secret_from_its_first_byte_and_a_custodian_is_made_whole_or_not(tmp_path, capsys, monkeypatch):
    """verifies that: no moment shows a share or a custodian's keys to others; a taken name makes no half of them."""
    modes = []
    real = os.open

    def opened(path, flags, mode=0o777, **more):
        if flags & os.O_CREAT:
            modes.append((Path(path).name, mode))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", opened)
    for name in ("ada", "bo"):
        assert run(["hsm", "custodian", "new", name, "--dir", str(tmp_path / name)]) == 0
    publics = [word for name in ("ada", "bo") for word in ("--custodian", str(tmp_path / name / "custodian.cbor"))]
    assert run(["hsm", "init", "--dir", str(tmp_path / "t"), "--label", "alpha", *publics]) == 0
    share = ["hsm", "backup", "share", str(tmp_path / "t" / "custody.cbor"), "--custodian", str(tmp_path / "ada")]
    assert run([*share, "--output", str(tmp_path / "s")]) == 0
    secret = [mode for name, mode in modes if name in ("s", "signing.pem", "sealing.pem", "pin")]
    assert secret == [0o600] * 6
    for name in ("signing.pem", "sealing.pem"):
        (tmp_path / "ada" / name).unlink()
    assert run(["hsm", "custodian", "new", "ada", "--dir", str(tmp_path / "ada")]) == 2
    assert "[cli.file_exists]" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ada").iterdir()] == ["custodian.cbor"]


def test_inspect_shows_the_token_and_nothing_of_its_own(tmp_path, capsys):
    """verifies that: `moor hsm inspect` shows the token's keys as they are now, and no object of its own."""
    location = ceremony.initialise(tmp_path / "t", label="alpha").location
    capsys.readouterr()

    def keys_shown() -> list[tuple[str, str]]:
        assert run(["hsm", "inspect", "--dir", str(tmp_path / "t"), "--json"]) == 0
        return [(each["label"], each["kind"]) for each in json.loads(capsys.readouterr().out)["keys"]]

    pairs = ["hsm-identity", "hsm-kem", "issuing-ca", "verifier"]
    made = sorted([(label, half) for label in pairs for half in ("private", "public")] + [("wrapping", "secret")])
    assert keys_shown() == made
    with open_token(location) as token:
        token.import_mac_key("launch-key-1", bytes(32))
        token.destroy_key("verifier")
    assert keys_shown() == sorted({*made, ("launch-key-1", "secret")} - {("verifier", "private"), ("verifier", "public")})


def test_a_token_of_any_module_is_named_by_path_slot_and_pin_source(tmp_path, capsys, monkeypatch):
    """verifies that: module, slot and PIN source are enough to look at a token; what is wrong about them is named."""
    location = ceremony.initialise(tmp_path / "t", label="alpha").location
    with open_token(location) as token:
        slot = token.module.find(location).slot.slot_id
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "t" / "softhsm2.conf"))
    monkeypatch.setenv("MOOR_TEST_PIN_OF_ALPHA", (tmp_path / "t" / "pin").read_text())
    capsys.readouterr()
    here = ["hsm", "inspect", "--json", "--module", location.module]
    by_file = ["--pin-file", str(tmp_path / "t" / "pin")]
    for named in (
        ["--slot", str(slot), *by_file],
        ["--label", "alpha", *by_file],
        ["--slot", str(slot), "--pin-environment", "MOOR_TEST_PIN_OF_ALPHA"],
    ):
        assert run([*here, *named]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["token"]["health"] == "good"
        assert "issuing-ca" in {each["label"] for each in found["keys"]}
    (tmp_path / "junk.so").write_bytes(b"no library")
    libc = "libc.so.6"
    refused = [
        ([*here, "--slot", str(slot + 1), *by_file], "token.login"),
        ([*here, *by_file], "token.location"),
        ([*here, "--slot", str(slot), "--pin-environment", "MOOR_NO_SUCH"], "token.pin_environment"),
        ([*here[:-1], str(tmp_path / "junk.so"), "--slot", "0", *by_file], "token.module"),
        ([*here[:-1], str(tmp_path / "none.so"), "--slot", "0", *by_file], "token.module"),
        ([*here[:-1], libc, "--slot", "0", *by_file], "token.module"),
    ]
    for words, code in refused:
        assert run(words) == 2
        said = json.loads(capsys.readouterr().out)["error"]
        assert said["code"] == code
        assert said["remedy"]
    assert run([*here, "--dir", str(tmp_path / "t")]) == 64
    assert run(["hsm", "inspect", "--dir", str(tmp_path / "t"), "--slot", "0"]) == 64


def test_a_directory_that_the_environment_names_has_one_owner_too(tmp_path, monkeypatch):
    """verifies that: SoftHSM's own variable is no way around the rule that one process has a token's directory open."""
    location = ceremony.initialise(tmp_path / "t", label="alpha").location
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "t" / "softhsm2.conf"))
    command = [sys.executable, "-m", "moorline.cli", "hsm", "inspect", "--json"]
    by_module = ["--module", location.module, "--label", "alpha", "--pin-file", str(tmp_path / "t" / "pin")]
    with open_token(location):
        done = subprocess.run([*command, *by_module], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "token.owned")
    with open_token(replace(location, environment={})):
        by_directory = ["--dir", str(tmp_path / "t")]
        done = subprocess.run([*command, *by_directory], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "token.owned")


def test_a_pin_is_typed_at_a_terminal_or_not_at_all(tmp_path):
    """verifies that: without a terminal no PIN is read from what happens to be standard input, and none is shown."""
    location = ceremony.initialise(tmp_path / "t", label="alpha").location
    command = [sys.executable, "-m", "moorline.cli", "hsm", "inspect", "--module", location.module, "--label", "alpha"]
    done = subprocess.run(
        command,
        env={**os.environ, "SOFTHSM2_CONF": str(tmp_path / "t" / "softhsm2.conf")},
        input=(tmp_path / "t" / "pin").read_text() + "\n",
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "[token.pin_prompt]" in done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout == ""
