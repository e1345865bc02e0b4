"""`moor init` makes what belongs to a service, with comments, and never touches what is there; errors say what to do."""

import json
import os

import pytest

from moorline import cli
from moorline.ledger.light_client import LedgerTrust
from moorline.services import settings

FOUR = [word for n in range(1, 5) for word in ("--authority", f"authority-{n}=127.0.0.1:710{n}")]


def moor(capsys, *arguments):
    """Exit code, standard output and standard error of one command line."""
    code = cli.run([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def consortium(tmp_path, capsys):
    made = moor(
        capsys, "init", "consortium", "--dir", tmp_path / "c", "--domain", "consortium.test", "--simulated", *FOUR, "--json"
    )
    assert made[0] == 0, made
    return tmp_path / "c"


@pytest.fixture
def alpha(tmp_path, consortium, capsys):
    words = ("--name", "alpha", "--trust-domain", "alpha.test", "--consortium", consortium)
    assert moor(capsys, "init", "provider", "--dir", tmp_path / "alpha", *words)[0] == 0
    return tmp_path / "alpha"


def private_files(directory):
    return [path for path in directory.rglob("*") if path.is_file() and path.name.endswith(("key.pem", "pin"))]


def test_a_consortium_has_commented_settings_for_each_authority(consortium):
    from moorline.services.authority import Settings

    for n in range(1, 5):
        file = consortium / "authorities" / f"authority-{n}" / "authority.toml"
        assert "# Where it serves, address:port" in file.read_text()
        assert settings.load(Settings, file).directory.resolve() == file.parent.resolve()
    assert LedgerTrust.parse((consortium / "trust.cbor").read_bytes()).quorum == 3


def test_a_second_ceremony_in_the_same_place_is_refused(consortium, capsys):
    before = (consortium / "genesis.cbor").read_bytes()
    code, out, _ = moor(capsys, "init", "consortium", "--dir", consortium, "--domain", "x.test", *FOUR, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "ledger.ceremony_done")
    assert (consortium / "genesis.cbor").read_bytes() == before


def test_an_authority_that_joins_is_certified_by_the_root_of_the_genesis(tmp_path, consortium, capsys):
    from moorline.ledger.ceremony import load_authority

    words = ("--listen", "127.0.0.1:7105", "--genesis", consortium / "genesis.cbor", "--root", consortium / "root")
    code, _, _ = moor(capsys, "init", "authority", "--dir", tmp_path / "authority-5", *words)
    assert code == 0
    assert load_authority(tmp_path / "authority-5").name == "authority-5"
    again = moor(capsys, "init", "authority", "--dir", tmp_path / "authority-5", *words, "--json")
    assert (again[0], json.loads(again[1])["error"]["code"]) == (2, "ledger.authority_folder")


def test_a_provider_says_what_to_do_next_and_keeps_its_key_to_itself(tmp_path, consortium, capsys):
    words = ("--name", "alpha", "--trust-domain", "alpha.test", "--consortium", consortium)
    _, out, _ = moor(capsys, "init", "provider", "--dir", tmp_path / "alpha", *words)
    assert "next: an authority certifies it: moor authority issue" in out
    assert [oct(path.stat().st_mode & 0o777) for path in private_files(tmp_path / "alpha")] == ["0o600"]


def test_a_provider_is_never_made_twice(tmp_path, consortium, alpha, capsys):
    before = {path: path.read_bytes() for path in alpha.rglob("*") if path.is_file()}
    words = ("--name", "alpha", "--trust-domain", "alpha.test", "--consortium", consortium)
    code, out, _ = moor(capsys, "init", "provider", "--dir", alpha, *words, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "provider.key_exists")
    assert {path: path.read_bytes() for path in alpha.rglob("*") if path.is_file()} == before


def test_an_authority_certifies_only_a_request_signed_by_its_own_key(tmp_path, consortium, alpha, capsys):
    by = ("--by", consortium / "authorities" / "authority-1", "--output", tmp_path / "out.pem", "--json")
    request = (alpha / "request.pem").read_bytes()
    (tmp_path / "odd.pem").write_bytes(request.replace(request[200:204], b"AAAA"))
    code, out, _ = moor(capsys, "authority", "issue", tmp_path / "odd.pem", *by)
    assert code in (1, 2)
    assert json.loads(out)["error"]["code"].startswith("provider.request_")
    assert not (tmp_path / "out.pem").exists()
    assert moor(capsys, "authority", "issue", alpha / "request.pem", *by)[0] == 0
    again = moor(capsys, "authority", "issue", alpha / "request.pem", *by)
    assert (again[0], json.loads(again[1])["error"]["code"]) == (2, "cli.file_exists")


def test_a_provider_without_certificate_is_told_how_to_get_one(tmp_path, alpha, capsys):
    from moorline.cli import hsm_request
    from moorline.hsm.ceremony import initialise

    made = initialise(tmp_path / "token", label="alpha")
    names = {"provider": "alpha", "trust_domain": "alpha.test", "hsm": "hsm-1", "issuing_ca": "ca-1"}
    asked = hsm_request.make(made.keys, **names, sessions="127.0.0.1:1", https="127.0.0.1:2")
    (tmp_path / "request.json").write_bytes(asked.render())
    code, _, err = moor(capsys, "hsm", "certify", tmp_path / "request.json", "--as", alpha)
    assert code == 2
    assert "next: have an authority issue it" in err


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"provider": 1}', b"\xff\xfe"])
def test_a_request_that_is_none_is_named(tmp_path, alpha, capsys, content):
    (tmp_path / "request.json").write_bytes(content)
    code, out, _ = moor(capsys, "hsm", "certify", tmp_path / "request.json", "--as", alpha, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "hsm.request_malformed")


def test_a_file_that_is_not_there_is_an_error_in_words(alpha, capsys):
    code, _, err = moor(capsys, "hsm", "show", "keys", "--broker", alpha / "broker")
    assert code == 2
    assert "the file cannot be read [cli.file]" in err


def test_wrong_use_is_64(capsys):
    assert moor(capsys, "init", "provider", "--nonsense")[0] == 64
    assert moor(capsys, "provider", "revoke", "nonsense", "x", "--as", os.devnull)[0] == 64
