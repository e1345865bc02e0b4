"""The orchestrator's process (MANO): packages in, functions placed, launched, watched and cleaned up, over mutual TLS.

Composition only: decisions are orchestration's, memory is storage.orchestrator_store, never asked on the event loop.
Identity files are read again for every connection, since an SVID lives an hour at most and is renewed by replacing them. At
start every unfinished launch and clean-up goes on from its last recorded step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from moorline.audit.checkpoint import log_name
from moorline.clock import Clock, SystemClock
from moorline.errors import Malformed, Misconfigured, MoorlineError, Refused
from moorline.ledger.client import Endpoint, LedgerClient
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.orchestration import package as packages
from moorline.orchestration.compliance import Compliance, Reactions
from moorline.orchestration.launch import Identity, Launches, as_json
from moorline.orchestration.placement import Demand
from moorline.policy import sec009
from moorline.services import http, metrics, service_audit
from moorline.services.callers import Callers, view_for
from moorline.services.key_files import KeyFile
from moorline.services.orchestrator_peers import Brokers, HostAgents, LauncherLink, NamedHost, Peer
from moorline.services.process import announce_ready, serve_all
from moorline.services.service_audit import ServiceLog
from moorline.storage.orchestrator_store import AUDIT_DOMAIN, Afterwards, FunctionRow, OrchestratorStore, PackageRow
from moorline.wire import keys, launch
from moorline.wire.certificates import dns_name
from moorline.wire.http import ClientIdentity, HttpClient, load_identity
from moorline.wire.orchestration import MAX_PACKAGE_BYTES

IDENTITY_REREAD_S: Final = 600.0
END_WAIT_S: Final = 20.0
STORE_RETRY_S: Final = 2.0
MAX_GENERATION: Final = 99_999


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorSettings:
    """orchestrator.toml. `intent_key` is registered on the ledger; `package_signers` are publishers or their CAs, PEM."""

    provider: str
    """The provider's name on the ledger."""
    trust_domain: str
    """The provider's trust domain."""
    id: str
    """This orchestrator's id on the ledger."""
    hsm: str
    """The HSM that releases keys to the functions launched here."""
    listen: str
    """Where it serves HTTPS for operators, address:port."""
    state: Path
    """Directory of its database."""
    trust: Path
    """The ledger's trust file."""
    roots: Path
    """The consortium's root certificates, PEM."""
    certificate_chain: Path
    """Its certificate and those above it, PEM (moor hsm svid)."""
    private_key: Path
    """The certificate's private key, PEM, mode 0600."""
    intent_key: Path
    """Private key, PEM, mode 0600, that signs launch intents; its public half is on the ledger."""
    launcher: str
    """Where the launcher takes intents: address:port or unix:/path."""
    package_signers: Path
    """Certificates of publishers, or of their CAs, whose packages are taken, PEM."""
    verifier: Peer
    """The provider's attestation authority."""
    verifier_key: Path
    """Public keys that may sign its results, PEM (one or several) or DER. Read again whenever the file changes."""
    ledger: tuple[Peer, ...]
    """An authority of the ledger."""
    hosts: tuple[NamedHost, ...]
    """A host and its agent."""
    database_url: str | None = None
    """A PostgreSQL database in place of the file in `state`; written as in broker.toml."""
    max_age_s: int = 30
    """Oldest ledger proof that is acted upon, in seconds."""
    launch_life_s: int = 300
    """Seconds within which a launch must be consumed at the broker."""
    on_host_lost: str = "relaunch"
    """What becomes of a function whose host lost its verdict: relaunch, or fail."""
    on_guest_ended: str = "relaunch"
    """What becomes of a function whose guest ended by itself: relaunch, or fail."""
    relaunches: int = 3
    """How often a function may be launched again within relaunch_window_s before it fails."""
    relaunch_window_s: int = 600
    """Seconds over which relaunches are counted."""
    supervise_s: float = 3.0
    """Seconds between two looks at verdicts and guests; events of the verifier are acted upon at once."""
    silent_s: int = 30
    """Seconds after which a result that is only missing counts as lost, where no event of the verifier said so before."""


class FunctionRequest(BaseModel):
    """Body of POST /v1/functions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    service: str
    package: str
    tenant: str
    contracts: list[str] = []
    settings: dict[str, str] = {}
    hsm: str | None = None
    id: str | None = None


class DemandRequest(BaseModel):
    """Body of POST /v1/placement/explain: a package, or use case and jurisdiction."""

    model_config = ConfigDict(extra="forbid", strict=True)

    package: str | None = None
    use_case: str | None = None
    jurisdiction: str | None = None


class Orchestrator:
    """What the interface acts on: the store, the launches under way, and who may publish packages."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        store: OrchestratorStore,
        launches: Launches,
        hosts: HostAgents,
        signers: tuple[bytes, ...],
        trust: LedgerTrust,
        clock: Clock,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._settings = settings
        self._signers = signers
        self._trust = trust
        self._clock = clock
        self._log = log
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._closing = False
        self.store = store
        self.launches = launches
        self.hosts = hosts

    def onboard(self, csar: bytes) -> PackageRow:
        """Verify a package and keep it. Raises what `package.verify` does."""
        now = self._clock.now()
        verified = packages.verify(csar, signers=self._signers, now=now)
        sec009.profile(verified.descriptor.use_case)
        row = PackageRow(
            digest=verified.digest,
            service=verified.descriptor.service,
            version=verified.descriptor.version,
            use_case=verified.descriptor.use_case,
            jurisdiction=verified.descriptor.jurisdiction,
            memory_mib=verified.descriptor.memory_mib,
            pids=verified.descriptor.pids,
            signer=verified.signer,
            signer_name=verified.signer_name,
            onboarded=now,
        )
        self.store.onboard(row, csar)
        return row

    async def create(self, asked: FunctionRequest) -> FunctionRow:
        """Record a function and begin its launch. The same request with the same id again is the same function."""
        recorded = await asyncio.to_thread(self._record, asked)
        self.resume(recorded.instance)
        return recorded

    async def end(self, instance: str) -> FunctionRow:
        """End a function; its row once it ended, or as far as it is after a while."""
        await self.launches.end(instance)
        task = self.interrupt(instance)
        if task is not None:
            await asyncio.wait([task], timeout=END_WAIT_S)
        return await asyncio.to_thread(self.store.function, instance)

    def _record(self, asked: FunctionRequest) -> FunctionRow:
        instance = parse_name(asked.id or f"{asked.service}-{secrets.token_hex(4)}", "id")
        launch.require_instance_name(instance)
        parse_name(launch.identity_name(instance, MAX_GENERATION), "id with the generation")
        package, _ = self.store.package(parse_digest(asked.package))
        if package.service != asked.service:
            raise Refused(
                "launch.other_service", "the package is of another service", expected=package.service, got=asked.service
            )
        row = FunctionRow(
            instance=instance,
            service=parse_name(asked.service, "service"),
            tenant=parse_name(asked.tenant, "tenant"),
            hsm=parse_name(asked.hsm or self._settings.hsm, "hsm"),
            package=package.digest,
            contracts=tuple(parse_name(contract, "contract") for contract in asked.contracts),
            settings=dict(asked.settings),
            requested=self._clock.now(),
        )
        return self.store.request(row)

    def resume(self, instance: str) -> None:
        """Drive a function on in the background, by one task at a time."""
        if instance not in self._under_way:
            self._begin(instance, after=None)

    def interrupt(self, instance: str) -> asyncio.Task[None] | None:
        """Leave the step a function is in, which may take long, and drive it on from what is recorded now."""
        if self._closing:
            return None
        before = self._under_way.get(instance)
        if before is not None:
            before.cancel()
        return self._begin(instance, after=before)

    async def resume_all(self) -> None:
        """Drive on whatever a former process left unfinished."""
        for instance in await asyncio.to_thread(self.store.unfinished):
            self._log.info("resumed", instance=instance)
            self.resume(instance)

    async def aclose(self) -> None:
        """Leave everything where it is; it resumes from the store."""
        self._closing = True
        tasks = tuple(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, instance: str, *, after: asyncio.Task[None] | None) -> asyncio.Task[None]:
        task = asyncio.ensure_future(self._drive(instance, after=after))
        self._under_way[instance] = task

        def done(ended: asyncio.Task[None]) -> None:
            if self._under_way.get(instance) is ended:
                del self._under_way[instance]

        task.add_done_callback(done)
        return task

    def demand(self, asked: DemandRequest) -> Demand:
        """The demand of a package, or the one spelled out."""
        use_case, jurisdiction = asked.use_case, asked.jurisdiction
        if asked.package is not None:
            package, _ = self.store.package(parse_digest(asked.package))
            use_case, jurisdiction = package.use_case, package.jurisdiction
        if use_case is None or jurisdiction is None:
            raise Malformed("http.request_malformed", "name a package, or a use case and a jurisdiction")
        return Demand(use_case=use_case, jurisdiction=jurisdiction, simulated_allowed=self._trust.simulated_allowed)

    async def _drive(self, instance: str, *, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait([after])
        while True:
            try:
                row = await self.launches.drive(instance)
            except MoorlineError as error:  # the store itself is away
                self._log.error("not driven on", instance=instance, **error.as_problem())
                await asyncio.sleep(STORE_RETRY_S)
            else:
                facts = {"generation": row.generation, "host": row.host, "problem": row.problem}
                self._log.info("settled", instance=instance, state=row.state.value, **facts)
                return


def application(settings: OrchestratorSettings, orchestrator: Orchestrator, guard: http.Guard) -> FastAPI:
    """The orchestrator's interface; every route is for operators of the own trust domain, whom `guard` lets in."""
    app = http.application("orchestrator", body_cap=MAX_PACKAGE_BYTES, guard=guard)
    metrics.of_orchestrator(app, orchestrator.store)

    def operator(request: Request) -> None:
        http.require(request, Role.OPERATOR, trust_domain=settings.trust_domain)

    @app.post("/v1/packages")
    async def onboard(request: Request) -> JSONResponse:
        operator(request)
        body = await request.body()
        return JSONResponse(package_json(await asyncio.to_thread(orchestrator.onboard, body)), status_code=201)

    @app.get("/v1/packages")
    async def onboarded(request: Request) -> JSONResponse:
        operator(request)
        rows = await asyncio.to_thread(orchestrator.store.packages)
        return JSONResponse({"packages": [package_json(row) for row in rows]})

    @app.post("/v1/functions")
    async def create(request: Request, asked: FunctionRequest) -> JSONResponse:
        operator(request)
        return JSONResponse(as_json(await orchestrator.create(asked)), status_code=202)

    @app.get("/v1/functions")
    async def functions(request: Request) -> JSONResponse:
        operator(request)
        return JSONResponse({"functions": [as_json(row) for row in await asyncio.to_thread(orchestrator.store.functions)]})

    @app.get("/v1/functions/{instance}")
    async def function(request: Request, instance: str) -> JSONResponse:
        operator(request)
        row = await asyncio.to_thread(orchestrator.store.function, instance)
        events = [dataclasses.asdict(event) for event in await asyncio.to_thread(orchestrator.store.events, instance)]
        waiting = orchestrator.launches.waiting.get(instance)
        held_up = None if waiting is None else waiting.as_problem()
        return JSONResponse({**as_json(row), "waiting": held_up, "events": events})

    @app.delete("/v1/functions/{instance}")
    async def end(request: Request, instance: str) -> JSONResponse:
        operator(request)
        return JSONResponse(as_json(await orchestrator.end(instance)))

    @app.get("/v1/hosts")
    async def hosts(request: Request) -> JSONResponse:
        operator(request)
        return JSONResponse({"hosts": await orchestrator.hosts.standing_results()})

    @app.post("/v1/placement/explain")
    async def explain(request: Request, asked: DemandRequest) -> JSONResponse:
        operator(request)
        demand = await asyncio.to_thread(orchestrator.demand, asked)
        placement = await orchestrator.launches.explain(demand)
        needs = [
            {"capability": need.capability, "minimum": need.minimum.word, "requirements": list(need.requirements)}
            for need in sec009.profile(demand.use_case)
        ]
        return JSONResponse({**placement.as_json(), "profile": needs})

    return app


async def run(settings: OrchestratorSettings, log: structlog.stdlib.BoundLogger) -> None:
    """Serve until cancelled."""
    reactions = reactions_of(settings)
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    trust = LedgerTrust.parse(settings.trust.read_bytes())
    roots = settings.roots.read_bytes()
    store = OrchestratorStore.open(settings.database_url or f"sqlite:///{settings.state / 'orchestrator.db'}")
    clock = SystemClock()

    def identity() -> ClientIdentity:
        return ClientIdentity(
            certificate_chain_pem=settings.certificate_chain.read_bytes(), private_key_pem=settings.private_key.read_bytes()
        )

    hosts = _hosts(settings, roots, identity, clock)
    endpoints = [Endpoint(url=peer.url, server_name=peer.server_name) for peer in settings.ledger]
    async with LedgerClient(endpoints, roots_pem=roots) as ledger:
        launches = Launches(
            me=_me(settings, trust),
            store=store,
            ledger=ledger,
            hosts=hosts,
            launcher=LauncherLink(settings.launcher),
            broker=Brokers(roots_pem=roots, identity=identity, trust_domain=settings.trust_domain),
            clock=clock,
        )
        orchestrator = Orchestrator(
            settings,
            store=store,
            launches=launches,
            hosts=hosts,
            signers=load_certificates(settings.package_signers),
            trust=trust,
            clock=clock,
            log=log,
        )
        compliance = Compliance(
            store=store,
            clean_ups=launches.clean_ups,
            verdicts=hosts,
            guests=hosts,
            clock=clock,
            reactions=reactions,
            interrupt=orchestrator.interrupt,
            on_error=_said_once(log),
        )
        await orchestrator.resume_all()
        view = view_for(ledger, trust, store, clock)
        guard = Callers(view, provider=settings.provider, trust_domain=settings.trust_domain, clock=clock)
        app = application(settings, orchestrator, guard)
        secure_log = _secure_log(settings, store, launches, roots, identity)
        service_audit.add_routes(app, secure_log, trust_domain=settings.trust_domain)
        signing = secure_log.keep(lambda error: log.warning("checkpoint", **error.as_problem()))
        try:
            await serve_all(_serve(settings, app, roots, log), compliance.follow(), compliance.supervise(), signing)
        finally:
            await orchestrator.aclose()
            await hosts.aclose()
            store.close()


def _hosts(settings: OrchestratorSettings, roots: bytes, identity: Callable[[], ClientIdentity], clock: Clock) -> HostAgents:
    return HostAgents(
        hosts=settings.hosts,
        verifier=settings.verifier,
        verifier_keys=KeyFile(settings.verifier_key),
        roots_pem=roots,
        identity=identity,
        provider=settings.provider,
        trust_domain=settings.trust_domain,
        clock=clock,
    )


def _me(settings: OrchestratorSettings, trust: LedgerTrust) -> Identity:
    return Identity(
        provider=settings.provider,
        trust_domain=settings.trust_domain,
        id=settings.id,
        signer=load_signer(settings.intent_key),
        trust=trust,
        max_age_s=settings.max_age_s,
        launch_life_s=settings.launch_life_s,
    )


def _said_once(log: structlog.stdlib.BoundLogger) -> Callable[[MoorlineError], None]:
    """Logs what keeps compliance from looking when it begins, not each time it looks."""
    said: list[str] = []

    def on_error(error: MoorlineError) -> None:
        if said != [error.code]:
            said[:] = [error.code]
            log.warning("compliance", **error.as_problem())

    return on_error


def _secure_log(
    settings: OrchestratorSettings,
    store: OrchestratorStore,
    launches: Launches,
    roots: bytes,
    identity: Callable[[], ClientIdentity],
) -> ServiceLog:
    hsm = SpiffeId(trust_domain=settings.trust_domain, role=Role.HSM, segments=(settings.hsm,))

    async def broker() -> HttpClient:
        return HttpClient(
            await launches.locate(settings.hsm),
            server_name=dns_name(hsm),
            roots_pem=roots,
            identity=await asyncio.to_thread(identity),
        )

    return ServiceLog(name=log_name(AUDIT_DOMAIN, settings.id), read=store.audit_rows, broker=broker)


async def _serve(settings: OrchestratorSettings, app: FastAPI, roots: bytes, log: structlog.stdlib.BoundLogger) -> None:
    def files() -> tuple[bytes, bytes]:
        return settings.certificate_chain.read_bytes(), settings.private_key.read_bytes()

    renewing: list[asyncio.Task[None]] = []

    async def renew(context: ssl.SSLContext) -> None:
        while True:
            await asyncio.sleep(IDENTITY_REREAD_S)
            try:
                load_identity(context, *await asyncio.to_thread(files))
            except OSError as error:  # half replaced, or no pair: it is read again
                log.warning("no new identity, the one in use stays", got=error.strerror or str(error))

    chain, key = files()
    try:
        await http.serve(
            app,
            listen=settings.listen,
            identity=http.TlsIdentity(chain_pem=chain, key_pem=key),
            client_roots_pem=roots,
            ready=lambda address: announce_ready("orchestrator", address=address),
            on_context=lambda context: renewing.append(asyncio.ensure_future(renew(context))),
        )
    finally:
        for task in renewing:
            task.cancel()


def reactions_of(settings: OrchestratorSettings) -> Reactions:
    """What the settings say about functions that are halted. Raises Misconfigured("orchestrator.reaction")."""
    words = {one.value: one for one in (Afterwards.RELAUNCH, Afterwards.FAIL)}
    for key, word in (("on_host_lost", settings.on_host_lost), ("on_guest_ended", settings.on_guest_ended)):
        if word not in words:
            raise Misconfigured("orchestrator.reaction", f"{key} is neither of the two", expected="relaunch, fail", got=word)
    return Reactions(
        host_lost=words[settings.on_host_lost],
        guest_ended=words[settings.on_guest_ended],
        relaunches=settings.relaunches,
        within_s=settings.relaunch_window_s,
        supervise_s=settings.supervise_s,
        silent_s=settings.silent_s,
    )


def package_json(row: PackageRow) -> dict[str, Any]:
    """A package for the HTTP interface."""
    return {
        "digest": row.digest.hex(),
        "service": row.service,
        "version": row.version,
        "use_case": row.use_case,
        "jurisdiction": row.jurisdiction,
        "memory_mib": row.memory_mib,
        "pids": row.pids,
        "signer": row.signer_name,
        "signer_digest": row.signer.hex(),
        "onboarded": row.onboarded,
    }


def parse_digest(text: str) -> bytes:
    """The digest of a package in hex. Raises Malformed("package.digest_malformed")."""
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise Malformed("package.digest_malformed", "a package is named by 64 hexadecimal digits", got=text[:80])
    return digest


def load_signer(path: Path) -> keys.Signer:
    """A signer from a private key file (PEM, PKCS#8: P-256, P-384 or Ed25519). Raises Misconfigured."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise Misconfigured("orchestrator.key_unreadable", "the key file cannot be read", got=f"{path}: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise Misconfigured("orchestrator.key_unreadable", "this kind of key is not used here", got=path)
    return keys.KeySigner(key)


def load_certificates(path: Path) -> tuple[bytes, ...]:
    """All certificates of a PEM file, DER. Raises Misconfigured("orchestrator.no_signers")."""
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Misconfigured("orchestrator.no_signers", "package_signers cannot be read", got=f"{path}: {error}") from None
    return tuple(certificate.public_bytes(serialization.Encoding.DER) for certificate in found)
