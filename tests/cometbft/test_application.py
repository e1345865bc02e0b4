"""The application alone, asked as CometBFT asks."""

import ast
import json
from pathlib import Path

import pytest
from apps import NAMES, NOW, App, retire_last
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moorline.ledger.engines.cometbft as package
from moorline.errors import Misconfigured, MoorlineError, Refused
from moorline.ledger import state as machine
from moorline.ledger.engines.cometbft import header, mempool
from moorline.ledger.engines.cometbft.application import MAX_TRANSACTIONS, REJECTED
from moorline.ledger.engines.cometbft.chain import Chain
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb


async def test_the_chain_id_and_the_validators_must_be_the_ledgers(app):
    chain_id = header.chain_id_of(app.made.genesis.ledger_id)
    good = pb.RequestInitChain(chain_id=chain_id, initial_height=1)
    for one in app.made.genesis.authorities:
        good.validators.add(power=header.AUTHORITY_POWER).pub_key.ed25519 = one.checkpoint_key
    answer = await app.ask(init_chain=good)
    assert answer.app_hash == machine.initial(app.made.genesis).root
    for spoil in (
        lambda request: setattr(request, "chain_id", "other"),
        lambda request: request.validators.pop(),
        lambda request: setattr(request.validators[0], "power", 1),
        lambda request: setattr(request.validators[0].pub_key, "ed25519", bytes(32)),
    ):
        bad = pb.RequestInitChain()
        bad.CopyFrom(good)
        spoil(bad)
        with pytest.raises(Misconfigured, match="comet.other_genesis"):
            await app.ask(init_chain=bad)


async def test_echo_info_query_and_vote_extensions_are_answered(app):
    assert (await app.ask(echo=pb.RequestEcho(message="hello"))).message == "hello"
    assert (await app.ask(info=pb.RequestInfo())).last_block_height == 0
    await app.block()
    info = await app.ask(info=pb.RequestInfo())
    assert (info.last_block_height, info.last_block_app_hash) == (1, app.chain.state.root)
    found = await app.ask(query=pb.RequestQuery(path="record", data=b"parameter/max_age_s"))
    assert (found.code, found.value) == (0, app.chain.state.get("parameter/max_age_s"))
    assert (await app.ask(query=pb.RequestQuery(path="record", data=b"\xff"))).code == REJECTED
    assert (await app.ask(extend_vote=pb.RequestExtendVote(height=2))).vote_extension == b""
    known = pb.ResponseVerifyVoteExtension
    for extension, status in ((b"", known.ACCEPT), (b"anything", known.REJECT)):
        request = pb.RequestVerifyVoteExtension(height=2, vote_extension=extension)
        assert (await app.ask(verify_vote_extension=request)).status == status


async def test_a_request_that_is_none_is_refused(app):
    with pytest.raises(Refused, match="comet.request_unknown"):
        await app.application.answer(pb.Request())


async def test_what_would_not_apply_does_not_wait(app):
    good, _ = app.proposal(app.admission())
    assert (await app.check(good)).code == 0
    for bad in (b"", b"nonsense", good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        answer = await app.check(bad)
        assert answer.code == REJECTED
        assert json.loads(answer.log)["code"].startswith("ledger.")


async def test_a_proposal_leaves_out_what_does_not_apply(app):
    """verifies that: PrepareProposal drops the invalid and keeps order and the bound of bytes."""
    good, found = app.proposal(app.admission())
    approval = app.approval(found, NAMES[1])
    early = app.approval("00" * 32, NAMES[1])
    assert await app.prepare(b"nonsense", good, early, approval, good) == [good, approval]
    assert await app.prepare(good, approval, max_bytes=len(good) + 10) == [good]
    assert await app.prepare() == []


async def test_a_block_with_anything_that_does_not_apply_is_refused(app):
    """verifies that: ProcessProposal refuses the whole block, whatever the other transactions are."""
    good, found = app.proposal(app.admission())
    approval = app.approval(found, NAMES[1])
    assert await app.process(good, approval)
    assert await app.process()
    for bad in ((b"nonsense",), (approval, good), (good, good), (good, app.approval("00" * 32, NAMES[1])), (good, b"")):
        assert not await app.process(*bad)
    assert not await app.process(good, height=7)
    assert not await app.process(*[b"x"] * (MAX_TRANSACTIONS + 1))


async def test_a_decided_block_is_durable_when_commit_is_answered_and_not_before(app):
    """verifies that: a crash after FinalizeBlock loses the block, which CometBFT gives again; after Commit it is there."""
    data, _ = app.proposal(app.admission())
    answer = await app.finalize(data)
    app.reopened()
    assert app.chain.state.height == 0
    again = await app.finalize(data)
    assert again.app_hash == answer.app_hash
    await app.ask(commit=pb.RequestCommit())
    app.reopened()
    assert (app.chain.state.height, app.chain.state.root) == (1, answer.app_hash)


async def test_a_block_that_is_not_the_next_stops_the_application(app):
    await app.block()
    for height in (1, 3):
        with pytest.raises(MoorlineError, match="ledger.wrong_height"):
            await app.finalize(height=height)
    with pytest.raises(Refused, match="ledger.nothing_decided"):
        await app.ask(commit=pb.RequestCommit())


async def test_block_time_decides_and_no_clock(app):
    """verifies that: a certificate is judged at block time, whatever year it is here; the same block, the same root."""
    data, _ = app.proposal(app.admission())
    ok = await app.finalize(data)
    late = await app.finalize(data, time_s=NOW + 100 * 365 * 86_400)
    assert [one.code for one in ok.tx_results] == [0]
    again = await app.finalize(data)
    assert again.app_hash == ok.app_hash
    assert late.tx_results


async def test_validators_follow_the_authorities(app):
    """verifies that: who is retired by a quorum is no validator any more, two blocks later (CometBFT's rule)."""
    answer = await app.decided(retire_last(), by=NAMES[:3])
    leaving = app.keys[NAMES[3]].checkpoint.public_key().public_bytes_raw()
    assert [(one.pub_key.ed25519, one.power) for one in answer.validator_updates] == [(leaving, 0)]
    assert set(app.chain.state.authority_set()) == set(NAMES[:3])
    assert not (await app.block()).validator_updates


async def test_a_sender_has_a_share_of_the_mempool_and_no_more(app, monkeypatch):
    """verifies that: a flood of one sender is refused with its code while another's transactions are taken."""
    monkeypatch.setattr(mempool, "MAX_PENDING_PER_SENDER", 5)
    flood = [app.proposal(app.admission(f"p{number}"))[0] for number in range(7)]
    codes = [(await app.check(data)).code for data in flood]
    assert codes == [0] * 5 + [REJECTED] * 2
    assert json.loads((await app.check(flood[5])).log)["code"] == "ledger.sender_busy"
    assert (await app.check(flood[0])).code == 0  # the same again is not one more
    assert (await app.check(app.proposal(app.admission("other"), NAMES[1])[0])).code == 0
    app.mempool.forget(list(app.mempool.waiting())[:1])
    assert app.mempool.waiting()


async def test_a_share_is_free_again_when_a_transaction_leaves(app, monkeypatch):
    monkeypatch.setattr(mempool, "MAX_PENDING_PER_SENDER", 1)
    told = []
    app.application.on_rejected = lambda found, error: told.append((found, error.code))
    one, _ = app.proposal(app.admission("one"))
    two, _ = app.proposal(app.admission("two"))
    assert [(await app.check(one)).code, (await app.check(two)).code] == [0, REJECTED]
    await app.block(one)  # in a block, so that it does not apply again
    assert (await app.check(one, again=True)).code == REJECTED
    assert [code for _, code in told] == ["ledger.nonce_used"]
    assert (await app.check(two)).code == 0
    await app.ask(info=pb.RequestInfo())  # CometBFT started anew: its mempool is empty
    assert not app.mempool.waiting()


async def test_misbehaviour_is_kept_under_the_authoritys_name(app):
    address = header.address_of(app.keys[NAMES[2]].checkpoint.public_key().public_bytes_raw())
    bad = pb.Misbehavior(type=pb.DUPLICATE_VOTE, height=1)
    bad.validator.address = address
    await app.block()
    await app.block(misbehaviour=[bad])
    app.reopened()
    (found,) = app.store.misbehaviour()
    assert (found.authority, found.kind, found.height, found.seen_at) == (NAMES[2], "duplicate-vote", 1, 2)


async def test_a_database_that_was_changed_does_not_start(app):
    """verifies that: a record changed behind the application's back is found before anything is served."""
    await app.block(app.proposal(app.admission())[0])
    with app.store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE consensus_records SET value = x'00' WHERE key = 'parameter/max_age_s'")
    with pytest.raises(Misconfigured, match="ledger.database_corrupt"):
        Chain(genesis=app.made.genesis, store=app.store)


async def test_two_applications_go_the_same_way(app, tmp_path):
    """verifies that: proposer and follower, one of them restarted in between, have the same roots."""
    other = App(tmp_path / "other", app.made)
    try:
        found = app.proposal(app.admission())
        for batch in ([found[0]], [app.approval(found[1], NAMES[1])], []):
            kept = await app.prepare(*batch)
            assert await other.process(*kept)
            assert (await app.block(*kept)).app_hash == (await other.block(*kept)).app_hash
            other.reopened()
    finally:
        other.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.binary(max_size=200), max_size=5))
async def test_any_bytes_are_dropped_refused_and_never_an_error(app, data):
    assert await app.prepare(*data) == []
    assert await app.process(*data) is (not data)
    for one in data:
        assert (await app.check(one)).code == REJECTED


def test_nothing_that_decides_asks_a_clock_a_socket_or_chance():
    """verifies that: the clock of a node cannot change what its application decides: it is never read."""
    folder = Path(package.__file__).parent
    forbidden = {"time", "datetime", "random", "secrets", "socket", "asyncio", "subprocess", "os"}
    deciding = (
        "application",
        "chain",
        "mempool",
        "canonical",
        "header",
        "commit",
        "verifier",
        "light",
        "evidence",
        "receipts",
    )
    for name in deciding:
        tree = ast.parse((folder / f"{name}.py").read_text("utf-8"))
        imported = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        imported |= {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level == 0
        }
        assert not imported & forbidden, name
        assert "SystemClock" not in (folder / f"{name}.py").read_text("utf-8")
