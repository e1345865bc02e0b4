"""A consortium of four authorities and two providers, made of real keys, and blocks without any engine."""

import itertools
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant, Validity
from moorline.ledger import ceremony, state, transactions
from moorline.ledger.genesis import Parameters
from moorline.ledger.state import Applied, Rejected, State
from moorline.ledger.transactions import Approve, Sender, SenderKind
from moorline.nfv import SpiffeId
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

NOW = Instant(1_790_000_000)
NAMES = ("authority-1", "authority-2", "authority-3", "authority-4")
DOMAIN = "consortium.test"


@dataclass
class Provider:
    """A provider's offline CA key and its certificate."""

    name: str
    trust_domain: str
    ca: Issuer

    @property
    def der(self):
        return self.ca.certificate.public_bytes(Encoding.DER)


@dataclass
class Consortium:
    """The state machine with everybody's keys: `send` makes a block of one transaction."""

    made: ceremony.Ceremony
    authorities: dict[str, ceremony.AuthorityKeys]
    state: State
    now_ms: int = NOW * 1000
    counter: itertools.count = field(default_factory=itertools.count)

    def payload(self, kind, name, body, **changes):
        values = {
            "sender": Sender(kind=kind, name=name),
            "ledger_id": self.state.ledger_id,
            "nonce": secrets.token_bytes(32),
            "valid_until": self.state.height + 100,
        }
        return transactions.make(body, **(values | changes))

    def block(self, *batch):
        self.now_ms += 1000
        executed = state.execute(self.state, batch, time_ms=self.now_ms)
        self.state = executed.state
        return executed.outcomes

    def send(self, payload, signer) -> Applied | Rejected:
        return self.block(transactions.sign(payload, signer))[0]

    def as_authority(self, name, body, **changes):
        payload = self.payload(SenderKind.AUTHORITY, name, body, **changes)
        return self.send(payload, self.authorities[name].signer())

    def as_provider(self, provider, body, **changes):
        payload = self.payload(SenderKind.PROVIDER, provider.name, body, **changes)
        return self.send(payload, keys.KeySigner(provider.ca.key))

    def decide(self, action, names=NAMES[:2]):
        """Propose by the first, approve by the others; the last outcome."""
        payload = self.payload(SenderKind.AUTHORITY, names[0], transactions.propose(action))
        outcome = self.send(payload, self.authorities[names[0]].signer())
        if isinstance(outcome, Rejected):
            return outcome
        for name in names[1:]:
            outcome = self.as_authority(name, Approve(proposal=transactions.proposal_id(payload)))
        return outcome

    def provider(self, name, trust_domain, issuer="authority-1"):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = ceremony.issue_provider(
            self.authorities[issuer].ca, key.public_key(), name=name, trust_domain=trust_domain, now=NOW
        )
        return Provider(name=name, trust_domain=trust_domain, ca=Issuer(certificate=certificate, key=key))

    def admitted(self, name, trust_domain):
        provider = self.provider(name, trust_domain)
        outcome = self.decide(transactions.AdmitProvider(name=name, trust_domain=trust_domain, certificate=provider.der))
        assert isinstance(outcome, Applied), outcome
        return provider


def consortium_at(directory: Path, *, simulated_allowed=True, addresses=None, max_age_s=30, now=NOW) -> Consortium:
    made = ceremony.genesis_ceremony(
        directory,
        names=NAMES,
        consortium_domain=DOMAIN,
        simulated_allowed=simulated_allowed,
        parameters=Parameters(max_age_s=max_age_s),
        addresses=addresses or dict.fromkeys(NAMES, "127.0.0.1:1"),
        now=now,
    )
    loaded = {name: ceremony.load_authority(directory / "authorities" / name) for name in NAMES}
    return Consortium(made=made, authorities=loaded, state=state.initial(made.genesis), now_ms=now * 1000)


@pytest.fixture
def consortium(tmp_path):
    return consortium_at(tmp_path / "consortium")


@pytest.fixture
def alpha(consortium):
    return consortium.admitted("alpha", "alpha.test")


@pytest.fixture
def beta(consortium):
    return consortium.admitted("beta", "beta.test")


def der(certificate):
    return certificate.public_bytes(Encoding.DER)


def hsm_body(provider, *, hsm="hsm-1", key=None, sequence=1, kind=transactions.RegisterHsm, trust_domain=None):
    """A registration of an HSM with a fresh key, certified by the provider."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    certificate = certificates.hsm_certificate(
        key.public_key(),
        spiffe_id=SpiffeId.parse(f"spiffe://{trust_domain or provider.trust_domain}/hsm/{hsm}"),
        address="https://127.0.0.1:4433",
        issuer=provider.ca,
        validity=Validity(not_before=Instant(NOW - 60), not_after=Instant(NOW + 86400)),
        serial=7,
    )
    return kind(
        id=hsm,
        certificate=der(certificate),
        address="127.0.0.1:4433",
        est_url="https://127.0.0.1:4434",
        kem_public=b"k" * 65,
        signing_public=keys.public_bytes(key.public_key()),
        bundle_sequence=sequence,
    )
