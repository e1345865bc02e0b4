"""Evidence that is one thing, wrong by itself: who it names, what makes it worthless, and that nobody can make it up."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from moorline.audit import merkle
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.ledger import blocks, evidence, misconduct, seals, transactions
from moorline.ledger.anchor import COMETBFT, CometAnchor
from moorline.ledger.engines.cometbft import canonical, header
from moorline.ledger.engines.cometbft.commit import Commit, Precommit, SignedHeader
from moorline.ledger.engines.cometbft.evidence import DuplicateVote, LightClientAttack, SignedVote
from moorline.ledger.engines.cometbft.header import Header as CometHeader
from moorline.ledger.finding import Kind, SealedHeader
from moorline.ledger.misconduct import BackwardsBlock, InvalidBlock
from moorline.wire import schema

from .conftest import NAMES, consortium_at

HOUR_NS = 3600 * 10**9


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return consortium_at(tmp_path_factory.mktemp("misconduct") / "consortium")


def encoded(made, kind, body):
    return misconduct.encode(kind, schema.encode(body), ledger_id=made.made.genesis.ledger_id, changes=())


def verified(made, data):
    return evidence.verify(data, made.made.trust)


# The embedded engine ----------------------------------------------------------------------------------------------------


def sealed(made, found, name=NAMES[0], key=None):
    key = key or made.authorities[name].checkpoint
    seal = seals.seal(found, ledger_id=made.made.genesis.ledger_id, term=0, attempt=1, name=name, key=key)
    return SealedHeader(header=schema.encode(found), seal=seal)


def header_over(made, batch, **changes):
    """The header of block 1 over any bytes."""
    block, _, _ = blocks.make(blocks.genesis_head(made.made.genesis), [], time_ms=made.made.genesis.time_ms + 1000)
    leaves = [merkle.leaf_hash(data) for data in batch]
    return replace(block.header, transactions_root=merkle.root(leaves), transactions_count=len(batch), **changes)


def invalid(made, batch, index, **by):
    path = merkle.inclusion_proof([merkle.leaf_hash(data) for data in batch], index)
    return InvalidBlock(
        sealed=sealed(made, header_over(made, batch), **by), transaction=batch[index], index=index, path=path
    )


def signed(made, **changes):
    values = {
        "sender": transactions.Sender(kind=transactions.SenderKind.AUTHORITY, name=NAMES[1]),
        "ledger_id": made.made.genesis.ledger_id,
        "nonce": bytes(32),
        "valid_until": 50,
    }
    payload = transactions.make(
        transactions.propose(transactions.SetParameter(name="max_age_s", value=6)), **(values | changes)
    )
    return transactions.sign(payload, made.authorities[NAMES[1]].signer())


def test_who_seals_what_can_never_stand_is_named(made):
    """verifies that: no transaction, one of another ledger, an expired one; a transaction that could stand shows nothing."""
    good = signed(made)
    for bad in (b"no transaction", signed(made, ledger_id=bytes(32)), signed(made, valid_until=0)):
        finding = verified(made, encoded(made, Kind.INVALID, invalid(made, [good, bad, good], 1)))
        assert (finding.kind, finding.height, finding.offenders, finding.forked) == (Kind.INVALID, 1, (NAMES[0],), False)
    with pytest.raises(Refused, match=r"ledger.evidence_names_nobody"):
        verified(made, encoded(made, Kind.INVALID, invalid(made, [good, b"bad"], 0)))


def test_a_bad_transaction_has_to_be_in_the_block_and_the_seal_its_makers(made):
    found = invalid(made, [signed(made), b"bad"], 1)
    for wrong in (replace(found, transaction=b"worse"), replace(found, index=0), replace(found, path=())):
        with pytest.raises(MoorlineError):
            verified(made, encoded(made, Kind.INVALID, wrong))
    for by in (
        {"name": NAMES[1], "key": Ed25519PrivateKey.generate()},
        {"name": "nobody", "key": made.authorities[NAMES[0]].checkpoint},
    ):
        with pytest.raises(NotAuthentic, match=r"ledger.seal_invalid"):
            verified(made, encoded(made, Kind.INVALID, invalid(made, [b"bad"], 0, **by)))


def test_who_seals_a_time_that_runs_back_is_named(made):
    """verifies that: the sealed header follows the one shown and is not later; a later one, or another, shows nothing."""
    before = header_over(made, [], time_ms=5000)
    for time_ms, wrong in ((4000, True), (5000, True), (5001, False)):
        after = replace(before, height=2, previous=blocks.digest(before), time_ms=time_ms)
        data = encoded(made, Kind.BACKWARDS, BackwardsBlock(sealed=sealed(made, after), previous=schema.encode(before)))
        if wrong:
            assert verified(made, data).offenders == (NAMES[0],)
        else:
            with pytest.raises(Refused, match=r"ledger.evidence_names_nobody"):
                verified(made, data)
    after = replace(before, height=2, previous=bytes(32), time_ms=1)
    data = encoded(made, Kind.BACKWARDS, BackwardsBlock(sealed=sealed(made, after), previous=schema.encode(before)))
    with pytest.raises(Malformed, match=r"ledger.evidence_malformed"):
        verified(made, data)


# CometBFT ---------------------------------------------------------------------------------------------------------------


def key_of(made, name):
    return made.authorities[name].checkpoint


def public_of(made, name):
    return key_of(made, name).public_key().public_bytes_raw()


def vote(made, name, block, **changes):
    chain_id = header.chain_id_of(made.made.genesis.ledger_id)
    blank = SignedVote(block_hash=block, parts_total=1, parts_hash=block, time_ns=7, signature=bytes(64))
    message = canonical.vote(canonical.PRECOMMIT, height=5, round_=0, block=blank.block(), time_ns=7, chain_id=chain_id)
    return replace(blank, signature=key_of(made, name).sign(message), **changes)


def duplicate(made, name, *, key=None):
    return DuplicateVote(
        chain_id=header.chain_id_of(made.made.genesis.ledger_id),
        public_key=key or public_of(made, name),
        kind=canonical.PRECOMMIT,
        height=5,
        round=0,
        one=vote(made, name, b"1" * 32),
        other=vote(made, name, b"2" * 32),
    )


def test_who_votes_twice_is_named(made):
    """verifies that: two votes that exclude each other name their validator; the same twice, or a stranger's, nobody."""
    finding = verified(made, encoded(made, Kind.VOTES, duplicate(made, NAMES[2])))
    assert (finding.kind, finding.height, finding.offenders) == (Kind.VOTES, 5, (NAMES[2],))
    found = duplicate(made, NAMES[2])
    with pytest.raises(Malformed):
        verified(made, encoded(made, Kind.VOTES, replace(found, other=found.one)))
    with pytest.raises(NotAuthentic):
        verified(made, encoded(made, Kind.VOTES, replace(found, round=1)))
    stranger = Ed25519PrivateKey.generate()
    strange = replace(
        made, authorities={**made.authorities, NAMES[2]: replace(made.authorities[NAMES[2]], checkpoint=stranger)}
    )
    with pytest.raises(Refused, match=r"ledger.evidence_names_nobody"):
        verified(made, encoded(made, Kind.VOTES, duplicate(strange, NAMES[2])))


def comet_header(made, **changes):
    validators = header.authority_validators(made.made.trust.authorities)
    values = {
        "version_block": 11,
        "version_app": 1,
        "chain_id": header.chain_id_of(made.made.genesis.ledger_id),
        "height": 5,
        "time_ns": 100 * HOUR_NS,
        "last_block_hash": b"b" * 32,
        "last_parts_total": 1,
        "last_parts_hash": b"p" * 32,
        "last_commit_hash": b"c" * 32,
        "data_hash": b"d" * 32,
        "validators_hash": validators.hash(),
        "next_validators_hash": validators.hash(),
        "consensus_hash": b"x" * 32,
        "app_hash": b"a" * 32,
        "last_results_hash": b"r" * 32,
        "evidence_hash": b"e" * 32,
        "proposer_address": bytes(20),
    }
    return CometHeader(**(values | changes))


def committed(made, found, names=NAMES, late=None):
    blank = SignedHeader(header=found, commit=Commit(round=0, parts_total=1, parts_hash=b"p" * 32, precommits=()))
    precommits = []
    for name in names:
        time_ns = found.time_ns + (late or {}).get(name, 0)
        one = Precommit(address=header.address_of(public_of(made, name)), time_ns=time_ns, signature=bytes(64))
        precommits.append(replace(one, signature=key_of(made, name).sign(blank.sign_bytes(one))))
    return replace(blank, commit=replace(blank.commit, precommits=tuple(precommits)))


@pytest.mark.parametrize("hours", [-24, -7, 7, 24])
def test_whose_clock_is_far_off_is_named(made, hours):
    found = committed(made, comet_header(made), late={NAMES[3]: hours * HOUR_NS})
    finding = verified(made, encoded(made, Kind.CLOCK, CometAnchor(form=COMETBFT, signed=found)))
    assert (finding.kind, finding.offenders, finding.forked) == (Kind.CLOCK, (NAMES[3],), False)


def test_hours_between_honest_votes_name_nobody(made):
    found = committed(made, comet_header(made), late={NAMES[3]: 5 * HOUR_NS, NAMES[0]: -HOUR_NS})
    with pytest.raises(Refused, match=r"ledger.evidence_names_nobody"):
        verified(made, encoded(made, Kind.CLOCK, CometAnchor(form=COMETBFT, signed=found)))
    few = committed(made, comet_header(made), names=NAMES[2:], late={NAMES[3]: 24 * HOUR_NS})
    with pytest.raises(NotAuthentic, match=r"ledger.quorum_missing"):
        verified(made, encoded(made, Kind.CLOCK, CometAnchor(form=COMETBFT, signed=few)))


def test_who_commits_two_headers_is_named_and_the_ledger_forked(made):
    validators = header.authority_validators(made.made.trust.authorities).validators
    one = committed(made, comet_header(made), names=NAMES[:3])
    other = committed(made, comet_header(made, data_hash=b"z" * 32), names=NAMES[1:])
    attack = LightClientAttack(common=validators, validators=validators, others=validators, one=one, other=other)
    finding = verified(made, encoded(made, Kind.ATTACK, attack))
    assert (finding.kind, finding.offenders, finding.forked) == (Kind.ATTACK, NAMES[1:3], True)
    with pytest.raises(Malformed):
        verified(made, encoded(made, Kind.ATTACK, replace(attack, other=one)))


# All of it --------------------------------------------------------------------------------------------------------------


def samples(made):
    yield encoded(made, Kind.INVALID, invalid(made, [b"bad"], 0))
    yield encoded(made, Kind.VOTES, duplicate(made, NAMES[2]))
    yield encoded(
        made,
        Kind.CLOCK,
        CometAnchor(form=COMETBFT, signed=committed(made, comet_header(made), late={NAMES[3]: 24 * HOUR_NS})),
    )


def test_another_ledger_believes_none_of_it(made):
    for data in samples(made):
        with pytest.raises(Refused, match=r"ledger.other_ledger"):
            evidence.verify(data, replace(made.made.trust, ledger_id=bytes(32)))


@given(st.data())
def test_a_changed_bit_names_nobody_else(made, data):
    """verifies that: whatever is changed, evidence names the same authority or is refused; nobody can be framed."""
    original = data.draw(st.sampled_from(list(samples(made))))
    at, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(original)
    changed[at] ^= 1 << bit
    try:
        finding = verified(made, bytes(changed))
    except MoorlineError:
        return
    assert finding.offenders == verified(made, original).offenders


@given(st.binary(max_size=300))
def test_any_bytes_are_evidence_or_malformed(made, data):
    with pytest.raises(Malformed):
        verified(made, data)
