"""Launchers, functions and devices before a real broker process: who gets in, who does not, and why.

Evidence is of simulated silicon and signed by a simulated chip; Attestation Results are signed by the verifier key in the
token through the broker's own interface, and served over mutual TLS by a small authority in this process.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.audit.log import LogEntry
from moorline.channel.driver import ClientSession, Collected, open_session
from moorline.clock import Instant, SystemClock, Validity
from moorline.digest import tagged_hash
from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.hsm import exchange
from moorline.hsm.exchange import ExchangeReply, Expectation, Party
from moorline.hsm.keys import HSM_IDENTITY, TokenEcKey
from moorline.hsm.provider import make_provider_key, sign_launcher_ticket
from moorline.hsm.token import open_token
from moorline.ledger import transactions as tx
from moorline.ledger.records import PackageRule, RevocationKind
from moorline.nfv import Role
from moorline.policy import ear, sec009
from moorline.rats import AttestationResult, CapabilityLevel, EvidenceRoot, Finding, Outcome, Tier
from moorline.services import http
from moorline.services.broker_function_requests import LINES
from moorline.simulators.manufacturer import create_manufacturer, open_chip
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.storage.broker_store import BrokerStore
from moorline.storage.verifier_rounds import EnrolledHost, StoredResult
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.chains import verify_chain
from moorline.wire import cbor, keys, launch, schema
from moorline.wire.access import (
    AccessStatement,
    Connection,
    Side,
    sign_statement,
    statement_digest,
    verify_statement,
)
from moorline.wire.certificates import root_certificate
from moorline.wire.guest import LauncherLaunch
from moorline.wire.host import HostEvidence, PcrValue, session_qualifying_data
from moorline.wire.http import ClientIdentity
from moorline.wire.launch import ChannelProfile, LaunchFields
from moorline.wire.pair import PairEpoch, PairOffer
from moorline.wire.session import (
    Activation,
    AuthoriseDeviceCall,
    AuthoriseDeviceReply,
    EntropyCall,
    EntropyReply,
    EvidenceFormat,
    FunctionFields,
    FunctionSecrets,
    HostFields,
    KeyKind,
    LauncherFields,
    LauncherSecrets,
    LauncherTicket,
    LogCall,
    PeerFields,
    ProveCall,
    RekeyCall,
    RekeyReply,
    SessionRole,
    StorageKeyReply,
)

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium, Provider, free_addresses

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]

LAUNCHER_CODE = b"\x11" * 48
FUNCTION_CODE = b"\x22" * 48
PACKAGE = b"\x33" * 32
USE_CASE = "4.7"


@dataclass
class World:
    """Alpha with a launcher's chip, a host and a service; beta with a device."""

    consortium: Consortium
    alpha: Provider
    silicon: Silicon
    trust_bytes: bytes
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    enrolled: dict[str, bytes] = field(default_factory=dict)
    verifier: ClientIdentity | None = None
    secrets: LauncherSecrets | None = None
    launcher_key: bytes = b""
    sequence: int = 0
    number: int = 0
    address: str | None = None
    verdicts: VerifierStore | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, host: str, code: str = "") -> None:
        """The authority's verdict about a host changes: it is lost for this reason, or gained."""
        assert self.verdicts is not None
        self.verdicts.enrol(
            EnrolledHost(host=host, ek_digest=host.encode(), ak_public=b"", root=EvidenceRoot.TEST, enrolled=self.now)
        )
        if code:
            self.results.pop(host, None)
            self.verdicts.withdraw(host, code, at=self.now)
        else:
            self.results[host] = {}
            good = {"ear": "", "status": "affirming", "code": None, "withdrawn": None}
            until = Instant(self.now + 3600)
            self.verdicts.put_result(
                StoredResult(host=host, issued=self.now, expires=until, **good), patience_until=Instant(0)
            )
        waiting, self.changed = self.changed, asyncio.Event()
        waiting.set()

    @property
    def now(self) -> Instant:
        return SystemClock().now()

    @property
    def chip(self) -> bytes:
        return self.silicon.chip.chip_id

    def home_statement(self, connection: Connection, **changes) -> bytes:
        """What beta's HSM says of a connection: a yes, with the key in its token, whose broker does not run here."""
        beta = self.consortium.providers["beta"]
        made = {
            "ledger_id": self.consortium.ceremony.trust.ledger_id,
            "side": Side.HOME,
            "provider": "beta",
            "hsm": "hsm-1",
            "connection": connection,
            "allowed": True,
            "rule": "policy0",
            "issued": self.now,
            "not_after": self.now + 30,
            "answers": b"",
        }
        with open_token(beta.hsm.location) as token:
            signer = keys.KeySigner(TokenEcKey(token, HSM_IDENTITY))
            return sign_statement(AccessStatement(**{**made, **changes}), signer)

    def ticket(self, *, key=None, **changes) -> bytes:
        values = {
            "ledger_id": self.consortium.ceremony.trust.ledger_id,
            "provider": "alpha",
            "ticket": os.urandom(32),
            "measurement": LAUNCHER_CODE,
            "chip": self.chip,
            "not_after": self.now + 60,
        }
        return sign_launcher_ticket(key or self.alpha.issuer.key, LauncherTicket(**{**values, **changes}))

    async def open(
        self, role: SessionRole, fields: bytes, *, guest: dict[str, Any], proof=None, signing=None
    ) -> ClientSession:
        """A session with this evidence; the binding is that of the session, or what `bound` in `guest` makes of it."""
        bound = guest.pop("bound", bytes)
        values = {"policy": guest_policy(debug=False), "report_id": os.urandom(32), **guest}
        context = GuestContext(**values)

        async def verify_broker(_challenge, certificates) -> None:
            roots = self.consortium.ceremony.trust.roots
            chain = verify_chain(certificates[0], certificates[1:], roots, self.now)
            assert chain.spiffe_id.role is Role.HSM

        async def prove(_challenge, digest: bytes) -> bytes | None:
            return None if proof is None else proof(digest)

        async def collect(binding: bytes, _challenge) -> Collected:
            made = self.silicon.report(context, bound(binding))
            return Collected(format=EvidenceFormat.SNP, evidence=made.outblob, endorsements=made.auxblob)

        return await open_session(
            self.address or self.alpha.broker.said["sessions"],
            role=role,
            formats=(EvidenceFormat.SNP,),
            fields=fields,
            signing_public=signing or spki(),
            verify_broker=verify_broker,
            prove=prove,
            collect=collect,
        )

    async def launcher(self, ticket: bytes, *, trust: bytes | None = None, signing=None, **guest) -> ClientSession:
        configuration = LauncherLaunch(ticket=ticket, trust=trust or self.trust_bytes, provider="alpha", hsm="hsm-1")
        host_data = tagged_hash("launcher-configuration", schema.encode(configuration))
        return await self.open(
            SessionRole.LAUNCHER,
            schema.encode(LauncherFields(ticket=ticket)),
            guest={"measurement": LAUNCHER_CODE, "host_data": host_data, **guest},
            signing=signing,
        )

    def fields(self, **changes) -> LaunchFields:
        """Launch fields of the next sequence number, for a new instance, with changes."""
        assert self.secrets is not None
        self.number += 1
        values = {
            "ledger_id": self.consortium.ceremony.trust.ledger_id,
            "provider": "alpha",
            "tenant": "t1",
            "service": "records",
            "package_digest": PACKAGE,
            "configuration_digest": b"\x44" * 32,
            "measurement": FUNCTION_CODE,
            "instance": f"records-{self.number}",
            "generation": 1,
            "host": "h1",
            "chip": self.chip,
            "hsm": "hsm-1",
            "profile": ChannelProfile.TLS,
            "launcher": hashlib.sha256(self.launcher_key).digest(),
            "epoch": self.secrets.epoch,
            "sequence": self.secrets.lease_first + self.number,
            "not_after": self.now + 60,
        }
        return LaunchFields(**{**values, **changes})

    async def function(self, fields: LaunchFields, *, token: bytes | None = None, **guest) -> ClientSession:
        """A function launched with these fields and, unless another is given, their token."""
        assert self.secrets is not None
        held = launch.token(self.secrets.launch_key, fields) if token is None else token
        return await self.open(
            SessionRole.FUNCTION,
            schema.encode(FunctionFields(launch_fields=launch.encode_fields(fields))),
            guest={"measurement": fields.measurement, "host_data": launch.commitment(fields), **guest},
            proof=lambda digest: launch.token_proof(held, digest),
        )

    async def refused(self, opening) -> str:
        with pytest.raises(MoorlineError) as caught:
            await opening
        return caught.value.code

    async def result(self, host: str) -> str:
        """What the authority says about a host now, signed in alpha's token."""
        said = self.results.get(host)
        if said is None:
            raise Refused("result.none", "nothing is known about this host")
        values = {
            "subject": f"host/{host}",
            "verifier": "spiffe://alpha.test/verifier/v1",
            "issued": self.now,
            "expires": Instant(self.now + 60),
            "root": EvidenceRoot.TEST,
            "simulated_allowed": True,
            "vector": {"hardware": Tier.AFFIRMING, "executables": Tier.AFFIRMING},
            "findings": (),
            "policy_digest": b"p" * 32,
            "nonce": b"n" * 32,
            "capabilities": tuple(
                CapabilityLevel(capability=need.capability, level=need.minimum) for need in sec009.profile(USE_CASE)
            ),
        }
        message = ear.signing_input(AttestationResult(**{**values, **said}), audience="alpha.test")
        async with self.alpha.https(self.verifier) as client:
            asked = {"key": "verifier", "messages": [base64.b64encode(message).decode()]}
            signed: Any = await client.post_json("/v1/sign", asked)
        return ear.assemble(message, base64.b64decode(signed["signatures"][0]))


def spki() -> bytes:
    return keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())


async def svid(provider: Provider, name: str) -> ClientIdentity:
    await provider.register(name)
    key = ec.generate_private_key(ec.SECP256R1())
    public = base64.b64encode(keys.public_bytes(key.public_key())).decode()
    async with provider.admin() as admin:
        given: Any = await admin.post_json("/v1/svid", {"public_key": public, "spiffe_id": name})
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return ClientIdentity(certificate_chain_pem=given["chain"].encode(), private_key_pem=pem)


async def serve_results(world: World, address: str) -> asyncio.Task[None]:
    """The attestation authority's reading interface."""
    app = http.application("results")

    @app.get("/v1/results/{host}")
    async def read(host: str) -> dict[str, str]:
        return {"host": host, "ear": await world.result(host)}

    @app.get("/v1/hosts/{host}/enrolment")
    async def enrolment(host: str) -> dict[str, str]:
        if host not in world.enrolled:
            raise Refused("enrol.unknown", "this host is not enrolled")
        return {"host": host, "ak_public": base64.b64encode(world.enrolled[host]).decode()}

    @app.get("/v1/events")
    async def events(after: int = 0, wait_s: float = 0) -> dict[str, object]:
        assert world.verdicts is not None
        waiting = world.changed
        found, newest = world.verdicts.events(after=after, limit=500)
        if not found:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(waiting.wait(), wait_s)
            found, newest = world.verdicts.events(after=after, limit=500)
        following = found[-1].cursor if found else after
        return {"events": [asdict(one) for one in found], "next": following, "newest": newest}

    identity = world.verifier
    assert identity is not None
    bound = asyncio.Event()
    task = asyncio.ensure_future(
        http.serve(
            app,
            listen=address,
            identity=http.TlsIdentity(chain_pem=identity.certificate_chain_pem, key_pem=identity.private_key_pem),
            client_roots_pem=world.alpha.roots_pem,
            ready=lambda _: bound.set(),
        )
    )
    await bound.wait()
    return task


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory):
    async with built(tmp_path_factory.mktemp("sessions")) as made:
        yield made


@contextlib.asynccontextmanager
async def built(directory: Path, **alphas):
    """The world, with changes to how alpha is set up."""
    now = SystemClock().now()
    maker = create_manufacturer(directory / "silicon", now=now)
    chip = open_chip(maker.make_chip("m0", now=now))
    consortium = await Consortium.found(directory)
    served = None
    try:
        address = free_addresses(1)[0]
        alpha = await consortium.admit(
            "alpha",
            verifier="v1",
            verifier_url=f"https://{address}",
            snp_anchors=maker.anchors_path,
            snp_minimum_tcb=(chip.tcb.boot_loader, chip.tcb.tee, chip.tcb.snp, chip.tcb.microcode),
            **{"revocation_poll_s": 1, **alphas},
        )
        beta = await consortium.admit("beta", start=False)
        made = World(consortium, alpha, Silicon(chip), (directory / "ledger" / "trust.cbor").read_bytes())
        made.verdicts = VerifierStore.open(directory / "verdicts.db")
        made.tell("h1")
        made.verifier = await svid(alpha, "spiffe://alpha.test/verifier/v1")
        served = await serve_results(made, address)
        for host in ("h1", "h2"):
            await alpha.submitter.send(
                tx.RegisterPlatform(
                    id=host,
                    chip_id=chip.chip_id if host == "h1" else b"\x99" * 64,
                    product="Milan",
                    ek_digest=host.encode() * 16,
                    location="EU/DE",
                    tag_digest=b"t" * 32,
                    simulated=True,
                )
            )
        await alpha.submitter.send(
            tx.RegisterService(
                name="records",
                use_case=USE_CASE,
                packages=(PackageRule(package_digest=PACKAGE, measurement=FUNCTION_CODE),),
                profiles=("tls",),
                callers=("beta",),
            )
        )
        conditions = 'permit(principal, action, resource) when { principal.device == "phone-1" };'
        forbids = (
            "permit(principal, action, resource);"
            '@id("hours") forbid(principal, action, resource) when { context.hour < 24 };'
        )
        for contract, terms in (("c1", conditions), ("c2", forbids), ("c3", conditions)):
            await alpha.submitter.send(
                tx.OfferAccess(contract=contract, service="records", grantee="beta", conditions=terms, profiles=("tls",))
            )
            if contract != "c3":
                await beta.submitter.send(tx.AcceptAccess(contract=contract))
        made.launcher_key = spki()
        session = await made.launcher(made.ticket(), signing=made.launcher_key)
        made.secrets = schema.decode(LauncherSecrets, session.secrets)
        yield made
        await session.aclose()
    finally:
        if served is not None:
            served.cancel()
        await consortium.close()


# Launchers -------------------------------------------------------------------------------------------------------------


async def test_a_launcher_gets_the_key_and_a_lease(world):
    """verifies that: an attested launcher with a ticket gets key, leases and SVID; its ticket serves nobody else."""
    ticket, signing = world.ticket(), spki()
    async with await world.launcher(ticket, signing=signing) as session:
        secrets = schema.decode(LauncherSecrets, session.secrets)
        assert secrets.launch_key == world.secrets.launch_key  # one key an epoch, for all launchers of the provider
        name = hashlib.sha256(signing).hexdigest()[:32]
        assert session.activation.spiffe_id == f"spiffe://alpha.test/launcher/{name}"
        more = schema.decode(LauncherSecrets, await session.call("launcher.lease", b""))
        assert more.lease_first == secrets.lease_first + secrets.lease_count
        renewed = schema.decode(Activation, await session.call("renew", b""))
        assert renewed.certificate != session.activation.certificate
        with pytest.raises(MoorlineError) as caught:
            await session.call("device.authorise", b"")
        assert caught.value.code == "broker.no_such_operation"
    assert await world.refused(world.launcher(ticket)) == "launcher.ticket_used"
    async with world.alpha.admin() as admin:
        assert (await admin.get_json("/v1/alarms"))["alarms"][0]["code"] == "launcher.ticket_used"


@pytest.mark.parametrize(
    ("ticket", "guest", "code"),
    [
        ({"measurement": b"\x12" * 48}, {}, "launcher.measurement_mismatch"),
        ({}, {"measurement": b"\x12" * 48}, "launcher.measurement_mismatch"),
        ({"chip": b"\x13" * 64}, {}, "launcher.chip_mismatch"),
        ({"not_after": 1}, {}, "launcher.ticket_expired"),
        ({"provider": "beta"}, {}, "launcher.ticket_for_another"),
        ({"ledger_id": b"\x14" * 32}, {}, "launcher.ticket_for_another"),
        ({}, {"host_data": b"\x15" * 32}, "launcher.configuration_mismatch"),
        ({}, {"trust": b"another trust file"}, "launcher.configuration_mismatch"),
        ({}, {"policy": guest_policy(debug=True)}, "snp.policy_not_met"),
    ],
)
async def test_launchers_that_get_nothing(world, ticket, guest, code):
    """verifies that: one wrong thing about ticket or guest refuses a launcher, before its ticket is used."""
    assert await world.refused(world.launcher(world.ticket(**ticket), **guest)) == code


@pytest.mark.parametrize("bound", [lambda _: bytes(64), lambda made: made[:63] + b"?"], ids=["another", "nearly this"])
async def test_evidence_made_for_another_session_opens_none(world, bound):
    """verifies that: genuine evidence over anything but this session's binding gets no launcher and no function a key."""
    assert await world.refused(world.launcher(world.ticket(), bound=bound)) == "snp.report_data_mismatch"
    assert await world.refused(world.function(world.fields(), bound=bound)) == "snp.report_data_mismatch"


async def test_a_ticket_by_a_stranger(world, tmp_path):
    """verifies that: only the provider's registered key signs tickets."""
    stranger = make_provider_key(tmp_path / "key.pem")
    assert await world.refused(world.launcher(world.ticket(key=stranger))) == "launcher.ticket_not_authentic"


@pytest.mark.parametrize("kind", KeyKind)
async def test_a_function_gets_fresh_keys(world, kind):
    """verifies that: over its session a function gets key after key of the kind it asks, each certified in its name."""
    async with await world.function(world.fields()) as session:
        got = [schema.decode(RekeyReply, await session.call("rekey", schema.encode(RekeyCall(kind=kind)))) for _ in range(3)]
        leaves = [x509.load_der_x509_certificate(one.activation.certificate) for one in got]
        for one, leaf in zip(got, leaves, strict=True):
            key = serialization.load_der_private_key(one.private_key, None)
            assert keys.public_bytes(key.public_key()) == keys.public_bytes(leaf.public_key())
            assert one.activation.spiffe_id == session.activation.spiffe_id
        assert len({one.private_key for one in got}) == 3
        with pytest.raises(MoorlineError):
            await session.call("rekey", cbor.encode({"kind": "dsa"}))
        await session.call("renew", b"")  # of the launch key, as before


async def test_a_function_gets_entropy_of_the_token_and_writes_into_its_log(world):
    """verifies that: both go over the one session; the entry names who said it, and nobody drowns the log."""
    async with await world.function(world.fields()) as session:
        drawn = [schema.decode(EntropyReply, await session.call("entropy", b"\xa1dsize\x18@")).random for _ in range(2)]
        assert [len(one) for one in drawn] == [64, 64]
        assert drawn[0] != drawn[1]
        for size in (0, 1025):
            with pytest.raises(MoorlineError, match=r"session\.entropy_size"):
                await session.call("entropy", schema.encode(EntropyCall(size=size)))
        line = schema.encode(LogCall(event="started", says="as the function says"))
        await session.call("log", line)
        async with world.alpha.admin() as admin:
            (entry,) = [one for one in (await admin.get_json("/v1/audit"))["entries"] if one["kind"] == "function-said"]
        said = {"spiffe_id": session.activation.spiffe_id, "event": "started", "says": "as the function says"}
        assert entry["body"] == said
        for _ in range(LINES - 1):
            await session.call("log", line)
        with pytest.raises(Unavailable, match=r"session\.log_full"):
            await session.call("log", line)
        with pytest.raises(MoorlineError):
            await session.call("log", cbor.encode({"event": "x" * 65, "says": ""}))
        await session.call("renew", b"")


# Functions -------------------------------------------------------------------------------------------------------------


async def test_a_provider_learns_which_rule_decided(world):
    """verifies that: `moor hsm explain` says of a function that got its keys, and of one that did not, which rule it was."""
    good, late = world.fields(), world.fields(measurement=b"\x23" * 48)
    async with await world.function(good) as session:
        await session.call("renew", b"")
    assert await world.refused(world.function(late)) == "launch.package_not_registered"

    async def explained(name):
        running = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", "import sys; from moorline.cli import main; main()"),
            *("hsm", "explain", name, "--broker", str(world.alpha.directory), "--json"),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await running.communicate()
        return running.returncode, json.loads(out)["decisions"]

    status, (renewed,) = await explained(good.instance)
    assert (status, renewed["allowed"], renewed["action"]) == (0, True, "renew")
    assert renewed["decided_by"] == "permit-confirmed"
    stands_on = renewed["stands_on"]  # the verdict about its host, by name
    assert (stands_on["subject"], stands_on["verifier"]) == (f"host/{good.host}", "spiffe://alpha.test/verifier/v1")
    assert len(bytes.fromhex(stands_on["result_digest"])) == 32
    assert 0 <= stands_on["age_s"] < 3600
    async with world.alpha.admin() as admin:
        entries = (await admin.get_json("/v1/audit"))["entries"]
    (consumed,) = [
        one["body"] for one in entries if one["kind"] == "launch-consumed" and one["body"]["instance"] == good.instance
    ]
    assert len(bytes.fromhex(consumed["host_result"])) == 32
    status, (refused,) = await explained(late.instance)
    assert (status, refused["allowed"], refused["decided_by"]) == (1, False, "launch.package_not_registered")
    assert "forbid-other-code" in refused["policy"]["rules"]
    facts = world.alpha.directory / "facts.json"
    facts.write_text(json.dumps({**refused["facts"], "action": "renew"}))
    assert (await explained(str(facts)))[0] == 1


async def test_a_launched_function_gets_its_identity(world):
    """verifies that: a function gets a key pair from the pool, its certificate, time, proofs and decisions."""
    fields = world.fields()
    async with await world.function(fields) as session:
        secrets = schema.decode(FunctionSecrets, session.secrets)
        private = serialization.load_der_private_key(secrets.private_key, password=None)
        roots = world.consortium.ceremony.trust.roots
        chain = verify_chain(session.activation.certificate, session.activation.chain, roots, world.now)
        assert str(chain.spiffe_id) == f"spiffe://alpha.test/svc/records/{fields.instance}"
        assert chain.leaf.public_key() == private.public_key()
        assert abs(cbor.decode(await session.call("time", b""))["now"] - world.now) < 10
        assert await session.call("ledger.prove", schema.encode(ProveCall(keys=("provider/alpha",))))
        kept = schema.decode(StorageKeyReply, await session.call("storage.key", b""))
        assert (kept.storage_key, kept.generation) == (secrets.storage_key, secrets.generation)
        renewed = schema.decode(Activation, await session.call("renew", b""))
        again = verify_chain(renewed.certificate, renewed.chain, roots, world.now)
        assert again.leaf.public_key() == private.public_key()
        assert again.serial != chain.serial
    async with world.alpha.admin() as admin:
        rows = (await admin.get_json("/v1/launches"))["launches"]
    assert [row["state"] for row in rows if row["instance"] == fields.instance] == ["confirmed"]


@pytest.mark.parametrize(
    ("device", "contract", "allowed", "rule"),
    [
        ("spiffe://beta.test/device/phone-1", "c1", True, "policy0"),
        ("spiffe://beta.test/device/phone-2", "c1", False, "no rule permits"),
        ("spiffe://alpha.test/device/phone-1", "c1", False, "access.not_granted"),
        ("spiffe://beta.test/svc/records/x", "c1", False, "access.not_granted"),
        ("spiffe://beta.test/device/phone-1", "c2", False, "hours"),
        ("spiffe://beta.test/device/phone-1", "c3", False, "ledger.contract_not_active"),
        ("spiffe://beta.test/device/phone-1", "c9", False, "ledger.contract_not_active"),
    ],
)
async def test_devices_are_authorised_by_contract(world, device, contract, allowed, rule):
    """verifies that: contract, both providers and the Cedar conditions decide, and anything odd is a no, signed."""
    async with await world.function(world.fields()) as session:
        connection = Connection(
            device=device,
            device_provider="beta",
            function=session.activation.spiffe_id,
            function_provider="alpha",
            service="records",
            contract=contract,
            profile="tls",
            post_quantum=True,
            binding=os.urandom(32),
        )

        async def authorised(about, home):
            asked = AuthoriseDeviceCall(connection=about, home=home)
            return schema.decode(AuthoriseDeviceReply, await session.call("device.authorise", schema.encode(asked)))

        yes = world.home_statement(connection)
        reply = await authorised(connection, yes)
        assert (reply.allowed, reply.rule, reply.refused_by) == (allowed, rule, "" if allowed else "function")
        said = verify_statement(reply.statement, world.alpha.hsm.keys.identity)
        assert (said.allowed, said.rule, said.connection) == (allowed, rule, connection)
        assert said.answers == statement_digest(yes)
        no = await authorised(connection, world.home_statement(connection, allowed=False, rule="not today"))
        assert (no.allowed, no.rule, no.refused_by) == (False, "not today", "home")
        for odd in ({"service": "other"}, {"function": "spiffe://alpha.test/svc/records/x-1"}, {"profile": "no-pfs"}):
            about = replace(connection, **odd)
            assert await refusal(authorised(about, world.home_statement(about))) == "broker.other_service"
        assert await refusal(authorised(replace(connection, binding=bytes(32)), yes)) == "access.other_connection"
    logged = [one for one in await entries(world.alpha) if one["binding"] == connection.binding.hex()]
    assert [one["decided_by"] for one in logged][:2] == ["home beta/hsm-1", "function alpha/hsm-1"]


async def refusal(awaitable):
    with pytest.raises(MoorlineError) as caught:
        await awaitable
    return caught.value.code


async def entries(provider):
    """What the broker's secure log says of connections."""
    with contextlib.closing(BrokerStore.open(f"sqlite:///{provider.settings.database}")) as store:
        found = [schema.decode(LogEntry, data) for data in store.audit(limit=100_000)]
    return [one.details for one in found if one.event == "access-decided"]


async def test_a_function_nobody_launched(world):
    """verifies that: genuine code on a genuine host without a token gets nothing; the same with its token does (control)."""
    fields = world.fields()
    assert await world.refused(world.function(fields, token=os.urandom(32))) == "launch.token_mismatch"
    async with await world.function(fields) as session:
        assert session.activation.spiffe_id.endswith(fields.instance)


async def test_a_token_shown_twice(world):
    """verifies that: a second session with a used token is refused, and the alarm names both."""
    fields = world.fields()
    async with await world.function(fields):
        pass
    assert await world.refused(world.function(fields)) == "launch.token_consumed"
    async with world.alpha.admin() as admin:
        alarm = (await admin.get_json("/v1/alarms"))["alarms"][0]
    assert alarm["code"] == "launch.token_consumed"
    assert alarm["first"].startswith("function from 127.0.0.1")
    assert alarm["second"] != alarm["first"]


@pytest.mark.parametrize(
    ("fields", "guest", "code"),
    [
        ({"hsm": "hsm-2"}, {}, "launch.other_hsm"),
        ({"ledger_id": b"z" * 32}, {}, "launch.other_ledger"),
        ({"profile": ChannelProfile.HPKE_ONLY}, {}, "launch.profile_mismatch"),
        ({"not_after": 1}, {}, "launch.expired"),
        ({"sequence": 1 << 40}, {}, "launch.sequence_not_leased"),
        ({"launcher": b"K" * 32}, {}, "launch.sequence_not_leased"),
        ({"epoch": 1 << 40}, {}, "launch.token_mismatch"),
        ({"package_digest": b"z" * 32}, {}, "launch.package_not_registered"),
        ({"measurement": b"z" * 48}, {}, "launch.package_not_registered"),
        ({}, {"measurement": b"z" * 48}, "launch.measurement_mismatch"),
        ({}, {"host_data": b"z" * 32}, "launch.commitment_mismatch"),
        ({"chip": b"z" * 64}, {}, "launch.chip_mismatch"),
        ({"host": "h2"}, {}, "launch.platform_not_registered"),
        ({"host": "h9"}, {}, "ledger.platform_not_active"),
        ({"service": "other"}, {}, "ledger.service_not_active"),
        ({}, {"policy": guest_policy(debug=True)}, "snp.policy_not_met"),
        ({"instance": "../../x"}, {}, "name.malformed"),
    ],
)
async def test_functions_that_get_nothing(world, fields, guest, code):
    """verifies that: one wrong thing about launch or guest refuses a function that holds a genuine token for it."""
    assert await world.refused(world.function(world.fields(**fields), **guest)) == code


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (None, "launch.host_not_standing"),
        ({"vector": {"executables": Tier.CONTRAINDICATED}}, "launch.host_not_standing"),
        ({"subject": "host/h2"}, "launch.host_not_standing"),
        ({"expires": Instant(1)}, "launch.host_not_standing"),
        (
            {
                "vector": {"executables": Tier.CONTRAINDICATED},
                "findings": (
                    Finding(code="host.kernel", outcome=Outcome.NOT_MET, claim="executables", says="another kernel"),
                ),
            },
            "launch.host_not_standing",
        ),
        ({"capabilities": ()}, "launch.host_below_profile"),
    ],
)
async def test_hosts_without_standing(world, said, code):
    """verifies that: no function starts on a host that the authority does not affirm for the service's use case, now."""
    fields, before = world.fields(), world.results.pop("h1")
    try:
        if said is not None:
            world.results["h1"] = said
        assert await world.refused(world.function(fields)) == code
    finally:
        world.results["h1"] = before
    async with await world.function(fields):
        pass  # the same launch, once the host stands


# Hosts -----------------------------------------------------------------------------------------------------------------


def tpm_evidence(tpm, qualifying: bytes) -> Collected:
    quoted = tpm.quote(qualifying, 0x000B, (0, 7))
    evidence = HostEvidence(
        quoted=quoted.attest,
        signature=quoted.signature,
        bank=0x000B,
        pcrs=tuple(PcrValue(index=index, digest=digest) for index, digest in sorted(quoted.pcrs.items())),
        event_log=None,
        ima_from=0,
        ima=b"",
        location=None,
    )
    return Collected(format=EvidenceFormat.TPM, evidence=schema.encode(evidence), endorsements=b"")


async def host_session(world, tpm, host: str, *, qualifying=session_qualifying_data, ak=None) -> ClientSession:
    async def nothing(*_):
        return None

    async def collect(binding: bytes, _challenge) -> Collected:
        return await asyncio.to_thread(tpm_evidence, tpm, qualifying(binding))

    return await open_session(
        world.alpha.broker.said["sessions"],
        role=SessionRole.HOST,
        formats=(EvidenceFormat.TPM,),
        fields=schema.encode(HostFields(host=host, ak_public=ak or tpm.attestation_key())),
        signing_public=spki(),
        verify_broker=nothing,
        prove=nothing,
        collect=collect,
    )


async def test_a_host_agent_gets_its_name_by_its_tpm(world, tmp_path):
    """verifies that: whoever holds the enrolled key gets the host's SVID; another TPM or an old quote does not."""
    pytest.importorskip("tpm2_pytss")
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is not installed")
    from moorline.attesters.tpm import Tpm
    from moorline.simulators.tpm import SimulatedTpm, SimulatedTpmManufacturer

    maker = SimulatedTpmManufacturer.create(tmp_path / "maker", now=world.now)
    with (
        SimulatedTpm.manufacture(tmp_path / "one", maker) as one,
        SimulatedTpm.manufacture(tmp_path / "two", maker) as two,
        Tpm.open(one.tcti) as mine,
        Tpm.open(two.tcti) as other,
    ):
        world.enrolled["h1"] = mine.attestation_key()
        async with await host_session(world, mine, "h1") as session:
            assert session.activation.spiffe_id == "spiffe://alpha.test/host/h1"
            renewed = schema.decode(Activation, await session.call("renew", b""))
            assert renewed.spiffe_id == session.activation.spiffe_id
        assert await world.refused(host_session(world, other, "h1")) == "host.other_key"
        forged = host_session(world, other, "h1", ak=mine.attestation_key())
        assert await world.refused(forged) == "tpm.signature_invalid"
        replayed = host_session(world, mine, "h1", qualifying=lambda _: session_qualifying_data(b"an earlier binding"))
        assert await world.refused(replayed) == "tpm.nonce_mismatch"
        assert await world.refused(host_session(world, mine, "h2")) == "enrol.unknown"
        world.enrolled["h9"] = mine.attestation_key()
        assert await world.refused(host_session(world, mine, "h9")) == "ledger.platform_not_active"


async def relaunched(world: World) -> None:
    """Another launcher, with a key of the epoch of now."""
    signing = spki()
    async with await world.launcher(world.ticket(), signing=signing) as session:
        world.launcher_key, world.secrets = signing, schema.decode(LauncherSecrets, session.secrets)


@pytest.mark.parametrize("revoked", ["launcher", "measurement"])
async def test_a_launcher_that_the_ledger_revokes_loses_key_and_epoch(world, revoked):
    """verifies that: over its open session it gets no further lease; the key it holds mints for nobody, whoever it names."""
    code, signing = os.urandom(48), spki()
    async with await world.launcher(world.ticket(measurement=code), signing=signing, measurement=code) as session:
        await session.call("launcher.lease", b"")
        if revoked == "launcher":
            launcher = hashlib.sha256(signing).hexdigest()
            await world.alpha.submitter.send(tx.Revoke(kind=RevocationKind.LAUNCHER, id=launcher))
        else:
            await world.consortium.decide(tx.RevokeGlobally(kind=RevocationKind.MEASUREMENT, id=code.hex()))
        for operation in ("launcher.lease", "renew"):
            with pytest.raises(Refused) as caught:
                await session.call(operation, b"")
            assert caught.value.code in ("ledger.revoked", "launch.launcher_not_admitted")
    # All launchers had this key: it minted for another's numbers as well. Within a poll nothing proves anything under it.
    async with asyncio.timeout(20):
        while True:
            try:
                async with await world.function(world.fields()):
                    await asyncio.sleep(0.2)
            except Refused as refusal:
                assert refusal.code in ("launch.token_mismatch", "launch.sequence_not_leased", "launch.epoch_closed")
                break
    await relaunched(world)
    async with await world.function(world.fields()):
        pass


async def test_revocation_reaches_the_broker(world):
    """verifies that: a revoked instance gets neither certificate nor storage key, a revoked launcher or host no launch."""
    fields = world.fields()
    async with await world.function(fields) as session:
        await world.alpha.submitter.send(tx.Revoke(kind=RevocationKind.INSTANCE, id=fields.instance))
        with pytest.raises(MoorlineError) as caught:
            await session.call("renew", b"")
        assert caught.value.code == "renewal.instance_revoked"
        with pytest.raises(MoorlineError) as caught:
            await session.call("storage.key", b"")
        assert caught.value.code == "renewal.instance_revoked"
    before = world.fields()
    await world.alpha.submitter.send(tx.Revoke(kind=RevocationKind.INSTANCE, id=before.instance))
    assert await world.refused(world.function(before)) == "ledger.revoked"  # of one that was never launched
    launcher = hashlib.sha256(world.launcher_key).hexdigest()
    async with world.alpha.admin() as admin:
        await admin.post_json("/v1/launchers/revoke", {"launcher": launcher})
    # Its epoch was closed without grace, and the epoch's key destroyed in the token: nothing can be proven under it.
    assert await world.refused(world.function(world.fields())) == "launch.token_mismatch"
    await relaunched(world)
    async with await world.function(world.fields()):
        pass
    await world.alpha.submitter.send(tx.RevokePlatform(id="h1"))
    assert await world.refused(world.function(world.fields())) == "ledger.platform_not_active"


def peer_bundle(world: World, signer, digest: bytes, **changes) -> bytes:
    """Beta's trust bundle for alpha, with changes, signed by its HSM key."""
    values = {
        "expected": Expectation(
            ledger_id=world.consortium.ceremony.trust.ledger_id,
            sender=Party(provider="beta", hsm="hsm-1"),
            receiver=Party(provider="alpha", hsm="hsm-1"),
            challenge=digest,
        ),
        "trust_domain": "beta.test",
        "sequence": 1,
        "now": world.now,
        "roots": (),
        "issuing_cas": (),
        "above": (),
    }
    return exchange.sign_bundle(exchange.our_bundle(**{**values, **changes}), signer)


async def test_a_peer_tells_of_its_own_cas_only_and_nothing_before_it_was_met(world):
    """verifies that: an HSM gets nowhere with another's trust domain, CA or bundle, nor by leaving steps out."""
    beta = Party(provider="beta", hsm="hsm-1")
    folder = world.consortium.providers["alpha"].directory
    theirs = x509.load_pem_x509_certificates((folder / "issuing-ca.pem").read_bytes())
    above = x509.load_pem_x509_certificates((folder / "chain.pem").read_bytes())
    stranger = root_certificate(
        ec.generate_private_key(ec.SECP256R1()),
        name="stranger",
        validity=Validity(not_before=Instant(world.now - 60), not_after=Instant(world.now + 3600)),
        serial=7,
    )
    ders = [tuple(one.public_bytes(serialization.Encoding.DER) for one in some) for some in (theirs, above, [stranger])]
    with open_token(world.consortium.providers["beta"].hsm.location) as token:
        signer = keys.KeySigner(TokenEcKey(token, HSM_IDENTITY))
        async with peer_session(world, signer, beta) as (session, digest):

            async def said(operation: str, body: bytes) -> str:
                with pytest.raises(MoorlineError) as caught:
                    await session.call(operation, body)
                return caught.value.code

            for operation in ("peer.pair_epoch", "peer.grants"):
                assert await said(operation, b"") == "broker.no_such_operation"
            assert await said("peer.confirm", b"") == "exchange.out_of_order"
            for changes, code in (
                ({"trust_domain": "alpha.test"}, "exchange.trust_domain"),
                ({"issuing_cas": ders[0], "above": ders[1]}, "exchange.other_certificate"),
                ({"issuing_cas": ders[2]}, "chain.untrusted"),
            ):
                assert await said("peer.exchange", peer_bundle(world, signer, digest, **changes)) == code
            assert await said("peer.exchange", peer_bundle(world, signer, bytes(32))) == "exchange.not_for_us"
            assert await said("peer.pair_epoch", b"") == "broker.no_such_operation"


async def test_an_hsm_that_is_revoked_agrees_on_nothing_over_the_session_it_kept(world):
    """verifies that: a peer that met is asked about at each step; once revoked it gets neither an epoch nor a pair key."""
    beta = Party(provider="beta", hsm="hsm-1")
    with open_token(world.consortium.providers["beta"].hsm.location) as token:
        signer = keys.KeySigner(TokenEcKey(token, HSM_IDENTITY))
        async with peer_session(world, signer, beta) as (session, digest):
            ours = peer_bundle(world, signer, digest)
            reply = schema.decode(ExchangeReply, await session.call("peer.exchange", ours))
            agreed = exchange.transcript(digest, ours, reply.bundle)
            await session.call("peer.confirm", exchange.agree(signer, agreed))
            assert schema.decode(PairEpoch, await session.call("peer.pair_epoch", b"")).newest == 0
            await world.consortium.providers["beta"].submitter.send(tx.RevokeHsm(id="hsm-1"))
            offer = schema.encode(PairOffer(epoch=1, point=bytes(65)))
            for operation, body in (("peer.pair_epoch", b""), ("peer.pair", offer)):
                with pytest.raises(Refused) as caught:
                    await session.call(operation, body)
                assert caught.value.code == "ledger.hsm_not_active"


@contextlib.asynccontextmanager
async def peer_session(world: World, signer, party: Party):
    """A session of this HSM at alpha's broker, and the digest of the challenge."""
    shown: list[bytes] = []

    async def verify_broker(_challenge, _certificates) -> None:
        return None

    async def prove(_challenge, digest: bytes) -> bytes:
        shown.append(digest)
        return exchange.prove(signer, challenge_digest=digest, party=party)

    async def collect(_binding: bytes, _challenge) -> Collected:
        return Collected(format=EvidenceFormat.NONE, evidence=b"", endorsements=b"")

    async with await open_session(
        world.alpha.broker.said["sessions"],
        role=SessionRole.PEER_HSM,
        formats=(EvidenceFormat.NONE,),
        fields=schema.encode(PeerFields(provider=party.provider, hsm=party.hsm, bundle=b"")),
        signing_public=keys.public_bytes(signer.public_key()),
        verify_broker=verify_broker,
        prove=prove,
        collect=collect,
    ) as session:
        yield session, shown[0]
