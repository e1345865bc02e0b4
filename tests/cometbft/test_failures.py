"""Four CometBFT authorities as real processes, killed, cut apart, lied to. What takes minutes is `long`."""

import asyncio
import base64
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import httpx
import networks
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from networks import eventually
from partitions import Links
from stories import Provider, decide, proven, same_roots, submit

from moorline.clock import Instant
from moorline.errors import Unavailable
from moorline.hsm.token import initialise_softhsm, open_token
from moorline.ledger import blocks, ceremony, transactions
from moorline.ledger.engines.cometbft import canonical, home, light
from moorline.ledger.engines.cometbft.commit import Commit, Precommit, SignedHeader
from moorline.ledger.engines.cometbft.evidence import DuplicateVote, SignedVote
from moorline.ledger.engines.cometbft.header import address_of, chain_id_of
from moorline.ledger.engines.cometbft.rpc import CometRpc
from moorline.ledger.engines.cometbft.verifier import LightBlock, Rules
from moorline.ledger.light_client import LedgerTrust
from moorline.services import settings
from moorline.services.authority import Settings
from moorline.services.comet_settings import CometSettings, ValidatorToken
from moorline.storage.consensus_store import open_consensus
from moorline.wire import keys
from small_disk import small_disk

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]
STEPS = ("comet.block.finalized", "comet.block.committed", "comet.signature.intended")
BYZANTINE = Path(__file__).with_name("byzantine.py")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def network(tmp_path_factory):
    async with networks.running(tmp_path_factory.mktemp("network") / "ledger") as found:
        found.alpha = await Provider(found, "alpha").admitted()
        yield found


# Short: one network for all ------------------------------------------------------------------------------------------------


async def light_block(rpc, height):
    return LightBlock(
        signed=await rpc.signed_header(height),
        validators=await rpc.validators(height),
        next_validators=await rpc.validators(height + 1),
    )


async def test_the_light_client_believes_a_real_chain_and_its_witness(network):
    """verifies that: headers, votes and sets of a real CometBFT verify, adjacent and skipping; a changed one does not."""
    height = 0
    while height < 6:
        height = (await submit(network, network.alpha.anchor())).height
    chain = []
    for number in (1, 2):
        async with CometRpc(f"http://{network[number].rpc}") as rpc:
            chain.append({at: await light_block(rpc, at) for at in range(1, height)})
    rules = Rules(trusting_period_s=3600, now_ns=time.time_ns())
    trace = light.drive(light.walk(chain[0][1], height - 1, rules), chain[0].__getitem__)
    assert light.cross_checked(trace, [chain[1].__getitem__], rules)[0] == chain[0][height - 1]
    for at in range(2, height):
        light.drive(light.walk(chain[0][at - 1], at, rules), chain[1].__getitem__)


async def test_two_dead_the_ledger_stops_loses_nothing_and_resumes(network):
    """verifies that: two of four make no block; what had a receipt is there, what waited gets one later."""
    alpha = network.alpha
    receipt = await submit(network, alpha.anchor())
    await asyncio.gather(network[3].kill(), network[4].kill())
    waiting = alpha.anchor()
    with pytest.raises(Unavailable):
        async with network.client(1, timeout_s=3.0) as client:
            await client.submit(waiting)
    before = await network.heads(1, 2)
    await asyncio.sleep(1.0)
    assert await network.heads(1, 2) == before
    await network.start(3, 4)
    later = await submit(network, waiting)
    assert later.height > receipt.height
    assert blocks.verify_receipt(later, waiting, network.made.trust).height == later.height
    await same_roots(network, at_least=later.height)


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_a_step_of_a_commit_it_comes_back_to_the_same_root(network, step):
    """verifies that: wherever an application dies in a commit, CometBFT leads it back to where the others are."""
    await killed_at(network, 2, step)
    receipt = await submit(network, network.alpha.anchor(), 2, 1)
    await same_roots(network, at_least=receipt.height)


async def killed_at(network, number, step):
    victim = network[number]
    victim.kill_at.write_text(step, "utf-8")
    others = [one for one in (1, 2, 3, 4) if one != number]
    await submit(network, network.alpha.anchor(), *others)
    await asyncio.wait_for(victim.process.wait(), 30)
    assert victim.process.returncode == -9
    await network.start(number)


async def test_an_authority_that_signs_two_blocks_is_named_on_the_chain(network, tmp_path):
    """verifies that: two votes of one key at one height, shown to one honest node, are evidence that all have and verify;
    `moor ledger evidence` lists it, exports it, and verifies it offline with the trust file."""
    liar = network.keys["authority-4"].checkpoint
    public = liar.public_key().public_bytes_raw()
    chain_id = chain_id_of(network.made.genesis.ledger_id)
    async with CometRpc(f"http://{network[1].rpc}") as rpc:
        height = (await rpc.status()).height - 1
        at = (await rpc.signed_header(height)).header.time_ns
        index = [one.public_key for one in (await rpc.validators(height)).validators].index(public)

    def vote(block):
        message = canonical.vote(
            canonical.PRECOMMIT,
            height=height,
            round_=0,
            block=canonical.block_id(block, 1, block),
            time_ns=at,
            chain_id=chain_id,
        )
        return SignedVote(block_hash=block, parts_total=1, parts_hash=block, time_ns=at, signature=liar.sign(message))

    one, other = vote(b"\1" * 32), vote(b"\2" * 32)
    found = DuplicateVote(
        chain_id=chain_id, public_key=public, kind=canonical.PRECOMMIT, height=height, round=0, one=one, other=other
    )
    assert found.verify(chain_id=chain_id) == address_of(public)
    said = await broadcast_evidence(network[1], found, index=index, time_ns=at)
    assert "error" not in said, said
    await submit(network, network.alpha.anchor())
    for number in (1, 2, 3):
        kept = await eventually(lambda number=number: misbehaviour(network, number))
        assert [(one.authority, one.kind, one.height) for one in kept] == [("authority-4", "duplicate-vote", height)]
    (row,) = await eventually(lambda: listed(network))
    assert (row["kind"], row["height"], row["offenders"], row["forked"]) == (
        "duplicate-vote", height, ["authority-4"], False,
    )  # fmt: skip
    await verified_offline(network, row, tmp_path / "evidence.cbor")


async def test_who_commits_to_a_header_that_is_not_the_chains_is_named(network, tmp_path):
    """verifies that: a light-client attack shown to one honest node names all who signed both headers, in the same table."""
    async with CometRpc(f"http://{network[1].rpc}") as rpc:
        height = (await rpc.status()).height - 2
        own = await rpc.signed_header(height)
        validators = await rpc.validators(height)
    lie = signed_by_all(network, replace(own.header, data_hash=b"\1" * 32), validators, own.commit.round)
    said = await show(network[1], "tendermint/LightClientAttackEvidence", attack_json(lie, validators, own))
    assert "error" not in said, said
    await submit(network, network.alpha.anchor())

    async def named():
        return [row for row in await listed(network) if row["kind"] == "light-client-attack"]

    rows = await eventually(named)  # one for each own commit of that height that an authority has
    for row in rows:
        assert (row["height"], len(row["offenders"]) >= 3, row["forked"]) == (height, True, True)
    await verified_offline(network, rows[0], tmp_path / "attack.cbor")


def address(keys_):
    return address_of(keys_.checkpoint.public_key().public_bytes_raw())


def signed_by_all(network, found, validators, round_):
    """A commit for a header by all four."""
    commit = Commit(round=round_, parts_total=1, parts_hash=b"\2" * 32, precommits=())
    blank = SignedHeader(header=found, commit=commit)
    by_address = {address(one): one.checkpoint for one in network.keys.values()}
    precommits = []
    for one in validators.validators:
        mine = Precommit(address=one.address, time_ns=found.time_ns + 10**6, signature=bytes(64))
        precommits.append(replace(mine, signature=by_address[one.address].sign(blank.sign_bytes(mine))))
    return replace(blank, commit=replace(commit, precommits=tuple(precommits)))


async def moor(*words):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "moorline.cli", *map(str, words),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def listed(network):
    code, said = await moor("ledger", "evidence", "list", "--genesis", network.made.directory / "genesis.cbor", "--json")
    assert code == 0, said
    return json.loads(said)["evidence"]


async def verified_offline(network, row, file):
    directory = network.made.directory
    code, said = await moor("ledger", "evidence", "export", row["id"], "--genesis", directory / "genesis.cbor", "-o", file)
    assert code == 0, said
    words = ("ledger", "evidence", "verify", file, "--trust", directory / "trust.toml", "--json")
    code, said = await moor(*words)
    assert (code, json.loads(said)["offenders"]) == (0, row["offenders"]), said
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert (await moor(*words))[0] in {1, 2}


async def misbehaviour(network, number):
    store = open_consensus(f"sqlite:///{network[number].directory / 'consensus.db'}")
    try:
        return store.misbehaviour()
    finally:
        store.close()


async def broadcast_evidence(node, found, *, index, time_ns):
    """CometBFT's JSON of the two votes, to its RPC."""

    def said(one):
        return {
            "type": found.kind,
            "height": str(found.height),
            "round": found.round,
            "block_id": block_json(one.block_hash, one.parts_total, one.parts_hash),
            "timestamp": stamp(one.time_ns),
            "validator_address": address_of(found.public_key).hex().upper(),
            "validator_index": index,
            "signature": base64.b64encode(one.signature).decode(),
        }

    value = {
        "vote_a": said(found.one),
        "vote_b": said(found.other),
        "TotalVotingPower": "8",
        "ValidatorPower": "2",
        "Timestamp": stamp(time_ns),
    }
    return await show(node, "tendermint/DuplicateVoteEvidence", value)


async def show(node, kind, value):
    """Evidence, to the RPC of one node."""
    params = {"evidence": {"type": kind, "value": value}}
    request = {"jsonrpc": "2.0", "id": 1, "method": "broadcast_evidence", "params": params}
    async with httpx.AsyncClient() as client:
        return (await client.post(f"http://{node.rpc}/", json=request)).json()


def block_json(hash_, total, parts):
    return {"hash": hash_.hex().upper(), "parts": {"total": total, "hash": parts.hex().upper()}}


def header_json(found):
    """CometBFT's JSON of a header."""
    hashes = (
        "last_commit_hash data_hash validators_hash next_validators_hash consensus_hash app_hash last_results_hash "
        "evidence_hash proposer_address"
    )
    return {
        "version": {"block": str(found.version_block), "app": str(found.version_app)},
        "chain_id": found.chain_id,
        "height": str(found.height),
        "time": stamp(found.time_ns),
        "last_block_id": block_json(found.last_block_hash, found.last_parts_total, found.last_parts_hash),
        **{name: getattr(found, name).hex().upper() for name in hashes.split()},
    }


def attack_json(lie, validators, own):
    """CometBFT's JSON of an equivocation: another header of one height, with its commit."""
    members = [
        {
            "address": one.address.hex().upper(),
            "pub_key": {"type": "tendermint/PubKeyEd25519", "value": base64.b64encode(one.public_key).decode()},
            "voting_power": "2",
            "proposer_priority": "0",
        }
        for one in validators.validators
    ]
    commit = {
        "height": str(lie.header.height),
        "round": lie.commit.round,
        "block_id": block_json(lie.header.hash(), lie.commit.parts_total, lie.commit.parts_hash),
        "signatures": [
            {
                "block_id_flag": 2,
                "validator_address": one.address.hex().upper(),
                "timestamp": stamp(one.time_ns),
                "signature": base64.b64encode(one.signature).decode(),
            }
            for one in lie.commit.precommits
        ],
    }
    signed_both = {one.address for one in own.commit.precommits}
    return {
        "ConflictingBlock": {
            "signed_header": {"header": header_json(lie.header), "commit": commit},
            "validator_set": {"validators": members, "proposer": members[0]},
        },
        "CommonHeight": str(lie.header.height),
        "ByzantineValidators": [one for one in members if bytes.fromhex(one["address"]) in signed_both],
        "TotalVotingPower": "8",
        "Timestamp": stamp(own.header.time_ns),
    }


def stamp(time_ns):
    seconds, nanos = divmod(time_ns, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanos:09}Z"


async def test_a_damaged_database_is_refused_and_repaired_from_the_others_on_command(network):
    """verifies that: a flipped page keeps an authority from starting; `moor ledger repair` brings the others' state; it
    votes again, and its signer still knows what it signed."""
    victim = network[3]
    code, said = await moor("ledger", "repair", "--config", victim.config)
    assert (code, "ledger.authority_running" in said) == (1, True), said
    await victim.stop()
    signed = (victim.directory / "signed.json").read_text()
    file = victim.directory / "consensus.db"
    data = bytearray(file.read_bytes())
    page = next(at for at in range(4096, len(data), 4096) if data[at] in (10, 13))
    data[page : page + 12] = bytes(12)
    file.write_bytes(data)
    await victim.start()
    assert await asyncio.wait_for(victim.process.wait(), 30) == 2
    assert "ledger.database_corrupt" in victim.log()
    receipt = await submit(network, network.alpha.anchor(), 1, 2, 4)
    code, said = await moor("ledger", "repair", "--config", victim.config, "--json")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["repaired to height"] >= receipt.height
    assert list(victim.directory.glob("consensus.db.damaged-*"))
    before, after = (json.loads(one) for one in (signed, (victim.directory / "signed.json").read_text()))
    assert (after["height"], after["round"], after["step"]) >= (before["height"], before["round"], before["step"])
    await network.start(3)
    await same_roots(network, at_least=receipt.height)
    await network[4].kill()
    receipt = await submit(network, network.alpha.anchor(), 1, 2, 3)  # a quorum needs the repaired one
    await network.start(4)
    await same_roots(network, at_least=receipt.height)


async def test_nobody_is_promoted_where_consensus_decides(network):
    code, said = await moor("ledger", "promote", "authority-2", "--by", network[1].directory)
    assert (code, "ledger.consensus_decides" in said) == (1, True), said


async def test_a_trust_file_is_renewed_from_the_running_ledger(network, tmp_path):
    """verifies that: the new file names the authorities in force as of now, and verifies a proof as the old one does."""
    directory, new, proof = network.made.directory, tmp_path / "new.toml", tmp_path / "proof.cbor"
    words = ("--genesis", directory / "genesis.cbor", "--renew", directory / "trust.toml", "-o", new)
    code, said = await moor("ledger", "trust", *words)
    assert code == 0, said
    old, found = (tomllib.loads(one.read_text()) for one in (directory / "trust.toml", new))
    assert old.pop("known") <= found["known"]
    assert abs(found.pop("known").timestamp() - time.time()) < 60
    assert old == found
    code, said = await moor("ledger", "prove", "provider/alpha", "--genesis", directory / "genesis.cbor", "-o", proof)
    assert code == 0, said
    assert (await moor("ledger", "verify", proof, "--trust", new))[0] == 0
    binary = ("--genesis", directory / "genesis.cbor", "-o", tmp_path / "new.cbor", "--renew")
    code, said = await moor("ledger", "trust", *binary, directory / "trust.toml")
    assert (code, "ledger.trust_no_roots" in said) == (2, True), said
    code, said = await moor("ledger", "trust", *binary, directory / "trust.cbor")
    assert code == 0, said
    renewed = LedgerTrust.parse((tmp_path / "new.cbor").read_bytes())
    assert renewed == replace(network.made.trust, known_s=renewed.known_s)


async def test_what_a_power_cut_takes_from_the_database_comes_again_from_cometbft(network):
    """verifies that: a database that is some blocks behind its CometBFT is brought up to it, and to the others' root."""
    victim = network[2]
    await victim.stop()
    file, kept = victim.directory / "consensus.db", victim.directory / "kept.db"
    shutil.copy(file, kept)
    await network.start(2)
    for _ in range(3):
        receipt = await submit(network, network.alpha.anchor())
    await same_roots(network, at_least=receipt.height)
    await victim.stop()
    assert highest(kept) < receipt.height <= highest(file)
    kept.replace(file)
    await network.start(2)
    assert (await same_roots(network, at_least=receipt.height))[0] >= receipt.height


def highest(file):
    store = open_consensus(f"sqlite:///{file}")
    try:
        return store.head().height
    finally:
        store.close()


# Long ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_killed_a_hundred_times_at_the_steps_of_a_commit(network):
    """verifies that: a hundred deaths at every step, of any authority, application or node first, leave one history."""
    chance = random.Random(5)
    for round_ in range(100):
        number = chance.choice((1, 2, 3, 4))
        if round_ % 4 == 3:  # the node, wherever it is; its application ends with it
            node = network[number].node_pid()
            writing = asyncio.ensure_future(submit(network, network.alpha.anchor()))
            await asyncio.sleep(chance.random() * 0.3)
            assert node is not None
            os.kill(node, signal.SIGKILL)
            await asyncio.wait_for(network[number].process.wait(), 30)
            await network.start(number)
            receipt = await writing
        else:
            await killed_at(network, number, STEPS[round_ % 3])
            receipt = await submit(network, network.alpha.anchor())
    await same_roots(network, at_least=receipt.height)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["block sync", "state sync"])
async def test_an_authority_that_lost_its_disk_catches_up(tmp_path, how):
    """verifies that: from nothing but its keys and settings it comes to the same root: all blocks again, or a snapshot."""
    async with networks.running(tmp_path / "ledger", snapshot_every=5) as network:
        alpha = await Provider(network, "alpha").admitted()
        for _ in range(12):
            receipt = await submit(network, alpha.anchor())
        victim = network[4]
        await victim.stop()
        shutil.rmtree(victim.home / "data")
        (victim.home / "data").mkdir()
        for path in victim.directory.glob("consensus.db*"):
            path.unlink()
        shutil.rmtree(victim.directory / "snapshots", ignore_errors=True)
        if how == "state sync":
            async with CometRpc(f"http://{network[1].rpc}") as rpc:
                trusted = (await rpc.signed_header(2)).header.hash()
            rewrite_home(
                network,
                4,
                sync=home.StateSync(
                    rpc_servers=tuple(f"http://{network[number].rpc}" for number in (1, 2)),
                    trust_height=2,
                    trust_hash=trusted,
                    trust_period_s=3600,
                ),
            )
        await network.start(4)
        await same_roots(network, at_least=receipt.height, within_s=120)
        after = await submit(network, alpha.anchor(), 4, within_s=120)
        await same_roots(network, at_least=after.height)
        store = open_consensus(f"sqlite:///{victim.directory / 'consensus.db'}")
        first = store.block(1)
        store.close()
        assert (first is None) == (how == "state sync")


def rewrite_home(network, number, *, sync=None, peers=None):
    name = f"authority-{number}"
    ids = [(network.ids[other], network.ports[other].p2p) for other in network.ids]
    addresses = home.Addresses(
        p2p=network.ports[name].p2p,
        rpc=network.ports[name].rpc,
        peers=peers or home.peers_of(ids, but=network.ids[name]),
    )
    text = home.config_file(name, network.made.genesis, addresses, sync)
    (network[number].home / "config" / "config.toml").write_text(text, "utf-8")


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_partitions_stop_the_smaller_side_and_heal_to_one_history(tmp_path):
    """verifies that: 2|2 makes no block on either side; 3|1 goes on with three; healed, all four have one root."""
    network = networks.made_network(tmp_path / "ledger")
    links = await Links().between({name: ports.p2p for name, ports in network.ports.items()})
    try:
        for number, name in enumerate(network.ids, 1):
            rewrite_home(network, number, peers=links.peers_of(name, network.ids))
        await network.start()
        alpha = await Provider(network, "alpha").admitted()
        names = list(network.ids)
        links.split(names[:2], names[2:])
        await asyncio.sleep(1.0)
        before = await network.heads()
        waiting = [alpha.anchor(), alpha.anchor(log="other")]
        for number in (1, 3):
            with pytest.raises(Unavailable):
                async with network.client(number, timeout_s=4.0) as client:
                    await client.submit(waiting[number // 2])
        after = await network.heads()
        assert max(height for height, _ in after.values()) <= max(height for height, _ in before.values()) + 1
        links.heal()
        receipts = [await submit(network, data, within_s=90) for data in waiting]
        await same_roots(network, at_least=max(one.height for one in receipts), within_s=90)
        links.split(names[:3], names[3:])
        await asyncio.sleep(1.0)
        for _ in range(3):
            receipt = await submit(network, alpha.anchor(), 1, 2, 3, within_s=90)
        assert (await network.heads(4))[4][0] < receipt.height
        links.heal()
        await same_roots(network, at_least=receipt.height, within_s=90)
    finally:
        await network.stop()
        await links.close()


async def start_byzantine(network, number, how):
    one = network[number]
    with (one.directory / "log").open("ab") as log:
        one.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(BYZANTINE),
            how,
            "authority",
            "run",
            "--config",
            str(one.config),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    await one.ready()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["propose", "censor", "future", "past"])
async def test_one_authority_that_breaks_the_rules_changes_nothing(tmp_path, how):
    """verifies that: invalid proposals are not decided, censored transactions get in, block time stays the honest ones'."""
    network = networks.made_network(tmp_path / "ledger")
    try:
        for number in (1, 2, 3):
            await network[number].start()
        await start_byzantine(network, 4, how)
        for number in (1, 2, 3):
            await network[number].ready()
        alpha = await Provider(network, "alpha").admitted()
        for _ in range(8):  # everybody proposes in turn
            data = alpha.anchor()
            receipt = await submit(network, data, 1, 2, 3)
            assert abs(receipt.time_ms / 1000 - time.time()) < 30
            blocks.verify_receipt(receipt, data, network.made.trust)
        await same_roots(network, 1, 2, 3, at_least=receipt.height)
        assert (await proven(network, "audit-anchor/alpha/hsm-1", number=1)).record("audit-anchor/alpha/hsm-1")
        if how in {"future", "past"}:
            rows = await eventually(lambda: listed(network))
            assert {(row["kind"], *row["offenders"]) for row in rows} == {("clock-off", "authority-4")}
        else:  # nothing that anybody else could verify: a refused proposal is in the log, and a censor signed nothing
            assert await listed(network) == []
            named = [one for one in (network[1].log()).splitlines() if "a block that does not hold" in one]
            assert ({json.loads(one)["authority"] for one in named} == {"authority-4"}) is (how == "propose")
    finally:
        await network.stop()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system takes root")
async def test_an_application_with_a_full_disk_stops_says_so_and_goes_on_with_room(tmp_path):
    """verifies that: what cannot be stored is not answered: application and node end, the others go on; with room it is with
    them again."""
    network = networks.made_network(tmp_path / "ledger")
    found = settings.load(Settings, network[4].config)
    with small_disk(tmp_path / "small") as small:
        settings.write(replace(found, database=f"sqlite:///{small}/consensus.db"), network[4].config)
        try:
            await network.start()
            alpha = await Provider(network, "alpha").admitted()
            filler = small / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            await submit(network, alpha.anchor(), 1, 2, 3)
            await asyncio.wait_for(network[4].process.wait(), 60)
            assert "storage.full" in (network[4].directory / "log").read_text()
            receipt = await submit(network, alpha.anchor(), 1, 2, 3)
            filler.unlink()
            await network.start(4)
            await same_roots(network, at_least=receipt.height)
        finally:
            await network.stop()


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_two_nodes_with_one_key_are_caught(tmp_path):
    """verifies that: a validator that runs twice without its signer's memory votes twice; the chain goes on and names it."""
    network = networks.made_network(tmp_path / "ledger")
    twin = None
    try:
        for number in (1, 2, 3):
            await network[number].start()
        await start_byzantine(network, 4, "equivocate")
        for number in (1, 2, 3):
            await network[number].ready()
        alpha = await Provider(network, "alpha").admitted()
        twin = make_twin(network, 4, tmp_path / "twin")
        await start_byzantine(network, 5, "equivocate")

        async def caught():
            await submit(network, alpha.anchor(), 1, 2, 3)
            return [one for one in await misbehaviour(network, 1) if one.authority == "authority-4"]

        assert await eventually(caught, within_s=300, every_s=0)
        await same_roots(network, 1, 2, 3)
    finally:
        await network.stop()
        if twin is not None:
            await twin.stop()


def make_twin(network, number, directory):
    """A second node with the validator key of an authority, and a node key and ports of its own."""
    name = f"authority-{number}"
    shutil.copytree(
        network[number].directory,
        directory,
        ignore=lambda _, names: [
            one for one in names if one.startswith(("consensus", "cometbft", "signed", "snapshots", "log"))
        ],
    )
    listen, p2p, rpc = networks.free_addresses(3)
    ids = [(network.ids[other], network.ports[other].p2p) for other in network.ids if other != name]
    home.make(
        directory / "cometbft",
        name=f"twin of {name}",
        genesis=network.made.genesis,
        key=Ed25519PrivateKey.generate(),
        addresses=home.Addresses(p2p=p2p, rpc=rpc, peers=home.peers_of(ids, but="")),
    )
    configured = Settings(
        name=name, listen=listen, directory=directory, cometbft=CometSettings(home=directory / "cometbft", rpc=rpc)
    )
    settings.write(configured, directory / "authority.toml")
    twin = networks.Authority(name, directory, rpc)
    network.authorities["authority-5"] = twin
    return twin


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_an_authority_moves_its_key_into_a_token_while_it_runs(tmp_path):
    """verifies that: rotated by a quorum, votes are signed in the token from two blocks later on, without a restart."""
    network = networks.made_network(tmp_path / "ledger")
    location = initialise_softhsm(tmp_path / "token", label="validator")
    with open_token(location) as token:
        public = token.generate_ed25519_key("validator")
    found = settings.load(Settings, network[4].config)
    where = ValidatorToken(
        token_module=location.module,
        token_label="validator",
        token_pin_file=location.pin_file,
        softhsm_conf=Path(location.environment["SOFTHSM2_CONF"]),
    )
    settings.write(replace(found, validator_token=where), network[4].config)
    try:
        await network.start()
        alpha = await Provider(network, "alpha").admitted()
        before = next(one for one in network.made.genesis.authorities if one.name == "authority-4")
        action = transactions.RotateAuthorityKey(
            name="authority-4",
            certificate=before.certificate,
            transaction_key=before.transaction_key,
            checkpoint_key=public,
            address=before.address,
        )
        await decide(network, action, by=("authority-1", "authority-2", "authority-3"))
        for _ in range(2):
            await submit(network, alpha.anchor())
        await network[3].kill()  # three of four are needed, and the fourth has no other key to vote with
        receipt = await submit(network, alpha.anchor(), 1, 2, 4, within_s=90)
        async with CometRpc(f"http://{network[1].rpc}") as rpc:
            signed = await rpc.signed_header(receipt.height)
        assert address_of(public) in {one.address for one in signed.commit.precommits}
        assert (await proven(network, "authority/authority-4", number=1)).record("authority/authority-4")
    finally:
        await network.stop()


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_a_fifth_authority_joins_with_its_key_in_a_token(tmp_path):
    """verifies that: admitted by a quorum it is a validator, signs inside SoftHSM, and is needed when another is dead."""
    async with networks.running(tmp_path / "ledger") as network:
        alpha = await Provider(network, "alpha").admitted()
        folder = network.made.directory / "authorities" / "authority-5"
        listen, p2p, rpc = networks.free_addresses(3)
        joining = ceremony.join_authority(
            folder,
            genesis=network.made.genesis.encode(),
            root=network.made.directory / "root",
            address=listen,
            now=Instant(int(time.time())),
        )
        location = initialise_softhsm(tmp_path / "token", label="validator")
        with open_token(location) as token:
            public = token.generate_ed25519_key("validator")
        action = transactions.AdmitAuthority(
            name="authority-5",
            certificate=joining.ca.certificate.public_bytes(Encoding.DER),
            transaction_key=keys.public_bytes(joining.transaction.public_key()),
            checkpoint_key=public,
            address=listen,
        )
        admitted = await decide(network, action, by=("authority-1", "authority-2", "authority-3"))
        ids = [(network.ids[name], network.ports[name].p2p) for name in network.ids]
        home.make(
            folder / "cometbft",
            name="authority-5",
            genesis=network.made.genesis,
            key=Ed25519PrivateKey.generate(),
            addresses=home.Addresses(p2p=p2p, rpc=rpc, peers=home.peers_of(ids, but="")),
        )
        configured = Settings(
            name="authority-5",
            listen=listen,
            directory=folder,
            cometbft=CometSettings(home=folder / "cometbft", rpc=rpc),
            validator_token=ValidatorToken(
                token_module=location.module,
                token_label="validator",
                token_pin_file=location.pin_file,
                softhsm_conf=Path(location.environment["SOFTHSM2_CONF"]),
            ),
        )
        settings.write(configured, folder / "authority.toml")
        network.authorities["authority-5"] = networks.Authority("authority-5", folder, rpc)
        await network[5].start()
        await network[5].ready()
        await network[4].kill()  # four of five are needed: without the token's votes there is no block
        receipt = await submit(network, alpha.anchor(), 1, 2, 3, within_s=120)
        assert receipt.height > admitted.height
        state = await proven(network, "authority/authority-5", number=1)  # the change of the set is carried to an old client
        assert state.record("authority/authority-5")
        async with CometRpc(f"http://{network[1].rpc}") as rpc_client:
            signed = await rpc_client.signed_header(receipt.height)
        assert address_of(public) in {one.address for one in signed.commit.precommits}
