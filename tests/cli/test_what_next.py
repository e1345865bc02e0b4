"""An error ends with what to do next, also where whoever read the bytes could not know where they came from."""

import pytest

from moorline import cli
from moorline.errors import EXIT_UNDECIDED


@pytest.mark.parametrize(
    "words",
    [
        ("refs", "from-boot", "--event-log", "junk", "--set", "b", "--serial", "1", "--until", "2099-01-01", "-o", "o"),
        ("ledger", "trust", "--genesis", "junk", "-o", "o"),
        ("ledger", "repair", "--config", "missing.toml"),
        ("ledger", "repair", "--config", "junk"),
        ("host", "assess", "--probed", "junk"),
        ("collateral", "fetch", "--store", "s", "--tpm-chain", "junk"),
    ],
)
def test_odd_files_are_refused_with_a_next_step(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "junk").write_bytes(bytes(range(200, 256)) * 2)
    monkeypatch.chdir(tmp_path)
    assert cli.run(list(words)) == EXIT_UNDECIDED
    said = capsys.readouterr().err.strip().splitlines()
    assert said[0].endswith("]"), said
    assert said[-1].startswith("  next: "), said
    assert not (tmp_path / "o").exists()
