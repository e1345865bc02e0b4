"""A real SoftHSM token with a provider's keys, certificates under a real (throw-away) root, and an empty broker database."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, SystemClock, Validity
from moorline.hsm.ceremony import Ceremony, initialise
from moorline.hsm.issuing import HsmIdentity, IssuingCa
from moorline.hsm.launch_keys import COUNTER, LaunchKeys, Terms
from moorline.hsm.pool import KeyPool, Watermarks
from moorline.hsm.provider import HsmCertificates, certify_hsm
from moorline.hsm.token import Token, open_token
from moorline.nfv import Role, SpiffeId
from moorline.storage import broker_facts
from moorline.storage.broker_store import BrokerStore
from moorline.wire import certificates
from moorline.wire.certificates import Issuer

sys.path.insert(0, str(Path(__file__).parent))
from looking import issuing_ca

NOW = Instant(1_800_000_000)
DOMAIN = "alpha.test"
LONG = Validity(not_before=Instant(NOW - 3600), not_after=Instant(NOW + 30 * 24 * 3600))


def der(certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True)
class Provider:
    """Root, authority and provider with software keys, and what the provider signed for the token."""

    root: Issuer
    authority: Issuer
    issuer: Issuer
    signed: HsmCertificates

    @property
    def above(self) -> tuple[bytes, ...]:
        return (der(self.issuer.certificate), der(self.authority.certificate))


def make_provider(keys, *, domain: str = DOMAIN, now: Instant = NOW) -> Provider:
    validity = Validity(not_before=Instant(now - 3600), not_after=Instant(now + 30 * 24 * 3600))
    made = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "authority", "provider")}
    root = certificates.root_certificate(made["root"], name="root", validity=validity, serial=1)
    top = Issuer(certificate=root, key=made["root"])
    middle = Issuer(
        certificate=certificates.authority_certificate(
            made["authority"].public_key(), name="authority-1", issuer=top, validity=validity, serial=2
        ),
        key=made["authority"],
    )
    issuer = Issuer(
        certificate=certificates.provider_certificate(
            made["provider"].public_key(),
            name="alpha",
            trust_domain=domain,
            issuer=middle,
            validity=validity,
            serial=3,
        ),
        key=made["provider"],
    )
    signed = certify_hsm(
        issuer,
        keys,
        trust_domain=domain,
        hsm="hsm-1",
        issuing_ca="ca-1",
        address="127.0.0.1:7443",
        validity=validity,
        serials=(4, 5),
    )
    return Provider(root=top, authority=middle, issuer=issuer, signed=signed)


@pytest.fixture(scope="session")
def ceremony(tmp_path_factory) -> Ceremony:
    if shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM is not installed")
    return initialise(tmp_path_factory.mktemp("hsm") / "token", label="alpha")


@pytest.fixture(scope="session")
def provider(ceremony) -> Provider:
    return make_provider(ceremony.keys)


@pytest.fixture(scope="session")
def real_now(ceremony) -> Provider:
    """The same chain as of this machine's time: some foreign tools take no other."""
    return make_provider(ceremony.keys, now=SystemClock().now())


@pytest.fixture(scope="module")  # not longer: another test's set-up opens another token
def token(ceremony):
    with open_token(ceremony.location) as opened:
        yield opened


@pytest.fixture
def store(database_url):
    """The store on each kind of database."""
    opened = BrokerStore.open(database_url)
    yield opened
    opened.close()


@pytest.fixture
def ca(token, provider) -> IssuingCa:
    return issuing_ca(token, provider.signed.issuing_ca, provider.above)


@pytest.fixture
def identity(token, provider) -> HsmIdentity:
    spiffe_id = SpiffeId(trust_domain=DOMAIN, role=Role.HSM, segments=("hsm-1",))
    return HsmIdentity(token, certificate=provider.signed.hsm, above=provider.above, spiffe_id=spiffe_id)


@pytest.fixture
def pool(token, store) -> KeyPool:
    return KeyPool(token, store, Watermarks(low=4, high=8))


@pytest.fixture
def launch_keys(token: Token, store) -> LaunchKeys:
    # The token is shared by all tests; this test's new database joins at the value its counter has reached.
    with store.transaction() as c:
        broker_facts.set_fact(c, "counter", token.counter(COUNTER))
    return LaunchKeys(token, store, Terms(epoch_s=3600, grace_s=60, lease_count=10, lease_s=1800))
