"""Every kind of transaction, sent by everybody who may not: each refused, for the right reason, without a trace."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.ledger import state, transactions
from moorline.ledger import transactions as tx
from moorline.ledger.records import RevocationKind
from moorline.ledger.registration import HSM_REVOKES
from moorline.ledger.state import Applied, Rejected

from .everything import World

NOBODY = {
    "authority-9": "ledger.authority_unknown",  # retired
    "gamma": "ledger.provider_suspended",
    "delta": "ledger.provider_unknown",  # removed
    "epsilon, old key": "ledger.key_unknown",  # its retire time has passed
    "gamma/hsm-1": "ledger.provider_suspended",
    "alpha/hsm-0": "ledger.hsm_unknown",  # revoked
    "stranger": "ledger.provider_unknown",
    "imposter": "ledger.key_unknown",
    "false authority": "ledger.key_unknown",
    "alpha as authority": "ledger.authority_unknown",
    "authority as provider": "ledger.provider_unknown",
    "alpha as its HSM": "ledger.key_unknown",
    "HSM as alpha": "ledger.key_unknown",
    "HSM of alpha as beta's": "ledger.key_unknown",
    "checkpoint key": "ledger.key_unknown",
    "CA key of authority": "ledger.key_unknown",
}
"""Who may send nothing at all, and what is said to them whatever it is."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world") / "c")


def named(body):
    return type(body).__name__ + (f" {body.kind}" if isinstance(body, tx.Propose | tx.Revoke) else "")


def test_every_kind_passes_when_its_own_sender_sends_it(world):
    """verifies that: the cases below differ from something good in the sender only; every kind there is has its case."""
    bodies = world.bodies()
    for label, body in bodies:
        outcome, _ = world.tried(label, body)
        assert isinstance(outcome, Applied), (named(body), outcome)
    kinds = {type(body).__name__ for _, body in bodies}
    assert kinds == {*transactions.AUTHORITY_BODIES, *transactions.PROVIDER_BODIES}
    assert {body.kind for _, body in bodies if isinstance(body, tx.Propose)} == set(transactions.ACTIONS)


@pytest.mark.parametrize("label", NOBODY)
def test_who_has_no_standing_sends_nothing(world, label):
    """verifies that: every kind, from every false sender, is refused and leaves the state root where it was."""
    kind = world.senders[label].kind
    for _, body in world.bodies():
        before = world.consortium.state.root
        outcome, after = world.tried(label, body)
        mine = transactions.AUTHORITY_BODIES if kind is tx.SenderKind.AUTHORITY else transactions.PROVIDER_BODIES
        expected = NOBODY[label] if type(body).__name__ in mine else "ledger.kind_unknown"
        assert isinstance(outcome, Rejected), (label, named(body))
        assert outcome.code == expected, (label, named(body), outcome)
        assert after.root == before


def test_who_is_in_good_standing_sends_only_what_is_theirs(world):
    """verifies that: nobody does another's part, and a provider touches nothing of another provider's."""
    yours = {
        "RevokeIssuingCa": "ledger.record_unknown",
        "RevokeHsm": None,  # beta has an hsm-1 of its own, and revokes that
        "RevokeOrchestrator": "ledger.record_unknown",
        "UpdateService": "ledger.record_unknown",
        "RemoveService": "ledger.record_unknown",
        "RevokePlatform": "ledger.record_unknown",
        "OfferAccess": "ledger.record_unknown",
        "RotateProviderKey": "ledger.certificate_constraints",
        "RegisterIssuingCa": "ledger.certificate_issuer",
        "RegisterHsm": "ledger.certificate_issuer",
        "RotateHsm": "ledger.certificate_issuer",
    }
    for label, body in world.bodies():
        name = type(body).__name__
        if label.startswith("authority"):
            for other in ("alpha", "alpha/hsm-1"):
                outcome, _ = world.tried(other, body)
                assert outcome.code == "ledger.kind_unknown", (other, named(body))
            continue
        outcome, _ = world.tried("authority-1", body)
        assert outcome.code == "ledger.kind_unknown", named(body)
        outcome, _ = world.tried("alpha/hsm-1", body)
        if (isinstance(body, tx.Revoke) and body.kind in HSM_REVOKES) or isinstance(body, tx.AnchorLog):
            assert isinstance(outcome, Applied), named(body)
        else:
            assert outcome.code == "ledger.not_for_hsm", (named(body), outcome)
        if label == "alpha" and (expected := yours.get(name)) is not None:
            outcome, _ = world.tried("beta", body)
            assert isinstance(outcome, Rejected), named(body)
            assert outcome.code == expected, (named(body), outcome)
        elif label == "alpha":
            outcome, _ = world.tried("beta", body)
            if isinstance(outcome, Applied):
                assert [key for key in outcome.writes if "alpha" in key.split("/")] == [], named(body)


def test_a_contract_is_its_two_sides_and_nobody_elses(world):
    for body in (tx.AcceptAccess(contract="c-1"), tx.WithdrawAccess(contract="c-2")):
        outcome, _ = world.tried("epsilon", body)
        assert outcome.code == "ledger.not_yours"
    assert world.tried("alpha", tx.AcceptAccess(contract="c-1"))[0].code == "ledger.not_yours"
    assert isinstance(world.tried("alpha", tx.WithdrawAccess(contract="c-2"))[0], Applied)


def test_one_authority_decides_nothing(world):
    """verifies that: every action takes as many distinct authorities as its threshold; the same one again is no second."""
    for action in world.actions():
        outcome, after = world.tried("authority-1", transactions.propose(action))
        changed = {key.split("/")[0] + "/" + key.split("/")[1] for key in outcome.writes}
        assert changed <= {"proposal/" + key.split("/")[1] for key in outcome.writes} | {"index/open-proposals"}, action
        assert after.authority_set() == world.consortium.state.authority_set()


@pytest.fixture(scope="module")
def everything(world):
    """All there is to send, but for voices on what an authority outside of the minority has proposed."""
    return [body for _, body in world.bodies() if not isinstance(body, tx.Approve)]


class Played:
    """A ledger that goes on from the world's, by whoever sends; it leaves the world where it is."""

    def __init__(self, world):
        self.world, self.state, self.at, self.proposals = world, world.consortium.state, world.consortium.now_ms, []

    def send(self, label, body):
        signed = self.world.signed(label, body)
        self.at += 1000
        executed = state.execute(self.state, [signed], time_ms=self.at)
        self.state = executed.state
        if isinstance(body, tx.Propose) and isinstance(executed.outcomes[0], Applied):
            self.proposals.append(transactions.proposal_id(transactions.parse(signed).payload))

    def approved_by(self, *labels):
        """Every proposal gets the voice of each of these."""
        for proposal in self.proposals:
            for label in labels:
                self.send(label, tx.Approve(proposal=proposal))
        return self

    def rules(self):
        """Who is an authority, and the parameters."""
        found = self.state.records.items()
        return self.state.authority_set(), {key: value for key, value in found if key.startswith("parameter/")}


MINORITY = ("authority-1", "authority-2")


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_no_sequence_of_transactions_by_a_minority_changes_the_authorities(world, everything, data):
    """verifies that: two of four authorities, every provider, HSM and stranger together, propose, approve and send what they
    like, in any order, each as often as they like, and in the end both approve all of it: who is an authority, and the
    parameters, stay as they were."""
    played = Played(world)
    senders = [label for label in world.senders if label not in {"authority-3", "authority-4"}]
    for _ in range(data.draw(st.integers(5, 15))):
        label = data.draw(st.sampled_from([*senders, *MINORITY * 8]))
        voices = [tx.Approve(proposal=one) for one in played.proposals]
        played.send(label, data.draw(st.sampled_from(voices if voices and data.draw(st.booleans()) else everything)))
    assert played.approved_by(*MINORITY).rules() == Played(world).rules()


@pytest.mark.parametrize("kind", [tx.AdmitAuthority, tx.RetireAuthority, tx.RotateAuthorityKey, tx.SetParameter])
def test_with_a_third_voice_the_same_does(world, kind):
    """verifies that: what the minority could not do is a matter of one voice more."""
    played = Played(world)
    played.send("authority-1", transactions.propose(next(one for one in world.actions() if isinstance(one, kind))))
    assert played.approved_by(*MINORITY).rules() == Played(world).rules()
    assert played.approved_by("authority-3").rules() != Played(world).rules()


def test_what_is_a_quorums_is_not_a_providers(world):
    outcome, _ = world.tried("alpha", tx.Revoke(kind=RevocationKind.VENDOR_ROOT, id="aa"))
    assert outcome.code == "ledger.revocation_kind"
    for kind in HSM_REVOKES:
        outcome, _ = world.tried("authority-1", transactions.propose(tx.RevokeGlobally(kind=kind, id="aa")))
        assert outcome.code == "ledger.revocation_kind"
