"""Two providers, a ledger of signed records, a broker that appraises real (simulated) SNP evidence, a function, a device.

Only the processes and the token are left out: every key, chain, proof, report and connection is real, under false roots.
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib.util
import io
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from moorline.attesters.reports import Report
from moorline.channel.session import SessionFacts
from moorline.channel.session_port import serve_sessions
from moorline.clock import Instant, SystemClock
from moorline.device.connection import Wanted, connect
from moorline.device.store import DeviceStore
from moorline.errors import NotAuthentic, Refused, Unavailable
from moorline.evidence.snp import parse_report
from moorline.ledger import checkpoint, proof, records, standing
from moorline.ledger.client import Endpoint
from moorline.ledger.light_client import LedgerTrust, verify_bundle
from moorline.ledger.records import ContractStatus, Status
from moorline.ledger.tree import Tree
from moorline.nfv import SpiffeId
from moorline.services import broker_access, http
from moorline.services.http import TlsIdentity
from moorline.simulators.manufacturer import create_manufacturer, open_chip
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_revocations import RevocationStore
from moorline.storage.broker_store import BrokerStore
from moorline.verification.anchors import parse_anchor_file
from moorline.verification.snp import endorsements_from_table, verify_snp
from moorline.wire import cbor, guest, keys, launch, schema
from moorline.wire.certificates import spiffe_id_of
from moorline.wire.session import (
    Activation,
    AuthoriseDeviceCall,
    FunctionFields,
    FunctionSecrets,
    ProveCall,
    SessionRole,
    resume_message,
)
from moorline.workload_agent import agent

_SPEC = importlib.util.spec_from_file_location("channel_world", Path(__file__).parents[1] / "channel" / "conftest.py")
_CHANNEL = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _CHANNEL
_SPEC.loader.exec_module(_CHANNEL)
Consortium = _CHANNEL.Consortium
der = _CHANNEL.der

sys.modules["device_world"] = sys.modules[__name__]

FUNCTION = Path(__file__).parents[2] / "examples" / "records" / "function.py"
MEASUREMENT = hashlib.sha384(b"the measured runtime").digest()
NAMES = ("authority-1", "authority-2", "authority-3", "authority-4")


@pytest.fixture(scope="session")
def manufacturer(tmp_path_factory):
    """RSA-4096 takes seconds: one maker a test run."""
    return create_manufacturer(tmp_path_factory.mktemp("manufacturer"), now=Instant(int(time.time()) - 3600))


@dataclass
class Ledger:
    """Records under a state tree, and checkpoints signed by three of four authorities."""

    roots: tuple[bytes, ...]
    max_age_s: int = 30
    ledger_id: bytes = b"L" * 32
    height: int = 1
    values: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self):
        self.keys = {name: ed25519.Ed25519PrivateKey.generate() for name in NAMES}
        self.publics = {name: key.public_key().public_bytes_raw() for name, key in self.keys.items()}

    @property
    def trust(self):
        return LedgerTrust(
            ledger_id=self.ledger_id,
            authorities=self.publics,
            quorum=3,
            roots=self.roots,
            simulated_allowed=True,
            max_age_s=self.max_age_s,
            known_s=int(time.time()),
            trusting_period_s=86_400,
        )

    def put(self, key, record):
        self.values[key] = records.encode(record)
        self.height += 1

    def bundle(self, wanted, *, at=None, signers=NAMES[:3]):
        at = Instant(int(time.time())) if at is None else at
        tree = Tree().updated(self.values)
        height = at * 1000 + self.height  # one block a second and one a record: never two states at one height
        made = checkpoint.Checkpoint(
            ledger_id=self.ledger_id,
            size=height + 1,
            root=bytes(32),
            height=height,
            time_ms=at * 1000,
            state_root=tree.root,
            authorities=checkpoint.authority_set_digest(self.publics),
        )
        lines = tuple(checkpoint.cosign(made, name=name, key=self.keys[name], now=at) for name in signers)
        note = checkpoint.Note(checkpoint=made, signatures=lines).encode()
        return proof.make_bundle(note=note, changes=(), tree=tree, value_of=self.values.get, keys=wanted)

    async def prove(self, wanted, *, height=0):
        return self.bundle(wanted)

    def provider(self, consortium, name):
        self.put(
            records.provider_key(name),
            records.ProviderRecord(
                name=name,
                trust_domain=consortium.trust_domain,
                status=Status.ACTIVE,
                ca_certificates=(der(consortium.provider.certificate),),
                retire_at=(0,),
            ),
        )
        self.put(
            records.issuing_ca_key(name, "ca-1"),
            records.IssuingCaRecord(
                provider=name, id="ca-1", status=Status.ACTIVE, certificate=der(consortium.ca.certificate)
            ),
        )
        public = keys.public_bytes(consortium.hsm.key.public_key())
        self.put(
            records.hsm_key(name, "hsm-1"),
            records.HsmRecord(
                provider=name,
                id="hsm-1",
                status=Status.ACTIVE,
                certificate=der(consortium.hsm.certificate),
                address="127.0.0.1:1",
                est_url="https://127.0.0.1:2",
                kem_public=b"k",
                signing_public=public,
                bundle_sequence=1,
            ),
        )

    def service(self, *, status=Status.ACTIVE, profiles=("tls",)):
        self.put(
            records.service_key("alpha", "records"),
            records.ServiceRecord(
                provider="alpha",
                name="records",
                status=status,
                use_case="4.7",
                packages=(),
                profiles=profiles,
                callers=(),
            ),
        )

    def contract(self, name="c1", *, grantee="beta", status=ContractStatus.ACCEPTED, **changes):
        self.put(
            records.contract_key(name),
            records.ContractRecord(
                **{
                    "id": name,
                    "provider": "alpha",
                    "service": "records",
                    "grantee": grantee,
                    "conditions": "permit(principal, action, resource);",
                    "profiles": ("tls",),
                    "status": status,
                    **changes,
                }
            ),
        )

    def revoke(self, kind, registrant, what):
        record = records.RevocationRecord(kind=kind, registrant=registrant, id=what, time_ms=0)
        self.put(records.revocation_key(kind, registrant, what), record)


class Broker:
    """Alpha's broker: appraises function evidence as PROTOCOLS.md 3 and 4 want it, short of the token's HSM."""

    def __init__(self, alpha, ledger, anchors, directory):
        self.alpha, self.ledger, self.anchors = alpha, ledger, anchors
        self.identity = alpha.identity("hsm/hsm-1", issuer=alpha.hsm)
        self.launch_key = b"launch key of the epoch, 32 byte"
        self.pool = ec.generate_private_key(ec.SECP256R1())
        self.storage_key = b"s" * 32
        self.renew_after_s = 600
        self.asked = []
        self.certified = self.pool
        self.time_off = 0
        self.verdict = None
        self.claims = []
        self.bundles_made = 0
        self.keys = None
        self.hsm = Hsm(ledger, alpha, "alpha", directory)

    async def serve(self, where):
        facts = SessionFacts(ledger_id=self.ledger.ledger_id, provider="alpha", hsm="hsm-1")
        return await serve_sessions(
            where,
            identity=lambda: self.identity,
            facts=facts,
            bundle=self.bundle,
            appraise=self.appraise,
            activate=self.activate,
            call=self.call,
        )

    async def bundle(self):
        self.bundles_made += 1
        return self.ledger.bundle(standing.hsm_keys("alpha", "hsm-1"))

    async def appraise(self, claim):
        fields = launch.parse_fields(schema.decode(FunctionFields, claim.fields).launch_fields)
        endorsements = endorsements_from_table(claim.endorsements)
        now = Instant(int(time.time()))
        report = parse_report(claim.evidence)
        verified = verify_snp(report, endorsements, report_data=claim.binding, anchors=self.anchors, now=now)
        if verified.value.host_data != launch.commitment(fields):
            raise NotAuthentic("hsm.commitment", "HOST_DATA is another launch's")
        self.claims.append(claim)
        if claim.role is SessionRole.RESUME:
            return self.resumed(claim)
        if claim.proof != launch.token_proof(launch.token(self.launch_key, fields), claim.challenge_digest):
            raise NotAuthentic("hsm.token", "the token does not hold")
        encoding = serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        private = self.pool.private_bytes(*encoding)
        return schema.encode(FunctionSecrets(private_key=private, storage_key=self.storage_key, generation=1))

    def resumed(self, claim):
        if self.verdict is not None:
            raise self.verdict
        assert claim.signing_public == keys.public_bytes(self.pool.public_key())
        keys.verify(self.pool.public_key(), claim.proof, resume_message(claim.challenge_digest))
        return b""

    async def activate(self, claim):
        leaf = self.alpha.leaf("svc/records/i-1", key=self.certified, serial=self.next_serial())
        issuers = (self.alpha.ca, self.alpha.provider, self.alpha.authority)
        return Activation(
            spiffe_id="spiffe://alpha.test/svc/records/i-1",
            certificate=der(leaf),
            chain=tuple(der(issuer.certificate) for issuer in issuers),
            now=int(time.time()) + self.time_off,
            renew_after_s=self.renew_after_s,
            body=b"",
        )

    def next_serial(self):
        self.asked.append("serial")
        return 1000 + self.asked.count("serial")

    async def call(self, claim, operation, body):
        self.asked.append(operation)
        if operation == "time":
            return cbor.encode({"now": int(time.time())})
        if operation == "renew":
            return schema.encode(await self.activate(claim))
        if operation == "ledger.prove":
            return self.ledger.bundle(schema.decode(ProveCall, body).keys)
        if operation == "device.key" and self.keys is not None:
            return await self.keys(launch.parse_fields(schema.decode(FunctionFields, claim.fields).launch_fields), body)
        if operation == "device.authorise":
            return schema.encode(await self.authorised(claim, schema.decode(AuthoriseDeviceCall, body)))
        raise Refused("hsm.operation", "unknown", got=operation)

    async def authorised(self, claim, call):
        """The product's own decision, over this ledger."""
        fields = launch.parse_fields(schema.decode(FunctionFields, claim.fields).launch_fields)
        return await broker_access.authorise_device(self.hsm, fields, call)


class Hsm:
    """What the access code needs of a broker: settings, ledger, signer, log."""

    def __init__(self, ledger, consortium, name, directory):
        self.directory = directory
        self.settings = SimpleNamespace(provider=name, hsm="hsm-1", trust_domain=consortium.trust_domain)
        self.at, self.clock = ledger, SystemClock()
        self.identity = SimpleNamespace(signer=keys.KeySigner(consortium.hsm.key))
        self.access_log, self.ledger, self.store = broker_access.AccessLog(), self, self
        self.entries = []
        self.away = False

    @property
    def trust(self):
        return self.at.trust

    async def proven(self, wanted):
        bundle = self.at.bundle(wanted)
        return bundle, verify_bundle(bundle, self.trust, now=self.clock.now())

    @functools.cached_property
    def kept(self):
        return BrokerStore.open(f"sqlite:///{self.directory / self.settings.provider}.db")

    @functools.cached_property
    def revocations(self):
        return RevocationStore(self.kept)

    def append(self, event, body, *, at):
        self.entries.append({"event": event, "at": at, **body})

    def decisions(self):
        """Who decided what, as the secure log has it."""
        return [(one["decided_by"], one["allowed"], one["rule"]) for one in self.entries if one["event"] == "access-decided"]


def recorded(store, der, now):
    """Record a device's certificate as the broker that made it does, unless it is there."""
    leaf = x509.load_der_x509_certificate(der)
    serial, not_after = f"{leaf.serial_number:x}", Instant(int(leaf.not_valid_after_utc.timestamp()))
    made = Issued(serial=serial, spiffe_id=str(spiffe_id_of(leaf)), key_digest=bytes(32), not_after=not_after, der=der)
    if RevocationStore(store).certificate(serial) is None:
        store.record_certificate(made, kind="svid-issued", at=now)


@contextlib.asynccontextmanager
async def home_door(consortium, *adds):
    """A provider's HTTPS door with these routes: where its devices find their home HSM."""
    app = http.application("home")
    for add in adds:
        add(app)
    shown = consortium.identity("hsm/hsm-1", issuer=consortium.hsm)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    chain = b"".join(x509.load_der_x509_certificate(one).public_bytes(form[0]) for one in shown.chain)
    ready = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        http.serve(
            app,
            listen="127.0.0.1:0",
            identity=TlsIdentity(chain_pem=chain, key_pem=shown.key.private_bytes(*form)),
            client_roots_pem=consortium.root.certificate.public_bytes(form[0]),
            ready=ready.set_result,
        )
    )
    try:
        where = f"https://{await asyncio.wait_for(ready, 10)}"
        yield Endpoint(url=where, server_name=f"hsm-1.hsm.{consortium.trust_domain}")
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


class HomeAt:
    """A device's home HSM without its HTTPS door; the caller's name stands for TLS."""

    def __init__(self, hsm, device):
        self.hsm, self.device = hsm, SpiffeId.parse(device)

    async def ask(self, question):
        self._reached()
        return await broker_access.for_device(self.hsm, self.device, question)

    async def tell(self, answer):
        self._reached()
        await broker_access.take_answer(self.hsm, self.device, answer)

    def _reached(self):
        if self.hsm.away:
            raise Unavailable("access.home_unavailable", "away", retry_after_s=5)


class Guest:
    """A launched guest's report source: the firmware fixed HOST_DATA and measurement at launch."""

    def __init__(self, silicon, host_data):
        self.silicon = silicon
        self.context = GuestContext(
            measurement=MEASUREMENT, host_data=host_data, policy=guest_policy(debug=False), report_id=bytes(32)
        )

    def report(self, report_data):
        made = self.silicon.report(self.context, report_data)
        return Report(provider=made.provider, outblob=made.outblob, auxblob=made.auxblob)


@dataclass
class World:
    directory: Path
    silicon: Silicon
    anchors: object
    max_age_s: int = 30

    def __post_init__(self):
        self.alpha = Consortium()
        self.beta = Consortium(trust_domain="beta.test", above=self.alpha)
        self.gamma = Consortium(trust_domain="gamma.test", above=self.alpha)
        self.ledger = Ledger(roots=self.alpha.roots, max_age_s=self.max_age_s)
        for name, consortium in (("alpha", self.alpha), ("beta", self.beta), ("gamma", self.gamma)):
            self.ledger.provider(consortium, name)
        self.ledger.service()
        self.ledger.contract()
        self.broker = Broker(self.alpha, self.ledger, self.anchors, self.directory)
        self.homes = {
            one.trust_domain: Hsm(self.ledger, one, name, self.directory)
            for name, one in (("beta", self.beta), ("gamma", self.gamma))
        }
        self.guest = self.directory / "guest"
        self.guest.mkdir()
        self.package = self.csar()
        self.task = None

    @property
    def inbound(self):
        return f"unix:{self.guest / guest.INBOUND_SOCKET}"

    def csar(self, source=None):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("TOSCA-Metadata/TOSCA.meta", "TOSCA-Meta-File-Version: 1.1\n")
            archive.writestr("Artifacts/function.py", source or FUNCTION.read_text())
        return content.getvalue()

    def fields(self, configuration, **changes):
        fields = {
            "ledger_id": self.ledger.ledger_id,
            "provider": "alpha",
            "tenant": "tenant-1",
            "service": "records",
            "package_digest": hashlib.sha256(self.package).digest(),
            "configuration_digest": hashlib.sha256(configuration).digest(),
            "measurement": MEASUREMENT,
            "instance": "i-1",
            "generation": 1,
            "host": "h1",
            "chip": self.silicon.chip.chip_id,
            "hsm": "hsm-1",
            "profile": launch.ChannelProfile.TLS,
            "launcher": bytes(32),
            "epoch": 1,
            "sequence": 0,
            "not_after": int(time.time()) + 600,
        }
        return launch.LaunchFields(**{**fields, **changes})

    def configuration(self, **changes):
        fields = {
            "trust": self.ledger.trust.encode(),
            "provider": "alpha",
            "hsm": "hsm-1",
            "service": "records",
            "contracts": ("c1",),
            "max_age_s": self.max_age_s,
            "settings": {},
        }
        return schema.encode(guest.FunctionConfiguration(**{**fields, **changes}))

    def hand_over(self, *, configuration=None, token=None, **changes):
        """Write what a host writes; the guest is launched with the commitment to the same fields."""
        configuration = configuration or self.configuration()
        fields = self.fields(configuration, **changes)
        token = token or launch.token(self.broker.launch_key, fields)
        launched = guest.FunctionLaunch(launch_fields=launch.encode_fields(fields), token=token)
        (self.guest / guest.LAUNCH_FILE).write_bytes(schema.encode(launched))
        (self.guest / guest.CONFIGURATION_FILE).write_bytes(configuration)
        (self.guest / guest.PACKAGE_FILE).write_bytes(self.package)
        self.reports = Guest(self.silicon, launch.commitment(fields))
        return fields

    async def start(self):
        """The function, running until `stop`."""
        self.server = await self.broker.serve(f"unix:{self.guest / guest.BROKER_SOCKET}")
        self.task = asyncio.create_task(agent.run(self.guest, lambda: self.reports))
        while not (self.guest / guest.STATUS_FILE).exists():
            if self.task.done():
                await self.task
            await asyncio.sleep(0.005)
        return self

    async def stop(self):
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.server.aclose()

    def device(self, consortium=None, name="d-1", *, directory="device", serial=501):
        """An enrolled device of beta, as EST would have left it."""
        consortium = consortium or self.beta
        store = DeviceStore(directory=self.directory / directory)
        store.provision(self.ledger.trust, (Endpoint(url="https://127.0.0.1:1", server_name="a"),))
        leaf = consortium.leaf(f"device/{name}", key=store.key(), serial=serial)
        issuers = (consortium.ca, consortium.provider, consortium.authority)
        store.keep_chain((der(leaf), *(der(issuer.certificate) for issuer in issuers)))
        return store

    def home(self, store):
        """The home HSM of a device, as its certificate names it."""
        leaf = x509.load_der_x509_certificate(store.identity().chain[0])
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (device,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return HomeAt(self.homes[SpiffeId.parse(device).trust_domain], device)

    async def connect(self, store, *, contract="c1", provider="alpha", service="records", prove=None, home=None):
        wanted = Wanted(provider=provider, service=service, contract=contract)
        return await connect(
            store,
            self.inbound,
            wanted,
            clock=SystemClock(),
            prove=prove or self.ledger.prove,
            home=home or self.home(store),
        )


@pytest.fixture
def make_world(tmp_path, manufacturer):
    chip = open_chip(manufacturer.make_chip("m0", now=Instant(int(time.time()) - 3600)))
    anchors = parse_anchor_file(manufacturer.anchors_path.read_bytes())

    def make(**how):
        return World(directory=tmp_path, silicon=Silicon(chip), anchors=anchors, **how)

    return make


@pytest.fixture
def world(make_world):
    return make_world()


@pytest.fixture
async def running(world):
    world.hand_over()
    await world.start()
    yield world
    await world.stop()
