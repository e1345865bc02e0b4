"""The attestation authority's process: made of its settings, and served over HTTPS until it is stopped.

The key that signs results stays in the provider's token: the broker signs, for this verifier's identity only. What it is
configured with is in services.verifier_settings, what it trusts in verifier_anchors, what it answers in verifier_routes.
"""

from __future__ import annotations

import asyncio
import functools
import random
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI

from moorline.audit.checkpoint import log_name
from moorline.clock import Clock, SystemClock
from moorline.errors import Misconfigured, MoorlineError
from moorline.evidence.ima import PCR as IMA_PCR
from moorline.ledger.client import Endpoint, LedgerClient
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, SpiffeId
from moorline.services import (
    http,
    http_connection,
    metrics,
    service_audit,
    verifier_asking,
    verifier_landmarks,
    verifier_push,
    verifier_references,
    verifier_results,
    verifier_watch,
)
from moorline.services import verifier_files as files
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.callers import Callers, view_for
from moorline.services.host_appraisal import Distance, Terms
from moorline.services.process import announce_ready, collect_seldom, serve_all
from moorline.services.service_audit import ServiceLog
from moorline.services.verifier_anchors import Anchors, read_anchors, revocation_reader
from moorline.services.verifier_asking import Asking
from moorline.services.verifier_landmarks import Measurements
from moorline.services.verifier_makers import Makers
from moorline.services.verifier_parts import Parts, PlatformLookup, Sign
from moorline.services.verifier_platforms import LedgerPlatforms
from moorline.services.verifier_push import Pushing
from moorline.services.verifier_references import References, Sources
from moorline.services.verifier_routes import application
from moorline.services.verifier_settings import VerifierSettings, require_policy
from moorline.services.verifier_signer import BrokerSigner
from moorline.services.verifier_watch import Watch
from moorline.storage.verifier_events import AUDIT_DOMAIN
from moorline.storage.verifier_store import VerifierStore
from moorline.wire import certificates, keys
from moorline.wire.http import ClientIdentity, HttpClient, load_identity, server_context

IDENTITY_REREAD_S: Final = 1200.0
"""The certificate on disk is read again this often: it lives an hour at most, and whoever renews it replaces the files."""
IDENTITY_RETRY_S: Final = 30.0
"""And this soon when what is there cannot be used."""
HOST_IDLE_S: Final = 75
"""A host that attests once a minute keeps its connection."""
_LOG: Final = structlog.stdlib.get_logger("verifier")


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
    """Show the certificate that is on disk to whoever connects from now on; ten thousand hosts keep their connections.

    What is on disk and cannot be used, half-written or somebody else's, is logged, and the one in use stays.
    """
    context, wait_s = await bound, IDENTITY_REREAD_S
    while True:
        await asyncio.sleep(wait_s)
        try:
            identity = _identity(configured)
            require_identity(configured, identity.certificate_chain_pem)
        except MoorlineError as error:
            _LOG.warning("no new identity, the one in use stays", **error.as_problem())
            wait_s = IDENTITY_RETRY_S
        else:
            load_identity(context, identity.certificate_chain_pem, identity.private_key_pem)
            wait_s = IDENTITY_REREAD_S


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
    """What the files hold, known to be a pair. Raises Misconfigured("verifier.identity" | "verifier.unreadable")."""
    chain_pem, key_pem = files.read(configured.identity_chain), files.read(configured.identity_key)
    try:
        server_context(chain_pem, key_pem)
    except OSError as error:  # ssl's; tried here, for a context in use would be left without a certificate
        raise Misconfigured(
            "verifier.identity",
            "the files hold no certificate with its key",
            expected="PEM, whole, and of one pair",
            got=f"{configured.identity_chain}, {configured.identity_key}: {error.strerror or error}",
            remedy="issue a new one",
        ) from None
    return ClientIdentity(certificate_chain_pem=chain_pem, private_key_pem=key_pem)
