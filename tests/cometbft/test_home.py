"""CometBFT's home, program and answers: what is written, which version is taken, and what is made of its JSON."""

import json
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from apps import NAMES, made_at
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed, Misconfigured, Refused, Unavailable
from moorline.ledger.engines.cometbft import header, home, network, process, proto, rpc
from moorline.ledger.engines.cometbft.home import Addresses, StateSync
from moorline.ledger.engines.cometbft.network import Ports

ADDRESSES = Addresses(p2p="127.0.0.1:1", rpc="127.0.0.1:2", peers=("aa@127.0.0.1:3",))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_at(tmp_path_factory.mktemp("home") / "ledger")


def written(directory, made, **options):
    key = Ed25519PrivateKey.generate()
    home.make(directory, name=NAMES[0], genesis=made.genesis, key=key, addresses=ADDRESSES, **options)
    return tomllib.loads((directory / "config" / "config.toml").read_text("utf-8"))


def test_all_authorities_write_the_same_genesis_and_it_names_the_ledger(tmp_path, made):
    for name in ("one", "two"):
        written(tmp_path / name, made)
    one, two = ((tmp_path / name / "config" / "genesis.json").read_text("utf-8") for name in ("one", "two"))
    assert one == two
    document = json.loads(one)
    assert header.ledger_id_of(document["chain_id"]) == made.genesis.ledger_id
    assert [found["name"] for found in document["validators"]] == list(NAMES)
    assert {found["power"] for found in document["validators"]} == {"2"}


def test_the_home_holds_no_validator_key_and_opens_nothing_to_others(tmp_path, made):
    found = written(tmp_path / "home", made)
    assert found["priv_validator_laddr"].startswith("unix://")
    assert found["proxy_app"].startswith("unix://")
    assert found["rpc"]["laddr"] == "tcp://127.0.0.1:2"
    assert (found["rpc"]["unsafe"], found["p2p"]["pex"], found["instrumentation"]["prometheus"]) == (False, False, False)
    keys = list((tmp_path / "home").rglob("*key*.json"))
    assert [path.name for path in keys] == ["node_key.json"]
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600


def test_a_home_of_another_ledger_is_not_written_over(tmp_path, made):
    written(tmp_path / "home", made)
    other = made_at(tmp_path / "other")
    with pytest.raises(Misconfigured, match="comet.home_taken"):
        written(tmp_path / "home", other)


def test_a_home_that_begins_from_a_snapshot_says_from_whom(tmp_path, made):
    sync = StateSync(rpc_servers=("http://a:1", "http://b:2"), trust_height=7, trust_hash=bytes(32), trust_period_s=60)
    found = written(tmp_path / "home", made, sync=sync)["statesync"]
    assert (found["enable"], found["rpc_servers"], found["trust_height"]) == (True, "http://a:1,http://b:2", 7)
    assert "statesync" not in written(tmp_path / "plain", made)


def test_the_nodes_of_one_machine_know_each_other(made):
    ports = {name: Ports(p2p=f"127.0.0.1:{number}", rpc=f"127.0.0.1:{number + 10}") for number, name in enumerate(NAMES, 1)}
    ids = network.make(made, ports)
    for name in NAMES:
        text = (network.home_of(made, name) / "config" / "config.toml").read_text("utf-8")
        peers = tomllib.loads(text)["p2p"]["persistent_peers"].split(",")
        assert sorted(peers) == sorted(f"{ids[other]}@{ports[other].p2p}" for other in NAMES if other != name)


# The program -------------------------------------------------------------------------------------------------------------


def program(path, says):
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version", ["0.38.25", "0.38.26", "v0.38.99"])
def test_a_version_this_engine_was_made_for_is_taken(tmp_path, version):
    assert process.find(program(tmp_path / "cometbft", version)).name == "cometbft"


@pytest.mark.parametrize("version", ["0.38.24", "0.37.99", "1.0.1", "2.38.25", "", "none"])
def test_another_version_is_refused(tmp_path, version):
    with pytest.raises(Misconfigured, match="comet.version"):
        process.find(program(tmp_path / "cometbft", version))


def test_a_program_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(Misconfigured, match="comet.not_found") as caught:
        process.find(str(tmp_path / "none"))
    assert "./dev setup" in str(caught.value)


def test_the_generated_modules_are_what_cometbfts_files_give(tmp_path):
    """verifies that: nobody edited them, and whoever has CometBFT's sources gets the same."""
    go = Path("/usr/local/go/bin/go")
    found = subprocess.run([go, "env", "GOMODCACHE"], capture_output=True, text=True, check=False) if go.exists() else None
    cache = Path(found.stdout.strip()) if found else Path("/nowhere")
    module = cache / "github.com" / "cometbft" / f"cometbft@{wanted_version()}"
    if not module.is_dir():
        pytest.skip("CometBFT's sources are not in the Go module cache")
    folder = Path(proto.__file__).parent
    subprocess.run([folder / "generate.sh", sys.executable, module, tmp_path], check=True, capture_output=True)
    made = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text("utf-8") for path in folder.glob("*_pb2.py*")}


def wanted_version():
    text = (Path(__file__).parents[2] / "dev").read_text("utf-8")
    return next(line.split("=")[1].split()[0] for line in text.splitlines() if line.startswith("COMETBFT="))


# Its answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("2026-11-27T20:00:00.5Z", 1_795_809_600_500_000_000),
        ("2026-11-27T20:00:00.000000001Z", 1_795_809_600_000_000_001),
    ],
)
def test_times_are_read_to_the_nanosecond(text, time_ns):
    assert rpc.parse_time(text) == time_ns


@given(st.text(max_size=40))
def test_any_other_text_is_no_time(text):
    with pytest.raises(ValueError, match="time"):
        rpc.parse_time(text)


@pytest.mark.parametrize("item", [None, {}, [], {"header": {}, "commit": {}}, {"header": None, "commit": None}])
def test_json_that_is_no_header_is_none(item):
    with pytest.raises((KeyError, TypeError, ValueError)):
        rpc.parse_signed_header(item)


async def test_an_answer_becomes_the_error_it_was(monkeypatch):
    said = Refused("ledger.expired", "too late").as_problem()
    answers = {
        "refused": ({"result": {"code": 1, "log": json.dumps(said)}}, Refused, "ledger.expired"),
        "without a reason": ({"result": {"code": 1, "log": "?"}}, Malformed, "comet.answer_malformed"),
        "full": ({"error": {"message": "x", "data": "mempool is full: number of txs"}}, Unavailable, "ledger.busy"),
        "other": ({"error": {"message": "x", "data": "y"}}, Unavailable, "comet.rpc_failed"),
        "nothing": ({}, Malformed, "comet.answer_malformed"),
        "no object": ([], Malformed, "comet.answer_malformed"),
    }
    async with rpc.CometRpc("http://127.0.0.1:1") as client:
        for answer, kind, code in answers.values():

            async def given_(*_arguments, answer=answer):
                return answer

            monkeypatch.setattr(client._client, "post_json", given_)
            with pytest.raises(kind, match=code):
                await client.submit(b"x")

        async def known(*_arguments):
            return {"error": {"message": "Internal error", "data": "tx already exists in cache"}}

        monkeypatch.setattr(client._client, "post_json", known)
        await client.submit(b"x")


def weighted_median(times, power):
    """As CometBFT finds block time from the votes of a commit (0.38: types/time/time.go)."""
    median = len(times) * power // 2
    for one in sorted(times):
        if median <= power:
            return one
        median -= power
    raise AssertionError(times)


@given(st.data())
def test_block_time_is_an_honest_clocks_whoever_lies(data):
    """verifies that: with a third lying, in any commit of more than two thirds, block time is between honest votes."""
    faulty = data.draw(st.integers(1, 5))
    honest = data.draw(st.lists(st.integers(1000, 1010), min_size=faulty + 1, max_size=2 * faulty + 1))
    lies = data.draw(st.lists(st.sampled_from([0, 1 << 60]), min_size=max(0, 2 * faulty + 1 - len(honest)), max_size=faulty))
    assert min(honest) <= weighted_median(honest + lies, header.AUTHORITY_POWER) <= max(honest)
