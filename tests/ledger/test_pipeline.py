"""Blocks that follow one another without a pause: what one transaction of the database takes along, what dies with it."""

import asyncio
import contextlib
import os
import signal

import pytest

from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import blocks, transactions
from moorline.ledger import state as machine
from moorline.ledger.checkpoint import Note
from moorline.ledger.engines import intake, lookahead
from moorline.ledger.engines.embedded import Sequencer
from moorline.ledger.engines.node import Committed
from moorline.ledger.engines.proposal import Proposal
from moorline.ledger.engines.verifiers import Verifiers
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore, StateWrites, StoredBlock, StoredProposal
from moorline.wire import schema

from .conftest import NAMES
from .test_engine import FIRST, OTHERS, Engines, blank, databases, engines, in_child, until, volatile  # noqa: F401


@contextlib.asynccontextmanager
async def verifying(count=1):
    found = Verifiers(count)
    await found.started()
    try:
        yield found
    finally:
        await found.close()


def looked_at(node, data):
    found = transactions.parse(data)
    return found.sign1, machine.signing_key(node.head.state, found)


def forged(data):
    return data[:-1] + bytes((data[-1] ^ 1,))


# Workers ---------------------------------------------------------------------------------------------------------------


async def test_a_worker_says_which_signatures_hold(engines):  # noqa: F811
    """verifies that: of true and forged ones, mixed over two processes, exactly the true ones hold."""
    good = [engines.transaction() for _ in range(9)]
    mixed = [forged(data) if at % 3 == 0 else data for at, data in enumerate(good)]
    async with verifying(2) as found:
        holds = await found.hold([looked_at(engines.nodes[FIRST], data) for data in mixed])
        assert holds == [at % 3 != 0 for at in range(9)]
        assert await found.hold([]) == []
    engines.close()


async def test_an_answer_nobody_waits_for_is_nobody_elses(engines):  # noqa: F811
    """verifies that: of questions given up at any moment, no answer is taken for that of another signature."""
    good = [engines.transaction() for _ in range(6)]
    node = engines.nodes[FIRST]
    true, false = ([looked_at(node, one) for one in some] for some in (good, [forged(one) for one in good]))
    async with verifying() as found:
        for moment in (0, 0, 0.001, 0.002):
            given_up = asyncio.ensure_future(found.hold(true))
            await asyncio.sleep(moment)
            given_up.cancel()
            answers = await asyncio.gather(found.hold(false), found.hold(true), found.hold(false))
            assert answers == [[False] * 6, [True] * 6, [False] * 6]
    engines.close()


async def test_what_a_worker_did_not_say_is_verified_by_the_engine(engines):  # noqa: F811
    """verifies that: a worker that is killed says of nothing that it holds, is not asked again, and blocks go on."""
    async with verifying() as found:
        os.kill(found._workers[0]._process.pid, signal.SIGKILL)
        asked = [looked_at(engines.nodes[FIRST], engines.transaction())]
        assert await found.hold(asked) == [False]
        assert not found.ready
        engines.sequencer = Sequencer(engines.nodes[FIRST], dict(engines.peers), verifiers=found)
        async with engines.running():
            sent = [engines.transaction() for _ in range(lookahead.FEW + 4)]
            receipts = await asyncio.gather(*map(engines.sequencer.submit, sent))
            assert len(set(receipts)) == len(sent)


async def test_with_workers_every_transaction_is_judged_as_without(engines):  # noqa: F811
    """verifies that: forged, unknown and doubled ones among many get their codes, all others their receipts, once each."""
    async with verifying() as found:
        peers = {name: engines.peers[name] for name in OTHERS}
        engines.sequencer = engines.peers[FIRST].engine = Sequencer(engines.nodes[FIRST], peers, verifiers=found)
        async with engines.running():
            good = [engines.transaction() for _ in range(60)]
            bad = [forged(engines.transaction()) for _ in range(10)] + [b"garbage"]
            sent = (
                [data for pair in zip(good[:10], bad[:10], strict=True) for data in pair] + good[10:] + bad[10:] + good[:5]
            )
            answers = await asyncio.gather(*map(engines.sequencer.submit, sent), return_exceptions=True)
        told = dict(zip(sent, answers, strict=True))
        for data in good:
            blocks.verify_receipt(blocks.parse_receipt(told[data]), data, engines.consortium.made.trust)
        assert {told[data].code for data in bad[:10]} == {"ledger.signature_invalid"}
        assert told[b"garbage"].code == "ledger.transaction_malformed"
        assert not engines.nodes[FIRST].verified.knows(*looked_at(engines.nodes[FIRST], bad[0]))


async def test_a_sender_has_no_more_room_with_workers_than_without(engines, monkeypatch):  # noqa: F811
    """verifies that: beyond the room of a line nothing of a sender waits for a worker, and the line says that it is full."""
    for module in (intake, lookahead):
        monkeypatch.setattr(module, "UNPROVEN_ROOM", 20)
    monkeypatch.setattr(intake, "SENDER_ROOM", 24)
    async with verifying() as found:
        sequencer = Sequencer(engines.nodes[FIRST], {}, verifiers=found)
        sent = [asyncio.ensure_future(sequencer.submit(engines.transaction())) for _ in range(60)]
        await until(lambda: sum(one.done() for one in sent) >= 36)
        assert {one.exception().code for one in sent if one.done()} == {"ledger.sender_busy"}
        sequencer.close()
        await asyncio.gather(*sent, return_exceptions=True)
    engines.close()


# The pipeline ----------------------------------------------------------------------------------------------------------


async def flow(sequencer, sent):
    """Submit one after the other without waiting for receipts; those that are not `None` verify."""

    async def later(at, data):
        await asyncio.sleep(at / 2000)
        return await sequencer.submit(data)

    return await asyncio.gather(*(later(at, data) for at, data in enumerate(sent)))


async def test_the_next_block_is_proposed_by_the_transaction_that_commits_the_one_before(engines):  # noqa: F811
    """verifies that: under load blocks are proposed with a commit; each is durable before anybody is shown it."""
    store, shown = engines.nodes[FIRST].store, []
    alone, together = [], []
    propose, prepare = store.propose, store.prepare
    store.propose = lambda height, *rest, **named: (alone.append(height), propose(height, *rest, **named))[1]

    def prepared(block, *rest, proposal, **named):
        together.extend([] if proposal is None else [proposal.height])
        return prepare(block, *rest, proposal=proposal, **named)

    store.prepare = prepared
    cosign = engines.peers["authority-2"].cosign

    async def seen(proposal):
        body = schema.decode(Proposal, proposal).block
        shown.append(store.proposed().body == body)
        return await cosign(proposal)

    engines.peers["authority-2"].cosign = seen
    async with engines.running():
        sent = [engines.transaction() for _ in range(60)]
        receipts = await flow(engines.sequencer, sent)
        heights = {blocks.parse_receipt(one).height for one in receipts}
    assert together, "some block was proposed with the commit of the one before"
    assert set(together) & heights
    assert shown
    assert all(shown)


async def test_a_transaction_sent_again_while_its_block_is_committed_gets_the_one_receipt(engines):  # noqa: F811
    async with engines.running():
        sent = [engines.transaction() for _ in range(10)]
        receipts = await flow(engines.sequencer, [data for data in sent for _ in range(4)])
    assert len(set(receipts)) == len(sent)


async def test_an_engine_that_is_stopped_in_a_commit_ends_it(engines):  # noqa: F811
    """verifies that: whoever cancels it while the disk is waited for leaves head and database alike."""
    node = engines.nodes[FIRST]
    entered = asyncio.Event()
    settled = node.settled

    async def slowly():
        entered.set()
        await settled()

    node.settled = slowly
    async with engines.running():
        waiting = asyncio.ensure_future(engines.sequencer.submit(engines.transaction()))
        await entered.wait()
        engines.close = lambda: None  # looked at below
    waiting.cancel()
    assert node._written is None
    assert node.head.state.height == node.store.head().height >= 1
    for one in engines.nodes.values():
        one.store.close()


async def test_a_block_that_comes_from_elsewhere_during_its_commit_is_the_same_block(engines):  # noqa: F811
    """verifies that: two ways to one block meet in one commit; nothing is written twice."""
    data, head = engines.proposal(engines.transaction())
    proposal = schema.decode(Proposal, data)
    node = engines.nodes[FIRST]
    block = blocks.parse(proposal.block)
    found, applied = node.execute(block, proposal.block)
    lines = tuple(engines.nodes[name].cosign(head.checkpoint(), at=node.now()) for name in NAMES[:3])
    committed = Committed(block=proposal.block, note=Note(checkpoint=head.checkpoint(), signatures=lines).encode())
    node.begin_commit(committed, found, applied, proposal=None)
    node.adopt(committed)
    await node.settled()
    assert (node.head.digest, node.store.head().height) == (head.digest, 1)
    engines.close()


def test_killed_while_blocks_follow_one_another_nothing_is_lost_or_doubled(blank, volatile):  # noqa: F811
    """verifies that: after SIGKILL behind the n-th commit, with a proposal in it or not, each transaction stands once."""
    sent = [Engines(blank[0], databases(blank, volatile / "first")).transaction() for _ in range(24)]
    died_with_proposal = 0
    for after in range(1, 8):
        directory = databases(blank, volatile / f"flow-{after}")

        class Killing(LedgerStore):
            count = 0

            def finish(self, prepared, *, dies=after):
                super().finish(prepared)
                Killing.count += 1
                if Killing.count == dies:
                    os.kill(os.getpid(), signal.SIGKILL)

        async def submit_and_die(directory=directory, store=Killing):
            async with Engines(blank[0], directory, store).running() as found:
                await flow(found.sequencer, sent)

        ended = in_child(submit_and_die)
        assert ended in {signal.SIGKILL, 0}
        left = LedgerStore(open_database(f"sqlite:///{directory / FIRST}.db", "ledger"))
        proposed, head = left.proposed(), left.head()
        assert proposed is None or proposed.height == head.height + 1
        died_with_proposal += proposed is not None
        left.close()

        async def resume(directory=directory):
            async with Engines(blank[0], directory).running() as found:
                await asyncio.gather(*map(found.sequencer.submit, sent))
                store = found.nodes[FIRST].store
                bodies = [blocks.parse(store.block(height).body) for height in range(1, store.head().height + 1)]
                stand = [data for block in bodies for data in block.transactions]
                assert sorted(stand) == sorted(sent)

        assert in_child(resume) == 0, f"resuming behind commit {after}"
        if ended == 0:
            break
    assert died_with_proposal, "some process died between a commit and showing what it proposed with it"


def test_what_is_prepared_is_nothing_until_it_is_finished(blank, volatile):  # noqa: F811
    """verifies that: others read the state before; an error while it is written leaves nothing, and no open transaction."""
    directory = databases(blank, volatile / "prepared")
    store, reader = (LedgerStore(open_database(f"sqlite:///{directory / FIRST}.db", "ledger")) for _ in range(2))
    block = StoredBlock(height=1, body=b"b", note=b"n", leaf=b"l", edge=b"")
    state = StateWrites(records={bytes(32): ("k", b"v")}, subtrees={}, nonces={})
    proposal = StoredProposal(height=2, body=b"next", seal=b"s", first_seal=None)
    named = {"transactions": [(b"t", 9)], "authorities": None, "proposal": proposal}
    prepared = store.prepare(block, state, **named)
    assert (reader.head(), reader.proposed()) == (None, None)
    store.finish(prepared)
    assert (reader.head(), reader.proposed()) == (block, proposal)
    with pytest.raises(Exception, match="UNIQUE"):
        store.prepare(block, state, **named)
    reader.propose(3, b"later")  # nobody holds the database
    for one in (store, reader):
        one.close()


async def test_a_full_disk_at_the_commit_is_told_and_the_head_stays(engines):  # noqa: F811
    """verifies that: when the disk takes nothing, the engine stops with that error and nobody has a receipt."""

    def full(prepared):
        prepared._open.pop_all()  # never committed
        raise Unavailable("storage.full", "there is no room to write")

    engines.nodes[FIRST].store.finish = full
    task = asyncio.ensure_future(engines.sequencer.run())
    waiting = asyncio.ensure_future(engines.sequencer.submit(engines.transaction()))
    with pytest.raises(MoorlineError, match="storage.full"):
        await task
    assert engines.nodes[FIRST].head.state.height == 0
    assert not waiting.done()
    waiting.cancel()
