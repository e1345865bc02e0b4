"""Keys that are due by calendar: what is done when, whoever is killed in between; pair keys by age, volume and loss."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Misconfigured
from moorline.hsm import lifecycle
from moorline.hsm.calendar import Deed, Entry, Rotation, due_at, entries, waits_for_the_provider
from moorline.hsm.exchange import Party
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA, KEM, VERIFIER, WRAPPING
from moorline.hsm.lifecycle import State, Use
from moorline.hsm.pair import Ends, PairKeys
from moorline.hsm.verifier_keys import VerifierKeys
from moorline.storage.broker_pairs import PairStore, PairUse
from moorline.storage.broker_store import BrokerStore
from moorline.storage.hsm_store import HsmStore
from moorline.wire import keys

NOW = Instant(1_800_000_000)
DAY = 86_400
_COUNT = itertools.count()
POLICY = Rotation(
    wrapping_s=90 * DAY, verifier_s=30 * DAY, announce_s=2 * DAY, issuing_ca_s=300 * DAY, pair_s=DAY, pair_keys=3
)


def at(days: float) -> Instant:
    return Instant(NOW + round(days * DAY))


def adopted(*roles: str):
    return tuple(lifecycle.adopted(role, role, NOW) for role in roles)


def test_nothing_is_due_before_its_age_and_nothing_without_one():
    """verifies that: a role without an age is left to people; others wait for their day, verifiers are announced first."""
    rows = adopted(WRAPPING, VERIFIER, ISSUING_CA, HSM_IDENTITY, KEM)
    assert entries(rows, POLICY, at(27.9)) == ()
    assert entries(rows, POLICY, at(28)) == (Entry(deed=Deed.BEGIN, role=VERIFIER),)
    assert {each.role for each in entries(rows, POLICY, at(3000))} == {WRAPPING, VERIFIER, ISSUING_CA}
    assert entries(rows, Rotation(), at(3000)) == ()
    assert [due_at(row, POLICY) for row in rows] == [at(90), at(30), at(300), None, None]
    assert due_at(rows[0], None) is None


def test_what_the_provider_must_do_is_begun_once_and_waits():
    """verifies that: a CA that is due is made once, however often the calendar looks, and never activated by it."""
    rows = adopted(ISSUING_CA)
    begun = lifecycle.begun(rows, ISSUING_CA, at(300))
    assert waits_for_the_provider(begun)
    assert entries((*rows, begun), POLICY, at(4000)) == ()


def test_a_verifier_key_signs_only_when_it_was_announced(token):
    """verifies that: the next key is told to relying parties two days before it signs, and the old one counts after."""
    token.generate_ec_key("verifier@7")
    old = replace(lifecycle.adopted(VERIFIER, VERIFIER, NOW), label=VERIFIER)
    begun = replace(lifecycle.begun((old,), VERIFIER, at(28)), label="verifier@7")
    known = VerifierKeys(token, (old, begun))
    assert (len(known.accepted()), len(known.announced())) == (1, 2)
    assert entries((old, begun), POLICY, at(29.9)) == ()
    assert entries((old, begun), POLICY, at(30)) == (Entry(deed=Deed.ACTIVATE, role=VERIFIER, label="verifier@7"),)
    rows = lifecycle.activated((old, begun), "verifier@7", at(30), overlap_s=3600)
    known.follow(rows)
    assert known.label == "verifier@7"
    assert len(known.accepted()) == 2
    token.destroy_key("verifier@7")


def test_a_wrapping_key_retires_after_what_it_sealed_was_sealed_again():
    """verifies that: a pass comes before each try to retire, and none of it waits for a person."""
    rows = adopted(WRAPPING)
    begun = lifecycle.begun(rows, WRAPPING, at(90))
    # Killed after the row, before the key was made: the same rotation goes on.
    assert entries((*rows, begun), POLICY, at(90)) == (Entry(deed=Deed.BEGIN, role=WRAPPING),)
    rows = lifecycle.activated((*rows, begun), begun.label, at(90), overlap_s=120)
    assert [each.deed for each in entries(rows, POLICY, at(90))] == [Deed.REWRAP]
    late = entries(rows, POLICY, Instant(at(90) + 120))
    assert [(each.deed, each.label) for each in late] == [(Deed.REWRAP, WRAPPING), (Deed.RETIRE, WRAPPING)]


def done(rows, entry: Entry, now: Instant):
    """What the broker's deeds make of the rows."""
    if entry.deed is Deed.BEGIN:
        waiting = [row for row in rows if row.role == entry.role and row.state == State.PRE_ACTIVE]
        row = waiting[0] if waiting else lifecycle.begun(rows, entry.role, now)
        changed = (row,)
        if entry.role == WRAPPING:
            changed = lifecycle.activated((*rows, row), row.label, now, overlap_s=120)
    elif entry.deed is Deed.ACTIVATE:
        changed = lifecycle.activated(rows, entry.label, now, overlap_s=3600)
    elif entry.deed is Deed.RETIRE:
        changed = (lifecycle.retired(rows, entry.label, now),)
    else:
        changed = ()
    names = {row.label for row in changed}
    return (*(row for row in rows if row.label not in names), *changed)


@given(st.lists(st.tuples(st.integers(1, 40 * DAY), st.integers(0, 4)), max_size=40))
def test_whenever_the_calendar_looks_and_wherever_it_dies(looks):
    """verifies that: each role has one active key always, at most one begun; no key signs before it was announced."""
    rows, now = adopted(WRAPPING, VERIFIER, ISSUING_CA), NOW
    for passed, survived in looks:
        now = Instant(now + passed)
        for entry in entries(rows, POLICY, now)[:survived]:  # killed behind so many deeds
            rows = done(rows, entry, now)
        for role in (WRAPPING, VERIFIER, ISSUING_CA):
            mine = [row for row in rows if row.role == role]
            assert [row.state for row in mine].count(State.ACTIVE) == 1
            assert [row.state for row in mine].count(State.PRE_ACTIVE) <= 1
            assert lifecycle.usable(rows, role, Use.NEW)
        for row in rows:
            if row.role == VERIFIER and row.active is not None and row.label != VERIFIER:
                assert row.active >= row.created + POLICY.announce_s
    if now >= at(91):
        now = Instant(now + DAY)
        for entry in entries(rows, POLICY, now):
            rows = done(rows, entry, now)
        assert lifecycle.usable(rows, WRAPPING, Use.NEW) != (WRAPPING,)


@pytest.mark.parametrize("wrong", [{"wrapping_s": 0}, {"pair_keys": -1}, {"every_s": 0}, {"verifier_s": 9, "announce_s": 9}])
def test_a_policy_that_cannot_be(wrong):
    """verifies that: an age of nothing, and a verifier key that is due before it was announced, are refused at the start."""
    with pytest.raises(Misconfigured, match=r"rotation\.settings"):
        Rotation(**wrong).require_sane()


def test_of_two_processes_one_has_the_turn(tmp_path):
    """verifies that: who took the turn has it until it ends, also if he died; then anybody may."""
    url = f"sqlite:///{tmp_path / 'hsm.db'}"
    one, two = HsmStore.open(url), HsmStore.open(url)
    assert one.take_turn("calendar-turn", NOW, 60)
    assert not two.take_turn("calendar-turn", Instant(NOW + 59), 60)
    assert two.take_turn("calendar-turn", Instant(NOW + 60), 60)
    assert not one.take_turn("calendar-turn", Instant(NOW + 61), 60)
    before = one.key_changes()
    two.put_keys(adopted(WRAPPING))
    assert one.key_changes() == before + 1
    for store in (one, two):
        store.close()


# Pair keys ---------------------------------------------------------------------------------------------------------------


class Side:
    """One HSM. Its table of pairs can be put back to what it was."""

    def __init__(self, token, name):
        self.token = token
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.party = Party(provider=name, hsm="hsm-1")
        self.store = BrokerStore.open("sqlite://")
        self.pairs = PairStore(self.store)
        self.keys = PairKeys(token, self.pairs, lambda: keys.KeySigner(self.key))

    def saved(self):
        with self.store.reading() as c:
            return [dict(row) for row in c.execute(sa.text("SELECT * FROM pairs")).mappings()]

    def restored(self, rows):
        with self.store.transaction() as c:
            c.execute(sa.text("DELETE FROM pairs"))
            for row in rows:
                c.execute(sa.insert(sa.table("pairs", *map(sa.column, row))).values(**row))

    def ends(self, other):
        return Ends(ledger_id=b"l" * 32, own=self.party, peer=other.party, peer_key=other.key.public_key())

    def due(self, now):
        return self.keys.due(self.party, POLICY, now)


@pytest.fixture
def pair(token):
    number = next(_COUNT)  # names of their own for each test: what is agreed stays in the token
    made = tuple(Side(token, f"{name}{number}-calendar") for name in ("a", "b"))
    yield made
    for side in made:
        side.store.close()


def agreed(one, two, now, floor=0):
    """One exchange; `floor` is what the ledger has anchored."""
    theirs = max(two.keys.newest_epoch(two.ends(one)), floor)
    row, offer = one.keys.offer(one.ends(two), theirs=theirs, at=now)
    reply = two.keys.answer(two.ends(one), offer, at=now)
    row, confirm = one.keys.agree(one.ends(two), row, reply)
    two.keys.confirm(two.ends(one), confirm, at=now)
    made = one.keys.activate(one.ends(two), row, peer_signed=reply.statement, at=now)
    assert one.keys.mac(two.party, made.epoch, b"m") == two.keys.mac(one.party, made.epoch, b"m")
    return made.epoch


def test_a_pair_key_is_due_by_age_at_the_end_that_comes_first(pair):
    """verifies that: one end begins when the key is old; the other only when that one seems to be away for good."""
    one, two = pair
    agreed(one, two, NOW)
    assert (one.due(at(0.99)), two.due(at(0.99))) == ((), ())
    assert (one.due(at(1)), two.due(at(1))) == ((two.party,), ())
    assert two.due(at(2)) == (one.party,)
    agreed(two, one, at(2))
    assert (one.due(at(2.5)), two.due(at(2.5))) == ((), ())


def test_a_pair_key_is_due_by_volume(pair):
    """verifies that: keys derived are counted durably, with what is written for each; so many, and the key is due."""
    one, two = pair
    epoch = agreed(one, two, NOW)
    of = PairUse(provider=one.party.provider, hsm="hsm-1", epoch=epoch)
    for number in range(3):
        assert two.due(NOW) == ()
        two.pairs.sealed_for_device(device=f"d-{number}", of=of, contract="c1", key_id=bytes([number]) * 32, at=NOW)
    assert two.due(NOW) == (one.party,)
    agreed(two, one, NOW)
    assert two.due(NOW) == ()


def test_months_of_missed_epochs_are_one_next_epoch(pair):
    """verifies that: while the peer is away an offer waits and is no reason for others; back, one epoch is agreed."""
    one, two = pair
    agreed(one, two, NOW)
    one.keys.offer(one.ends(two), theirs=1, at=at(1))  # and nobody answers
    assert one.due(at(90)) == ()
    assert len(one.pairs.pending()) == 1
    assert agreed(one, two, at(90)) == 2
    assert (one.due(at(90)), two.due(at(90))) == ((), ())


@pytest.mark.parametrize(("lost", "begins"), [(0, 0), (1, 0), (1, 1)])
def test_either_end_put_back_from_a_backup(pair, lost, begins):
    """verifies that: a database of yesterday, with a token that has no pair keys, is due at once, and above all before."""
    back, other = pair[lost], pair[1 - lost]
    agreed(*pair, NOW)
    backup = back.saved()
    for day in (1, 2, 3):
        agreed(*pair, at(day))
    back.restored(backup)
    for epoch in range(1, 5):
        back.token.destroy_secret(f"pair/{other.party.provider}/hsm-1/{epoch}")
    assert back.due(at(3)) == (other.party,)
    first, second = (back, other) if begins == 0 else (other, back)
    assert agreed(first, second, at(3)) == 5
    assert (back.due(at(3)), other.due(at(3))) == ((), ())


def test_both_ends_put_back_agree_above_what_the_ledger_has(pair):
    """verifies that: where both forgot epochs, the anchors on the ledger are the floor: an anchor never goes back."""
    one, two = pair
    agreed(one, two, NOW)
    backups = [side.saved() for side in pair]
    for day in (1, 2, 3):
        agreed(one, two, at(day))
    for side, backup in zip(pair, backups, strict=True):
        side.restored(backup)
    assert agreed(one, two, at(3), floor=4) == 5
