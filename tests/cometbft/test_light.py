"""Walks over many headers, witnesses, and attacks that leave evidence."""

from dataclasses import replace

import pytest
from chains import CHAIN, Chain, authorities, digest, key_of, public_of, rules, set_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.ledger.engines.cometbft import canonical, evidence, light
from moorline.ledger.engines.cometbft.evidence import DuplicateVote, LightClientAttack, SignedVote
from moorline.ledger.engines.cometbft.header import address_of, authority_validators

FOUR = ("a", "b", "c", "d")


def walked(chain, target, *, trusted=1, **options):
    asked = []

    def fetch(height):
        asked.append(height)
        return chain.blocks[height]

    trace = light.drive(light.walk(chain.blocks[trusted], target, rules(chain, **options)), fetch)
    return trace, asked


@pytest.fixture(scope="module")
def turning():
    """One validator in four changes every five blocks: nobody of the start is left at the end."""
    names = "abcdefghijklmnop"
    return Chain(sets={1 + 5 * i: tuple(names[i : i + 4]) for i in range(12)}).grow(60)


def test_an_unchanged_set_is_crossed_in_one_step():
    chain = Chain(sets={1: FOUR}).grow(40)
    trace, asked = walked(chain, 40)
    assert asked == [40]
    assert [block.height for block in trace] == [1, 40]


def test_a_set_that_turned_over_is_crossed_by_halving(turning):
    """verifies that: skipping goes as far as trust reaches and no step rests on less than a third."""
    trace, asked = walked(turning, 60)
    assert trace[-1] == turning.blocks[60]
    assert len(asked) < 40
    assert [block.height for block in trace] == sorted({block.height for block in trace})


@settings(max_examples=25)
@given(st.integers(1, 59), st.data())
def test_any_walk_ends_at_the_chains_own_header(turning, start, data):
    target = data.draw(st.integers(start + 1, 60))
    trace, _ = walked(turning, target, trusted=start)
    assert trace[-1] == turning.blocks[target]


def test_a_source_that_hands_out_other_heights_is_malformed(turning):
    with pytest.raises(Malformed, match="comet.height_wrong"):
        light.drive(light.walk(turning.blocks[1], 60, rules(turning)), lambda _: turning.blocks[7])


def test_a_forged_future_under_new_keys_is_never_reached():
    """verifies that: a source with keys of its own is refused however it cuts the way."""
    chain = Chain(sets={1: FOUR}).grow(20)
    forged = Chain(sets={1: FOUR, 2: ("w", "x", "y", "z")}, label="forged").grow(20)
    with pytest.raises(NotAuthentic):
        light.drive(light.walk(chain.blocks[1], 20, rules(chain)), lambda height: forged.blocks[height])


def test_a_walk_beyond_the_trusting_period_is_refused(turning):
    with pytest.raises(Refused, match="comet.trust_expired"):
        walked(turning, 60, period_s=30)


# Witnesses ---------------------------------------------------------------------------------------------------------------


def forked(names, *, round_=0, label="state"):
    """A second chain from height 5 on, made final by validators who sign twice."""
    chain = Chain(sets={1: FOUR}).grow(9)
    other = Chain(sets={1: FOUR}, label=label).grow(4)
    for height in range(5, 10):
        if label == "state":
            found = other.make(height, signers=names, round_=round_, data_hash=digest("other data"))
        else:
            found = other.make(height, signers=names, round_=round_)
        other.blocks[height] = found
    return chain, other


def source(chain):
    return lambda height: chain.blocks[height]


def test_a_witness_that_agrees_makes_a_header_trusted():
    chain = Chain(sets={1: FOUR}).grow(9)
    trace, _ = walked(chain, 9)
    block, trouble = light.cross_checked(trace, [source(chain)], rules(chain))
    assert (block, trouble) == (chain.blocks[9], ())


def test_without_a_witness_that_agrees_nothing_is_trusted():
    chain = Chain(sets={1: FOUR}).grow(9)
    trace, _ = walked(chain, 9)
    broken = Chain(sets={1: FOUR}, label="broken").grow(9)
    broken.blocks[9] = broken.make(9, signers=("a",))
    for witnesses in ([], [source(broken)]):
        with pytest.raises(NotAuthentic, match="comet.no_witness"):
            light.cross_checked(trace, witnesses, rules(chain))
    block, trouble = light.cross_checked(trace, [source(broken), source(chain)], rules(chain))
    assert block == chain.blocks[9]
    assert [error.code for error in trouble] == ["ledger.quorum_missing"]


def test_two_headers_signed_in_one_round_name_who_signed_both():
    """verifies that: equivocation is noticed, nothing is believed, and the evidence names b, c and d to anybody."""
    chain, other = forked(("b", "c", "d"))
    for height in range(5, 10):
        chain.blocks[height] = chain.make(height, signers=("a", "b", "c", "d"))
    trace, _ = walked(chain, 9)
    with pytest.raises(light.Attack, match="comet.attack") as caught:
        light.cross_checked(trace, [source(other)], rules(chain))
    found = LightClientAttack.parse(caught.value.evidence.encode())
    assert found == caught.value.evidence
    offenders = found.verify(set_of(FOUR), chain_id=CHAIN)
    assert set(offenders) == {address_of(public_of(name)) for name in "bcd"}


def test_the_common_header_is_the_last_both_have():
    chain, other = forked(("b", "c", "d"))
    trace = tuple(chain.blocks[height] for height in (1, 3, 6, 9))
    attack = light.compare(trace, source(other), rules(chain))
    assert attack is not None
    assert attack.one.header.height == 9


def test_a_header_that_lies_about_the_state_names_its_signers_once_the_chain_is_known():
    """verifies that: a lunatic header, whose state root is not the chain's, is evidence against all who signed it."""
    chain, other = forked(("b", "c", "d"), label="lie")
    trace, _ = walked(chain, 9)
    attack = light.compare(trace, source(other), rules(chain))
    true_hash = chain.blocks[9].signed.header.hash()
    named = evidence.offenders_against(attack, true_hash, set_of(FOUR))
    assert set(named) == {address_of(public_of(name)) for name in "bcd"}
    with pytest.raises(Malformed, match="comet.evidence_malformed"):
        evidence.offenders_against(attack, digest("some other block"), set_of(FOUR))


def test_amnesia_is_an_attack_that_names_nobody():
    chain, other = forked(("b", "c", "d"), round_=1)
    trace, _ = walked(chain, 9)
    attack = light.compare(trace, source(other), rules(chain))
    assert attack.verify(set_of(FOUR), chain_id=CHAIN) == ()


def test_evidence_that_was_tampered_with_convicts_nobody():
    chain, other = forked(("b", "c", "d"))
    good = light.compare(walked(chain, 9)[0], source(other), rules(chain))
    bad = {
        "one header twice": (replace(good, other=good.one, others=good.validators), Malformed),
        "two heights": (replace(good, other=other.blocks[8].signed), Malformed),
        "another chain": (
            replace(good, other=replace(good.other, header=replace(good.other.header, chain_id="moor-x"))),
            NotAuthentic,
        ),
        "too few signatures": (
            replace(
                good,
                other=replace(good.other, commit=replace(good.other.commit, precommits=good.other.commit.precommits[:2])),
            ),
            NotAuthentic,
        ),
        "made-up validators": (replace(good, others=set_of(("b", "c", "d")).validators), NotAuthentic),
        "another beginning": (replace(good, common=set_of(("b", "c", "d")).validators), NotAuthentic),
    }
    for found, kind in bad.values():
        with pytest.raises(kind):
            found.verify(set_of(FOUR), chain_id=CHAIN)


# One validator, two votes ------------------------------------------------------------------------------------------------


def vote(name, block, **changes):
    facts = {"kind": canonical.PRECOMMIT, "height": 5, "round_": 0, "chain_id": CHAIN} | changes
    blank = SignedVote(block_hash=block, parts_total=1, parts_hash=digest("parts"), time_ns=7, signature=bytes(64))
    message = canonical.vote(
        facts["kind"],
        height=facts["height"],
        round_=facts["round_"],
        block=blank.block(),
        time_ns=7,
        chain_id=facts["chain_id"],
    )
    return replace(blank, signature=key_of(name).sign(message))


def duplicate(one, other, name="a"):
    return DuplicateVote(
        chain_id=CHAIN,
        public_key=public_of(name),
        kind=canonical.PRECOMMIT,
        height=5,
        round=0,
        one=one,
        other=other,
    )


def test_two_votes_for_different_blocks_convict_their_signer():
    for other in (digest("block two"), b""):  # another block, or nil
        found = duplicate(vote("a", digest("block one")), vote("a", other))
        assert DuplicateVote.parse(found.encode()).verify(chain_id=CHAIN) == address_of(public_of("a"))


def test_votes_that_do_not_exclude_each_other_or_are_forged_convict_nobody():
    one = vote("a", digest("block one"))
    with pytest.raises(Malformed, match="comet.evidence_malformed"):
        duplicate(one, one).verify(chain_id=CHAIN)
    for forged in (
        vote("b", digest("block two")),
        vote("a", digest("block two"), height=6),
        vote("a", digest("block two"), round_=1),
        vote("a", digest("block two"), kind=canonical.PREVOTE),
        vote("a", digest("block two"), chain_id="moor-other"),
    ):
        with pytest.raises(NotAuthentic, match="ledger.signature_invalid"):
            duplicate(one, forged).verify(chain_id=CHAIN)
    with pytest.raises(NotAuthentic, match="comet.other_chain"):
        duplicate(one, vote("a", digest("block two"))).verify(chain_id="moor-other")


def test_authorities_are_validators_with_the_same_power():
    assert authority_validators(authorities(FOUR)) == set_of(FOUR)
