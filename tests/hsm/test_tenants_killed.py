"""Tenants are made, given a new PIN and destroyed by processes that are killed at every step of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moorline.hsm.token import initialise_softhsm

KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_tenants as t
from moorline.hsm.token.owner import Owner
from moorline.hsm.token.softhsm import location_in
directory = Path(sys.argv[2])
hsm, _ = t.virtual(directory, location_in(directory / "t"), Owner())
hsm.recover()
for act in sys.argv[3:]:
    if act == "make": hsm.create("ten", uid=t.ME)
    if act == "key": t.RemoteToken(hsm.door_of("ten")).generate_ec_key("signer")
    if act == "rotate": hsm.rotate("ten")
    if act == "destroy": hsm.destroy("ten")
    if act == "point": print(t.RemoteToken(hsm.door_of("ten")).ec_point("signer").hex())
    if act == "states": print([each.state for each in hsm.rows()], len(list((directory / "t" / "tokens").iterdir())))
hsm.close()
"""


def acted(directory: Path, *acts: str, kill_at: str = "") -> tuple[int, str]:
    environment = {**os.environ, "MOOR_KILL_AT": kill_at}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(directory), *acts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode, done.stdout.strip()


def copied(source: Path, target: Path) -> Path:
    """The same tokens, PINs and database elsewhere; only SoftHSM's configuration names its place."""
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
    conf = target / "t" / "softhsm2.conf"
    conf.write_text(conf.read_text().replace(str(source), str(target)))
    return target


@pytest.fixture
def tmp_path(tmp_path_factory):
    """A folder of a short name: a socket's path has 107 bytes at most, and pytest names folders after tests."""
    return tmp_path_factory.mktemp("k")


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    directory = tmp_path_factory.mktemp("c")
    initialise_softhsm(directory / "t", label="provider")
    return directory


@pytest.fixture(scope="module")
def tenanted(empty, tmp_path_factory):
    """A tenant with a key, and the key's point."""
    directory = copied(empty, tmp_path_factory.mktemp("c"))
    return directory, acted(directory, "make", "key", "point")[1]


@pytest.mark.parametrize("step", ["hsm.tenant.intended", "hsm.tenant.token_made", "hsm.tenant.moved"])
def test_a_creation_that_is_killed(empty, tmp_path, step):
    """verifies that: a tenant whose creation died is not there, or is whole; no token is left over."""
    directory = copied(empty, tmp_path)
    assert acted(directory, "make", kill_at=step)[0] == -9
    expected = "['active'] 2" if step == "hsm.tenant.moved" else "[] 1"
    assert acted(directory, "states")[1] == expected


@pytest.mark.parametrize("step", ["hsm.tenant.moved", "hsm.tenant.objects_destroyed", "hsm.tenant.token_removed"])
def test_a_destruction_that_is_killed(tenanted, tmp_path, step):
    """verifies that: once intended, a destruction is finished at the next start, whatever was done before the crash."""
    directory = copied(tenanted[0], tmp_path)
    assert acted(directory, "destroy", kill_at=step)[0] == -9
    assert acted(directory, "states")[1] == "['destroyed'] 1"


@pytest.mark.parametrize("step", ["hsm.pin.beside", "hsm.pin.set"])
def test_a_pin_rotation_that_is_killed(tenanted, tmp_path, step):
    """verifies that: whichever PIN the token has, the next start finds it, and the keys are there."""
    directory = copied(tenanted[0], tmp_path)
    assert acted(directory, "rotate", kill_at=step)[0] == -9
    assert acted(directory, "point")[1] == tenanted[1]
    assert not list((directory / "tenants").rglob("pin.next"))
