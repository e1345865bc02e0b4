"""A provider with real keys under a false root: certificates, cosigned ledger states, packages, a launcher."""

import asyncio
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant, Validity
from moorline.errors import Refused
from moorline.ledger import records
from moorline.ledger.checkpoint import Checkpoint, Note, authority_set_digest, cosign
from moorline.ledger.light_client import LedgerTrust
from moorline.ledger.proof import make_bundle
from moorline.ledger.records import Status
from moorline.ledger.tree import Tree
from moorline.nfv import SpiffeId
from moorline.orchestration import descriptor, package
from moorline.orchestration.launcher import Launcher, SessionClock
from moorline.services.callers import Callers
from moorline.services.ledger_view import LedgerView
from moorline.wire import cbor, certificates, keys, schema
from moorline.wire.certificates import Issuer
from moorline.wire.session import Activation, LauncherSecrets

NOW = Instant(1_790_000_000)
MEASUREMENT = bytes(range(48))
CHIP = bytes(range(64))


def der(certificate):
    return certificate.public_bytes(Encoding.DER)


@dataclass
class Ledger:
    """Four authorities who cosign whatever records they are given; `prove` is what an orchestrator asks."""

    records: dict[str, bytes] = field(default_factory=dict)
    authorities: dict = field(default_factory=lambda: {f"a{n}": ed25519.Ed25519PrivateKey.generate() for n in range(4)})
    ledger_id: bytes = b"L" * 32
    height: int = 10
    now: Instant = NOW
    asked: list = field(default_factory=list)

    @property
    def public(self):
        return {name: key.public_key().public_bytes_raw() for name, key in self.authorities.items()}

    def put(self, key, record):
        self.records[key] = records.encode(record)
        self.height += 1

    def bundle(self, wanted, *, signers=4, time=None):
        tree = Tree().updated(self.records)
        checkpoint = Checkpoint(
            ledger_id=self.ledger_id,
            size=self.height + 1,
            root=bytes(32),
            height=self.height,
            time_ms=(time or self.now) * 1000,
            state_root=tree.root,
            authorities=authority_set_digest(self.public),
        )
        lines = [
            cosign(checkpoint, name=name, key=key, now=self.now) for name, key in list(self.authorities.items())[:signers]
        ]
        note = Note(checkpoint=checkpoint, signatures=tuple(lines)).encode()
        return make_bundle(note=note, changes=(), tree=tree, value_of=self.records.get, keys=wanted)

    async def prove(self, wanted, *, height=0):
        self.asked.append(tuple(wanted))
        return self.bundle(wanted)


@dataclass
class Provider:
    """alpha.test: certificates down to an issuing CA, its records on the ledger, its orchestrator's intent key."""

    name: str = "alpha"
    trust_domain: str = "alpha.test"

    def __post_init__(self):
        self.validity = Validity(not_before=Instant(NOW - 3600), not_after=Instant(NOW + 86400))
        self.ledger = Ledger()
        self.root = self._issuer(
            lambda key: certificates.root_certificate(key, name="root", validity=self.validity, serial=1)
        )
        authority = self._issuer(self._under(certificates.authority_certificate, self.root, 2, name="authority-1"))
        self.ca = self._issuer(
            self._under(certificates.provider_certificate, authority, 3, name=self.name, trust_domain=self.trust_domain)
        )
        self.issuing = self._issuer(self._under(certificates.issuing_ca_certificate, self.ca, 4, name="ca-1"))
        self.above = (der(self.issuing.certificate), der(self.ca.certificate), der(authority.certificate))
        self.intent_signer = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
        self.trust = LedgerTrust(
            ledger_id=self.ledger.ledger_id,
            authorities=self.ledger.public,
            quorum=3,
            roots=(der(self.root.certificate),),
            simulated_allowed=True,
            max_age_s=30,
            known_s=NOW,
            trusting_period_s=86_400,
        )
        self._register()

    def _issuer(self, make):
        key = ec.generate_private_key(ec.SECP256R1())
        return Issuer(certificate=make(key), key=key)

    def _under(self, builder, issuer, serial, **names):
        return lambda key: builder(key.public_key(), issuer=issuer, validity=self.validity, serial=serial, **names)

    def _register(self):
        ledger, name = self.ledger, self.name
        ledger.put(
            records.provider_key(name),
            records.ProviderRecord(
                name=name,
                trust_domain=self.trust_domain,
                status=Status.ACTIVE,
                ca_certificates=(der(self.ca.certificate),),
                retire_at=(0,),
            ),
        )
        ledger.put(
            records.issuing_ca_key(name, "ca-1"),
            records.IssuingCaRecord(
                provider=name, id="ca-1", status=Status.ACTIVE, certificate=der(self.issuing.certificate)
            ),
        )
        hsm_key = ec.generate_private_key(ec.SECP256R1())
        hsm = certificates.hsm_certificate(
            hsm_key.public_key(),
            spiffe_id=SpiffeId.parse(f"spiffe://{self.trust_domain}/hsm/hsm-1"),
            address="https://127.0.0.1:1",
            issuer=self.ca,
            validity=self.validity,
            serial=5,
        )
        self.hsm = Issuer(certificate=hsm, key=hsm_key)
        ledger.put(
            records.hsm_key(name, "hsm-1"),
            records.HsmRecord(
                provider=name,
                id="hsm-1",
                status=Status.ACTIVE,
                certificate=der(hsm),
                address="127.0.0.1:7443",
                est_url="https://127.0.0.1:7444",
                kem_public=b"k" * 65,
                signing_public=keys.public_bytes(hsm_key.public_key()),
                bundle_sequence=1,
            ),
        )
        self.orchestrator()
        for host, location in (("h1", "EU/DE"), ("h2", "EU/DE"), ("h3", "US/CA")):
            self.platform(host, location=location)

    def orchestrator(self, status=Status.ACTIVE, *, name="o1"):
        self.ledger.put(
            records.orchestrator_key(self.name, name),
            records.OrchestratorRecord(
                provider=self.name, id=name, status=status, public_key=keys.public_bytes(self.intent_signer.public_key())
            ),
        )

    def platform(self, host, *, location="EU/DE", status=Status.ACTIVE, chip=CHIP):
        self.ledger.put(
            records.platform_key(self.name, host),
            records.PlatformRecord(
                provider=self.name,
                id=host,
                status=status,
                chip_id=chip,
                product="Milan",
                ek_digest=bytes(32),
                location=location,
                tag_digest=bytes(32),
                simulated=True,
            ),
        )

    def service(self, *digests, status=Status.ACTIVE, measurement=MEASUREMENT, profiles=("tls",), use_case="4.7"):
        self.ledger.put(
            records.service_key(self.name, "records"),
            records.ServiceRecord(
                provider=self.name,
                name="records",
                status=status,
                use_case=use_case,
                packages=tuple(records.PackageRule(package_digest=digest, measurement=measurement) for digest in digests),
                profiles=profiles,
                callers=("beta",),
            ),
        )

    def validity_of_leaves(self, now=NOW):
        return Validity(not_before=Instant(now - 60), not_after=Instant(now + 3000))

    def svid(self, path, public, *, now=NOW, issuer=None, serial=77):
        """A leaf with its chain, DER, leaf first."""
        leaf = certificates.leaf_certificate(
            public,
            spiffe_id=SpiffeId.parse(f"spiffe://{self.trust_domain}/{path}"),
            issuer=issuer or self.issuing,
            validity=self.validity_of_leaves(now),
            serial=serial,
        )
        return (der(leaf), *self.above)


@dataclass
class Publisher:
    """A publisher's key with its self-signed certificate, and packages it signs."""

    name: str = "publisher"

    def __post_init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        validity = Validity(not_before=Instant(NOW - 3600), not_after=Instant(NOW + 86400))
        self.certificate = package.publisher_certificate(self.key, name=self.name, validity=validity, serial=11)
        self.der = der(self.certificate)

    def described(self, **changes):
        fields = {
            "service": "records",
            "provider": "alpha",
            "version": "1.0.0",
            "use_case": "4.7",
            "jurisdiction": "EU/DE",
            "memory_mib": 256,
            "pids": 64,
            "artifact": descriptor.FUNCTION_FILE,
        }
        return descriptor.Descriptor(**(fields | changes))

    def build(self, *, function=b"class Function: ...\n", extra=None, **changes):
        content = package.PackageContent(
            descriptor=self.described(**changes), function=function, release=NOW, extra=extra or {}
        )
        return package.build(content, package.Publisher(certificate=self.certificate, key=self.key))


class BrokerSession:
    """The far end of a launcher's session: hands out leases and time, and can be told to refuse."""

    def __init__(self, *, count=3, epoch=7, now=NOW):
        self.count, self.epoch, self.now_told, self.first = count, epoch, now, 0
        self.epoch_not_after = now + 3600
        self.refuse = None
        self.calls = []
        self.closed = False

    def secrets(self):
        lease = LauncherSecrets(
            launch_key=bytes([self.epoch]) * 32,
            epoch=self.epoch,
            epoch_not_after=self.epoch_not_after,
            lease_first=self.first,
            lease_count=self.count,
            lease_not_after=self.epoch_not_after,
        )
        self.first += self.count
        return lease

    async def call(self, operation, body):
        self.calls.append(operation)
        if self.refuse is not None:
            raise self.refuse
        if operation == "launcher.lease":
            return schema.encode(self.secrets())
        if operation == "time":
            return cbor.encode({"now": self.now_told})
        raise Refused("session.operation", "no such operation", got=operation)


class Monotonic:
    """A monotonic clock that stands until it is moved."""

    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


@dataclass
class Enclave:
    """A launcher with everything around it."""

    launcher: Launcher
    session: BrokerSession
    monotonic: Monotonic
    signer: keys.KeySigner

    async def exchange(self, request):
        return await self.launcher.answer(request)


class Kept(dict):
    """Documents of a service, in memory."""

    document, set_document = dict.get, dict.__setitem__


def guard_of(provider, **prover):
    """Who judges the certificates of callers at the doors of this provider's services, by its ledger."""
    asked = prover.get("prover", provider.ledger)
    clock = SimpleNamespace(now=lambda: provider.ledger.now)
    view = LedgerView(asked, provider.trust, Kept(), clock)
    return Callers(view, provider=provider.name, trust_domain=provider.trust_domain, clock=clock)


@pytest.fixture
def provider():
    return Provider()


@pytest.fixture
def publisher():
    return Publisher()


def enclave_of(provider, *, count=3, path="launcher/l1", renew_after_s=1800):
    signer = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
    chain = provider.svid(path, signer.public_key())
    session, monotonic = BrokerSession(count=count), Monotonic()
    activation = Activation(
        spiffe_id=f"spiffe://{provider.trust_domain}/{path}",
        certificate=chain[0],
        chain=chain[1:],
        now=NOW,
        renew_after_s=renew_after_s,
        body=b"",
    )
    launcher = Launcher(
        trust=provider.trust,
        provider=provider.name,
        signer=signer,
        session=session,
        secrets=session.secrets(),
        activation=activation,
        clock=SessionClock(monotonic),
    )
    return Enclave(launcher=launcher, session=session, monotonic=monotonic, signer=signer)


@pytest.fixture
def enclave(provider):
    return enclave_of(provider)


async def until(condition, *, within_s=10.0):
    """Wait for a condition, not for a time; fails when it never comes."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never came")
