"""One step of the light client, on chains of real keys: every good step, and the bad twin of each thing it looks at."""

from dataclasses import replace

import pytest
from chains import CHAIN, DAY_S, Chain, digest, key_of, precommit, public_of, rules, set_of, signed_by
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.ledger.engines.cometbft import canonical, commit, header, verifier
from moorline.ledger.engines.cometbft.header import Validator, ValidatorSet

FOUR = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def chain():
    return Chain(sets={1: FOUR}).grow(12)


def test_an_adjacent_and_a_skipping_step_of_a_good_chain_are_taken(chain):
    for new in (2, 3, 12):
        verifier.verify(chain.blocks[1], chain.blocks[new], rules(chain))


def test_three_of_four_are_enough_and_two_are_not(chain):
    """verifies that: exactly more than two thirds make a block final, adjacent or not."""
    for height in (2, 6):
        verifier.verify(chain.blocks[1], chain.make(height, signers=FOUR[:3]), rules(chain))
        with pytest.raises(NotAuthentic, match="ledger.quorum_missing"):
            verifier.verify(chain.blocks[1], chain.make(height, signers=FOUR[:2]), rules(chain))


def test_power_counts_not_heads():
    chain = Chain(sets={1: FOUR}, powers={"a": 14}).grow(3)
    verifier.verify(chain.blocks[1], chain.make(2, signers=("a",)), rules(chain))
    with pytest.raises(NotAuthentic, match="ledger.quorum_missing"):
        verifier.verify(chain.blocks[1], chain.make(2, signers=("b", "c", "d")), rules(chain))


BAD = {
    "other chain": (lambda c: c.make(2, chain_id=CHAIN[:-1] + "A"), NotAuthentic, "comet.other_chain"),
    "not higher": (lambda c: c.make(1), Refused, "comet.not_later"),
    "not later": (lambda c: c.make(2, time_ns=c.blocks[1].signed.header.time_ns), Refused, "comet.not_later"),
    "future": (lambda c: c.make(2, time_ns=c.blocks[12].signed.header.time_ns + 60 * 10**9), Refused, "comet.from_future"),
    "other validators": (
        lambda c: replace(c.make(2), validators=set_of(("a", "b", "c", "x"))),
        NotAuthentic,
        "comet.validators_mismatch",
    ),
    "own validators": (
        lambda c: replace(
            c.make(2, signers=("x", "y", "z"), validators_hash=set_of(("x", "y", "z")).hash()),
            validators=set_of(("x", "y", "z")),
        ),
        NotAuthentic,
        "comet.validators_mismatch",
    ),
    "strangers far away": (
        lambda c: replace(
            c.make(9, signers=("x", "y", "z"), validators_hash=set_of(("x", "y", "z")).hash()),
            validators=set_of(("x", "y", "z")),
        ),
        NotAuthentic,
        "comet.overlap_missing",
    ),
    "a stranger's signature": (lambda c: c.make(2, signers=("a", "b", "c", "x")), NotAuthentic, "ledger.signature_unknown"),
    "one signature twice": (lambda c: c.make(2, signers=("a", "b", "b")), NotAuthentic, "ledger.signature_unknown"),
    "nobody": (lambda c: c.make(2, signers=()), Malformed, "comet.commit_malformed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused_for_what_is_wrong_with_it(chain, name):
    make, kind, code = BAD[name]
    with pytest.raises(kind, match=code):
        verifier.verify(chain.blocks[1], make(chain), rules(chain))


def test_every_field_of_the_header_is_signed(chain):
    """verifies that: no field of a header can be changed under its signatures, adjacent or skipping."""
    for height in (2, 7):
        good = chain.blocks[height]
        for name in type(good.signed.header).__dataclass_fields__:
            value = getattr(good.signed.header, name)
            other = value + 1 if isinstance(value, int) else value[:-1] + ("A" if isinstance(value, str) else b"\x55")
            bad = replace(good, signed=replace(good.signed, header=replace(good.signed.header, **{name: other})))
            with pytest.raises(MoorlineError):
                verifier.verify(chain.blocks[1], bad, rules(chain))


@pytest.mark.parametrize("change", [{"round": 1}, {"parts_total": 2}, {"parts_hash": digest("other parts")}])
def test_round_and_parts_of_the_commit_are_signed(chain, change):
    good = chain.blocks[2]
    bad = replace(good, signed=replace(good.signed, commit=replace(good.signed.commit, **change)))
    with pytest.raises(NotAuthentic, match="ledger.signature_invalid"):
        verifier.verify(chain.blocks[1], bad, rules(chain))


def test_a_vote_says_its_own_time_and_signs_it(chain):
    good = chain.blocks[2].signed
    moved = replace(good.commit.precommits[0], time_ns=good.commit.precommits[0].time_ns + 1)
    bad = replace(good, commit=replace(good.commit, precommits=(moved, *good.commit.precommits[1:])))
    with pytest.raises(NotAuthentic, match="ledger.signature_invalid"):
        commit.require_power(bad, set_of(FOUR))


def test_a_prevote_is_no_precommit(chain):
    """verifies that: a vote of another kind by the same validator for the same block does not make it final."""
    signed = chain.blocks[2].signed
    good = signed.commit.precommits[0]
    message = canonical.vote(
        canonical.PREVOTE,
        height=2,
        round_=0,
        block=canonical.block_id(signed.header.hash(), 1, signed.commit.parts_hash),
        time_ns=good.time_ns,
        chain_id=CHAIN,
    )
    prevote = replace(good, signature=key_of("a").sign(message))
    bad = replace(signed, commit=replace(signed.commit, precommits=(prevote, *(precommit(signed, n) for n in "bcd"))))
    with pytest.raises(NotAuthentic, match="ledger.signature_invalid"):
        commit.require_power(bad, set_of(FOUR))


def test_beyond_the_trusting_period_nothing_is_believed(chain):
    """verifies that: those who signed long ago and have left cannot lead a client anywhere."""
    verifier.verify(chain.blocks[1], chain.blocks[2], rules(chain, period_s=DAY_S, after_s=DAY_S - 60))
    for new in (2, 9):
        with pytest.raises(Refused, match="comet.trust_expired"):
            verifier.verify(chain.blocks[1], chain.blocks[new], rules(chain, period_s=DAY_S, after_s=DAY_S))


def test_skipping_takes_more_than_a_third_of_the_set_that_was_announced():
    """verifies that: of three trusted validators one is not enough (it may be the faulty one), two are."""
    chain = Chain(sets={1: ("a", "b", "c"), 5: ("a", "x", "y"), 8: ("a", "b", "y")}).grow(9)
    with pytest.raises(NotAuthentic, match="comet.overlap_missing"):
        verifier.verify(chain.blocks[1], chain.blocks[6], rules(chain))
    verifier.verify(chain.blocks[1], chain.blocks[9], rules(chain))


def test_a_trusted_block_with_made_up_next_validators_leads_nowhere(chain):
    trusted = replace(chain.blocks[1], next_validators=set_of(("x", "y", "z")))
    forged = replace(
        chain.make(9, signers=("x", "y", "z"), validators_hash=set_of(("x", "y", "z")).hash()),
        validators=set_of(("x", "y", "z")),
    )
    with pytest.raises(NotAuthentic, match="comet.validators_mismatch"):
        verifier.verify(trusted, forged, rules(chain))


@pytest.mark.parametrize(
    "validators",
    [(), (Validator(public_key=public_of("a"), power=0),), (Validator(public_key=public_of("a"), power=1),) * 2],
)
def test_a_validator_set_makes_sense(validators):
    with pytest.raises(Malformed, match="comet.validators_malformed"):
        ValidatorSet.of(validators)


@given(st.permutations(FOUR))
def test_a_set_has_one_hash_whatever_the_order(names):
    assert set_of(names).hash() == set_of(FOUR).hash()


@given(st.binary(max_size=64).map(lambda data: data.hex()) | st.text(max_size=60))
def test_a_chain_id_stands_for_one_ledger_or_is_refused(text):
    with pytest.raises(Malformed, match="comet.chain_id_malformed"):
        header.ledger_id_of(text)
    assert header.ledger_id_of(CHAIN) == digest("a ledger")


def test_votes_of_another_round_do_not_add_up(chain):
    """verifies that: signatures of two rounds cannot be put together to one commit."""
    found = chain.header(2)
    early, late = signed_by(found, ("a", "b"), round_=0), signed_by(found, ("c", "d"), round_=1)
    mixed = replace(early, commit=replace(early.commit, precommits=early.commit.precommits + late.commit.precommits))
    with pytest.raises(NotAuthentic, match="ledger.signature_invalid"):
        commit.require_power(mixed, set_of(FOUR))
