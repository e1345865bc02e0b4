"""Evidence of a block that is not what the rules give: anybody executes it again, without a ledger; nobody can be framed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.audit import merkle
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.ledger import blocks, evidence, misconduct, re_execution, seals, transactions
from moorline.ledger.finding import Kind, SealedHeader
from moorline.ledger.nonces import Nonces
from moorline.ledger.places import key_digest, subtree_of
from moorline.ledger.proof import Entry
from moorline.ledger.re_execution import WrongExecution
from moorline.ledger.transactions import SenderKind
from moorline.ledger.tree import Tree
from moorline.wire import keys, schema

from .conftest import NAMES, consortium_at, hsm_body

MAKER = NAMES[0]


class Ledger:
    """Blocks upon one another, and a maker who seals what it likes."""

    def __init__(self, directory):
        self.world = consortium_at(directory)
        genesis = self.world.made.genesis
        self.head, self.header = blocks.genesis_head(genesis), blocks.genesis_header(genesis)
        self.provider = self.world.provider("alpha", "alpha.test")
        admit = transactions.AdmitProvider(name="alpha", trust_domain="alpha.test", certificate=self.provider.der)
        payload = self.world.payload(SenderKind.AUTHORITY, NAMES[0], transactions.propose(admit))
        self.append(transactions.sign(payload, self.world.authorities[NAMES[0]].signer()))
        approve = transactions.Approve(proposal=transactions.proposal_id(payload))
        self.append(self.by_authority(approve, NAMES[1]))
        self.used = self.by_provider(hsm_body(self.provider))
        self.append(self.used)

    def by_authority(self, body, name):
        payload = self.world.payload(SenderKind.AUTHORITY, name, body)
        return transactions.sign(payload, self.world.authorities[name].signer())

    def by_provider(self, body):
        payload = self.world.payload(SenderKind.PROVIDER, "alpha", body)
        return transactions.sign(payload, keys.KeySigner(self.provider.ca.key))

    def parameter(self, value):
        return self.by_authority(transactions.propose(transactions.SetParameter(name="max_age_s", value=value)), NAMES[2])

    def made(self, *batch, **header):
        """A block that holds all of `batch`, whether it applies or not; `header` is changed at will."""
        block, after, _ = blocks.make(self.head, batch, time_ms=self.head.state.time_ms + 1000)
        root = merkle.root([merkle.leaf_hash(data) for data in batch])
        changed = {"transactions_root": root, "transactions_count": len(batch)} | header
        return blocks.Block(header=replace(block.header, **changed), transactions=batch), after

    def append(self, *batch):
        block, after = self.made(*batch)
        assert block.header.state_root == after.state.root != self.head.state.root
        self.head, self.header = after, block.header

    def sealed(self, block, name=MAKER):
        genesis, key = self.world.made.genesis, self.world.authorities[name].checkpoint
        seal = seals.seal(block.header, ledger_id=genesis.ledger_id, term=0, attempt=1, name=name, key=key)
        return SealedHeader(header=schema.encode(block.header), seal=seal)

    def shown(self, block):
        return re_execution.show(self.head.state, self.header, block, self.sealed(block))

    def verified(self, body):
        genesis = self.world.made.genesis
        data = misconduct.encode(Kind.EXECUTION, body, ledger_id=genesis.ledger_id, changes=())
        return evidence.verify(data, self.world.made.trust)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return Ledger(tmp_path_factory.mktemp("wrong") / "consortium")


@pytest.fixture(scope="module")
def wrong_blocks(ledger):
    return list(broken(ledger))


def broken(ledger):
    """What a maker may not seal, and the rule that it breaks."""
    good = ledger.by_provider(hsm_body(ledger.provider, hsm="hsm-2"))
    again = ledger.parameter(12)
    yield "ledger.parameter_bounds", ledger.made(good, ledger.parameter(1))[0]
    yield "ledger.already_registered", ledger.made(ledger.by_provider(hsm_body(ledger.provider)))[0]
    yield "ledger.nonce_used", ledger.made(again, again)[0]
    yield "ledger.wrong_state_root", ledger.made(good, state_root=bytes(32))[0]
    yield "ledger.wrong_state_root", ledger.made(state_root=bytes(32))[0]
    yield "ledger.block_invalid", ledger.made(good, authorities=bytes(32))[0]


def test_who_seals_a_block_that_executing_it_does_not_give_is_named(ledger, wrong_blocks):
    """verifies that: what does not apply, what stands twice, another state root, other authorities: all are seen from the
    evidence alone, by nobody but the rules, and the rule is said."""
    for fault, block in wrong_blocks:
        finding = ledger.verified(ledger.shown(block))
        assert (finding.kind, finding.offenders, finding.fault) == (Kind.EXECUTION, (MAKER,), fault), fault
        assert (finding.height, finding.forked) == (4, False)


def test_a_right_block_is_no_evidence_whatever_is_made_of_it(ledger):
    """verifies that: nothing is shown of an honest block, and evidence put together from one names nobody."""
    good, _ = ledger.made(ledger.parameter(12), ledger.by_provider(hsm_body(ledger.provider, hsm="hsm-2")))
    assert ledger.shown(good) is None
    wrong = schema.decode(WrongExecution, ledger.shown(ledger.made(*good.transactions, state_root=bytes(32))[0]))
    framed = replace(wrong, sealed=ledger.sealed(good))
    with pytest.raises(Refused, match=r"ledger.evidence_names_nobody"):
        ledger.verified(schema.encode(framed))


def test_a_transaction_of_a_block_before_names_nobody(tmp_path):
    """verifies that: nonces are not under the state root: what only they refuse is refused by all, and shows nothing to
    others."""
    ledger = Ledger(tmp_path / "consortium")
    again = ledger.by_provider(transactions.AnchorLog(log="orchestrator", size=1, root=bytes(32)))
    ledger.append(again)
    forgetful = replace(ledger.head, state=replace(ledger.head.state, nonces=Nonces.of({}, height=4)))
    block, _, _ = blocks.make(forgetful, [again], time_ms=ledger.head.state.time_ms + 1000)
    assert block.transactions == (again,)
    with pytest.raises(Refused, match=r"ledger.block_invalid") as caught:
        blocks.execute_again(ledger.head, block)
    assert caught.value.got == "ledger.nonce_used"
    assert ledger.shown(block) is None


def test_a_state_that_is_in_a_database_shows_the_same(ledger, wrong_blocks):
    """verifies that: what the rules touch is found out in a state of which nothing is in memory yet, too."""
    state, kept = ledger.head.state, {}
    for key, value in state.records.items():
        kept.setdefault(subtree_of(key_digest(key)), []).append((key, value))
    for fault, block in wrong_blocks:
        stored = replace(state, tree=Tree.stored(state.tree.all_subtrees(), kept.__getitem__))
        shown = re_execution.show(stored, ledger.header, block, ledger.sealed(block))
        assert shown == ledger.shown(block), fault


def changed(found, index, **entry):
    records = list(found.records)
    records[index] = replace(records[index], **entry)
    return replace(found, records=tuple(records))


def test_evidence_with_another_state_is_refused(ledger, wrong_blocks):
    """verifies that: with a record less or more, another value, an absence made up, another state or other transactions
    the seal's maker is not blamed."""
    _, block = wrong_blocks[0]
    found = schema.decode(WrongExecution, ledger.shown(block))
    present = next(index for index, one in enumerate(found.records) if one.value is not None)
    state = ledger.head.state
    extra = sorted((*(one.key for one in found.records), "provider/zeta"))
    fewer = [one.key for one in found.records][1:]
    twisted = (
        replace(found, records=found.records[1:]),
        replace(found, records=found.records[::-1]),
        replace(found, records=found.records[1:], tree=state.tree.prove(fewer)),
        replace(found, records=tuple(Entry(key=key, value=state.get(key)) for key in extra), tree=state.tree.prove(extra)),
        changed(found, present, value=b"another"),
        changed(found, present, value=None),
        replace(found, tree=blocks.genesis_head(ledger.world.made.genesis).state.tree.prove(extra)),
        replace(found, transactions=found.transactions[:1]),
        replace(found, previous=schema.encode(blocks.genesis_header(ledger.world.made.genesis))),
        replace(found, sealed=replace(found.sealed, seal=replace(found.sealed.seal, name=NAMES[1]))),
    )
    assert ledger.verified(schema.encode(found)).offenders == (MAKER,)
    for index, one in enumerate(twisted):
        with pytest.raises(MoorlineError) as caught:
            ledger.verified(schema.encode(one))
        assert caught.value.code != "ledger.evidence_names_nobody", index


def test_a_header_that_is_not_of_these_transactions_shows_nothing(ledger):
    block, _ = ledger.made(ledger.parameter(12), transactions_count=3)
    with pytest.raises(NotAuthentic, match=r"ledger.block_invalid"):
        ledger.verified(ledger.shown(block))


@given(st.data())
def test_a_flipped_bit_names_nobody_else(ledger, wrong_blocks, data):
    _, block = data.draw(st.sampled_from(wrong_blocks[::3]))
    original = bytearray(ledger.shown(block))
    original[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        finding = ledger.verified(bytes(original))
    except MoorlineError:
        return
    assert finding.offenders == (MAKER,)
