"""Pair keys: agreed inside the token, the same on both sides or not at all, whatever is lost, repeated or forged."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from moorline.clock import Instant
from moorline.errors import Conflict, Malformed, MoorlineError, NotAuthentic, Refused
from moorline.hsm.exchange import Party
from moorline.hsm.pair import Ends, PairKeys
from moorline.services import broker_pairs
from moorline.storage.broker_pairs import Claim, PairState, PairStore
from moorline.storage.broker_revocations import RevocationStore, Revoked
from moorline.storage.broker_store import BrokerStore
from moorline.wire import cose, keys, pair, schema
from moorline.wire.pair import PairConfirm, PairOffer, PairStatement, RevocationsCall

NOW = Instant(1_800_000_000)
NAMES = ("alpha", "beta")
_COUNT = iter(range(1_000_000))


class Side:
    """One HSM. Both sides share a token here: their labels name the other side, so they never meet in it."""

    def __init__(self, token, name, ledger_id=b"l" * 32):
        self.token, self.ledger_id = token, ledger_id
        self.store = BrokerStore.open("sqlite://")
        self.pairs = PairStore(self.store)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.party = Party(provider=name, hsm="hsm-1")
        self.keys = PairKeys(token, self.pairs, lambda: keys.KeySigner(self.key))

    def ends(self, other):
        return Ends(ledger_id=self.ledger_id, own=self.party, peer=other.party, peer_key=other.key.public_key())

    def mac(self, other, epoch, message=b"m"):
        return self.keys.mac(other.party, epoch, message)

    def newest(self, other):
        return self.pairs.newest(other.party.provider, other.party.hsm)


@pytest.fixture
def sides(token):
    # Names of their own for each test: what is agreed stays in the token.
    suffix = next(_COUNT)
    made = tuple(Side(token, f"{name}{suffix}") for name in NAMES)
    yield made
    for side in made:
        side.store.close()


def agree(one, two):
    """The whole exchange, `one` first."""
    mine, theirs = one.ends(two), two.ends(one)
    row, offer = one.keys.offer(mine, theirs=two.keys.newest_epoch(theirs), at=NOW)
    reply = two.keys.answer(theirs, offer, at=NOW)
    row, confirm = one.keys.agree(mine, row, reply)
    two.keys.confirm(theirs, confirm, at=NOW)
    return one.keys.activate(mine, row, peer_signed=reply.statement, at=NOW)


def test_both_tokens_hold_the_same_key_and_both_signed_the_same(sides):
    one, two = sides
    row = agree(one, two)
    assert row.epoch == 1
    assert one.mac(two, 1) == two.mac(one, 1)
    mine, theirs = one.newest(two), two.newest(one)
    assert mine.transcript == theirs.transcript
    assert {mine.state, theirs.state} == {PairState.ACTIVE}
    for signed, side in ((mine.own_signed, one), (mine.peer_signed, two), (theirs.peer_signed, one)):
        payload = cose.verify(cose.parse(pair.PAIR_PURPOSE, signed), side.key.public_key())
        statement = schema.decode(PairStatement, payload)
        assert pair.transcript(statement) == mine.transcript
        assert (statement.initiator_provider, statement.responder_provider) == (one.party.provider, two.party.provider)


def test_nothing_of_it_can_be_taken_out_of_the_token(sides, token):
    one, two = sides
    agree(one, two)
    label = f"pair/{two.party.provider}/hsm-1/1"
    (fact,) = [fact for fact in token.inspect() if fact.label == label]
    assert (fact.kind, fact.sensitive, fact.extractable) == ("secret", True, False)
    assert not [fact for fact in token.inspect() if fact.label.startswith(f"pair-ephemeral/{two.party.provider}")]


def test_rotation_keeps_the_epoch_before_and_destroys_older_ones(sides, token):
    one, two = sides
    for _ in range(3):
        agree(one, two)
    assert agree(two, one).epoch == 4  # either side may begin
    for side, other in ((one, two), (two, one)):
        assert [row.state for row in side.pairs.all()] == [PairState.ACTIVE] * 2 + [PairState.RETIRED] * 2
        assert side.mac(other, 3) != side.mac(other, 4)
        for epoch in (1, 2):
            assert not token.has_secret(f"pair/{other.party.provider}/hsm-1/{epoch}")
            with pytest.raises(Refused, match="pair.none"):
                side.mac(other, epoch)
    assert one.mac(two, 3) == two.mac(one, 3)


def offered(one, two):
    row, offer = one.keys.offer(one.ends(two), theirs=two.keys.newest_epoch(two.ends(one)), at=NOW)
    return row, offer, two.keys.answer(two.ends(one), offer, at=NOW)


def forged(statement, key):
    return cose.sign(pair.PAIR_PURPOSE, schema.encode(statement), keys.KeySigner(key))


@pytest.mark.parametrize(
    "change",
    [
        {"ledger_id": b"x" * 32},
        {"initiator_provider": "gamma"},
        {"initiator_hsm": "hsm-2"},
        {"responder_provider": "gamma"},
        {"responder_hsm": "hsm-2"},
        {"epoch": 9},
        {"initiator_point": b"\x04" + b"1" * 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_peer_that_signs_anything_else_is_refused(sides, change):
    """verifies that: each field of the statement counts, even when the peer's own key signs the change."""
    one, two = sides
    row, _, reply = offered(one, two)
    statement = schema.decode(
        PairStatement, cose.verify(cose.parse(pair.PAIR_PURPOSE, reply.statement), two.key.public_key())
    )
    changed = forged(replace(statement, **change), two.key)
    with pytest.raises(Refused, match="pair.statement"):
        one.keys.agree(one.ends(two), row, replace(reply, statement=changed))
    one.keys.agree(one.ends(two), row, reply)  # the control


def test_a_strangers_signature_is_refused(sides):
    one, two = sides
    row, _, reply = offered(one, two)
    statement = schema.decode(
        PairStatement, cose.verify(cose.parse(pair.PAIR_PURPOSE, reply.statement), two.key.public_key())
    )
    stranger = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(NotAuthentic):
        one.keys.agree(one.ends(two), row, replace(reply, statement=forged(statement, stranger)))


def test_a_man_in_the_middle_with_a_point_of_his_own_gets_no_key_confirmed(sides):
    """verifies that: another point, signed by a stolen signing key, still needs the MAC of the same secret."""
    one, two = sides
    row, _, reply = offered(one, two)
    statement = schema.decode(
        PairStatement, cose.verify(cose.parse(pair.PAIR_PURPOSE, reply.statement), two.key.public_key())
    )
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    other = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    with pytest.raises(NotAuthentic, match="pair.mac"):
        one.keys.agree(
            one.ends(two), row, replace(reply, statement=forged(replace(statement, responder_point=other), two.key))
        )


def test_a_mac_sent_back_to_its_maker_is_refused(sides):
    one, two = sides
    row, _, reply = offered(one, two)
    _, confirm = one.keys.agree(one.ends(two), row, reply)
    with pytest.raises(NotAuthentic, match="pair.mac"):
        two.keys.confirm(two.ends(one), PairConfirm(statement=confirm.statement, mac=reply.mac), at=NOW)
    with pytest.raises(NotAuthentic):
        two.keys.confirm(two.ends(one), PairConfirm(statement=reply.statement, mac=confirm.mac), at=NOW)
    two.keys.confirm(two.ends(one), confirm, at=NOW)


def test_an_epoch_is_answered_for_one_point_only(sides):
    one, two = sides
    _, offer, reply = offered(one, two)
    assert two.keys.answer(two.ends(one), offer, at=NOW).statement == reply.statement  # a retry
    other = replace(offer, point=two.keys._ephemeral(two.ends(one), 77))
    with pytest.raises(Conflict, match="pair.epoch_taken"):
        two.keys.answer(two.ends(one), other, at=NOW)


@pytest.mark.parametrize("point", [b"\x04" + b"\xff" * 64, b"\x02" + b"1" * 64, b"\x00" * 65])
def test_a_point_that_is_none_agrees_on_nothing(sides, point):
    one, two = sides
    with pytest.raises(MoorlineError):
        two.keys.answer(two.ends(one), PairOffer(epoch=1, point=point), at=NOW)
    assert two.newest(one).state is not PairState.ACTIVE


def test_when_both_begin_the_first_by_name_wins(sides):
    one, two = sides
    _, mine = one.keys.offer(one.ends(two), theirs=0, at=NOW)
    _, theirs = two.keys.offer(two.ends(one), theirs=0, at=NOW)
    with pytest.raises(Conflict, match="pair.crossed"):
        one.keys.answer(one.ends(two), theirs, at=NOW)
    two.keys.answer(two.ends(one), mine, at=NOW)
    agree(one, two)
    assert one.mac(two, 1) == two.mac(one, 1)


def test_a_confirmation_out_of_the_blue_is_refused(sides):
    one, two = sides
    row, _, reply = offered(one, two)
    _, confirm = one.keys.agree(one.ends(two), row, reply)
    with pytest.raises(Conflict, match="pair.not_answered"):
        one.keys.confirm(one.ends(two), PairConfirm(statement=reply.statement, mac=confirm.mac), at=NOW)


@pytest.mark.parametrize("body", [b"", b"\x00", b"\xa0", schema.encode(PairOffer(epoch=1, point=b"p" * 65))[:-1]])
def test_odd_bytes_are_malformed(body):
    with pytest.raises(Malformed):
        schema.decode(PairOffer, body)


class Pairing(RuleBasedStateMachine):
    """Messages are lost and repeated, either side begins, either process dies: an active epoch is the same on both sides."""

    token = None

    def __init__(self):
        super().__init__()
        suffix = next(_COUNT)
        self.sides = tuple(Side(self.token, f"{name}{suffix}") for name in NAMES)
        self.wire = []

    def pick(self, which):
        return (self.sides[which], self.sides[1 - which])

    @rule(which=st.sampled_from([0, 1]))
    def begins(self, which):
        one, two = self.pick(which)
        row, offer = one.keys.offer(one.ends(two), theirs=two.keys.newest_epoch(two.ends(one)), at=NOW)
        self.wire.append(("offer", which, row, offer))

    @rule(data=st.data())
    def delivers(self, data):
        if not self.wire:
            return
        kind, which, row, message = data.draw(st.sampled_from(self.wire))
        one, two = self.pick(which)
        try:
            if kind == "offer":
                self.wire.append(("reply", which, row, two.keys.answer(two.ends(one), message, at=NOW)))
            elif kind == "reply":
                row = one.newest(two)
                if not row.pending:
                    return
                row, confirm = one.keys.agree(one.ends(two), row, message)
                self.wire.append(("confirm", which, row, (confirm, message.statement)))
            else:
                confirm, statement = message
                two.keys.confirm(two.ends(one), confirm, at=NOW)
                newest = one.newest(two)
                if newest.pending and newest.transcript == row.transcript:
                    one.keys.activate(one.ends(two), newest, peer_signed=statement, at=NOW)
        except (Conflict, Refused, NotAuthentic):
            return  # late, crossed or overtaken

    @rule()
    def loses(self):
        self.wire.clear()

    @invariant()
    def same_key_on_both_sides(self):
        one, two = self.sides
        mine = {row.epoch: row for row in one.pairs.all() if row.state is PairState.ACTIVE}
        theirs = {row.epoch: row for row in two.pairs.all() if row.state is PairState.ACTIVE}
        for epoch in mine.keys() & theirs.keys():
            assert mine[epoch].transcript == theirs[epoch].transcript
            assert one.mac(two, epoch) == two.mac(one, epoch)
        for row in (*mine.values(), *theirs.values()):
            assert row.own_signed
            assert row.peer_signed

    def teardown(self):
        for side in self.sides:
            side.store.close()


def test_any_order_of_messages_and_losses(token):
    Pairing.token = token
    quick = settings(max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Pairing, settings=quick)


# Claims of device keys ----------------------------------------------------------------------------------------------------


def claim(**changes):
    made = Claim(
        key_id=b"k" * 32,
        instance="i-1",
        generation=1,
        device="spiffe://beta.test/device/d-1",
        contract="c1",
        first=0,
        count=16,
        at=NOW,
    )
    return replace(made, **changes)


@pytest.mark.parametrize("again", [claim(), claim(instance="i-2"), claim(generation=2), claim(first=16)])
def test_a_key_is_given_once_whoever_asks(sides, again):
    """verifies that: neither another instance nor the same one again gets a key whose counters may have been used."""
    one, _ = sides
    one.pairs.claim(claim())
    with pytest.raises(Conflict, match="nopfs.key_claimed"):
        one.pairs.claim(again)
    assert [alarm.code for alarm in one.store.alarms()] == ["nopfs.key_claimed"]
    one.pairs.claim(claim(key_id=b"x" * 32))


def test_hundreds_revoked_at_one_height_are_all_told_once():
    """verifies that: what a lost host revokes in one block reaches the peer whole and once, 32 an answer."""
    store = BrokerStore.open("sqlite://")
    broker = SimpleNamespace(revocations=RevocationStore(store))
    everything = [(7, f"{n:x}") for n in range(100)] + [(9, "ff")]
    broker.revocations.learn(
        tuple(
            Revoked(
                serial=serial,
                spiffe_id=f"spiffe://alpha.test/svc/records/i-{serial}",
                not_after=Instant(NOW + 3600),
                at=NOW,
                reason="unspecified",
                data=None,
                height=height,
            )
            for height, serial in everything
        )
    )
    told, since, after, more = [], 0, "g", True
    while more:
        reply = broker_pairs._revocations(broker, RevocationsCall(since=since, after=after))
        assert 0 < len(reply.revoked) <= 32
        told += [(one.height, one.serial) for one in reply.revoked]
        since, after = broker_pairs._next(reply.revoked[-1], since, after)
        more = reply.more
    assert sorted(told) == sorted(everything)
    assert broker_pairs._revocations(broker, RevocationsCall(since=9, after="g")).revoked == ()
    with pytest.raises(Malformed, match=r"exchange\.revocations_order"):
        broker_pairs._next(reply.revoked[-1], since, after)
    store.close()
