"""The host agent's process: it attests its host, and starts guests for one orchestrator.

Composition only: attestation is host_agent.attestation, guests are host_agent.guests. The agent's own identity (an SVID of
role `host`) comes from an attested session with the broker and says which registered machine this is, by the TPM enrolled
for it; what runs here is for Attestation Results to say. Where the settings name files instead, it comes from those. Until
it has an identity it serves nothing over the network, whatever its `status_socket` tells, and keeps attesting.

Everything on this machine belongs to an administrator who is not trusted. The interface is guarded so that strangers
cannot use the host, not because anybody relies on this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse

from moorline.channel.driver import Collected, open_session
from moorline.clock import SystemClock
from moorline.errors import Misconfigured, MoorlineError, Refused
from moorline.host_agent.guests import MAX_WAIT_S, Guests, parse_order
from moorline.host_agent.silicon import SiliconClient
from moorline.ledger.client import Endpoint, LedgerClient
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, parse_name
from moorline.orchestration.broker import judge_broker
from moorline.services import host_attesting, http, metrics
from moorline.services.callers import Callers, view_for
from moorline.services.condition import Condition, told
from moorline.services.host_attesting import AttestationSettings
from moorline.services.process import announce_ready, serve_all
from moorline.storage.document_files import DocumentFiles
from moorline.wire import keys, schema
from moorline.wire.http import load_identity, server_context
from moorline.wire.orchestration import MAX_ORDER_BYTES
from moorline.wire.session import Challenge, EvidenceFormat, HostFields, SessionRole

if TYPE_CHECKING:
    from moorline.attesters.tpm import Tpm
    from moorline.host_agent.attestation import HostAttestation

RETRY_S: Final = 2.0
RENEW_RETRY_S: Final = 30.0
FILES_REREAD_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """host.toml. Either `certificate_chain` and `private_key`, or `broker`, `hsm` and [attestation]."""

    provider: str
    """The provider's name on the ledger."""
    trust_domain: str
    """The provider's trust domain."""
    id: str
    """This host's id on the ledger."""
    listen: str
    """Where the agent serves HTTPS for its orchestrator, address:port."""
    state: Path
    """Directory of guests and their logs."""
    silicon: str
    """The secure processor: unix:/path of its socket."""
    orchestrator: str
    """Id of the one orchestrator that may start guests here."""
    roots: Path
    """The consortium's root certificates, PEM."""
    trust: Path
    """The ledger's trust file."""
    ledger_urls: tuple[str, ...]
    """The authorities, each as url|name in its certificate: asked whether the orchestrator's certificate still counts."""
    publish: str = "127.0.0.1"
    """Address on which ports of guests are published."""
    certificate_chain: Path | None
    """A certificate for the agent, PEM; left out, it gets one from the broker by attesting."""
    private_key: Path | None
    """Private key, PEM, mode 0600, of certificate_chain."""
    broker: str | None
    """The HSM's session port, address:port."""
    hsm: str | None
    """The HSM's id on the ledger."""
    attestation: AttestationSettings | None
    """How this host proves what it booted."""
    status_socket: Path | None = None
    """Unix socket (0600) with /healthz and /metrics, which answers whether or not the host has an identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An identity to serve under, and after how long to get the next."""

    identity: http.TlsIdentity
    renew_after_s: float


Obtain = Callable[[], Awaitable[Standing]]
_Wait = Annotated[int, Query(ge=0, le=MAX_WAIT_S, description="Until it serves or never will, at most so many seconds.")]


def application(settings: HostSettings, guests: Guests, guard: http.Guard) -> FastAPI:
    """The host agent's interface; every route is for the configured orchestrator only, if `guard` lets it in."""
    app = http.application("host agent", body_cap=MAX_ORDER_BYTES, guard=guard)

    def authorise(request: Request) -> None:
        caller = http.require(request, Role.ORCHESTRATOR, trust_domain=settings.trust_domain)
        if caller.segments != (settings.orchestrator,):
            raise Refused(
                "http.not_authorised", "this host serves another orchestrator", expected=settings.orchestrator, got=caller
            )

    @app.post("/v1/guests")
    async def start(request: Request) -> JSONResponse:
        authorise(request)
        order = parse_order(await request.body())
        return JSONResponse((await guests.start(order)).as_json())

    @app.get("/v1/guests")
    async def guests_here(request: Request) -> JSONResponse:
        authorise(request)
        return JSONResponse({"guests": [state.as_json() for state in await guests.states()]})

    @app.get("/v1/guests/{instance}")
    async def guest(request: Request, instance: str, wait_s: _Wait = 0) -> JSONResponse:
        authorise(request)
        return JSONResponse((await guests.decided(parse_name(instance, "instance"), wait_s)).as_json())

    @app.delete("/v1/guests/{instance}")
    async def stop(request: Request, instance: str) -> JSONResponse:
        authorise(request)
        return JSONResponse((await guests.stop(parse_name(instance, "instance"))).as_json())

    return app


async def run(settings: HostSettings, log: structlog.stdlib.BoundLogger) -> None:
    """Attest and serve until cancelled."""
    parse_name(settings.id, "host")
    silicon = SiliconClient(settings.silicon.removeprefix("unix:"))
    guests = Guests(settings.state / "guests", silicon, publish=settings.publish)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(guests.aclose)
        server = _Server(settings, application(settings, guests, await _guard(settings, stack)), log)
        adopting = asyncio.ensure_future(_adopt(guests, log))
        stack.callback(adopting.cancel)
        if settings.certificate_chain is not None and settings.private_key is not None:
            files = (settings.certificate_chain, settings.private_key)
            obtain: Obtain = _from_files(*files)
        else:
            obtain = _nowhere
        if settings.attestation is None:
            await server.serve(obtain)
            return
        attesting = await host_attesting.towards_all(settings, settings.attestation, stack)
        tpm, attestation = attesting.tpm, attesting.own
        if settings.certificate_chain is None:
            obtain = _from_broker(settings, tpm, attestation)
        judged, heard = asyncio.Event(), Condition(why="no verdict yet")
        await stack.enter_async_context(told(settings.status_socket, "host", heard, metrics.of_host))
        await serve_all(
            host_attesting.attest(attestation, host_attesting.heard_by(log, judged, heard)),
            server.serve(obtain, after=judged),
            *(host_attesting.attest(other, host_attesting.logged(log, verifier=name)) for name, other in attesting.further),
        )


async def _guard(settings: HostSettings, stack: contextlib.AsyncExitStack) -> Callers:
    """Who asks the ledger about the orchestrator's certificate; what it has seen of it is kept in the agent's state."""
    trust = LedgerTrust.parse(settings.trust.read_bytes())
    authorities = [Endpoint.parse(text) for text in settings.ledger_urls]
    client = await stack.enter_async_context(LedgerClient(authorities, roots_pem=settings.roots.read_bytes()))
    clock = SystemClock()
    view = view_for(client, trust, DocumentFiles(settings.state / "ledger"), clock)
    return Callers(view, provider=settings.provider, trust_domain=settings.trust_domain, clock=clock)


async def _adopt(guests: Guests, log: structlog.stdlib.BoundLogger) -> None:
    """Take over the guests of a former process as soon as the silicon answers, and their ports are free."""
    while True:
        try:
            log.info("guests adopted", guests=await guests.adopt())
        except MoorlineError as error:
            log.warning("guests not adopted yet", **error.as_problem())
            await asyncio.sleep(RETRY_S)
        else:
            return


class _Server:
    """Serves under the current identity; the next one is loaded into the running server, and disturbs no request."""

    def __init__(self, settings: HostSettings, app: FastAPI, log: structlog.stdlib.BoundLogger) -> None:
        self._settings = settings
        self._app = app
        self._log = log
        self._announced = False

    async def serve(self, obtain: Obtain, *, after: asyncio.Event | None = None) -> None:
        if after is not None:
            await after.wait()
        roots = self._settings.roots.read_bytes()
        standing = await self._first(obtain)
        bound: asyncio.Future[ssl.SSLContext] = asyncio.get_running_loop().create_future()
        serving = http.serve(
            self._app,
            listen=self._settings.listen,
            identity=standing.identity,
            client_roots_pem=roots,
            ready=self._bound,
            on_context=bound.set_result,
        )
        await serve_all(serving, self._renew(obtain, standing.renew_after_s, bound))

    async def _first(self, obtain: Obtain) -> Standing:
        while True:
            try:
                return await obtain()
            except MoorlineError as error:
                self._log.warning("no identity", **error.as_problem())
                self._announce(address="", code=error.code)
                await asyncio.sleep(RETRY_S)

    async def _renew(self, obtain: Obtain, wait_s: float, bound: asyncio.Future[ssl.SSLContext]) -> None:
        context = await bound
        while True:
            await asyncio.sleep(wait_s)
            try:
                standing = await obtain()
            except MoorlineError as error:
                # The broker is away, or this host lost its verdict: what it has is good until it expires, as TLS will say.
                self._log.warning("no new identity", **error.as_problem())
                wait_s = RENEW_RETRY_S
            else:
                load_identity(context, standing.identity.chain_pem, standing.identity.key_pem)
                wait_s = standing.renew_after_s

    def _bound(self, address: str) -> None:
        self._log.info("serving", address=address)
        self._announce(address=address, code="")

    def _announce(self, **facts: str) -> None:
        if not self._announced:
            self._announced = True
            announce_ready("host", host=self._settings.id, **facts)


def _from_files(chain: Path, key: Path) -> Obtain:
    async def obtain() -> Standing:
        try:
            chain_pem, key_pem = await asyncio.to_thread(lambda: (chain.read_bytes(), key.read_bytes()))
            server_context(chain_pem, key_pem)  # raises ssl's OSError for half of a pair
        except OSError as error:
            raise Misconfigured("host.no_identity", "the identity files cannot be read", got=error) from None
        return Standing(identity=http.TlsIdentity(chain_pem=chain_pem, key_pem=key_pem), renew_after_s=FILES_REREAD_S)

    return obtain


async def _nowhere() -> Standing:
    raise Misconfigured("host.no_identity", "the settings name no identity files and no attestation")


def _from_broker(settings: HostSettings, tpm: Tpm, attestation: HostAttestation) -> Obtain:
    """An identity by the attested session, role host: the broker asks the verifier for this host's standing result."""
    broker, hsm = settings.broker, settings.hsm
    if broker is None or hsm is None:
        raise Misconfigured("host.no_identity", "broker and hsm are needed to get an identity", expected="both")
    trust = LedgerTrust.parse(settings.trust.read_bytes())
    clock = SystemClock()

    async def judge(challenge: Challenge, certificates: tuple[bytes, ...]) -> None:
        judge_broker(challenge, certificates, trust=trust, provider=settings.provider, hsm=hsm, now=clock.now())

    async def prove(_: Challenge, __: bytes) -> None:
        return None

    async def collect(binding: bytes, _: Challenge) -> Collected:
        evidence = await attestation.evidence_for_session(binding)
        return Collected(format=EvidenceFormat.TPM, evidence=evidence, endorsements=b"")

    async def obtain() -> Standing:
        key = ec.generate_private_key(ec.SECP256R1())
        fields = HostFields(host=settings.id, ak_public=await asyncio.to_thread(tpm.attestation_key))
        async with await open_session(
            broker,
            role=SessionRole.HOST,
            formats=(EvidenceFormat.TPM,),
            fields=schema.encode(fields),
            signing_public=keys.public_bytes(key.public_key()),
            verify_broker=judge,
            prove=prove,
            collect=collect,
        ) as session:
            activation = session.activation
        chain = (activation.certificate, *activation.chain)
        return Standing(
            identity=http.TlsIdentity(chain_pem=_pem(chain), key_pem=_key_pem(key)),
            renew_after_s=float(activation.renew_after_s),
        )

    return obtain


def _pem(chain: tuple[bytes, ...]) -> bytes:
    certificates = (x509.load_der_x509_certificate(der) for der in chain)
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
