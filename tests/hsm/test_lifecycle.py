"""Lives of keys and approvals, as pure machines: no key out of its time, nothing destroyed that only few wanted gone."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, NotAuthentic, Refused
from moorline.hsm import approvals, custody, lifecycle
from moorline.hsm.approvals import Approval, Operation
from moorline.hsm.custody import Circle
from moorline.hsm.lifecycle import State, Use
from moorline.storage.hsm_store import HsmStore, KeyRow
from moorline.wire import keys, schema

NOW = Instant(1_800_000_000)
ROLE = "wrapping"


class Life(RuleBasedStateMachine):
    """Any order of rotations, activations, retirements and destructions, over passing time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000
        self.rows: dict[str, KeyRow] = {ROLE: lifecycle.adopted(ROLE, ROLE, Instant(self.now))}
        self.was: dict[str, list[str]] = {ROLE: [State.ACTIVE]}

    def put(self, *rows: KeyRow) -> None:
        for row in rows:
            if self.rows.get(row.label, row).state != row.state or row.label not in self.was:
                self.was.setdefault(row.label, []).append(row.state)
            self.rows[row.label] = row

    def attempt(self, act) -> None:
        try:
            made = act(list(self.rows.values()))
        except MoorlineError as error:
            assert error.code in ("key.state", "key.overlap", "key.rotation_under_way", "key.unknown")
            return
        self.put(*(made if isinstance(made, tuple) else (made,)))

    @rule(seconds=st.integers(0, 200))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def begin(self):
        self.attempt(lambda rows: lifecycle.begun(rows, ROLE, Instant(self.now)))

    @rule(data=st.data(), what=st.sampled_from(["activate", "retire", "destroy"]))
    def move(self, data, what):
        label = data.draw(st.sampled_from([*sorted(self.rows), "wrapping@99"]))
        now = Instant(self.now)
        acts = {
            "activate": lambda rows: lifecycle.activated(rows, label, now, overlap_s=100),
            "retire": lambda rows: lifecycle.retired(rows, label, now),
            "destroy": lambda rows: lifecycle.destroyed(rows, label, now),
        }
        self.attempt(acts[what])

    @invariant()
    def exactly_one_is_active(self):
        assert sum(row.state == State.ACTIVE for row in self.rows.values()) == 1

    @invariant()
    def states_only_go_forward(self):
        order = [State.PRE_ACTIVE, State.ACTIVE, State.RETIRING, State.RETIRED, State.DESTROYED]
        for states in self.was.values():
            places = [order.index(State(state)) for state in states]
            assert places == sorted(set(places))
            if State.DESTROYED in states:  # never active, or all the way
                assert len(states) in (1, 2, 4, 5)

    @invariant()
    def only_the_active_begins_and_only_living_ones_end(self):
        rows = list(self.rows.values())
        begun = lifecycle.usable(rows, ROLE, Use.BEGUN)
        (new,) = lifecycle.usable(rows, ROLE, Use.NEW)
        assert begun[0] == new
        assert {self.rows[label].state for label in begun} <= {State.ACTIVE, State.RETIRING}

    @invariant()
    def overlaps_are_kept(self):
        for row in self.rows.values():
            if row.retired is not None:
                assert row.retiring is not None
                assert row.retired >= row.retiring + 100


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase


def test_labels_are_never_used_again():
    """verifies that: a destroyed key's name is not given to another."""
    rows = [replace(lifecycle.adopted(ROLE, "wrapping@7", NOW), state=State.DESTROYED)]
    assert lifecycle.next_label(rows, ROLE) == "wrapping@8"
    assert lifecycle.next_label([], ROLE) == "wrapping@2"


@pytest.mark.parametrize("early", [100, 1])
def test_a_key_retires_when_its_overlap_is_over_and_not_a_second_before(early):
    """verifies that: what was begun under a key can end under it; its retirement is refused until then."""
    first = lifecycle.adopted(ROLE, ROLE, NOW)
    second = lifecycle.begun([first], ROLE, NOW)
    first, second = lifecycle.activated([first, second], second.label, NOW, overlap_s=100)
    with pytest.raises(Refused) as caught:
        lifecycle.retired([first, second], ROLE, Instant(NOW + 100 - early))
    assert caught.value.code == "key.overlap"
    assert lifecycle.retired([first, second], ROLE, Instant(NOW + 100)).state == State.RETIRED


# -- approvals --------------------------------------------------------------------------------------------------------------

NAMES = ("ada", "bo", "cy")
SIGNING = {name: ec.generate_private_key(ec.SECP256R1()) for name in NAMES}
CIRCLE = Circle(
    quorum=2,
    custodians=tuple(
        custody.public_of(name, SIGNING[name].public_key(), x25519.X25519PrivateKey.generate().public_key())
        for name in NAMES
    ),
)


def asked(target: str = "issuing-ca@1", operation: Operation = Operation.KEY_DESTROY):
    return approvals.request(
        provider="alpha", hsm="hsm-1", operation=operation, target=target, now=NOW, random=os.urandom(16)
    )


def approved(request, *names: str) -> tuple[Approval, ...]:
    signed = [approvals.approve(request, name, keys.KeySigner(SIGNING[name]), NOW) for name in names]
    return tuple(approvals.verify(request, each, CIRCLE, NOW) for each in signed)


def granted(request, given, *, now=NOW, target="issuing-ca@1", operation=Operation.KEY_DESTROY) -> None:
    approvals.require_granted(request, given, CIRCLE, operation=operation, target=target, now=now)


def test_a_quorum_grants_exactly_one_thing():
    """verifies that: two of three approve this key's destruction, and nothing else by it."""
    request = asked()
    given = approved(request, "ada", "cy")
    granted(request, given)
    for refusal, act in (
        ("approval.missing", lambda: granted(request, given[:1])),
        ("approval.missing", lambda: granted(request, ())),
        ("approval.other_request", lambda: granted(request, given, target="hsm-identity")),
        ("approval.other_request", lambda: granted(request, given, operation=Operation.TENANT_DESTROY)),
        ("approval.other_request", lambda: granted(asked(), given)),
        ("approval.expired", lambda: granted(request, given, now=Instant(NOW + approvals.LIFE_S + 1))),
    ):
        with pytest.raises(Refused) as caught:
            act()
        assert caught.value.code == refusal
    with pytest.raises(Conflict) as twice:
        granted(request, (given[0], given[0]))
    assert twice.value.code == "approval.twice"


def test_forged_approvals():
    """verifies that: a stranger, a custodian in another's name, and a database that was changed approve nothing."""
    request = asked()
    stranger = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
    for code, signed in (
        ("approval.stranger", approvals.approve(request, "ada", stranger, NOW)),
        ("approval.other_name", approvals.approve(request, "bo", keys.KeySigner(SIGNING["ada"]), NOW)),
    ):
        with pytest.raises(NotAuthentic) as caught:
            approvals.verify(request, signed, CIRCLE, NOW)
        assert caught.value.code == code
    good = approvals.approve(request, "ada", keys.KeySigner(SIGNING["ada"]), NOW)
    forged = Approval(custodian="bo", at=NOW, signed=good)  # as a changed row would say
    with pytest.raises((Conflict, Refused)):
        granted(request, (*approved(request, "ada"), forged))
    damaged = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(NotAuthentic):
        approvals.verify(request, damaged, CIRCLE, NOW)
    smaller = replace(CIRCLE, custodians=CIRCLE.custodians[1:])
    with pytest.raises(NotAuthentic):
        approvals.require_granted(
            request, approved(request, "ada", "bo"), smaller, operation=Operation.KEY_DESTROY, target="issuing-ca@1", now=NOW
        )


def test_an_approval_is_kept_and_used_once(tmp_path):
    """verifies that: each custodian is kept once, a request is used once, and both survive a restart."""
    url = f"sqlite:///{tmp_path / 'hsm.db'}"
    request = asked()
    store = HsmStore.open(url)
    store.add_request(request.id, schema.encode(request))
    for each in approved(request, "ada", "bo"):
        store.add_approval(request.id, each.custodian, each.at, each.signed)
    with pytest.raises(Conflict):
        store.add_approval(request.id, "ada", NOW, b"again")
    store.close()
    store = HsmStore.open(url)
    assert store.request(request.id) == schema.encode(request)
    assert [name for name, _, _ in store.approvals(request.id)] == ["ada", "bo"]
    store.use_request(request.id, NOW)
    with pytest.raises(Conflict) as caught:
        store.use_request(request.id, NOW)
    assert caught.value.code == "approval.used"
    with pytest.raises(Refused) as unknown:
        store.request(bytes(16))
    assert unknown.value.code == "approval.unknown"
    store.close()
