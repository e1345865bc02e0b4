"""The embedded engine with real databases and real signatures, its authorities in one process; and killed at every step."""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import pytest

from moorline.errors import MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import blocks, checkpoint, evidence, records, state, transactions
from moorline.ledger.blocks import Block
from moorline.ledger.checkpoint import Note
from moorline.ledger.engines import embedded
from moorline.ledger.engines.cosigner import Cosigner
from moorline.ledger.engines.embedded import Sequencer
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.engines.proposal import Proposal
from moorline.ledger.finding import Kind
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.transactions import SenderKind
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore
from moorline.wire import schema

from .conftest import NAMES, NOW, consortium_at

FIRST, *OTHERS = NAMES


class Local:
    """A peer reached by calling it; `away` says that it cannot be reached."""

    def __init__(self, engine=None):
        self.engine, self.away = engine, False

    async def _reached(self):
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("peer.unreachable", "the peer is away")

    async def cosign(self, proposal):
        await self._reached()
        return await self.engine.cosign(proposal)

    async def announce(self, committed):
        await self._reached()
        await self.engine.announce(committed)

    async def block(self, height):
        await self._reached()
        return self.engine.node.committed(height)

    async def note(self):
        await self._reached()
        return self.engine.node.signed_note()

    async def submit(self, transaction):
        await self._reached()
        return await self.engine.submit(transaction)

    async def manifest(self):
        await self._reached()
        return self.engine.node.manifest()

    async def chunk(self, first):
        await self._reached()
        return self.engine.node.chunk(first)

    async def standing(self):
        await self._reached()
        return self.engine.node.conduct.standing()

    async def promise(self, request):
        await self._reached()
        return self.engine.node.promise(request)


class Refusals(Sequencer):
    """A sequencer that keeps the refusals it gets."""

    def on_refusal(self, name, error):
        self.refusals = [*getattr(self, "refusals", []), (name, error.code)]


class Engines:
    """One sequencer and three cosigners over databases in a directory, at a time the test sets."""

    def __init__(self, consortium, directory, store=LedgerStore):
        self.consortium, self.now_ms = consortium, NOW * 1000 + 1000
        self.peers = {name: Local() for name in NAMES}
        self.nodes = {
            name: Node(
                name=name,
                genesis=consortium.made.genesis,
                key=consortium.authorities[name].checkpoint,
                store=store(open_database(f"sqlite:///{directory / name}.db", "ledger")),
                now_ms=lambda: self.now_ms,
            )
            for name in NAMES
        }
        self.sequencer = Refusals(self.nodes[FIRST], {name: self.peers[name] for name in OTHERS})
        self.cosigners = {name: Cosigner(self.nodes[name], self.peers[FIRST]) for name in OTHERS}
        for name, engine in {FIRST: self.sequencer, **self.cosigners}.items():
            self.peers[name].engine = engine

    @contextlib.asynccontextmanager
    async def running(self):
        task = asyncio.ensure_future(self.sequencer.run())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.close()

    def close(self):
        for node in self.nodes.values():
            node.store.close()

    def transaction(self, value=12, sender="authority-2"):
        payload = transactions.make(
            transactions.propose(transactions.SetParameter(name="max_age_s", value=value)),
            sender=transactions.Sender(kind=SenderKind.AUTHORITY, name=sender),
            ledger_id=self.consortium.made.genesis.ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=self.nodes[FIRST].head.state.height + 50,
        )
        return transactions.sign(payload, self.consortium.authorities[sender].signer())

    def proposal(self, *batch, time_ms=None, lines=(), attempt=0, **header):
        """The next block as the sequencer would make it, with a header changed at will."""
        time_ms = self.now_ms if time_ms is None else time_ms
        block, head, _ = blocks.make(self.nodes[FIRST].head, batch, time_ms=time_ms)
        block = Block(header=replace(block.header, **header), transactions=block.transactions)
        seal = self.nodes[FIRST].seal(block.header, term=0, attempt=attempt)
        proposal = Proposal(
            block=blocks.encode(block), previous=None, cosignatures=tuple(lines), seal=seal, first=None, certificate=None
        )
        return schema.encode(proposal), head


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """A consortium, and an empty database to copy: migrations are run once."""
    directory = tmp_path_factory.mktemp("blank")
    open_database(f"sqlite:///{directory / 'blank.db'}", "ledger").dispose()
    return consortium_at(directory / "consortium"), directory / "blank.db"


def databases(blank, directory):
    directory.mkdir(exist_ok=True)
    for name in NAMES:
        shutil.copy(blank[1], directory / f"{name}.db")
    return directory


@pytest.fixture
def volatile(tmp_path):
    """A directory in memory where there is one: SIGKILL loses nothing there either, and waiting for a disk tests nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def engines(blank, volatile):
    return Engines(blank[0], databases(blank, volatile / "databases"))


async def until(condition):
    while not condition():  # noqa: ASYNC110 - bounded by pytest's timeout
        await asyncio.sleep(0.01)


async def test_a_transaction_is_acknowledged_when_a_quorum_signed(engines):
    """verifies that: the receipt proves it, all authorities come to the same state, and the bundle of each is believed."""
    async with engines.running():
        transaction = engines.transaction()
        receipt = blocks.parse_receipt(await engines.sequencer.submit(transaction))
        signed = blocks.verify_receipt(receipt, transaction, engines.consortium.made.trust)
        assert signed.height == receipt.height
        await until(lambda: len({node.head.digest for node in engines.nodes.values()}) == 1)
        for node in engines.nodes.values():
            bundle = node.prove(["parameter/max_age_s"])
            verify_bundle(bundle, engines.consortium.made.trust, now=NOW).record("parameter/max_age_s")
        again = blocks.parse_receipt(await engines.sequencer.submit(transaction))
        assert again == receipt
        many = await asyncio.gather(*(engines.sequencer.submit(engines.transaction()) for _ in range(20)))
        for data in many:
            receipt = blocks.parse_receipt(data)
            assert receipt.note


async def test_a_transaction_sent_twice_at_once_gets_its_one_receipt_twice(engines):
    """verifies that: both stand in one batch, one of them is applied, and nobody is told that his nonce was used."""
    async with engines.running():
        twice, other = engines.transaction(12), engines.transaction(13)
        sent = (twice, other, twice, twice)
        receipts = [blocks.parse_receipt(data) for data in await asyncio.gather(*map(engines.sequencer.submit, sent))]
        assert receipts[0] == receipts[2] == receipts[3] != receipts[1]
        blocks.verify_receipt(receipts[2], twice, engines.consortium.made.trust)


async def test_a_rejected_transaction_answers_with_its_code_and_leaves_no_block(engines):
    async with engines.running():
        good = asyncio.ensure_future(engines.sequencer.submit(engines.transaction()))
        with pytest.raises(MoorlineError) as caught:
            await engines.sequencer.submit(engines.transaction(value=1))
        assert caught.value.code == "ledger.parameter_bounds"
        await good
        with pytest.raises(Refused, match="ledger.transaction_too_large"):
            await engines.sequencer.submit(bytes(70_000))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("ledger.wrong_state_root", {"state_root": bytes(32)}),
        ("ledger.wrong_previous", {"previous": bytes(32)}),
        ("ledger.block_invalid", {"transactions_count": 3}),
        ("ledger.block_invalid", {"authorities": bytes(32)}),
        ("ledger.time_not_rising", {"time_ms": NOW * 1000}),
        ("ledger.time_skew", {"time_ms": NOW * 1000 + 7000}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
async def test_a_cosigner_signs_nothing_it_would_not_have_made(engines, code, change):
    data, _ = engines.proposal(engines.transaction(), **change)
    cosigner = engines.cosigners["authority-2"]
    with pytest.raises(MoorlineError) as caught:
        await cosigner.cosign(data)
    assert caught.value.code == code
    assert cosigner.node.store.signed() is None
    engines.close()


async def test_a_block_that_executing_it_does_not_give_is_kept_as_evidence_once(engines):
    """verifies that: the cosigner that refused it shows everybody who made it; the maker's next attempt adds nothing, and a
    good block is signed all the same."""
    cosigner, told = engines.cosigners["authority-2"], []
    cosigner.node.on_evidence = told.append
    for attempt in (1, 2):
        data, _ = engines.proposal(engines.transaction(), state_root=bytes(32), attempt=attempt)
        with pytest.raises(Refused, match=r"ledger.wrong_state_root"):
            await cosigner.cosign(data)
    (kept,) = cosigner.node.store.evidence()
    finding = evidence.verify(kept.body, engines.consortium.made.trust)
    assert (finding.kind, finding.offenders, finding.fault) == (Kind.EXECUTION, (FIRST,), "ledger.wrong_state_root")
    assert told == [finding]
    data, _ = engines.proposal(engines.transaction(), attempt=3)
    assert await cosigner.cosign(data)
    engines.close()


async def test_a_block_with_a_transaction_that_does_not_apply_is_not_signed(engines):
    data, _ = engines.proposal()
    proposal = schema.decode(Proposal, data)
    block = blocks.parse(proposal.block)
    smuggled = replace(proposal, block=blocks.encode(replace(block, transactions=(b"garbage",))))
    with pytest.raises(Refused, match="ledger.block_invalid"):
        await engines.cosigners["authority-2"].cosign(schema.encode(smuggled))
    engines.close()


async def test_an_authority_signs_one_block_a_height_and_repeats_its_signature(engines):
    """verifies that: the same proposal gets the same line, also after a restart; another one at that height is a fork."""
    cosigner = engines.cosigners["authority-2"]
    data, _ = engines.proposal(engines.transaction())
    line = await cosigner.cosign(data)
    engines.now_ms += 60_000
    assert await cosigner.cosign(data) == line
    other, _ = engines.proposal(engines.transaction())
    with pytest.raises(NotAuthentic, match="ledger.fork"):
        await cosigner.cosign(other)
    restarted = Cosigner(
        Node(
            name="authority-2",
            genesis=engines.consortium.made.genesis,
            key=engines.consortium.authorities["authority-2"].checkpoint,
            store=cosigner.node.store,
            now_ms=lambda: engines.now_ms,
        ),
        engines.peers[FIRST],
    )
    assert await restarted.cosign(data) == line
    with pytest.raises(NotAuthentic, match="ledger.fork"):
        await restarted.cosign(other)
    engines.close()


async def test_a_late_block_is_signed_only_if_others_saw_it_in_time(engines):
    """verifies that: five seconds off is refused; another authority's timely cosignature lets it pass, the maker's not."""
    data, head = engines.proposal(engines.transaction())
    timely = await engines.cosigners["authority-3"].cosign(data)
    maker = engines.nodes[FIRST].cosign(head.checkpoint(), at=NOW).line()
    engines.now_ms += 6000
    late_maker = engines.nodes["authority-4"].cosign(head.checkpoint(), at=engines.nodes["authority-4"].now()).line()
    proposal = schema.decode(Proposal, data)
    cosigner = engines.cosigners["authority-2"]
    for lines in ((), (maker,), (late_maker,)):
        with pytest.raises(Refused, match="ledger.time_skew"):
            await cosigner.cosign(schema.encode(replace(proposal, cosignatures=lines)))
    assert await cosigner.cosign(schema.encode(replace(proposal, cosignatures=(timely,))))
    engines.close()


async def test_without_a_quorum_nothing_is_acknowledged_and_with_it_everything_goes_on(engines, monkeypatch):
    """verifies that: a submitter is told; a block nobody signed gives way to a newer one when the others are back."""
    monkeypatch.setattr(embedded, "SUBMIT_DEADLINE_S", 0.3)
    for name in OTHERS:
        engines.peers[name].away = True
    async with engines.running():
        transaction = engines.transaction()
        with pytest.raises(Unavailable, match="ledger.quorum_unreachable"):
            await engines.sequencer.submit(transaction)
        assert engines.nodes[FIRST].note is None
        with pytest.raises(Unavailable, match="ledger.no_block_yet"):
            engines.nodes[FIRST].prove(["x"])
        engines.now_ms += 60_000
        for name in OTHERS[:2]:
            engines.peers[name].away = False
        monkeypatch.setattr(embedded, "SUBMIT_DEADLINE_S", 15)
        receipt = blocks.parse_receipt(await engines.sequencer.submit(transaction))
        assert receipt.time_ms >= engines.now_ms
        # The one that was away follows when it is back.
        engines.peers["authority-4"].away = False
        await engines.cosigners["authority-4"].follow()
        assert engines.nodes["authority-4"].head.state.height >= receipt.height


async def test_a_block_somebody_signed_is_never_given_up(engines):
    """verifies that: the sequencer comes back to the very block one cosigner holds, even when its time has passed."""
    for name in OTHERS[1:]:
        engines.peers[name].away = True
    async with engines.running():
        await until(lambda: engines.nodes["authority-2"].store.signed() is not None)
        held = engines.nodes["authority-2"].store.signed().body
        await until(lambda: engines.nodes[FIRST].store.cosignatures(1))
        engines.now_ms += 60_000
        engines.peers["authority-3"].away = False
        await until(lambda: engines.nodes[FIRST].head.state.height >= 1)
        assert engines.nodes[FIRST].store.block(1).body == held


async def test_a_sequencer_with_a_changed_database_gets_no_signature_and_no_belief(engines, blank, volatile):
    """verifies that: even a database forged consistently with its own note fails: at the others and at every client."""
    async with engines.running():
        await engines.sequencer.submit(engines.transaction())
        await until(lambda: len({node.head.digest for node in engines.nodes.values()}) == 1)
    again = Engines(blank[0], volatile / "databases")
    again.now_ms = engines.now_ms + 1000
    node = again.nodes[FIRST]
    forged = dict(node.head.state.records)
    forged["parameter/simulated_allowed"] = records.encode(records.ParameterRecord(name="simulated_allowed", value=0))
    found = node.head.state
    lie = state.restored(
        ledger_id=found.ledger_id, height=found.height, time_ms=found.time_ms, records=forged, nonces=found.nonces
    )
    node.head = replace(node.head, state=lie)
    signature = node.cosign(node.head.checkpoint(), at=node.now())
    node.note = Note(checkpoint=node.head.checkpoint(), signatures=(signature,)).encode()
    with pytest.raises(NotAuthentic, match="ledger.quorum_missing"):
        verify_bundle(node.prove(["parameter/simulated_allowed"]), again.consortium.made.trust, now=NOW)
    async with again.running():
        waiting = asyncio.ensure_future(again.sequencer.submit(again.transaction()))
        await until(lambda: len(getattr(again.sequencer, "refusals", [])) >= 3)
        assert {code for _, code in again.sequencer.refusals[:3]} == {"ledger.wrong_state_root"}
        assert not waiting.done()
        waiting.cancel()
    assert all(again.nodes[name].head.state.height == found.height for name in OTHERS)


async def test_a_node_believes_no_block_without_quorum_and_none_that_differs_from_its_own(engines):
    """verifies that: catching up is judged like everything else; two signed blocks at one height are a fork."""
    data, head = engines.proposal(engines.transaction())
    other_data, other_head = engines.proposal(engines.transaction())

    def committed(proposal, found, names):
        lines = tuple(engines.nodes[name].cosign(found, at=NOW) for name in names)
        note = Note(checkpoint=found, signatures=lines).encode()
        return Committed(block=schema.decode(Proposal, proposal).block, note=note)

    node = engines.nodes["authority-4"]
    with pytest.raises(NotAuthentic, match="ledger.quorum_missing"):
        node.adopt(committed(data, head.checkpoint(), NAMES[:2]))
    with pytest.raises(NotAuthentic, match="ledger.fork"):
        node.adopt(committed(data, other_head.checkpoint(), NAMES[:3]))
    node.adopt(committed(data, head.checkpoint(), NAMES[:3]))
    node.adopt(committed(data, head.checkpoint(), NAMES[1:4]))
    with pytest.raises(NotAuthentic, match="two blocks at one height"):
        node.adopt(committed(other_data, other_head.checkpoint(), NAMES[:3]))
    assert checkpoint.parse_note(node.signed_note()).checkpoint == head.checkpoint()
    engines.close()


# Killed at every step --------------------------------------------------------------------------------------------------

WRITES = ("propose", "intend_signature", "keep_cosignatures", "commit", "finish")


def killing_store(after):
    """A store whose process dies by SIGKILL right after its n-th durable write, counted over all four databases."""
    count = [0]

    class Killing(LedgerStore):
        pass

    def wrapped(name):
        def call(self, *arguments, **named):
            getattr(LedgerStore, name)(self, *arguments, **named)
            count[0] += 1
            if count[0] == after:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in WRITES:
        setattr(Killing, name, wrapped(name))
    return Killing


def in_child(work):
    """Run `work()` in a child process; the signal that ended it, or its exit code negated."""
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(work())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.waitstatus_to_exitcode(status)


def test_killed_after_any_durable_step_the_ledger_resumes(blank, volatile):
    """verifies that: after SIGKILL behind each write, nobody signed two blocks at one height, and the transaction,
    sent again, stands in the ledger exactly once."""
    transaction = Engines(blank[0], databases(blank, volatile / "first")).transaction()
    points = 0
    for after in range(1, 100):
        directory = databases(blank, volatile / f"point-{after}")

        async def submit_and_die(directory=directory, after=after):
            async with Engines(blank[0], directory, killing_store(after)).running() as engines:
                await engines.sequencer.submit(transaction)

        ended = in_child(submit_and_die)
        assert ended in {signal.SIGKILL, 0}
        before = {name: LedgerStore(open_database(f"sqlite:///{directory / name}.db", "ledger")) for name in NAMES}
        signed = {name: store.signed() for name, store in before.items()}
        for store in before.values():
            store.close()

        async def resume(directory=directory, signed=signed):
            async with Engines(blank[0], directory).running() as engines:
                receipt = blocks.parse_receipt(await engines.sequencer.submit(transaction))
                blocks.verify_receipt(receipt, transaction, blank[0].made.trust)
                await engines.sequencer.submit(engines.transaction())
                await until(lambda: len({node.head.digest for node in engines.nodes.values()}) == 1)
                bodies = [blocks.parse(engines.nodes[FIRST].store.block(h).body) for h in range(1, receipt.height + 1)]
                assert sum(block.transactions.count(transaction) for block in bodies) == 1
                for found in signed.values():
                    assert found is None or engines.nodes[FIRST].store.block(found.height).body == found.body

        assert in_child(resume) == 0, f"resuming after durable step {after}"
        points = after
        if ended == 0:
            break
    assert points >= 8, "every durable step of a block was a point"
