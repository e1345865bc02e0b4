"""One ledger on which everything happened once, and a good transaction of every kind with who may send it."""

import itertools
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.ledger import ceremony, transactions
from moorline.ledger import transactions as tx
from moorline.ledger.records import PackageRule, RevocationKind
from moorline.ledger.state import Applied
from moorline.ledger.transactions import SenderKind
from moorline.wire import keys
from moorline.wire.certificates import Issuer

from .conftest import NAMES, NOW, consortium_at, der, hsm_body
from .test_registration import PLATFORM, SERVICE, issuing_ca

QUORUM = NAMES[:3]
TERMS = "permit(principal, action, resource);"


def spki(key=None):
    return keys.public_bytes((key or ec.generate_private_key(ec.SECP256R1())).public_key())


@dataclass
class Sender:
    """Somebody who sends: as what, under which name, with which key."""

    kind: SenderKind
    name: str
    signer: keys.Signer


@dataclass
class Case:
    """A transaction that passes when `sender` sends it; `made()` gives a fresh body each time."""

    kind: str
    sender: str
    made: object


class World:
    """Four authorities and one retired; alpha and beta, gamma suspended, delta removed; HSMs, one of them revoked."""

    def __init__(self, directory):
        self.count = itertools.count()
        self.consortium = made = consortium_at(directory)
        self.history = []  # (block time, transaction) of every block so far
        apply_block = made.block

        def recorded(*batch):
            outcomes = apply_block(*batch)
            self.history += [(made.state.time_ms, one) for one in batch]
            return outcomes

        made.block = recorded
        self.senders = {}
        for name in NAMES:
            self.add(name, SenderKind.AUTHORITY, name, made.authorities[name].signer())
        self.admit_and_retire("authority-9")
        self.providers = {
            name: made.admitted(name, f"{name}.test") for name in ("alpha", "beta", "gamma", "delta", "epsilon")
        }
        for name, provider in self.providers.items():
            self.add(name, SenderKind.PROVIDER, name, keys.KeySigner(provider.ca.key))
        self.hsm("alpha", "hsm-1")
        self.hsm("beta", "hsm-1")
        self.hsm("alpha", "hsm-0")
        self.applied("alpha", tx.RevokeHsm(id="hsm-0"))
        self.hsm("gamma", "hsm-1")
        self.applied("alpha", SERVICE)
        self.applied("alpha", tx.RegisterIssuingCa(id="ca-1", certificate=issuing_ca(self.providers["alpha"])))
        self.applied("alpha", tx.RegisterOrchestrator(id="o-1", public_key=spki()))
        self.applied("alpha", PLATFORM)
        self.applied("alpha", self.offer("c-1"))
        self.applied("alpha", self.offer("c-2"))
        self.applied("beta", tx.AcceptAccess(contract="c-2"))
        self.rotated("epsilon")
        for action in (tx.SuspendProvider(name="gamma"), tx.RemoveProvider(name="delta")):
            assert isinstance(made.decide(action), Applied)
        for name, provider in (("stranger", "nobody"), ("imposter", "alpha")):
            signer = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
            self.add(name, SenderKind.PROVIDER, provider, signer)
        self.add("false authority", SenderKind.AUTHORITY, NAMES[0], keys.KeySigner(ec.generate_private_key(ec.SECP256R1())))
        # The right key under the wrong title: a provider's as authority, an authority's as provider, a CA's as HSM.
        self.add("alpha as authority", SenderKind.AUTHORITY, "alpha", self.senders["alpha"].signer)
        self.add("authority as provider", SenderKind.PROVIDER, NAMES[0], self.senders[NAMES[0]].signer)
        self.add("alpha as its HSM", SenderKind.HSM, "alpha/hsm-1", self.senders["alpha"].signer)
        self.add("HSM as alpha", SenderKind.PROVIDER, "alpha", self.senders["alpha/hsm-1"].signer)
        self.add("HSM of alpha as beta's", SenderKind.HSM, "beta/hsm-1", self.senders["alpha/hsm-1"].signer)
        self.add("checkpoint key", SenderKind.AUTHORITY, NAMES[0], keys.KeySigner(made.authorities[NAMES[0]].checkpoint))
        self.add("CA key of authority", SenderKind.AUTHORITY, NAMES[0], keys.KeySigner(made.authorities[NAMES[0]].ca.key))

    def add(self, label, kind, name, signer):
        self.senders[label] = Sender(kind=kind, name=name, signer=signer)

    def authority(self, name):
        root_key = ceremony.serialization.load_pem_private_key(
            (self.consortium.made.directory / "root" / "root.key.pem").read_bytes(), None
        )
        root = ceremony.x509.load_der_x509_certificate(self.consortium.made.genesis.roots[0])
        return ceremony._authority(name, Issuer(certificate=root, key=root_key), NOW)

    def authority_body(self, kind, made):
        return kind(
            name=made.name,
            certificate=der(made.ca.certificate),
            transaction_key=keys.public_bytes(made.transaction.public_key()),
            checkpoint_key=made.checkpoint.public_key().public_bytes_raw(),
            address="127.0.0.1:9",
        )

    def admit_and_retire(self, name):
        made = self.authority(name)
        assert isinstance(self.consortium.decide(self.authority_body(tx.AdmitAuthority, made), QUORUM), Applied)
        self.consortium.authorities[name] = made
        self.add(name, SenderKind.AUTHORITY, name, made.signer())
        assert isinstance(self.consortium.decide(tx.RetireAuthority(name=name), NAMES), Applied)

    def hsm(self, provider, name):
        key = ec.generate_private_key(ec.SECP256R1())
        self.applied(provider, hsm_body(self.providers[provider], hsm=name, key=key))
        self.add(f"{provider}/{name}", SenderKind.HSM, f"{provider}/{name}", keys.KeySigner(key))

    def rotated(self, name):
        """The provider has another key; the old one's time is over."""
        new = self.consortium.provider(name, f"{name}.test")
        retire_at = self.consortium.now_ms // 1000 + 60
        self.applied(name, tx.RotateProviderKey(certificate=new.der, retire_at=retire_at))
        self.consortium.now_ms = retire_at * 1000
        self.add(f"{name}, old key", SenderKind.PROVIDER, name, self.senders[name].signer)
        self.add(name, SenderKind.PROVIDER, name, keys.KeySigner(new.ca.key))

    def offer(self, name):
        return tx.OfferAccess(contract=name, service="records", grantee="beta", conditions=TERMS, profiles=("tls",))

    def signed(self, label, body, **changes):
        sender = self.senders[label]
        payload = self.consortium.payload(sender.kind, sender.name, body, **changes)
        return transactions.sign(payload, sender.signer)

    def tried(self, label, body, **changes):
        """What would come of it; the ledger does not move."""
        from moorline.ledger import state

        found = self.consortium.state
        done = state.execute(found, [self.signed(label, body, **changes)], time_ms=self.consortium.now_ms + 1000)
        (outcome,) = done.outcomes
        return outcome, done.state

    def applied(self, label, body):
        sender = self.senders[label]
        outcome = self.consortium.send(self.consortium.payload(sender.kind, sender.name, body), sender.signer)
        assert isinstance(outcome, Applied), outcome
        return outcome

    # One of each -----------------------------------------------------------------------------------------------------

    def provider_body(self):
        provider = self.consortium.provider("zeta", "zeta.test")
        return tx.AdmitProvider(name="zeta", trust_domain="zeta.test", certificate=provider.der)

    def actions(self):
        """A good action of every kind."""
        following = self.authority("authority-2")
        return [
            self.authority_body(tx.AdmitAuthority, self.authority("authority-5")),
            tx.RetireAuthority(name="authority-4"),
            self.authority_body(tx.RotateAuthorityKey, following),
            tx.SetParameter(name="max_age_s", value=60),
            tx.RevokeGlobally(kind=RevocationKind.CHIP, id="ab" * 32),
            self.provider_body(),
            tx.SuspendProvider(name="alpha"),
            tx.ReinstateProvider(name="gamma"),
            tx.RemoveProvider(name="beta"),
        ]

    def bodies(self):
        """A good body of every kind with the label of who sends it."""
        alpha = self.providers["alpha"]
        rotate = replace(hsm_body(alpha, kind=tx.RotateHsm, sequence=2), address="127.0.0.1:5")
        update = tx.UpdateService(name="records", use_case="4.7", packages=SERVICE.packages, profiles=("tls",), callers=())
        retire_at = self.consortium.now_ms // 1000 + 600
        return [
            ("authority-1", tx.Approve(proposal=self.proposal())),
            *(("authority-1", transactions.propose(action)) for action in self.actions()),
            (
                "alpha",
                tx.RotateProviderKey(certificate=self.consortium.provider("alpha", "alpha.test").der, retire_at=retire_at),
            ),
            ("alpha", tx.RegisterIssuingCa(id="ca-2", certificate=issuing_ca(alpha))),
            ("alpha", tx.RevokeIssuingCa(id="ca-1")),
            ("alpha", hsm_body(alpha, hsm="hsm-2")),
            ("alpha", rotate),
            ("alpha", tx.RevokeHsm(id="hsm-1")),
            ("alpha", tx.RegisterOrchestrator(id="o-2", public_key=spki())),
            ("alpha", tx.RevokeOrchestrator(id="o-1")),
            ("alpha", replace(SERVICE, name="voice")),
            ("alpha", update),
            ("alpha", tx.RemoveService(name="records")),
            ("alpha", replace(PLATFORM, id="h2", chip_id=b"d" * 64)),
            ("alpha", tx.RevokePlatform(id="h1")),
            ("alpha", tx.RegisterReferenceValues(id="fw", kind="tpm", digest=b"1" * 32)),
            ("alpha", self.offer("c-3")),
            ("beta", tx.AcceptAccess(contract="c-1")),
            ("beta", tx.WithdrawAccess(contract="c-2")),
            *(("alpha", tx.Revoke(kind=kind, id="0a")) for kind in RevocationKind if kind is not RevocationKind.VENDOR_ROOT),
            ("alpha", tx.AnchorLog(log="hsm-1", size=3, root=b"r" * 32)),
        ]

    def proposal(self):
        """A proposal that authority-2 opened."""
        sender = self.senders["authority-2"]
        action = tx.SetParameter(name="max_age_s", value=100 + next(self.count))
        payload = self.consortium.payload(sender.kind, sender.name, transactions.propose(action))
        assert isinstance(self.consortium.send(payload, sender.signer), Applied)
        return transactions.proposal_id(payload)


def package(number):
    return PackageRule(package_digest=number.to_bytes(32, "big"), measurement=b"m" * 48)
