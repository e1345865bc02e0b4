"""The verifier over real TLS: who may ask what, what a production verifier refuses, and garbage on every route."""

import asyncio
import base64
import dataclasses
import secrets

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Request

from moorline.attesters.tpm import Tpm
from moorline.clock import Instant, SystemClock, Validity
from moorline.errors import Malformed, Misconfigured, MoorlineError, NotAuthentic, Refused
from moorline.evidence.tpm_structures import parse_public
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import SpiffeId
from moorline.policy import ear, host, reference_values
from moorline.rats import EvidenceRoot, Tier
from moorline.services import http, settings, verifier, verifier_anchors, verifier_routes, verifier_settings
from moorline.simulators import firmware
from moorline.simulators.manufacturer import create_manufacturer, open_chip
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.tpm_identity import endorsement_digest
from moorline.wire import certificates as profile
from moorline.wire import host as wire
from moorline.wire import keys, schema
from moorline.wire.http import ClientIdentity, HttpClient

NOW = SystemClock().now()
LIFE = Validity(not_before=Instant(NOW - 60), not_after=Instant(NOW + 3000))
PEM = serialization.Encoding.PEM


class Pki:
    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = profile.root_certificate(self.key, name="root", validity=LIFE, serial=1)
        self.roots_pem = self.root.public_bytes(PEM)

    def identity(self, uri):
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = profile.Issuer(certificate=self.root, key=self.key)
        certificate = profile.leaf_certificate(
            key.public_key(), spiffe_id=SpiffeId.parse(uri), issuer=issuer, validity=LIFE, serial=2
        )
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return ClientIdentity(certificate_chain_pem=certificate.public_bytes(PEM), private_key_pem=private)


async def by_chain_alone(_: Request):
    """The guard of doors in tests that are about something else: a certificate is worth what its chain is."""


PKI = Pki()


def trust(*, simulated_allowed=True):
    return LedgerTrust(
        ledger_id=bytes(32),
        authorities={"a": bytes(32)},
        quorum=1,
        roots=(),
        simulated_allowed=simulated_allowed,
        max_age_s=30,
        known_s=0,
        trusting_period_s=1 << 40,
    )


@pytest.fixture(scope="module")
def silicon(tmp_path_factory):
    return create_manufacturer(tmp_path_factory.mktemp("silicon"), now=NOW)


@pytest.fixture
def configured(world, maker, silicon, tmp_path):
    """verifier.toml of a provider that simulates, and every file it names."""
    identity = PKI.identity("spiffe://alpha.test/verifier/v1")
    values = firmware.reference_values(
        firmware.GOOD, name="good", not_before=Instant(NOW - 60), not_after=Instant(NOW + 3000)
    )
    files = {
        "chain.pem": identity.certificate_chain_pem,
        "key.pem": identity.private_key_pem,
        "roots.pem": PKI.roots_pem,
        "trust.cbor": trust().encode(),
        "good.cose": reference_values.sign(values, keys.KeySigner(world.reference_key)),
        "signer.der": keys.public_bytes(world.reference_key.public_key()),
        "tpm-root.der": maker.root_der,
        "snp.cbor": silicon.anchors_path.read_bytes(),
        "ear.pem": world.ear_key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        "verifier.toml": b"""
id = "v1"
listen = "127.0.0.1:0"
provider = "alpha"
trust_domain = "alpha.test"
identity_chain = "chain.pem"
identity_key = "key.pem"
consortium_roots = "roots.pem"
database = "verifier.db"
ledger_trust = "trust.cbor"
ledger_urls = ["https://127.0.0.1:1|authority-1.authority.consortium.test"]
ear_key = "ear.pem"
anchors = ["vendor", "simulated"]
simulated_tpm_roots = ["tpm-root.der"]
simulated_snp_roots = ["snp.cbor"]
reference_values = ["good.cose"]
reference_signers = ["signer.der"]
lease_s = 20
""",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return settings.load(verifier_settings.VerifierSettings, tmp_path / "verifier.toml")


def composed(configured, world, anchors):
    async def platforms(names):
        missing = Refused("ledger.platform_not_active", "no such platform")
        return {name: world.platforms.get(name, missing) for name in names}

    identity = verifier.require_identity(configured, configured.identity_chain.read_bytes())
    store = VerifierStore.open(configured.database)
    assert configured.ear_key is not None
    return verifier.compose(
        configured, anchors, identity, store, platforms, verifier.local_signer(configured.ear_key), SystemClock()
    )


@pytest.fixture
async def serving(configured, world):
    anchors = verifier_anchors.read_anchors(configured, trust())
    app = verifier_routes.application(
        composed(configured, world, anchors),
        anchors,
        trust_domain="alpha.test",
        clock=SystemClock(),
        guard=by_chain_alone,
    )
    bound = asyncio.get_running_loop().create_future()
    identity = http.TlsIdentity(
        chain_pem=configured.identity_chain.read_bytes(), key_pem=configured.identity_key.read_bytes()
    )
    task = asyncio.create_task(
        http.serve(app, listen="127.0.0.1:0", identity=identity, client_roots_pem=PKI.roots_pem, ready=bound.set_result)
    )
    yield await bound
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def client(address, uri=None):
    return HttpClient(
        f"https://{address}",
        server_name="v1.verifier.alpha.test",
        roots_pem=PKI.roots_pem,
        identity=None if uri is None else PKI.identity(uri),
    )


@pytest.mark.story
async def test_a_host_attests_over_tls_and_its_result_is_read_by_who_may(serving, world, running, tmp_path):
    with Tpm.open(running[0].tcti) as tpm:
        firmware.boot(tpm, tmp_path / "h1", firmware.GOOD)
        ek_digest = endorsement_digest(parse_public(tpm.endorsement().public).key())
        tag = world.tag("h1", ek_digest)
        tpm.write_location(reference_values.tag_digest(tag))
        world.register("h1", ek_digest, tag=tag)
        async with client(serving) as session:
            agent = HostAttestation(
                host="h1",
                verifier=session,
                tpm=tpm,
                logs=FileLogs(tmp_path / "h1" / firmware.EVENT_LOG, tmp_path / "h1" / firmware.IMA_LIST),
                tag=tag,
                period_s=0.01,
            )
            verdicts = []
            done = asyncio.Event()

            def on_verdict(verdict):
                verdicts.append(verdict)
                if len(verdicts) == 2:
                    done.set()

            task = asyncio.create_task(agent.run(on_verdict))
            await done.wait()
            task.cancel()
            assert [verdict.status for verdict in verdicts[:2]] == ["affirming", "affirming"]
    for uri in ("orchestrator/o1", "hsm/h1", "verifier/v2", "operator/ann"):
        async with client(serving, f"spiffe://alpha.test/{uri}") as session:
            answer = await session.get_json("/v1/results/h1")
            assert answer["host"] == "h1"
            known = await session.get_json("/v1/hosts/h1/enrolment")
            assert base64.b64decode(known["ak_public"])
            assert known["root"] == "test"
    result = ear.parse_verified(answer["ear"], world.ear_key.public_key(), now=SystemClock().now(), audience="alpha.test")
    assert (result.status, result.root, result.simulated_allowed) == (Tier.AFFIRMING, EvidenceRoot.TEST, True)
    async with client(serving, "spiffe://alpha.test/operator/ann") as session:
        (row,) = (await session.get_json("/v1/hosts"))["hosts"]
        assert (row["host"], row["status"], row["withdrawn"]) == ("h1", "affirming", None)


READ = ["/v1/results/h1", "/v1/hosts", "/v1/hosts/h1/enrolment"]


@pytest.mark.parametrize("path", READ)
async def test_results_are_for_roles_of_the_own_trust_domain(serving, path):
    async with client(serving) as session:
        with pytest.raises(NotAuthentic) as refused:
            await session.get_json(path)
        assert refused.value.code == "http.no_client_certificate"
    for uri in ("spiffe://beta.test/orchestrator/o1", "spiffe://alpha.test/host/h1", "spiffe://alpha.test/svc/s/i"):
        async with client(serving, uri) as session:
            with pytest.raises(Refused) as refused:
                await session.get_json(path)
            assert refused.value.code == "http.not_authorised"
            with pytest.raises(Refused):
                await session.post_json("/v1/appraise", {})


async def test_nothing_about_a_host_that_never_attested(serving):
    async with client(serving, "spiffe://alpha.test/operator/ann") as session:
        with pytest.raises(Refused) as refused:
            await session.get_json("/v1/results/h1")
        assert refused.value.code == "result.none"
        with pytest.raises(Refused) as refused:
            await session.post_cbor("/v1/hosts/h1/challenge", schema.encode(wire.ChallengeRequest(host="h1")))
        assert refused.value.code == "host.not_enrolled"


@pytest.mark.parametrize("verb", ["enrol", "enrol/finish", "challenge", "evidence"])
async def test_garbage_gives_a_typed_refusal_and_the_service_goes_on(serving, verb):
    async with client(serving) as session:
        for body in (b"", b"\xff" * 100, b"\xa0", secrets.token_bytes(1000), schema.encode(wire.ChallengeRequest(host="x"))):
            with pytest.raises(MoorlineError) as refused:
                await session.post_cbor(f"/v1/hosts/h1/{verb}", body)
            assert refused.value.code.partition(".")[0] in {"cbor", "message", "host"}
        with pytest.raises(Malformed) as malformed:
            await session.post_cbor(f"/v1/hosts/h1/{verb}", bytes(wire.MAX_EVIDENCE + 1))
        assert malformed.value.code == "http.body_too_large"
        with pytest.raises(Malformed):
            await session.post_cbor(f"/v1/hosts/H..1/{verb}", schema.encode(wire.ChallengeRequest(host="H..1")))
        assert (await session.get_json("/healthz"))["live"]


def test_simulated_silicon_counts_where_the_genesis_allows_it_and_never_in_production(configured, silicon):
    """verifies that: one report is accepted by a simulating verifier and refused by the shipped production policy"""
    chip = open_chip(silicon.make_chip("c1", now=NOW))
    report_data = bytes(range(64))
    context = GuestContext(measurement=b"m" * 48, host_data=b"h" * 32, policy=guest_policy(debug=False), report_id=b"r" * 32)
    report = Silicon(chip).report(context, report_data)
    body = {
        "format": "snp",
        "evidence": base64.b64encode(report.outblob).decode(),
        "endorsements": base64.b64encode(report.auxblob).decode(),
        "report_data": report_data.hex(),
    }
    simulating = verifier_anchors.read_anchors(configured, trust())
    shown = verifier_routes.appraise_evidence(body, simulating, now=NOW)
    assert (shown["root"], shown["measurement"]) == ("test", (b"m" * 48).hex())
    production = verifier_anchors.read_anchors(verifier_settings.production(configured), trust())
    with pytest.raises(NotAuthentic) as refused:
        verifier_routes.appraise_evidence(body, production, now=NOW)
    assert refused.value.code == "snp.anchor_unknown"
    with pytest.raises(NotAuthentic) as refused:
        verifier_routes.appraise_evidence(body | {"report_data": "00" * 64}, simulating, now=NOW)
    assert refused.value.code == "snp.report_data_mismatch"
    for wrong in ({}, body | {"format": "tdx"}, body | {"evidence": "!"}, body | {"more": 1}, body | {"report_data": 5}):
        with pytest.raises(Malformed):
            verifier_routes.appraise_evidence(wrong, simulating, now=NOW)


def test_a_production_verifier_has_no_anchor_of_root_test(configured):
    anchors = verifier_anchors.read_anchors(verifier_settings.production(configured), trust())
    assert all(anchor.root is not EvidenceRoot.TEST for anchor in (*anchors.tpm, *anchors.snp.snp))
    assert anchors.simulated_allowed is False


@pytest.mark.parametrize(
    ("changes", "allowed", "code"),
    [
        ({}, False, "verifier.anchors_simulated"),
        ({"anchors": ("vendor",)}, True, "verifier.anchors_simulated"),
        ({"anchors": ("simulated",)}, True, "verifier.anchors_unknown"),
        ({"anchors": ("vendor", "any")}, True, "verifier.anchors_unknown"),
    ],
)
def test_anchor_sets_that_do_not_fit_are_refused_at_start(configured, changes, allowed, code):
    with pytest.raises(Misconfigured) as refused:
        verifier_anchors.read_anchors(dataclasses.replace(configured, **changes), trust(simulated_allowed=allowed))
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"pcrs": tuple(range(10))}, "verifier.pcrs"),
        ({"pcrs": (*range(1, 11), 0)}, "verifier.pcrs"),
        ({"not_required": {"kernels": "a typing error"}}, "verifier.not_required"),
        ({"not_required": {"kernel": ""}}, "policy.no_reason"),
        ({"reference_values": ()}, "reference.none"),
        ({"reference_signers": ()}, "reference.signer_unknown"),
    ],
)
def test_settings_that_would_weaken_appraisal_by_accident_are_refused_at_start(configured, world, changes, code):
    anchors = verifier_anchors.read_anchors(configured, trust())
    with pytest.raises(MoorlineError) as refused:
        composed(dataclasses.replace(configured, **changes), world, anchors)
    assert refused.value.code == code


def test_older_reference_values_cannot_be_put_back(configured, world):
    anchors = verifier_anchors.read_anchors(configured, trust())
    composed(configured, world, anchors)
    VerifierStore.open(configured.database).accept_serial("good", 2)
    with pytest.raises(Refused) as refused:
        composed(configured, world, anchors)
    assert refused.value.code == "reference.rollback"


def test_an_identity_of_another_verifier_is_refused(configured):
    other = PKI.identity("spiffe://alpha.test/verifier/v2").certificate_chain_pem
    with pytest.raises(Misconfigured) as refused:
        verifier.require_identity(configured, other)
    assert refused.value.code == "verifier.identity"


def test_the_shipped_policy_demands_every_field_but_those_it_gives_a_reason_for(configured):
    shipped = verifier_settings.production(configured)
    assert set(shipped.not_required) == {"clock_safe"}
    assert set(shipped.not_required) < {field.name for field in dataclasses.fields(host.HostPolicy)}
