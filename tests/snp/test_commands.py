"""`moor simulate` as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moorline import cli
from moorline.clock import SystemClock
from moorline.simulators import guest_image
from moorline.simulators.manufacturer import open_chip
from moorline.verification.anchors import parse_anchor_file
from moorline.verification.snp import SnpEndorsements, verify_snp_chain


@pytest.fixture
def moor(monkeypatch):
    """The command `moor` with these words, as if typed."""

    def typed(words: list[str]) -> int:
        monkeypatch.setattr("sys.argv", ["moor", *words])
        return cli.run(words)

    return typed


def test_a_manufacturer_is_made_once_and_gets_more_chips(moor, tmp_path, capsys):
    directory = str(tmp_path / "maker")
    assert moor(["simulate", "manufacturer", "--dir", directory, "--chip", "a"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert moor(["simulate", "manufacturer", "--dir", directory, "--chip", "a", "--chip", "b"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert first["chips"]["a"] == second["chips"]["a"]
    assert second["chips"]["b"]["chip_id"] != second["chips"]["a"]["chip_id"]
    anchors = parse_anchor_file(Path(second["anchors"]).read_bytes())
    for made in second["chips"].values():
        chip = open_chip(Path(made["directory"]))
        endorsements = SnpEndorsements(leaf=chip.vcek, intermediates=(chip.ask,), crl=None)
        chain = verify_snp_chain(endorsements, anchors=anchors, now=SystemClock().now())
        assert chain.leaf.hwid.hex() == made["chip_id"]
    for key in Path(directory).rglob("*.key"):
        assert key.stat().st_mode & 0o077 == 0, "only the owner reads keys"


def test_measure_prints_the_launch_digest(moor, capsys):
    assert moor(["simulate", "measure", "--entry", "moorline.attesters.collect"]) == 0
    assert bytes.fromhex(capsys.readouterr().out) == guest_image.measure("moorline.attesters.collect")
    assert moor(["simulate", "measure", "--entry", "os"]) == 1
    assert "silicon.entry_unknown" in capsys.readouterr().err


def test_a_product_nobody_makes_is_a_wrong_use(moor, tmp_path):
    assert moor(["simulate", "manufacturer", "--dir", str(tmp_path / "maker"), "--product", "Naples"]) == 64


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "settings.missing_key"),
        ('listen = "s"\nchip = "none"\nstate = "t"\nport = 1\n', "settings.unknown_key"),
        ('listen = "s"\nchip = "none"\nstate = "t"\n', "silicon.no_chip"),
    ],
)
def test_silicon_that_is_set_up_wrongly_does_not_run(moor, tmp_path, capfd, text, code):
    config = tmp_path / "silicon.toml"
    config.write_text(text)
    assert moor(["simulate", "silicon", "--config", str(config)]) == 2
    assert code in capfd.readouterr().err
