"""Who sequences, on operators' words only; lost disks; evidence; floods. In one process, over real databases."""

import asyncio
import contextlib
from dataclasses import replace

import pytest

from moorline.errors import Conflict, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import blocks, evidence, snapshot, terms, transactions
from moorline.ledger.checkpoint import Note
from moorline.ledger.engines import cosigner, embedded, office, taking_over
from moorline.ledger.engines.embedded import Sequencer
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.engines.office import Office
from moorline.ledger.engines.proposal import Proposal
from moorline.ledger.light_client import verify_bundle
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore
from moorline.wire import schema

from .conftest import NAMES, NOW
from .test_engine import FIRST, OTHERS, Engines, Local, blank, databases, engines, until, volatile  # noqa: F401 - fixtures

SECOND, THIRD, FOURTH = OTHERS


class Reached(Local):
    """A peer reached through its office."""

    def __init__(self, offices, name):
        super().__init__()
        self.offices, self.name = offices, name

    @property
    def engine(self):
        return self.offices[self.name]

    @engine.setter
    def engine(self, _):
        """The office is the engine."""

    async def submit(self, transaction):
        await self._reached()
        return await self.engine.submit(transaction, forwarded=True)


class Offices(Engines):
    """Four offices, each with a database in a directory; each can be stopped and started again."""

    def __init__(self, consortium, directory):
        super().__init__(consortium, directory)
        self.directory = directory
        self.offices = {}
        self.peers = {name: Reached(self.offices, name) for name in NAMES}
        self.tasks = {}

    def node(self, name):
        return Node(
            name=name,
            genesis=self.consortium.made.genesis,
            key=self.consortium.authorities[name].checkpoint,
            store=LedgerStore(open_database(f"sqlite:///{self.directory / name}.db", "ledger")),
            now_ms=lambda: self.now_ms,
        )

    def start(self, name, **options):
        self.nodes[name].store.close()
        self.nodes[name] = self.node(name)
        others = {other: peer for other, peer in self.peers.items() if other != name}
        self.offices[name] = Office(self.nodes[name], others, **options)
        self.peers[name].away = False
        self.tasks[name] = asyncio.ensure_future(self.offices[name].run())

    async def stop(self, name):
        self.peers[name].away = True
        task = self.tasks.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def running(self, names=NAMES):
        for name in NAMES:
            if name not in names:
                self.peers[name].away = True
        for name in names:
            self.start(name)
        try:
            yield self
        finally:
            for name in NAMES:
                await self.stop(name)
            self.close()

    def proposal(self, *batch, **options):
        self.now_ms += 100
        return super().proposal(*batch, **options)

    async def same(self, names=NAMES):
        await until(lambda: len({self.nodes[name].head.digest for name in names}) == 1)

    async def promoted(self, name, by, **options):
        for one in by:
            await self.offices[one].promote(name, **options)
        await until(lambda: isinstance(self.offices[name].part, Sequencer))


@pytest.fixture
def offices(blank, volatile, monkeypatch):  # noqa: F811 - fixtures
    monkeypatch.setattr(office, "GATHER_S", 0.05)
    monkeypatch.setattr(embedded, "RETRY_S", 0.05)
    return Offices(blank[0], databases(blank, volatile / "databases"))


async def test_a_quorum_of_operators_makes_a_cosigner_the_sequencer_and_the_old_one_follows(offices):
    """verifies that: two words are not enough, three are; the old sequencer comes back as a cosigner of the new one."""
    async with offices.running():
        transaction = offices.transaction()
        await offices.offices[SECOND].submit(transaction)
        await offices.same()
        height = offices.nodes[SECOND].head.state.height
        await offices.stop(FIRST)
        for name in (SECOND, THIRD):
            await offices.offices[name].promote(SECOND)
        await asyncio.sleep(0.2)
        with pytest.raises(Unavailable, match="ledger.no_sequencer"):
            await offices.offices[SECOND].submit(offices.transaction())
        assert offices.nodes[SECOND].conduct.following.term == 0
        await offices.promoted(SECOND, [FOURTH])
        receipt = blocks.parse_receipt(await offices.offices[THIRD].submit(offices.transaction()))
        assert receipt.height > height
        again = blocks.parse_receipt(await offices.offices[FOURTH].submit(transaction))
        assert again.height <= height  # what was acknowledged before stands, once
        offices.start(FIRST)
        await offices.same()
        assert isinstance(offices.offices[FIRST].part, cosigner.Cosigner)
        await offices.stop(THIRD)  # now its signature is needed, and given
        assert await offices.offices[FIRST].submit(offices.transaction())


async def test_the_block_that_one_cosigner_holds_is_taken_over_byte_for_byte(offices):
    """verifies that: a block signed by others and maybe committed by the lost sequencer is the one the new one proposes."""
    async with offices.running():
        await offices.offices[FIRST].submit(offices.transaction())
        await offices.same()
        transaction = offices.transaction()
        data, _ = offices.proposal(transaction)
        block = schema.decode(Proposal, data).block
        line = await offices.offices[THIRD].cosign(data)  # SECOND is not shown it
        await offices.stop(FIRST)
        offices.now_ms += 60_000  # long after
        await offices.promoted(SECOND, [SECOND, THIRD, FOURTH])
        height = blocks.parse(block).header.height
        await until(lambda: offices.nodes[SECOND].head.state.height >= height)
        assert offices.nodes[SECOND].store.block(height).body == block
        assert line  # ... and whoever comes back with the same block has the same history
        offices.start(FIRST)
        await offices.same()
        assert offices.nodes[FIRST].store.block(height).body == block


async def test_an_old_sequencer_that_never_heard_of_it_gets_no_signature(offices):
    """verifies that: after a quorum's word nothing of the old term is signed, also by who has not seen the certificate."""
    async with offices.running():
        await offices.offices[FIRST].submit(offices.transaction())
        await offices.same()
        await offices.stop(FIRST)
        await offices.promoted(SECOND, [SECOND, THIRD, FOURTH])
        await until(lambda: offices.nodes[THIRD].conduct.following.term == 1)
        data, _ = offices.proposal(offices.transaction())
        for name in (THIRD, FOURTH):
            with pytest.raises(MoorlineError) as caught:
                await offices.offices[name].cosign(data)
            assert caught.value.code in {"ledger.term_over", "ledger.wrong_height", "ledger.height_passed"}
        with pytest.raises(Refused, match="ledger.term_over"):
            await offices.offices[SECOND].cosign(data)


async def test_nobody_is_promoted_by_himself(offices):
    """verifies that: an authority's own word, however often, and forged words of others make no sequencer."""
    async with offices.running():
        await offices.offices[FIRST].submit(offices.transaction())
        await offices.same()
        node = offices.nodes[FOURTH]
        own = terms.give(
            ledger_id=node.genesis.ledger_id,
            term=1,
            sequencer=FOURTH,
            name=FOURTH,
            height=1,
            held=bytes(32),
            key=node._key(),
        )
        for words in ([own], [own] * 3, [own, replace(own, name=SECOND), replace(own, name=THIRD)]):
            with pytest.raises((NotAuthentic, Refused)):
                offices.nodes[SECOND].conduct.learn(terms.certify(words), node.authorities())
        with pytest.raises(Refused, match="ledger.no_word"):
            offices.nodes[SECOND].promise(schema.encode(terms.Request(term=1, sequencer=FOURTH)))
        offices.nodes[SECOND].conduct.give_word(1, THIRD)
        with pytest.raises(Conflict, match="ledger.word_given"):
            offices.nodes[SECOND].conduct.give_word(1, FOURTH)
        with pytest.raises(Refused, match="ledger.authority_unknown"):
            await offices.offices[SECOND].promote("authority-9")


@pytest.mark.parametrize("gone", ["word", "taken_over", "certified"])
async def test_a_promotion_cut_off_anywhere_goes_on(offices, gone, monkeypatch):
    """verifies that: killed behind any durable step of its promotion, an authority becomes the sequencer when it is back."""
    async with offices.running():
        await offices.offices[FIRST].submit(offices.transaction())
        await offices.same()
        data, _ = offices.proposal(offices.transaction())
        await offices.offices[THIRD].cosign(data)
        await offices.stop(FIRST)
        cut = {"word": "give_word", "certified": "learn"}.get(gone)
        conduct = offices.nodes[SECOND].conduct

        class Cut(Exception):
            """The process dies here."""

        if cut is None:
            monkeypatch.setattr(conduct, "learn", lambda *_: (_ for _ in ()).throw(Cut))
        else:
            real = getattr(conduct, cut)

            def dies(*arguments):
                real(*arguments)
                raise Cut

            monkeypatch.setattr(conduct, cut, dies)
        for name in (THIRD, FOURTH):
            await offices.offices[name].promote(SECOND)
        with contextlib.suppress(Cut):
            await offices.offices[SECOND].promote(SECOND)
            await asyncio.wait_for(offices.tasks[SECOND], 5)
        await offices.stop(SECOND)
        offices.start(SECOND)
        await until(lambda: isinstance(offices.offices[SECOND].part, Sequencer))
        assert await offices.offices[THIRD].submit(offices.transaction())
        height = blocks.parse(schema.decode(Proposal, data).block).header.height
        assert offices.nodes[SECOND].store.block(height).body == schema.decode(Proposal, data).block


# Lost disks ------------------------------------------------------------------------------------------------------------


async def test_a_lost_disk_is_made_good_from_a_snapshot_and_signs_only_what_it_cannot_have_signed(offices, blank):  # noqa: F811
    """verifies that: state, receipts and nonces come from others; the height it may have signed is left to them."""
    async with offices.running():
        repeated = offices.transaction()
        for transaction in (repeated, *(offices.transaction() for _ in range(4))):
            offices.now_ms += 100
            await offices.offices[FIRST].submit(transaction)
        await offices.same()
        await offices.stop(FOURTH)
        offices.nodes[FOURTH].store.close()
        for file in offices.directory.glob(f"{FOURTH}.db*"):
            file.unlink()
        databases(blank, offices.directory / "fresh")
        (offices.directory / "fresh" / f"{FOURTH}.db").rename(offices.directory / f"{FOURTH}.db")
        offices.start(FOURTH, snapshot_after=1)
        await offices.same()
        node = offices.nodes[FOURTH]
        assert dict(node.head.state.records) == dict(offices.nodes[FIRST].head.state.records)
        assert set(node.head.state.nonces) == set(offices.nodes[FIRST].head.state.nonces)
        found = transactions.parse(repeated)
        assert node.receipt(found.id, found.payload.valid_until) is not None
        data, _ = offices.proposal(offices.transaction())
        with pytest.raises(Refused, match="ledger.signatures_forgotten"):
            await offices.offices[FOURTH].cosign(data)
        for _ in range(3):
            await offices.offices[FIRST].submit(offices.transaction())
        await offices.stop(THIRD)
        await offices.same([FIRST, SECOND, FOURTH])
        assert await offices.offices[FIRST].submit(offices.transaction())  # its signature counts again


async def test_a_sequencer_that_lost_its_disk_waits_for_its_operators(offices, blank):  # noqa: F811
    """verifies that: it proposes nothing of its own, and sequences again when a quorum says so."""
    async with offices.running():
        await offices.offices[FIRST].submit(offices.transaction())
        await offices.same()
        await offices.stop(FIRST)
        offices.nodes[FIRST].store.close()
        for file in offices.directory.glob(f"{FIRST}.db*"):
            file.unlink()
        databases(blank, offices.directory / "fresh")
        (offices.directory / "fresh" / f"{FIRST}.db").rename(offices.directory / f"{FIRST}.db")
        offices.start(FIRST)
        await offices.same()
        assert isinstance(offices.offices[FIRST].part, cosigner.Cosigner)
        assert await offices.offices[SECOND].promote(FIRST) == 0  # it is the sequencer, as far as anybody knows
        await offices.promoted(FIRST, NAMES, again=True)
        assert await offices.offices[SECOND].submit(offices.transaction())
        await offices.same()


async def test_a_lying_snapshot_is_not_believed(offices):
    """verifies that: changed records, subtrees, blocks and signatures are all refused, and another authority is asked."""
    async with offices.running():
        await offices.offices[FIRST].submit(offices.transaction())
        await offices.same()
        good = offices.nodes[FIRST].manifest()
        trust = offices.consortium.made.trust
        assert snapshot.verify(good, trust).checkpoint == offices.nodes[FIRST].head.checkpoint()
        found = schema.decode(snapshot.Manifest, good, max_bytes=1 << 24)
        other = replace(blocks.parse(found.block), transactions=())
        for changed in (
            replace(found, subtrees=found.subtrees[: -snapshot.ENTRY_BYTES]),
            replace(found, subtrees=found.subtrees[:-38] + bytes(32) + found.subtrees[-6:]),
            replace(found, block=blocks.encode(other)),
            replace(found, edge=bytes(len(found.edge))),
            replace(found, note=found.note.replace(b"time-ms 1", b"time-ms 2")),
        ):
            with pytest.raises(MoorlineError):
                snapshot.verify(schema.encode(changed), trust)

        class Liar(Local):
            """Gives a true manifest and records that are not those."""

            async def manifest(self):
                return good

            async def chunk(self, first):
                piece = snapshot.parse_chunk(self.engine.node.chunk(first))
                entries = [replace(piece.records[0], value=b"\xa0"), *piece.records[1:]]
                return schema.encode(replace(piece, records=tuple(entries)))

        empty = Node(
            name=FOURTH,
            genesis=offices.consortium.made.genesis,
            key=offices.consortium.authorities[FOURTH].checkpoint,
            store=LedgerStore(open_database(f"sqlite:///{offices.directory / 'empty'}.db", "ledger")),
            now_ms=lambda: offices.now_ms,
        )
        liar = Liar(offices.offices[FIRST])
        with pytest.raises(Unavailable, match="ledger.snapshot_moving"):
            await taking_over.take_over(empty, [liar])
        assert empty.note is None
        await taking_over.take_over(empty, [liar, offices.peers[SECOND]])
        assert empty.head.digest == offices.nodes[SECOND].head.digest
        verify_bundle(empty.prove(["parameter/max_age_s"]), trust, now=NOW).record("parameter/max_age_s")
        empty.store.close()


# Evidence --------------------------------------------------------------------------------------------------------------


def kept(node):
    return [evidence.verify(one.body, node.genesis.trust()) for one in node.store.evidence()]


async def test_a_sequencer_that_shows_two_blocks_is_named_by_what_it_sealed(engines):  # noqa: F811
    """verifies that: two sealed blocks of one attempt are evidence, found by who is shown both or commits the other;
    a second attempt is not."""
    data, _ = engines.proposal(engines.transaction())
    other, other_head = engines.proposal(engines.transaction())
    second = engines.cosigners[SECOND]
    await second.cosign(data)
    with pytest.raises(NotAuthentic, match="ledger.fork"):
        await second.cosign(other)
    (found,) = kept(second.node)
    assert (found.kind, found.offenders, found.forked) == (evidence.Kind.PROPOSALS, (FIRST,), False)
    third = engines.cosigners[THIRD]
    await third.cosign(data)
    retry, _ = engines.proposal(engines.transaction(), attempt=1)
    with pytest.raises(NotAuthentic, match="ledger.fork"):
        await third.cosign(retry)
    assert kept(third.node) == []
    lines = tuple(engines.nodes[name].cosign(other_head.checkpoint(), at=NOW) for name in (FIRST, SECOND, FOURTH))
    proposal = schema.decode(Proposal, other)
    note = Note(checkpoint=other_head.checkpoint(), signatures=lines).encode()
    await third.announce(schema.encode(Committed(block=proposal.block, note=note, seal=schema.encode(proposal.seal))))
    assert [one.offenders for one in kept(third.node)] == [(FIRST,)]
    engines.close()


async def test_two_heads_at_one_height_halt_the_engine_and_name_everybody_who_signed_both(engines):  # noqa: F811
    data, head = engines.proposal(engines.transaction())
    other_data, other = engines.proposal(engines.transaction(), attempt=1)

    def committed(proposal, found, names):
        lines = (engines.nodes[FIRST].sign_as_maker(found), *(engines.nodes[name].cosign(found, at=NOW) for name in names))
        note = Note(checkpoint=found, signatures=lines).encode()
        return schema.encode(Committed(block=schema.decode(Proposal, proposal).block, note=note))

    fourth = engines.cosigners[FOURTH]
    await fourth.announce(committed(data, head.checkpoint(), (FIRST, SECOND, THIRD)))
    with pytest.raises(NotAuthentic, match="two blocks at one height"):
        await fourth.announce(committed(other_data, other.checkpoint(), (THIRD,)))
    assert [(one.offenders, one.forked) for one in kept(fourth.node)] == [((FIRST, THIRD), False)]
    fourth.node.conduct.not_halted()  # one more signature somewhere is no fork: the ledger goes on
    with pytest.raises(NotAuthentic, match="two blocks at one height"):
        await fourth.announce(committed(other_data, other.checkpoint(), (FIRST, THIRD, FOURTH)))
    assert kept(fourth.node)[-1].forked or kept(fourth.node)[0].forked
    with pytest.raises(Unavailable, match="ledger.halted"):
        await fourth.cosign(data)
    again = Node(
        name=FOURTH,
        genesis=fourth.node.genesis,
        key=engines.consortium.authorities[FOURTH].checkpoint,
        store=fourth.node.store,
        now_ms=lambda: engines.now_ms,
    )
    with pytest.raises(Unavailable, match="ledger.halted"):
        again.conduct.not_halted()
    engines.close()


async def test_evidence_that_shows_nothing_is_refused(engines):  # noqa: F811
    """verifies that: nobody is accused by unsigned, forged, equal, foreign or half signed heads."""
    _, head = engines.proposal(engines.transaction())
    _, other = engines.proposal(engines.transaction())
    trust = engines.consortium.made.trust

    def note(found, *names):
        return Note(
            checkpoint=found.checkpoint(),
            signatures=tuple(engines.nodes[n].cosign(found.checkpoint(), at=NOW) for n in names),
        ).encode()

    ledger = trust.ledger_id
    both = evidence.of_heads(ledger, note(head, SECOND, THIRD), note(other, SECOND), ())
    assert evidence.verify(both, trust).offenders == (SECOND,)
    with pytest.raises(Refused, match="ledger.evidence_names_nobody"):
        evidence.verify(evidence.of_heads(ledger, note(head, SECOND), note(other, THIRD), ()), trust)
    with pytest.raises(MoorlineError, match="ledger.evidence_malformed"):
        evidence.verify(evidence.of_heads(ledger, note(head, SECOND), note(head, SECOND, THIRD), ()), trust)
    with pytest.raises(Refused, match="ledger.other_ledger"):
        evidence.verify(both, replace(trust, ledger_id=bytes(32)))
    forged = note(other, THIRD).replace(THIRD.encode(), SECOND.encode())
    with pytest.raises(NotAuthentic):
        evidence.verify(evidence.of_heads(ledger, note(head, SECOND), forged, ()), trust)
    for bit in range(0, len(both) * 8, 41):
        changed = bytearray(both)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MoorlineError):
            evidence.verify(bytes(changed), trust)
    engines.close()


# Floods ----------------------------------------------------------------------------------------------------------------


async def test_a_flood_from_one_sender_delays_nobody_else(engines, monkeypatch):  # noqa: F811
    """verifies that: beyond its room a sender is told so; others get into the next block; nobody fills another's room."""
    from moorline.ledger.engines import intake

    monkeypatch.setattr(intake, "SENDER_ROOM", 8)
    monkeypatch.setattr(intake, "UNPROVEN_ROOM", 4)
    for name in OTHERS:
        engines.peers[name].away = True  # nothing leaves the lines yet
    sequencer = engines.sequencer
    flood = [asyncio.ensure_future(sequencer.submit(engines.transaction())) for _ in range(12)]
    garbage = [asyncio.ensure_future(sequencer.submit(b"garbage %d" % one)) for one in range(12)]
    await asyncio.sleep(0.1)
    told = [one.exception().code for one in flood + garbage if one.done()]
    assert told.count("ledger.sender_busy") == 4 + 8
    forged = bytearray(engines.transaction())
    forged[-1] ^= 1
    with pytest.raises(MoorlineError):  # not even counted: with its line this long a sender has to be who it says
        await sequencer.submit(bytes(forged))
    other = asyncio.ensure_future(sequencer.submit(engines.transaction(sender="authority-3")))
    await asyncio.sleep(0)
    first = sequencer._intake.take(3, 1 << 20)
    assert [one.sender for one in first].count("authority authority-3") == 1
    for one in (*flood, *garbage, other):
        one.cancel()
    engines.close()
