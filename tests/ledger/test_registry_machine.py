"""The registry against a naive model of it, step by step; and what no sequence of steps can do."""

from functools import cache

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from moorline.clock import Instant, Validity
from moorline.ledger import ceremony, records, revocation_list, transactions
from moorline.ledger import transactions as tx
from moorline.ledger.records import RevocationKind
from moorline.ledger.state import Applied
from moorline.ledger.transactions import SenderKind
from moorline.nfv import SpiffeId
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

from .conftest import NAMES, NOW, consortium_at, der
from .naive import WEEK_S, Naive
from .test_registration import PLATFORM, SERVICE

CANDIDATES = (*NAMES, "authority-5", "authority-6")
PROVIDERS = ("p0", "p1", "p2")
TERMS = "permit(principal, action, resource);"
LIFE = Validity(not_before=Instant(NOW - 60), not_after=Instant(NOW + 1000 * 86400))
LATEST = NOW + 900 * 86400

authorities, providers = st.sampled_from(CANDIDATES), st.sampled_from(PROVIDERS)
few, contracts = st.integers(0, 3), st.sampled_from(["c0", "c1", "c2"])
ids = st.sampled_from(["x0", "x1"])
CHANGES = (tx.ReinstateProvider, tx.ReinstateProvider, tx.SuspendProvider)
ANSWERS = (tx.AcceptAccess, tx.AcceptAccess, tx.WithdrawAccess)
MOSTLY = st.sampled_from([True, True, False])
OVERLAPS = st.sampled_from([5, 90_000, 0])


class Keys:
    """Real key pairs and certificates for the model's small numbers, each made once."""

    def __init__(self, directory):
        self.made = consortium_at(directory)
        root = ceremony.x509.load_der_x509_certificate(self.made.made.genesis.roots[0])
        pem = (directory / "root" / "root.key.pem").read_bytes()
        self.root = Issuer(certificate=root, key=ceremony.serialization.load_pem_private_key(pem, None))
        self.start = self.made.state

    @cache  # noqa: B019 - one of these a test run
    def authority(self, name, number):
        if number == 0 and name in NAMES:
            return self.made.authorities[name]
        return ceremony._authority(name, self.root, NOW)

    @cache  # noqa: B019 - as above
    def pair(self, owner, number):
        del owner, number
        return ec.generate_private_key(ec.SECP256R1())

    @cache  # noqa: B019 - as above
    def provider(self, name, number, issuer):
        certificate = certificates.provider_certificate(
            self.pair(name, number).public_key(),
            name=name,
            trust_domain=f"{name}.test",
            issuer=self.authority(issuer, 0).ca,
            validity=LIFE,
            serial=number + 1,
        )
        return Issuer(certificate=certificate, key=self.pair(name, number))

    def below(self, provider, number):
        """A provider as issuer: name and key make an issuer, whoever certified it."""
        return self.provider(provider, number, NAMES[0])

    @cache  # noqa: B019 - as above
    def issuing_ca(self, provider, what, number, ca):
        public = self.pair(f"{provider}/record", number).public_key()
        return der(
            certificates.issuing_ca_certificate(public, name=what, issuer=self.below(provider, ca), validity=LIFE, serial=9)
        )

    @cache  # noqa: B019 - as above
    def hsm(self, provider, what, number, ca):
        public = self.pair(f"{provider}/record", number).public_key()
        name = SpiffeId.parse(f"spiffe://{provider}.test/hsm/{what}")
        made = certificates.hsm_certificate(
            public, spiffe_id=name, address="https://h:1", issuer=self.below(provider, ca), validity=LIFE, serial=7
        )
        return {
            "id": what,
            "certificate": der(made),
            "address": "h:1",
            "est_url": "https://h:1/est",
            "kem_public": b"k",
            "signing_public": keys.public_bytes(public),
        }


class Registry(RuleBasedStateMachine):
    """Every rule sends one transaction to both, whoever may send it or not, and compares."""

    keys: Keys
    passed: set  # kinds that passed at least once

    @initialize()
    def begin(self):
        self.made = self.keys.made
        self.made.state, self.made.now_ms = self.keys.start, NOW * 1000
        self.naive = Naive(authorities=dict.fromkeys(NAMES, 0), once=set(NAMES), now=NOW)
        self.naive.spent.update((name, 0) for name in NAMES)
        self.opened = []  # ids of proposals, as the model numbers them
        self.gone = set()  # senders whose key was given up
        for name in PROVIDERS[:2]:
            self.admit_provider(NAMES[0], name, 0, NAMES[0], through=True)
            self.register_something(name, 0, "x0", 1)

    # Sending ---------------------------------------------------------------------------------------------------------

    def send(self, sender, body, described):
        kind, name, signer = self.real(sender)
        payload = self.made.payload(kind, name, body)
        self.naive.now = self.made.now_ms // 1000 + 1
        before = (self.made.state.root, self.made.state.authority_set())
        outcome = self.made.send(payload, signer)
        passed = self.naive.send(sender, described)
        assert isinstance(outcome, Applied) == passed, (sender, described, outcome)
        if sender in self.gone:
            assert not passed, "a key that was given up signed again"
        if not passed:
            assert self.made.state.root == before[0]
        if described[0] not in ("Propose", "Approve"):
            assert self.made.state.authority_set() == before[1], "somebody changed the authority set alone"
        if passed:
            self.passed.add(described[1][0] if described[0] == "Propose" else described[0])
        if passed and described[0] == "Propose":
            self.opened.append(transactions.proposal_id(payload))
        self.remember()

    def real(self, sender):
        if sender[0] == "authority":
            return SenderKind.AUTHORITY, sender[1], self.keys.authority(sender[1], sender[2]).signer()
        if sender[0] == "provider":
            return SenderKind.PROVIDER, sender[1], keys.KeySigner(self.keys.pair(sender[1], sender[2]))
        pair = self.keys.pair(f"{sender[1]}/record", sender[3])
        return SenderKind.HSM, f"{sender[1]}/{sender[2]}", keys.KeySigner(pair)

    def remember(self):
        for name, key in self.naive.spent:
            if name in CANDIDATES and self.naive.authorities.get(name) != key:
                self.gone.add(("authority", name, key))
            if name in PROVIDERS and self.naive.providers[name]["status"] == "removed":
                self.gone.add(("provider", name, key))
            if name in PROVIDERS and key not in self.naive.counting(name):
                self.gone.add(("provider", name, key))
        for (kind, provider, what), found in self.naive.things.items():
            if kind == "hsm" and found["status"] != "active":
                self.gone.update(("hsm", provider, what, key) for key in range(4))

    # Authorities -----------------------------------------------------------------------------------------------------

    def authority_body(self, kind, name, number):
        found = self.keys.authority(name, number)
        return kind(
            name=name,
            certificate=der(found.ca.certificate),
            transaction_key=keys.public_bytes(found.transaction.public_key()),
            checkpoint_key=found.checkpoint.public_key().public_bytes_raw(),
            address="127.0.0.1:1",
        )

    def propose(self, sender, action, described, *, through=True):
        """Proposed; and if `through`, approved by everybody in turn, whether that still counts or not."""
        before = len(self.opened)
        self.send(sender, transactions.propose(action), ("Propose", described))
        if through and len(self.opened) > before:
            for name in sorted(self.naive.authorities):
                self.send(self.voice(name), tx.Approve(proposal=self.opened[-1]), ("Approve", before))

    @rule(by=authorities, key=few, name=authorities, number=few, through=st.booleans())
    def admit_or_rotate_authority(self, by, key, name, number, through):
        kind = tx.RotateAuthorityKey if name in self.naive.authorities else tx.AdmitAuthority
        sender = self.voice(by) if key else ("authority", by, number)
        self.propose(sender, self.authority_body(kind, name, number), (kind.__name__, name, number), through=through)

    @rule(by=authorities, name=authorities, sure=few, through=st.booleans())
    def retire(self, by, name, sure, through):
        if sure == 3:
            self.propose(self.voice(by), tx.RetireAuthority(name=name), ("RetireAuthority", name), through=through)

    @rule(by=authorities, value=st.sampled_from([0, 1, 2, 30, 86400, 86401]))
    def set_parameter(self, by, value):
        self.propose(self.voice(by), tx.SetParameter(name="max_age_s", value=value), ("SetParameter", value))

    @rule(by=authorities, kind=st.sampled_from(RevocationKind), what=st.sampled_from(["aa", "bb"]))
    def revoke_globally(self, by, kind, what):
        self.propose(self.voice(by), tx.RevokeGlobally(kind=kind, id=what), ("RevokeGlobally", kind.value, what))

    @rule(by=authorities, name=providers, number=few, issuer=st.sampled_from(NAMES), through=st.booleans())
    def admit_provider(self, by, name, number, issuer, through):
        certificate = der(self.keys.provider(name, number, issuer).certificate)
        action = tx.AdmitProvider(name=name, trust_domain=f"{name}.test", certificate=certificate)
        self.propose(self.voice(by), action, ("AdmitProvider", name, number, issuer), through=through)

    @rule(
        by=authorities,
        name=providers,
        kind=st.sampled_from([tx.SuspendProvider, tx.ReinstateProvider, tx.ReinstateProvider]),
    )
    def change_provider(self, by, name, kind):
        self.propose(self.voice(by), kind(name=name), (kind.__name__, name))

    @rule(by=authorities, name=providers, sure=few)
    def remove_provider(self, by, name, sure):
        if sure == 3:
            self.propose(self.voice(by), tx.RemoveProvider(name=name), ("RemoveProvider", name))

    @precondition(lambda self: self.opened)
    @rule(data=st.data(), by=st.lists(authorities, min_size=1, max_size=4))
    def approve(self, data, by):
        number = data.draw(st.integers(max(0, len(self.opened) - 6), len(self.opened) - 1))
        for name in by:
            self.send(self.voice(name), tx.Approve(proposal=self.opened[number]), ("Approve", number))

    def voice(self, name):
        """An authority with the key it has now, or had."""
        return ("authority", name, self.naive.authorities.get(name, 0))

    # Providers -------------------------------------------------------------------------------------------------------

    def speaker(self, name, number):
        """A provider with a key that counts if it has one, and with some key if not."""
        counting = sorted(self.naive.counting(name)) if name in self.naive.providers else []
        return ("provider", name, counting[number % len(counting)] if counting else number)

    @rule(
        name=providers,
        key=few,
        number=st.integers(0, 5),
        issuer=st.sampled_from(NAMES),
        overlap=st.sampled_from([0, 5, 90_000]),
    )
    def rotate_provider_key(self, name, key, number, issuer, overlap):
        now = self.made.now_ms // 1000 + 1
        body = tx.RotateProviderKey(
            certificate=der(self.keys.provider(name, number, issuer).certificate), retire_at=now + overlap
        )
        self.send(self.speaker(name, key), body, ("RotateProviderKey", number, issuer, overlap))

    @rule(name=providers, key=st.integers(0, 5))
    def speak_with_any_key(self, name, key):
        body = tx.RegisterReferenceValues(id="x0", kind="tpm", digest=bytes([key]) * 32)
        self.send(("provider", name, key), body, ("RegisterReferenceValues", "x0", key))

    @rule(name=providers, key=few, what=ids, number=few, ca=few, end=st.booleans())
    def issuing_cas(self, name, key, what, number, ca, end):
        if end:
            self.send(self.speaker(name, key), tx.RevokeIssuingCa(id=what), ("RevokeIssuingCa", what))
            return
        body = tx.RegisterIssuingCa(id=what, certificate=self.keys.issuing_ca(name, what, number, ca))
        self.send(self.speaker(name, key), body, ("RegisterIssuingCa", what, number, ca))

    @rule(name=providers, key=few, what=ids, number=few, ca=few, sequence=st.integers(0, 4))
    def register_or_rotate_hsm(self, name, key, what, number, ca, sequence):
        kind = tx.RotateHsm if ("hsm", name, what) in self.naive.things else tx.RegisterHsm
        body = kind(**self.keys.hsm(name, what, number, ca), bundle_sequence=sequence)
        self.send(self.speaker(name, key), body, (kind.__name__, what, number, ca, sequence))

    @rule(name=providers, key=few, what=ids, kind=st.sampled_from(["Hsm", "Platform", "Orchestrator", "Service"]))
    def end_something(self, name, key, what, kind):
        if kind == "Service":
            self.send(self.speaker(name, key), tx.RemoveService(name=what), ("RemoveService", what))
        else:
            self.send(self.speaker(name, key), getattr(tx, f"Revoke{kind}")(id=what), (f"Revoke{kind}", what))

    @rule(name=providers, key=few, what=ids, number=few)
    def register_something(self, name, key, what, number):
        public = keys.public_bytes(self.keys.pair(f"{name}/record", number).public_key())
        bodies = [
            (tx.RegisterOrchestrator(id=what, public_key=public), ("RegisterOrchestrator", what, number)),
            (service(tx.RegisterService, what), ("RegisterService", what)),
            (service(tx.UpdateService, what), ("UpdateService", what)),
            (transactions.RegisterPlatform(**{**fields(PLATFORM), "id": what}), ("RegisterPlatform", what)),
        ]
        body, described = bodies[number]
        self.send(self.speaker(name, key), body, described)

    @rule(
        name=providers, key=few, contract=contracts, what=ids, grantee=providers, good=st.sampled_from([True, True, False])
    )
    def offer(self, name, key, contract, what, grantee, good):
        body = tx.OfferAccess(
            contract=contract, service=what, grantee=grantee, conditions=TERMS if good else "permit(", profiles=("tls",)
        )
        self.send(self.speaker(name, key), body, ("OfferAccess", contract, what, grantee, good))

    @rule(
        name=providers,
        key=few,
        contract=contracts,
        kind=st.sampled_from([tx.AcceptAccess, tx.AcceptAccess, tx.WithdrawAccess]),
    )
    def accept_or_withdraw(self, name, key, contract, kind):
        self.send(self.speaker(name, key), kind(contract=contract), (kind.__name__, contract))

    @rule(name=providers, key=few, kind=st.sampled_from(RevocationKind), what=ids)
    def revoke(self, name, key, kind, what):
        self.send(self.speaker(name, key), tx.Revoke(kind=kind, id=what), ("Revoke", kind.value, what))

    @rule(name=providers, key=few, log=ids, size=st.integers(0, 5), root=few, by_hsm=st.booleans(), what=ids)
    def anchor(self, name, key, log, size, root, by_hsm, what):
        body = tx.AnchorLog(log=log, size=size, root=bytes([root]) * 32)
        sender = ("hsm", name, what, key) if by_hsm else self.speaker(name, key)
        self.send(sender, body, ("AnchorLog", log, size, root))

    @rule(name=providers, key=few, what=ids, kind=st.sampled_from(RevocationKind))
    def revoke_as_hsm(self, name, key, what, kind):
        self.send(("hsm", name, what, key), tx.Revoke(kind=kind, id="x2"), ("Revoke", kind.value, "x2"))

    def active(self):
        return sorted(name for name, one in self.naive.providers.items() if one["status"] == "active")

    @precondition(lambda self: self.active())
    @rule(pick=few, other=few, what=ids, contract=contracts, number=few)
    def what_is_meant_to_happen(self, pick, other, what, contract, number):
        """The order in which honest people do things: most of it passes."""
        names = self.active()
        name, grantee = names[pick % len(names)], names[other % len(names)]
        known = ("service", name, what) in self.naive.things
        kind = tx.UpdateService if known else tx.RegisterService
        self.send(self.speaker(name, pick), service(kind, what), (kind.__name__, what))
        self.offer(name, pick, contract, what, grantee, good=True)
        self.accept_or_withdraw(grantee, other, contract, tx.AcceptAccess)
        if number == 0:
            self.accept_or_withdraw(name, pick, contract, tx.WithdrawAccess)
        ca = self.speaker(name, pick)[2]
        if ("hsm", name, what) in self.naive.things and number:
            self.end_something(name, pick, what, "Hsm")
        else:
            self.register_or_rotate_hsm(name, pick, what, number, min(ca, 5), number)

    # Time ------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.made.now_ms // 1000 + WEEK_S < LATEST)
    @rule(seconds=st.sampled_from([3, 100_000, WEEK_S]))
    def time_passes(self, seconds):
        self.made.now_ms += seconds * 1000

    # What must hold --------------------------------------------------------------------------------------------------

    @invariant()
    def both_hold_the_same(self):
        if not hasattr(self, "naive"):
            return
        state = self.made.state
        wanted = {
            name: self.keys.authority(name, key).checkpoint.public_key().public_bytes_raw()
            for name, key in self.naive.authorities.items()
        }
        assert state.authority_set() == wanted
        assert state.parameter("max_age_s") == self.naive.max_age
        assert found_under(state, "provider/", records.ProviderRecord) == {
            f"provider/{name}": one["status"] for name, one in self.naive.providers.items()
        }
        things = {f"{kind}/{provider}/{what}": one["status"] for (kind, provider, what), one in self.naive.things.items()}
        assert {
            key: status
            for prefix, kind in REGISTERED.items()
            for key, status in found_under(state, prefix, kind).items()
        } == things  # fmt: skip
        numbered = [key for name in ("consortium", *self.naive.providers) for key in revoked_by(state, name)]
        assert sorted(numbered) == sorted(f"revocation/{kind}/{by}/{what}" for kind, by, what in self.naive.revoked)
        assert found_under(state, "contract/", records.ContractRecord) == {
            f"contract/{name}": one["status"] for name, one in self.naive.contracts.items()
        }
        assert {key for key in state.records if key.startswith("revocation/")} == {
            "revocation/" + "/".join(one) for one in self.naive.revoked
        }


REGISTERED = {
    "issuing-ca/": records.IssuingCaRecord,
    "hsm/": records.HsmRecord,
    "orchestrator/": records.OrchestratorRecord,
    "service/": records.ServiceRecord,
    "platform/": records.PlatformRecord,
}


def revoked_by(state, registrant):
    """The keys under the numbers of one registrant, each of a record that is there, with the digest over them."""
    index = records.parse(records.RevocationsRecord, state.get(records.revocations_index_key(registrant)))
    numbers = (records.numbered_revocation_index_key(registrant, number) for number in range(1, index.count + 1))
    found = [records.parse(records.IndexRecord, state.get(key)).holders[0] for key in numbers]
    assert index.digest == revocation_list.digest_after(bytes(32), found)
    assert all(state.get(key) is not None for key in found)
    return found


def found_under(state, prefix, kind):
    return {key: records.parse(kind, value).status.value for key, value in state.records.items() if key.startswith(prefix)}


def fields(record):
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}


def service(kind, name):
    return kind(**{**fields(SERVICE), "name": name, "callers": ()})


def run(directory, examples, steps, *, derandomize=False):
    Registry.keys, Registry.passed = Keys(directory), set()
    run_state_machine_as_test(
        Registry, settings=settings(deadline=None, max_examples=examples, stateful_step_count=steps, derandomize=derandomize)
    )


def test_the_registry_does_what_a_naive_one_does(tmp_path):
    """verifies that: whatever is sent by whomever, both answer alike and hold the same; the set changes by quorum only."""
    run(tmp_path / "c", 16, 50, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_registry_does_what_a_naive_one_does_for_ten_thousand_steps(tmp_path):
    run(tmp_path / "c", 100, 100)
    every = {*transactions.ACTIONS, "Approve", *transactions.PROVIDER_BODIES}
    assert Registry.passed <= every
    assert len(every - Registry.passed) <= 4  # it did not just refuse what is refused; which kinds come up is left to chance
