"""The attestation authority's process: configuration, HTTPS, and who may ask what.

Hosts prove themselves by their TPM and need no client certificate to enrol, ask for a challenge or send evidence. Everything
else is for the orchestrator, HSM, verifier or operator of the verifier's own trust domain, by mutual TLS. The key that signs
results stays in the provider's token: the broker signs, for this verifier's identity only.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import functools
import random
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Body, FastAPI, Request, Response

from moorline.audit.checkpoint import log_name
from moorline.clock import Clock, Instant, SystemClock
from moorline.errors import Malformed, Misconfigured
from moorline.evidence.ima import PCR as IMA_PCR
from moorline.evidence.snp import parse_report
from moorline.ledger.client import Endpoint, LedgerClient
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.policy import host as policy_host
from moorline.policy.match import NotRequired
from moorline.rats import EvidenceRoot
from moorline.services import (
    http,
    http_connection,
    metrics,
    service_audit,
    settings,
    verifier_asking,
    verifier_events,
    verifier_landmarks,
    verifier_push,
    verifier_references,
    verifier_results,
    verifier_watch,
)
from moorline.services import verifier_files as files
from moorline.services.attestation_authority import AttestationAuthority, Parts, PlatformLookup, Sign
from moorline.services.callers import Callers, view_for
from moorline.services.host_appraisal import Distance, Terms
from moorline.services.http_short import Answering, ShortWay
from moorline.services.process import announce_ready, collect_seldom, serve_all
from moorline.services.service_audit import ServiceLog
from moorline.services.verifier_asking import Asking
from moorline.services.verifier_landmarks import Measurements
from moorline.services.verifier_makers import Makers
from moorline.services.verifier_platforms import LedgerPlatforms
from moorline.services.verifier_push import Pushing, ReceiverSettings
from moorline.services.verifier_references import References, Sources
from moorline.services.verifier_results import READERS
from moorline.services.verifier_signer import BrokerSigner
from moorline.services.verifier_watch import Watch
from moorline.storage.collateral_intake import tpm_crls
from moorline.storage.collateral_store import open_collateral
from moorline.storage.verifier_events import AUDIT_DOMAIN
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.anchors import AnchorSet, parse_anchor_file, production_anchors
from moorline.verification.snp import endorsements_from_table, verify_snp
from moorline.verification.tpm_identity import TpmAnchor, vendor_anchors
from moorline.verification.tpm_revocation import Revocation
from moorline.wire import certificates, keys, schema
from moorline.wire import host as wire
from moorline.wire.http import CBOR_TYPE, ClientIdentity, HttpClient, load_identity

_VENDOR: Final = "vendor"
_SIMULATED: Final = "simulated"
_HOSTS: Final = "/v1/hosts/"
_ALL_BOOT: Final = tuple(range(11))
IDENTITY_REREAD_S: Final = 1200.0
"""The certificate on disk is read again this often: it lives an hour at most, and whoever renews it replaces the files."""
_NO_LISTS: Final = "makers of SIMULATED TPMs publish no revocation lists"
HOST_IDLE_S: Final = 75
"""A host that attests once a minute keeps its connection."""
_CLOCK_REASON: Final = "a TPM that lost power says so until its clock is safe again; its counters are compared all the same"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierSettings:
    """verifier.toml. Paths are relative to it. `ledger_urls` are `url|server name`; keys and certificates PEM or DER.

    `anchors` names the sets that count: `vendor`, and `simulated` where the ledger's genesis allows it. The roots of TPM
    makers that are not shipped are configured by file, by what they are. `reference_signers` sign reference values and
    location tags. The EAR key is in the token (`broker_url`, `broker_name`), or in `ear_key` where there is none.
    """

    id: str
    """This attestation authority's id; its certificate must say so."""
    listen: str
    """Where it serves HTTPS, address:port."""
    provider: str
    """The provider whose hosts it judges."""
    trust_domain: str
    """The provider's trust domain."""
    identity_chain: Path
    """Its certificate and those above it, PEM (moor hsm svid)."""
    identity_key: Path
    """The certificate's private key, PEM, mode 0600."""
    consortium_roots: Path
    """The consortium's root certificates, PEM."""
    database: Path
    """Its SQLite file."""
    ledger_trust: Path
    """The ledger's trust file."""
    ledger_urls: tuple[str, ...]
    """The authorities, each as url|name in its certificate."""
    anchors: tuple[str, ...]
    """The sets of anchors that count: "vendor", and "simulated" where the genesis allows simulation."""
    reference_values: tuple[Path, ...]
    """Signed sets of reference values (moor verifier sign-reference-values), or folders of them; changes are read."""
    reference_signers: tuple[Path, ...]
    """Public keys or certificates that may sign reference values and location tags."""
    database_url: str | None = None
    """A PostgreSQL database in place of the file; written as in broker.toml."""
    broker_url: str | None = None
    """The broker's HTTPS address: results are signed by the key in its token."""
    broker_name: str | None = None
    """The DNS name in the broker's certificate."""
    ear_key: Path | None = None
    """A private key file (0600) to sign results with, where there is no broker."""
    tpm_hardware_roots: tuple[Path, ...] = ()
    """Roots of TPM makers beside the shipped ones."""
    tpm_virtual_roots: tuple[Path, ...] = ()
    """Roots of virtual TPMs."""
    tpm_intermediates: tuple[Path, ...] = ()
    """Certificates of TPM makers between those roots and endorsement keys, for TPMs that do not bring them along."""
    tpm_collateral: Path | None = None
    """The collateral store that holds TPM makers' revocation lists (moor collateral add, or import)."""
    tpm_crls_not_required: dict[str, str] = field(default_factory=lambda: {EvidenceRoot.TEST.value: _NO_LISTS})
    """Kinds of root (hardware, virtual, test) for which a missing revocation list is no obstacle, each with the reason."""
    simulated_tpm_roots: tuple[Path, ...] = ()
    """Roots of SIMULATED TPMs."""
    simulated_snp_roots: tuple[Path, ...] = ()
    """Anchor files of SIMULATED SEV-SNP processors."""
    lease_s: int = 60
    """Seconds a result stands."""
    challenge_s: int = 30
    """Seconds a challenge is good for."""
    landmarks: Path | None = None
    """Landmarks whose measurements may refute the place in a host's tag: [landmark.NAME] with place and key."""
    measurements: Path | None = None
    """The folder of what these landmarks measured: HOST.pem, the host's echo key, and HOST.*.cose."""
    pull_every_s: int | None = None
    """Ask each host whose last result is older than this; left out, hosts come by themselves, once a period."""
    takeover_s: float = 5.0
    """Of several processes over one database: seconds after which the others do the work of one that is not heard of."""
    pcrs: tuple[int, ...] = _ALL_BOOT
    """The PCRs that hosts must quote."""
    not_required: dict[str, str] = field(default_factory=lambda: {"clock_safe": _CLOCK_REASON})
    """Fields of the appraisal policy that are not required, each with the reason."""
    connections: int = 32768
    """Connections at once: twice as many as there are hosts, since each keeps one open to be asked, and some more."""
    may_ask: tuple[str, ...] = ()
    """SPIFFE IDs of other trust domains that may read results about hosts, beside those of its own who act on them."""
    receivers: tuple[ReceiverSettings, ...] = ()
    """Somebody who is told of every verdict gained and lost, by signed events pushed over HTTPS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductionPolicy:
    """services/defaults/verifier-production.toml: what a production verifier puts in place of its settings."""

    anchors: tuple[str, ...]
    lease_s: int
    challenge_s: int
    pcrs: tuple[int, ...]
    not_required: dict[str, str]
    tpm_crls_not_required: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """All anchors of one verifier, and whether the genesis lifts the cap of simulated ones."""

    tpm: tuple[TpmAnchor, ...]
    snp: AnchorSet
    simulated_allowed: bool


def production(configured: VerifierSettings) -> VerifierSettings:
    """`configured` under the shipped production policy: vendor anchors alone, whatever the settings list."""
    shipped = resources.files("moorline.services.defaults").joinpath("verifier-production.toml")
    with resources.as_file(shipped) as path:
        policy = settings.load(ProductionPolicy, path)
    return dataclasses.replace(
        configured,
        anchors=policy.anchors,
        lease_s=policy.lease_s,
        challenge_s=policy.challenge_s,
        pcrs=policy.pcrs,
        not_required=policy.not_required,
        tpm_crls_not_required=policy.tpm_crls_not_required,
        simulated_tpm_roots=(),
        simulated_snp_roots=(),
    )


def read_anchors(configured: VerifierSettings, trust: LedgerTrust) -> Anchors:
    """The anchors that count. Raises Misconfigured (`verifier.anchors_*`) for unknown sets, or simulation not allowed."""
    unknown = set(configured.anchors) - {_VENDOR, _SIMULATED}
    if unknown or _VENDOR not in configured.anchors:
        raise Misconfigured(
            "verifier.anchors_unknown",
            "the anchor sets are vendor, and simulated",
            expected="vendor, simulated",
            got=configured.anchors,
        )
    simulated = _SIMULATED in configured.anchors
    if simulated and not trust.simulated_allowed:
        raise Misconfigured(
            "verifier.anchors_simulated",
            "this ledger's genesis does not allow simulated anchors",
            remedy='use anchors = ["vendor"]',
        )
    if not simulated and (configured.simulated_tpm_roots or configured.simulated_snp_roots):
        raise Misconfigured(
            "verifier.anchors_simulated",
            "simulated roots are listed but the set `simulated` is not",
            remedy='add "simulated" to anchors, or leave the roots out',
        )
    kinds = (
        (configured.tpm_hardware_roots, EvidenceRoot.HARDWARE),
        (configured.tpm_virtual_roots, EvidenceRoot.VIRTUAL),
        (configured.simulated_tpm_roots, EvidenceRoot.TEST),
    )
    between = tuple(files.certificate(path) for path in configured.tpm_intermediates)
    tpm = tuple(
        TpmAnchor(certificate=files.certificate(path), root=root, intermediates=between)
        for paths, root in kinds
        for path in paths
    )
    snp = production_anchors()
    for path in configured.simulated_snp_roots:
        snp = snp.plus(parse_anchor_file(files.read(path)))
    return Anchors(tpm=(*vendor_anchors(), *tpm), snp=snp, simulated_allowed=trust.simulated_allowed and simulated)


def revocation_reader(configured: VerifierSettings) -> Callable[[], Revocation]:
    """Reads what is held of TPM makers' CRLs, anew each time: a list that came in a minute ago counts.

    Raises Misconfigured("verifier.unknown_root" | "verifier.no_reason" | "collateral.no_store"), at once.
    """
    waived: dict[EvidenceRoot, str] = {}
    for root, reason in configured.tpm_crls_not_required.items():
        if root not in {EvidenceRoot.HARDWARE, EvidenceRoot.VIRTUAL, EvidenceRoot.TEST}:
            raise Misconfigured(
                "verifier.unknown_root", "not a kind of root", expected="hardware, virtual or test", got=root
            )
        if not reason.strip():
            raise Misconfigured("verifier.no_reason", "what is not required has a reason", got=root)
        waived[EvidenceRoot(root)] = reason
    path = configured.tpm_collateral
    store = None if path is None else open_collateral(path, create=False)

    def read() -> Revocation:
        try:
            return Revocation(crls=() if store is None else tpm_crls(store), not_required=waived)
        except Malformed as error:  # this verifier's own store, and not what a host sent
            raise Misconfigured(
                "verifier.collateral_damaged",
                "the collateral store holds what nobody put there",
                got=f"{path}: {error.code}",
                remedy="import the lists again (moor collateral import)",
            ) from None

    return read


def application(
    authority: AttestationAuthority,
    anchors: Anchors,
    *,
    trust_domain: str,
    clock: Clock,
    guard: http.Guard,
    may_ask: Collection[SpiffeId] = (),
) -> FastAPI:
    """The verifier's interface. `may_ask` are those of other trust domains who may read results about hosts.

    `guard` judges the certificates of callers; hosts need none, and the short way serves hosts only.
    """
    streams = {
        verifier_events.STREAM_PATH: verifier_events.STREAM_S + http_connection.REQUEST_DEADLINE_S,
        verifier_results.WAIT_PATH: verifier_asking.HELD_S + http_connection.REQUEST_DEADLINE_S,
    }
    short = ShortWay(functools.partial(_short_way, authority), CBOR_TYPE)
    app = http.application("attestation authority", body_cap=wire.MAX_EVIDENCE, streams=streams, short=short, guard=guard)
    metrics.of_verifier(app, authority.overview)

    @app.post("/v1/hosts/{host}/enrol")
    async def begin(request: Request, host: str) -> Response:
        asked = schema.decode(wire.EnrolRequest, await request.body())
        return _cbor(await authority.begin_enrolment(parse_name(host, "host"), asked))

    @app.post("/v1/hosts/{host}/enrol/finish")
    async def finish(request: Request, host: str) -> Response:
        proof = schema.decode(wire.EnrolProof, await request.body())
        return _cbor(await authority.finish_enrolment(parse_name(host, "host"), proof))

    @app.post("/v1/hosts/{host}/challenge")
    async def challenge(request: Request, host: str) -> Response:
        return _cbor(await _challenge(authority, host, await request.body()))

    @app.post("/v1/hosts/{host}/evidence")
    async def evidence(request: Request, host: str) -> Response:
        return _cbor(await authority.appraise(parse_name(host, "host"), wire.decode_evidence(await request.body())))

    @app.get("/v1/hosts")
    async def hosts(request: Request) -> dict[str, object]:
        http.require(request, *READERS, trust_domain=trust_domain)
        return {"hosts": authority.overview()}

    @app.get("/v1/hosts/{host}/enrolment")
    async def enrolment(request: Request, host: str) -> dict[str, object]:
        http.require(request, *READERS, trust_domain=trust_domain)
        known = authority.enrolled(host)
        return {
            "host": known.host,
            "ak_public": base64.b64encode(known.ak_public).decode("ascii"),
            "ek_digest": known.ek_digest.hex(),
            "root": known.root.value,
        }

    @app.post("/v1/appraise")
    async def appraise(request: Request, body: Annotated[dict[str, Any], Body()]) -> dict[str, object]:
        http.require(request, *READERS, trust_domain=trust_domain)
        return appraise_evidence(body, anchors, now=clock.now())

    verifier_results.add_routes(app, authority, trust_domain=trust_domain, clock=clock, may_ask=may_ask)
    verifier_events.add_routes(app, authority, trust_domain=trust_domain)
    return app


def _short_way(authority: AttestationAuthority, target: str) -> Answering | None:
    """The two routes of hosts that stand, which are nearly all that a verifier is asked."""
    name, _, verb = target.removeprefix(_HOSTS).partition("/")
    if not target.startswith(_HOSTS):
        return None

    async def evidence(body: bytes) -> bytes:
        return schema.encode(await authority.appraise(parse_name(name, "host"), wire.decode_evidence(body)))

    async def challenge(body: bytes) -> bytes:
        return schema.encode(await _challenge(authority, name, body))

    return {"evidence": evidence, "challenge": challenge}.get(verb)


async def _challenge(authority: AttestationAuthority, host: str, body: bytes) -> wire.HostChallenge:
    asked = schema.decode(wire.ChallengeRequest, body)
    if asked.host != host:
        raise Malformed("host.name_mismatch", "path and message name different hosts", expected=host, got=asked.host)
    return await authority.ask(host)


def appraise_evidence(body: dict[str, Any], anchors: Anchors, *, now: Instant) -> dict[str, object]:
    """Evidence appraised for somebody who holds it: authentic, and bound to `report_data`. Facts come back, not a lease.

    Raises Malformed("appraise.*"), and what `verify_snp` raises: a simulated root under vendor anchors is
    `snp.anchor_unknown`.
    """
    if set(body) != {"format", "evidence", "endorsements", "report_data"} or body["format"] != "snp":
        raise Malformed(
            "appraise.request", "not a request to appraise", expected="format snp, evidence, endorsements, report_data"
        )
    try:
        evidence, endorsements = (base64.b64decode(body[name], validate=True) for name in ("evidence", "endorsements"))
        report_data = bytes.fromhex(body["report_data"])
    except (TypeError, ValueError, binascii.Error):
        raise Malformed(
            "appraise.request", "a field is not encoded as it must be", expected="base64, base64, hexadecimal"
        ) from None
    verified = verify_snp(
        parse_report(evidence),
        endorsements_from_table(endorsements),
        report_data=report_data,
        anchors=anchors.snp,
        now=now,
    )
    claims = verified.value
    return {
        "format": "snp",
        "root": verified.root.value,
        "simulated_allowed": anchors.simulated_allowed,
        "product": claims.product.value,
        "measurement": claims.report.measurement.hex(),
        "host_data": claims.report.host_data.hex(),
        "chip_id": None if claims.chip_id is None else claims.chip_id.hex(),
        "debug": claims.report.policy.debug,
        "collateral": verified.collateral_digest.hex(),
    }


def local_signer(path: Path) -> Sign:
    """Signing with a key in a file, where a provider has no token."""
    key = serialization.load_pem_private_key(files.read(path), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Misconfigured("verifier.ear_key", "the EAR key is not an elliptic curve key", expected="P-256", got=path)
    signer = keys.KeySigner(key)

    async def sign(messages: tuple[bytes, ...]) -> tuple[bytes, ...]:
        return tuple(signer.sign(message) for message in messages)

    return sign


async def run(configured: VerifierSettings, *, announce: Callable[..., None] = announce_ready) -> None:
    """Serve until cancelled."""
    clock = SystemClock()
    trust = LedgerTrust.parse(files.read(configured.ledger_trust))
    anchors = read_anchors(configured, trust)
    identity = _identity(configured)
    verifier = require_identity(configured, identity.certificate_chain_pem)
    roots_pem = files.read(configured.consortium_roots)
    told = verifier_push.receivers(configured.receivers)
    store = VerifierStore.open(configured.database_url or configured.database)
    endpoints = tuple(Endpoint.parse(text) for text in configured.ledger_urls)
    async with LedgerClient(endpoints, roots_pem=roots_pem) as ledger:
        view = view_for(ledger, trust, store, clock)
        platforms = LedgerPlatforms(view, provider=configured.provider, clock=clock)
        signer = _signer(configured, roots_pem)
        measured = measurements(configured, clock)
        judged = None if measured is None else measured.judge
        authority = compose(configured, anchors, verifier, store, platforms, signer, clock, judged)
        may_ask = frozenset(SpiffeId.parse(text) for text in configured.may_ask)
        domain = configured.trust_domain
        guard = Callers(view, provider=configured.provider, trust_domain=domain, clock=clock)
        app = application(authority, anchors, trust_domain=domain, clock=clock, guard=guard, may_ask=may_ask)
        secure_log = ServiceLog(
            name=log_name(AUDIT_DOMAIN, configured.id),
            read=store.audit_rows,
            broker=functools.partial(_broker, configured, roots_pem),
        )
        service_audit.add_routes(app, secure_log, trust_domain=configured.trust_domain)
        signing = secure_log.keep(lambda error: structlog.get_logger().warning("checkpoint", **error.as_problem()))
        deliveries = store.deliveries()
        verifier_push.add_routes(app, deliveries, authority, trust_domain=configured.trust_domain)
        watch, watching = await _watching(app, configured, anchors, store, authority, clock)
        if measured is not None:
            watching = (measured.keep(), *watching)
        pushing = Pushing(
            authority=authority,
            verifier=str(verifier),
            deliveries=deliveries,
            sign=signer,
            clock=clock,
            sleep=asyncio.sleep,
            jitter=random.random,
            mine=watch.holds,
        )
        telling = (verifier_push.keep_telling(pushing, receiver) for receiver in told)
        collect_seldom()
        await serve_all(_serve(configured, app, roots_pem, announce), *watching, signing, *telling)


async def _watching(
    app: FastAPI,
    configured: VerifierSettings,
    anchors: Anchors,
    store: VerifierStore,
    authority: AttestationAuthority,
    clock: Clock,
) -> tuple[Watch, tuple[Coroutine[None, None, None], ...]]:
    """What this process does without being asked, and its routes: its part of the fleet, questions, reference values."""
    watch = Watch(
        store.watchers(),
        process=secrets.token_hex(16),
        takeover_s=configured.takeover_s,
        steady=time.monotonic,
        ready=authority.patient,
    )
    metrics.measured(
        app,
        "moorline_verifier_watched_parts",
        "Parts of the fleet this process watches",
        lambda: {(): float(watch.parts)},
    )
    asking = Asking(
        store, verifier_asking.Terms(answer_s=configured.challenge_s, pull_every_s=configured.pull_every_s), clock
    )
    verifier_results.add_asking(app, authority, asking, trust_domain=configured.trust_domain, clock=clock)
    held = sources(configured, store, clock)
    references = References(held, (await asyncio.to_thread(held.read))[1], authority)
    verifier_references.add_routes(app, references, trust_domain=configured.trust_domain)
    makers = Makers(store, anchors=anchors.tpm, revocation=revocation_reader(configured), authority=authority, clock=clock)
    return watch, (
        references.keep(),
        makers.keep(),
        watch.keep(),
        verifier_watch.sweep(authority, watch),
        verifier_watch.follow(authority),
        asking.keep(watch.holds),
    )


async def _broker(configured: VerifierSettings, roots_pem: bytes) -> HttpClient:
    """The provider's broker, which signs checkpoints of this verifier's log."""
    url, name = configured.broker_url, configured.broker_name
    if url is None or name is None:
        raise Misconfigured("audit.no_broker", "no broker signs this log", expected="broker_url and broker_name")
    identity = await asyncio.to_thread(_identity, configured)
    return HttpClient(url, server_name=name, roots_pem=roots_pem, identity=identity)


async def _serve(configured: VerifierSettings, app: FastAPI, roots_pem: bytes, announce: Callable[..., None]) -> None:
    identity = _identity(configured)
    require_identity(configured, identity.certificate_chain_pem)
    shown = http.TlsIdentity(chain_pem=identity.certificate_chain_pem, key_pem=identity.private_key_pem)
    context: asyncio.Future[ssl.SSLContext] = asyncio.get_running_loop().create_future()
    serving = http.serve(
        app,
        listen=configured.listen,
        identity=shown,
        client_roots_pem=roots_pem,
        ready=lambda address: announce("verifier", address=address),
        on_context=context.set_result,
        connections=http_connection.Connections(room=configured.connections, idle_s=HOST_IDLE_S),
    )
    await serve_all(serving, _renew(configured, context))


async def _renew(configured: VerifierSettings, bound: Awaitable[ssl.SSLContext]) -> None:
    """Show the certificate that is on disk to whoever connects from now on; ten thousand hosts keep their connections."""
    context = await bound
    while True:
        await asyncio.sleep(IDENTITY_REREAD_S)
        identity = _identity(configured)
        require_identity(configured, identity.certificate_chain_pem)
        load_identity(context, identity.certificate_chain_pem, identity.private_key_pem)


def compose(
    configured: VerifierSettings,
    anchors: Anchors,
    verifier: SpiffeId,
    store: VerifierStore,
    platforms: PlatformLookup,
    sign: Sign,
    clock: Clock,
    measured: Distance | None = None,
) -> AttestationAuthority:
    """The authority of these settings. Raises Misconfigured, and what reading reference values raises."""
    missing = sorted(set(range(10)) - set(configured.pcrs) | {IMA_PCR} - set(configured.pcrs))
    if missing or tuple(sorted(set(configured.pcrs))) != configured.pcrs:
        raise Misconfigured(
            "verifier.pcrs", "the PCRs to quote are ascending and hold 0 to 10 at least", got=configured.pcrs
        )
    require_policy(configured)
    signers = tuple(files.public_key(path) for path in configured.reference_signers)
    reference, _ = sources(configured, store, clock).read()
    return AttestationAuthority(
        Parts(
            verifier=str(verifier),
            audience=configured.trust_domain,
            terms=Terms(
                lease_s=configured.lease_s,
                challenge_s=configured.challenge_s,
                pcrs=configured.pcrs,
                not_required=configured.not_required,
            ),
            anchors=anchors.tpm,
            revocation=revocation_reader(configured),
            simulated_allowed=anchors.simulated_allowed,
            reference=reference,
            signers=signers,
            platforms=platforms,
            sign=sign,
            store=store,
            clock=clock,
            random=secrets.token_bytes,
            measured=measured,
        )
    )


def measurements(configured: VerifierSettings, clock: Clock) -> Measurements | None:
    """What landmarks measured, where they are configured. Raises Misconfigured (`distance.*`, "verifier.landmarks")."""
    if configured.landmarks is None and configured.measurements is None:
        return None
    if configured.landmarks is None or configured.measurements is None:
        raise Misconfigured(
            "verifier.landmarks", "landmarks are of use with their measurements only", expected="landmarks and measurements"
        )
    found = Measurements(configured.measurements, verifier_landmarks.landmarks(configured.landmarks), clock)
    found.look()
    return found


def require_policy(configured: VerifierSettings) -> None:
    """Raises Misconfigured("verifier.not_required" | "policy.no_reason") for what is no field, or has no reason."""
    known = {one.name for one in dataclasses.fields(policy_host.HostPolicy)}
    unknown = set(configured.not_required) - known
    if unknown:
        raise Misconfigured(
            "verifier.not_required", "not_required names no field of the policy", expected=sorted(known), got=sorted(unknown)
        )
    for reason in configured.not_required.values():
        NotRequired(reason)


def sources(configured: VerifierSettings, store: VerifierStore, clock: Clock) -> Sources:
    """Where the reference values of these settings are."""
    signers = tuple(files.public_key(path) for path in configured.reference_signers)
    return Sources(paths=configured.reference_values, signers=signers, store=store, clock=clock)


def require_identity(configured: VerifierSettings, chain_pem: bytes) -> SpiffeId:
    """The verifier's SPIFFE ID; raises Misconfigured("verifier.identity") unless the certificate is this verifier's."""
    expected = SpiffeId(trust_domain=configured.trust_domain, role=Role.VERIFIER, segments=(configured.id,))
    found = certificates.spiffe_id_of(x509.load_pem_x509_certificate(chain_pem))
    if found != expected:
        raise Misconfigured(
            "verifier.identity",
            "the certificate is for somebody else",
            expected=expected,
            got=found,
            remedy="issue a new one",
        )
    return expected


def _signer(configured: VerifierSettings, roots_pem: bytes) -> Sign:
    if configured.ear_key is not None:
        return local_signer(configured.ear_key)
    url, name = configured.broker_url, configured.broker_name
    if url is None or name is None:
        raise Misconfigured(
            "verifier.no_ear_key", "nothing signs the results", expected="broker_url and broker_name, or ear_key"
        )
    return BrokerSigner(lambda: HttpClient(url, server_name=name, roots_pem=roots_pem, identity=_identity(configured)))


def _identity(configured: VerifierSettings) -> ClientIdentity:
    return ClientIdentity(
        certificate_chain_pem=files.read(configured.identity_chain), private_key_pem=files.read(configured.identity_key)
    )


def _cbor(message: object) -> Response:
    return Response(schema.encode(message), media_type=CBOR_TYPE)
