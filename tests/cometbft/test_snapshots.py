"""Snapshots: given by one application, taken by another, and every lie on the way found."""

from dataclasses import replace

import pytest
from apps import NAMES, App, retire_last
from chains import precommit  # noqa: F401 - the folder's own signing, checked in test_verifier
from heads import head_after

from moorline.errors import MoorlineError, NotAuthentic
from moorline.ledger import checkpoint
from moorline.ledger.engines.cometbft import snapshots
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb
from moorline.ledger.engines.cometbft.snapshots import History, Manifest
from moorline.wire import schema

OFFER = pb.ResponseOfferSnapshot
APPLY = pb.ResponseApplySnapshotChunk


@pytest.fixture
async def giver(app, monkeypatch):
    """A chain with a provider, a retired authority and nonces, in several chunks, and the snapshot of its head."""
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 2000)
    await app.decided(app.admission(), by=NAMES[:2])
    await app.decided(retire_last(), by=NAMES[:3])
    app.node.take(head_after(app))
    await app.block()
    app.snapshots.write(app.chain.state)
    return app


@pytest.fixture
def taker(giver, tmp_path):
    found = App(tmp_path / "taker", giver.made)
    yield found
    found.close()


async def offered(taker, snapshot, app_hash):
    return (await taker.ask(offer_snapshot=pb.RequestOfferSnapshot(snapshot=snapshot, app_hash=app_hash))).result


async def applied(taker, index, data, sender="peer"):
    return await taker.ask(apply_snapshot_chunk=pb.RequestApplySnapshotChunk(index=index, chunk=data, sender=sender))


async def listed(giver):
    (found,) = (await giver.ask(list_snapshots=pb.RequestListSnapshots())).snapshots
    return found


async def chunks_of(giver, snapshot):
    found = []
    for index in range(snapshot.chunks):
        request = pb.RequestLoadSnapshotChunk(height=snapshot.height, format=snapshot.format, chunk=index)
        found.append((await giver.ask(load_snapshot_chunk=request)).chunk)
    return found


async def restored(taker, giver, *, chunks=None, app_hash=None):
    """The answer to the last chunk."""
    snapshot = await listed(giver)
    assert await offered(taker, snapshot, app_hash or giver.chain.state.root) == OFFER.ACCEPT
    answer = None
    for index, data in enumerate(chunks or await chunks_of(giver, snapshot)):
        answer = await applied(taker, index, data)
    return answer.result


async def test_a_state_is_taken_whole(giver, taker):
    """verifies that: records, nonces and the history of authorities arrive, are durable, and blocks go on from there."""
    snapshot = await listed(giver)
    assert snapshot.chunks > 2
    assert await restored(taker, giver) == APPLY.ACCEPT
    taker.reopened()
    mine, theirs = taker.chain.state, giver.chain.state
    assert (mine.height, mine.root, dict(mine.records)) == (theirs.height, theirs.root, dict(theirs.records))
    assert dict(mine.nonces) == {nonce: until for nonce, until in theirs.nonces.items() if until > theirs.height}
    assert taker.node._sets == giver.node._sets
    info = await taker.ask(info=pb.RequestInfo())
    assert (info.last_block_height, info.last_block_app_hash) == (theirs.height, theirs.root)
    data, _ = giver.proposal(giver.admission("beta"))
    assert (await giver.block(data)).app_hash == (await taker.block(data)).app_hash


async def test_an_old_transaction_is_refused_after_a_snapshot_too(giver, taker):
    """verifies that: what was applied before the snapshot cannot be applied again by whoever began from it."""
    data, _ = giver.proposal(giver.admission("gamma"))
    await giver.block(data)
    giver.snapshots.write(giver.chain.state)
    (newest, *_) = (await giver.ask(list_snapshots=pb.RequestListSnapshots())).snapshots
    assert await offered(taker, newest, giver.chain.state.root) == OFFER.ACCEPT
    for index, chunk in enumerate(await chunks_of(giver, newest)):
        await applied(taker, index, chunk)
    assert not await taker.process(data)
    assert (await taker.check(data)).code == 1


async def test_two_authorities_make_the_same_snapshot(giver, taker):
    assert await restored(taker, giver) == APPLY.ACCEPT
    taker.snapshots.write(taker.chain.state)
    height = giver.chain.state.height
    assert taker.snapshots.manifest(height) == giver.snapshots.manifest(height)


async def test_offers_that_make_no_sense_are_rejected(giver, taker):
    good = await listed(giver)
    root = giver.chain.state.root
    for spoil, expected in (
        (lambda one: setattr(one, "format", 9), OFFER.REJECT_FORMAT),
        (lambda one: setattr(one, "metadata", b"nonsense"), OFFER.REJECT),
        (lambda one: setattr(one, "hash", bytes(32)), OFFER.REJECT),
        (lambda one: setattr(one, "height", one.height + 1), OFFER.REJECT),
        (lambda one: setattr(one, "chunks", one.chunks + 1), OFFER.REJECT),
    ):
        bad = pb.Snapshot()
        bad.CopyFrom(good)
        spoil(bad)
        assert await offered(taker, bad, root) == expected
    assert await offered(giver, good, root) == OFFER.REJECT  # an application with a state begins from no other
    assert (await applied(taker, 0, b"")).result == APPLY.ABORT


async def test_a_wrong_chunk_is_fetched_from_somebody_else(giver, taker):
    snapshot = await listed(giver)
    chunks = await chunks_of(giver, snapshot)
    assert await offered(taker, snapshot, giver.chain.state.root) == OFFER.ACCEPT
    for index, data in ((0, chunks[1]), (0, b""), (len(chunks), chunks[0]), (len(chunks) - 1, b"no history")):
        answer = await applied(taker, index, data, sender="liar")
        assert (answer.result, list(answer.reject_senders), list(answer.refetch_chunks)) == (APPLY.RETRY, ["liar"], [index])
    assert [(await applied(taker, index, data)).result for index, data in enumerate(chunks)][-1] == APPLY.ACCEPT


async def test_records_that_lead_to_another_root_are_rejected(giver, taker):
    """verifies that: the app hash CometBFT's light client verified decides, not what the snapshot says of itself."""
    assert await restored(taker, giver, app_hash=bytes(32)) == APPLY.REJECT_SNAPSHOT
    assert (taker.chain.state.height, taker.store.head()) == (0, None)


async def test_a_snapshot_nobody_else_has_is_rejected(giver, taker):
    """verifies that: nonces, which no root covers, are believed of f+1 authorities and of no single peer."""
    taker.confirmations = checkpoint.tolerated_faults(3)
    assert await restored(taker, giver) == APPLY.REJECT_SNAPSHOT
    assert taker.chain.state.height == 0


def lies(history):
    (change,) = history.changes
    fewer = dict(list(change.authorities.items())[:2])
    yield "no change", History(changes=())
    yield "another set", History(changes=(replace(change, authorities=fewer),))
    yield "twice", History(changes=(change, change))
    yield "another height", History(changes=(replace(change, height=change.height - 1),))
    yield "another ledger's words", History(changes=(replace(change, head=b"x"),))


async def test_a_history_that_no_quorum_signed_is_rejected(giver, tmp_path):
    snapshot = await listed(giver)
    chunks = await chunks_of(giver, snapshot)
    history = schema.decode(History, chunks[-1])
    for number, (name, lie) in enumerate(lies(history)):
        taker = App(tmp_path / f"taker-{number}", giver.made)
        try:
            answer = await restored(taker, giver, chunks=[*chunks[:-1], schema.encode(lie)])
            assert answer == APPLY.REJECT_SNAPSHOT, name
            with pytest.raises(MoorlineError):
                snapshots.verify_history(lie, giver.made.genesis, giver.chain.state)
        finally:
            taker.close()


async def test_a_change_signed_by_too_few_is_rejected(giver):
    (change,) = schema.decode(History, (await chunks_of(giver, await listed(giver)))[-1]).changes
    weak = replace(change, head=head_after(giver, height=change.height + 1, by=NAMES[:2]).encode())
    with pytest.raises(NotAuthentic, match="ledger.quorum_missing"):
        snapshots.verify_history(History(changes=(weak,)), giver.made.genesis, giver.chain.state)


async def test_only_the_newest_are_kept(app):
    for _ in range(snapshots.KEPT + 2):
        await app.block()
        app.snapshots.write(app.chain.state)
    heights = [one.height for one in app.snapshots.listed()]
    assert heights == [5, 4, 3]
    assert app.snapshots.chunk(1, 1, 0) == b""
    assert app.snapshots.chunk(5, 9, 0) == b""
    assert isinstance(app.snapshots.manifest(5), Manifest)
