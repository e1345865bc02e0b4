"""A provider's broker: the one process that owns its token, and everything that asks the token for something.

Three doors. The session port (broker_sessions): attested launchers, functions, hosts and peer HSMs. HTTPS (broker_est,
`POST /v1/sign`): devices that enrol, and the attestation authority that has its results signed. A unix socket
(broker_admin): the provider's own people. This module reads the settings and puts the parts together.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.channel.tls import TlsIdentity as SessionTlsIdentity
from moorline.clock import Clock, SystemClock
from moorline.errors import Misconfigured, MoorlineError
from moorline.hsm.ceremony import public_keys
from moorline.hsm.issuing import HsmIdentity, IssuingCa, TlsKey
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA, VERIFIER, TokenEcKey
from moorline.hsm.launch_keys import LaunchKeys, Terms
from moorline.hsm.pair import PairKeys
from moorline.hsm.pool import KeyPool, Watermarks
from moorline.hsm.release_policy import ReleasePolicy
from moorline.hsm.rotation import RotatingToken, in_force, retiring_certificates
from moorline.hsm.token import RemoteToken, Token, TokenLocation, open_token
from moorline.ledger.client import Endpoint, LedgerClient
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, SpiffeId
from moorline.services.broker_batches import Batches
from moorline.services.broker_clock import RisingClock, keep_marking
from moorline.services.broker_explain import Decisions
from moorline.services.broker_hosts import HostAuthority
from moorline.services.broker_ledger import LedgerView
from moorline.services.broker_open import OpenFunctions
from moorline.services.http import TlsIdentity
from moorline.services.token_owner import say_what_is_lacking
from moorline.storage.broker_enrolments import EnrolmentStore
from moorline.storage.broker_instances import InstanceStore
from moorline.storage.broker_pairs import PairStore
from moorline.storage.broker_revocations import RevocationStore
from moorline.storage.broker_store import BrokerStore
from moorline.storage.hsm_store import HsmStore
from moorline.verification.anchors import AnchorSet, parse_anchor_file, production_anchors
from moorline.wire import certificates, keys
from moorline.wire.http import ClientIdentity
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import RekeyReply

if TYPE_CHECKING:
    from moorline.services.broker_rekeying import Rekey

_TLS_LIFE_S: Final = 3000
_RENEW_BEFORE_S: Final = 1200
_REFILL_EVERY_S: Final = 1.0
_REFILL_AT_ONCE: Final = 8
_REFILL_REST_S: Final = 0.05
_GRACE_MAX_S: Final = 120
_LEDGER_FIRST_S: Final = 5.0
_REUSE_MAX_S: Final = 5
_SESSIONS_MAX: Final = 65_536
_OTHER_DESCRIPTORS: Final = 512
_THREADS: Final = 32  # what waits for token or database; on few cores Python's own default is fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """`broker.toml`; paths are relative to it.

    `snp_anchors` names SIMULATED anchors, which count only where the genesis allows it. `verifier` and `verifier_url`
    are left out together by a provider that has no hosts. `softhsm_conf` is for SoftHSM only. `snp_minimum_tcb` is boot
    loader, TEE, SNP, microcode, and FMC from Turin on; without it no enclave is accepted.
    """

    provider: str
    """The provider's name on the ledger."""
    trust_domain: str
    """The provider's trust domain; every certificate issued here is inside it."""
    hsm: str
    """This HSM's id on the ledger."""
    issuing_ca: str
    """Id on the ledger of the issuing CA whose key is in the token."""
    token_module: str
    """The PKCS#11 module (shared library)."""
    database: Path
    """The broker's SQLite file."""
    ledger_trust: Path
    """The ledger's trust file; launcher and functions are given the same bytes."""
    ledger_urls: tuple[str, ...]
    """The authorities, each as url|name in its certificate."""
    roots: Path
    """The consortium's root certificates, PEM."""
    hsm_certificate: Path
    """The HSM's certificate, signed by the provider, PEM."""
    issuing_ca_certificate: Path
    """The issuing CA's certificate, signed by the provider, PEM."""
    authority_certificates: Path
    """The provider's certificate and the authority's above it, PEM."""
    listen_sessions: str
    """Where attested sessions are taken, address:port; on the ledger as the HSM's address."""
    listen_https: str
    """Where HTTPS is served (EST, signing for the verifier), address:port; on the ledger as its EST URL."""
    admin_socket: Path
    """Unix socket (0600) for the provider's own people; whoever can open it is the provider."""
    database_url: str | None = None
    """A PostgreSQL database in place of the file: postgresql+pg8000://user@/name?unix_sock=/run/postgresql/.s.PGSQL.5432,
    or over verified TLS postgresql+pg8000://user:password@host/name?sslrootcert=/path/ca.pem. Several broker processes may
    share it.
    """
    token_label: str | None = None
    """Label of the token. A token is named by label, serial number or slot; all that are given must hold."""
    token_serial: str | None = None
    """Serial number of the token."""
    token_slot: int | None = None
    """Number of the token's slot."""
    token_pin_file: Path | None = None
    """File with the token's PIN, mode 0600; the PIN is nowhere else. Or one of the two keys below."""
    token_pin_environment: str | None = None
    """Name of the variable that holds the PIN; it is taken out of the environment when it is read."""
    token_pin_prompt: bool = False
    """Ask for the PIN at the terminal when the broker starts."""
    token_owner: Path | None = None
    """Socket of the process that owns the token (moor hsm serve), for several brokers on one machine. Module, label and
    PIN are the owner's then.
    """
    release_policy: Path | None = None
    """The provider's release policy, in Cedar; left out, the shipped one, which demands what the protocol demands."""
    custody: Path | None = None
    """custody.cbor of the token (moor init broker --custodian): whose approval destroys keys and tenants. Without it
    nothing is destroyed.
    """
    tenants: Path | None = None
    """Directory of PINs and sockets of tenants; left out, this HSM has no tenants. The token must be opened here."""
    softhsm_conf: Path | None = None
    """SoftHSM's configuration file; left out for another token."""
    verifier: str | None = None
    """Id of the provider's attestation authority; left out, with verifier_url, by a provider without hosts."""
    verifier_url: str | None = None
    """The attestation authority's HTTPS address."""
    snp_anchors: Path | None = None
    """SIMULATED SEV-SNP anchors; they count only where the genesis allows simulation."""
    snp_minimum_tcb: tuple[int, ...] = ()
    """Least TCB of an enclave's processor: boot loader, TEE, SNP, microcode (and FMC from Turin on). Without it no
    enclave is accepted.
    """
    pool_services: tuple[str, ...] = ()
    """Services for which key pairs are made ahead when the broker starts."""
    pool_low: int = 8
    """Refill a pool of key pairs when fewer than this are left."""
    pool_high: int = 32
    """Refill a pool up to this many."""
    epoch_s: int = 3600
    """Seconds an epoch of launch keys lasts."""
    grace_s: int = 120
    """Seconds for which tokens of a closed epoch are still good."""
    lease_count: int = 1000
    """Launches a launcher may sign under one lease."""
    lease_s: int = 3600
    """Seconds a launcher's lease lasts."""
    svid_s: int = 3540
    """Seconds an issued certificate lives, an hour at most."""
    max_sessions: int = 8192
    """Sessions that may be open at once in this process; a descriptor each."""
    proof_reuse_s: float = 0.5
    """Seconds for which verified ledger proofs and Attestation Results are used again; 0 asks anew for each session."""
    renew_after_s: int = 1200
    """Seconds after which a function or host renews its certificate."""
    listen_revocation: str | None = None
    """Where CRLs, OCSP and CA certificates are served over plain HTTP, address:port: all of it is signed. HTTPS
    serves them too.
    """
    revocation_url: str | None = None
    """Base URL of the same as peers reach it; certificates name CRL and OCSP below it. Left out, they name none."""
    revocation_poll_s: int = 5
    """Seconds between two looks at the ledger for revoked certificates; part of the revocation bound."""
    listen_bootstrap: str | None = None
    """Where devices enrol by their manufacturer's certificate (IEEE 802.1AR), address:port; needs manufacturer_roots."""
    manufacturer_roots: Path | None = None
    """PEM file with the roots of the manufacturers whose devices may enrol at listen_bootstrap. They trust one another."""
    device_certificates: int = 16
    """Certificates of one device that may be valid at the same time; more are refused for a while."""
    contracts: tuple[str, ...] = ()
    """Contracts with other providers that this broker tells their HSMs of."""
    crls_above: Path | None = None
    """PEM file with the CRLs of provider, authorities and root, handed on to who checks the whole chain."""


class TlsKeys:
    """The broker's TLS key of the hour, certified under the HSM key and replaced in time. Never on disk."""

    def __init__(self, identity: HsmIdentity, clock: Clock) -> None:
        self._identity, self._clock = identity, clock
        self._current: TlsKey | None = None
        self._turn = threading.Lock()

    def renew(self) -> None:
        """The next connection gets a new key under the HSM's certificate of now."""
        with self._turn:
            self._current = None

    def current(self) -> TlsKey:
        """A key whose certificate still has a while to live."""
        with self._turn:
            now = self._clock.now()
            if self._current is None or self._current.leaf.not_after - now < _RENEW_BEFORE_S:
                self._current = self._identity.certify_tls(now, life_s=_TLS_LIFE_S)
            return self._current

    def for_sessions(self) -> SessionTlsIdentity:
        """As the session port wants it."""
        held = self.current()
        return SessionTlsIdentity(key=held.key, chain=(held.leaf.der, *held.leaf.chain))

    def for_https(self) -> TlsIdentity:
        """As the HTTPS server wants it."""
        held = self.current()
        return TlsIdentity(chain_pem=held.leaf.pem_chain(), key_pem=held.key_pem())

    def for_client(self) -> ClientIdentity:
        """As an HTTPS client wants it."""
        held = self.current()
        return ClientIdentity(certificate_chain_pem=held.leaf.pem_chain(), private_key_pem=held.key_pem())


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """The parts, put together. `roots` are DER."""

    settings: BrokerSettings
    clock: RisingClock
    token: RotatingToken
    store: BrokerStore
    trust: LedgerTrust
    trust_bytes: bytes
    roots: tuple[bytes, ...]
    roots_pem: bytes
    identity: HsmIdentity
    ca: IssuingCa
    launch_keys: LaunchKeys
    pool: KeyPool
    ledger: LedgerView
    ledger_client: LedgerClient
    hosts: HostAuthority | None
    anchors: AnchorSet
    tls: TlsKeys
    verifier_signer: keys.Signer
    refill: asyncio.Event
    rekeying: Batches[Rekey, RekeyReply]
    judged: asyncio.Event
    instances: InstanceStore
    open: OpenFunctions
    revoking: asyncio.Event
    revoked: asyncio.Event
    anchoring: asyncio.Lock
    decisions: Decisions
    effects: dict[str, float]
    """Seconds from the last lost verdict to the last session closed: since the verifier's event, and since it was read."""
    revocations: RevocationStore
    enrolments: EnrolmentStore
    manufacturer_roots: bytes | None
    hsm: HsmStore
    pairs: PairStore
    pair_keys: PairKeys
    pairing: asyncio.Event

    def require_hosts(self) -> HostAuthority:
        """The attestation authority; raises Misconfigured("broker.no_verifier") if there is none."""
        if self.hosts is None:
            raise Misconfigured(
                "broker.no_verifier",
                "this broker knows no attestation authority",
                remedy="set verifier and verifier_url in broker.toml",
            )
        return self.hosts

    def close(self) -> None:
        """Close token and database."""
        self.token.close()
        self.store.close()
        self.hsm.close()


def compose(settings: BrokerSettings, *, clock: Clock | None = None) -> Broker:
    """Open everything the broker needs. Raises Misconfigured naming what is wrong; nothing listens yet."""
    _require_sane(settings)
    clock = clock or SystemClock()
    trust_bytes = _read(settings.ledger_trust)
    roots_pem = _read(settings.roots)
    above = tuple(_der(each) for each in _certificates(settings.authority_certificates))
    url = settings.database_url or f"sqlite:///{settings.database.resolve()}"
    store, hsm = BrokerStore.open(url), HsmStore.open(url)
    token = RotatingToken(token_of(settings), hsm)
    try:
        return _assembled(settings, RisingClock(clock, store), token, store, hsm, trust_bytes, roots_pem, above)
    except BaseException:
        token.close()
        store.close()
        hsm.close()
        raise


def _assembled(
    settings: BrokerSettings,
    clock: RisingClock,
    token: RotatingToken,
    store: BrokerStore,
    hsm: HsmStore,
    trust_bytes: bytes,
    roots_pem: bytes,
    above: tuple[bytes, ...],
) -> Broker:
    spiffe_id = SpiffeId(trust_domain=settings.trust_domain, role=Role.HSM, segments=(settings.hsm,))
    trust = LedgerTrust.parse(trust_bytes)
    hsm_label, hsm_certificate = in_force(hsm, HSM_IDENTITY, _certificates(settings.hsm_certificate)[0])
    ca_label, ca_certificate = in_force(hsm, ISSUING_CA, _certificates(settings.issuing_ca_certificate)[0])
    identity = HsmIdentity(token, certificate=hsm_certificate, above=above, spiffe_id=spiffe_id, label=hsm_label)
    ca = IssuingCa(
        token,
        certificate=ca_certificate,
        label=ca_label,
        retiring=retiring_certificates(hsm, ISSUING_CA),
        above=above,
        trust_domain=settings.trust_domain,
        life_s=settings.svid_s,
        pointers=_pointers(settings),
    )
    terms = Terms(
        epoch_s=settings.epoch_s,
        grace_s=settings.grace_s,
        lease_count=settings.lease_count,
        lease_s=settings.lease_s,
    )
    tls = TlsKeys(identity, clock)
    revocations = RevocationStore(store)
    pairs = PairStore(store)
    client = LedgerClient(_ledger_endpoints(settings.ledger_urls), roots_pem=roots_pem)
    return Broker(
        settings=settings,
        clock=clock,
        token=token,
        store=store,
        trust=trust,
        trust_bytes=trust_bytes,
        roots=tuple(_der(each) for each in x509.load_pem_x509_certificates(roots_pem)),
        roots_pem=roots_pem,
        identity=identity,
        ca=ca,
        launch_keys=LaunchKeys(token, store, terms),
        pool=KeyPool(token, store, Watermarks(low=settings.pool_low, high=settings.pool_high)),
        ledger=LedgerView(client, trust, store, clock, reuse_s=settings.proof_reuse_s),
        ledger_client=client,
        hosts=_hosts(settings, token, tls, roots_pem, clock),
        anchors=_anchors(settings),
        tls=tls,
        verifier_signer=keys.KeySigner(TokenEcKey(token, VERIFIER)),
        refill=asyncio.Event(),
        rekeying=Batches(),
        judged=asyncio.Event(),
        instances=InstanceStore(store),
        open=OpenFunctions(),
        revoking=asyncio.Event(),
        revoked=asyncio.Event(),
        anchoring=asyncio.Lock(),
        revocations=revocations,
        enrolments=EnrolmentStore(store, revocations, quota=settings.device_certificates),
        manufacturer_roots=_manufacturer_roots(settings),
        decisions=Decisions(_release_policy(settings)),
        hsm=hsm,
        effects={},
        pairs=pairs,
        pair_keys=PairKeys(token, pairs, identity.signer),
        pairing=asyncio.Event(),
    )


async def run(settings: BrokerSettings, *, ready: Callable[[dict[str, str]], None]) -> None:
    """Serve until cancelled. `ready` is called once, with the addresses that are really bound."""
    from moorline.services import (
        broker_admin,
        broker_anchor,
        broker_cmp,
        broker_drift,
        broker_est,
        broker_pairs,
        broker_revocation,
        broker_revoking,
        broker_sessions,
    )
    from moorline.services.broker_keys import adopt_keys
    from moorline.services.broker_tenants import OpenTenants, open_tenants
    from moorline.services.process import serve_all

    _room_for(settings.max_sessions)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="broker"))
    broker = compose(settings)
    anchoring: asyncio.Future[None] | None = None
    tenants: OpenTenants | None = None
    try:
        now = broker.clock.now()
        await asyncio.to_thread(say_what_is_lacking, broker.token.inner)
        await asyncio.to_thread(adopt_keys, broker)
        tenants = await asyncio.to_thread(open_tenants, broker)
        broker.launch_keys.reconcile(now)
        broker.instances.erase()  # a process that died between deleting a key and erasing it did not get this far
        await asyncio.to_thread(_prefill, broker)
        anchoring = asyncio.ensure_future(broker_anchor.keep_anchored(broker))
        with contextlib.suppress(TimeoutError):
            # Whoever waits for the ready line wants to launch. Without a ledger the broker still enrols and answers.
            async with asyncio.timeout(_LEDGER_FIRST_S):
                await broker.judged.wait()
        server = await broker_sessions.serve(broker)
        bound: dict[str, str] = {"sessions": server.address}
        optional = {"revocation": settings.listen_revocation, "bootstrap": settings.listen_bootstrap}
        waiting = {"https", "admin", *(name for name, listen in optional.items() if listen is not None)}
        lists, cmp = broker_revocation.Lists(broker), broker_cmp.Cmp(broker)

        def on_bound(name: str, address: str) -> None:
            bound[name] = address
            waiting.discard(name)
            if not waiting and "address" not in bound:
                bound["address"] = bound["https"]
                ready(dict(bound))

        async with server:
            await serve_all(
                server.serve_forever(),
                broker_est.serve(broker, lists, cmp, lambda address: on_bound("https", address)),
                broker_est.serve_bootstrap(broker, lambda address: on_bound("bootstrap", address)),
                broker_revocation.serve(
                    lists,
                    lambda app: broker_cmp.add_routes(app, cmp),
                    lambda address: on_bound("revocation", address),
                ),
                lists.keep_watching(),
                broker_pairs.keep_pairing(broker),
                broker_admin.serve(broker, lists, tenants, lambda address: on_bound("admin", address)),
                anchoring,
                broker_drift.keep_watching(broker),
                broker_drift.keep_ending(broker),
                broker_revoking.keep_revoking(broker),
                _keep_pools(broker),
                keep_marking(broker.clock),
            )
    finally:
        if anchoring is not None:
            anchoring.cancel()
        if tenants is not None:
            await asyncio.to_thread(tenants.close)
        await broker.ledger.aclose()
        broker.close()


async def _keep_pools(broker: Broker) -> None:
    """Fill pools in the background, soon after each launch and now and then anyway."""
    while True:
        try:
            async with asyncio.timeout(_REFILL_EVERY_S):
                await broker.refill.wait()
        except TimeoutError:
            pass
        await asyncio.sleep(_REFILL_REST_S)  # what was taken in a burst is one look at the pools
        broker.refill.clear()
        try:
            # A few at a time, and only while nobody waits for an answer: requests come before what may be needed later.
            while broker.open.working == 0 or await asyncio.to_thread(broker.pool.low):
                if not await asyncio.to_thread(broker.pool.top_up, at_most=_REFILL_AT_ONCE):
                    break
                await asyncio.sleep(0)
        except MoorlineError:
            await asyncio.sleep(_REFILL_EVERY_S)  # token or database is busy or gone; a launch that needs them says so


def _prefill(broker: Broker) -> None:
    for service in broker.settings.pool_services:
        broker.pool.refill(service, ChannelProfile.TLS)


def _require_sane(settings: BrokerSettings) -> None:
    if (settings.verifier is None) != (settings.verifier_url is None):
        raise Misconfigured("broker.settings", "verifier and verifier_url belong together")
    if not 0 <= settings.grace_s <= _GRACE_MAX_S:
        raise Misconfigured(
            "broker.settings", "grace_s is out of bounds", expected=f"0..{_GRACE_MAX_S}", got=settings.grace_s
        )
    if not 0 <= settings.proof_reuse_s <= _REUSE_MAX_S:
        raise Misconfigured(
            "broker.settings", "proof_reuse_s is out of bounds", expected=f"0..{_REUSE_MAX_S}", got=settings.proof_reuse_s
        )
    if not 0 < settings.max_sessions <= _SESSIONS_MAX:
        raise Misconfigured(
            "broker.settings", "max_sessions is out of bounds", expected=f"1..{_SESSIONS_MAX}", got=settings.max_sessions
        )
    if not 0 < settings.pool_low <= settings.pool_high:
        raise Misconfigured("broker.settings", "pool_low and pool_high are out of order", got=settings.pool_low)


def _room_for(sessions: int) -> None:
    """As many descriptors as the sessions need, or as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sessions + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _release_policy(settings: BrokerSettings) -> ReleasePolicy:
    if settings.release_policy is not None:
        return ReleasePolicy(_read(settings.release_policy).decode("utf-8", "replace"), name=str(settings.release_policy))
    shipped = resources.files("moorline.services.defaults") / "release.cedar"
    return ReleasePolicy(shipped.read_text("utf-8"), name="the shipped release policy")


def token_of(settings: BrokerSettings) -> Token:
    """The broker's token: opened here, or at the process that owns it."""
    return open_token(token_location(settings)) if settings.token_owner is None else RemoteToken(settings.token_owner)


def token_location(settings: BrokerSettings) -> TokenLocation:
    """Where the settings say the token is."""
    conf = settings.softhsm_conf
    return TokenLocation(
        module=settings.token_module,
        label=settings.token_label,
        serial=settings.token_serial,
        slot=settings.token_slot,
        pin_file=settings.token_pin_file,
        pin_environment=settings.token_pin_environment,
        pin_prompt=settings.token_pin_prompt,
        environment={} if conf is None else {"SOFTHSM2_CONF": str(conf.resolve())},
    )


def _manufacturer_roots(settings: BrokerSettings) -> bytes | None:
    if (settings.listen_bootstrap is None) != (settings.manufacturer_roots is None):
        raise Misconfigured("broker.settings", "listen_bootstrap and manufacturer_roots belong together")
    if settings.manufacturer_roots is None:
        return None
    _certificates(settings.manufacturer_roots)
    return _read(settings.manufacturer_roots)


def _pointers(settings: BrokerSettings) -> certificates.Pointers | None:
    if settings.revocation_url is None:
        return None
    base = settings.revocation_url.rstrip("/")
    return certificates.Pointers(
        crl=f"{base}/crl/{settings.issuing_ca}.crl",
        ocsp=f"{base}/ocsp",
        issuer=f"{base}/ca/{settings.issuing_ca}.cer",
    )


def _hosts(settings: BrokerSettings, token: Token, tls: TlsKeys, roots_pem: bytes, clock: Clock) -> HostAuthority | None:
    if settings.verifier is None or settings.verifier_url is None:
        return None
    spiffe_id = SpiffeId(trust_domain=settings.trust_domain, role=Role.VERIFIER, segments=(settings.verifier,))
    return HostAuthority(
        url=settings.verifier_url,
        server_name=certificates.dns_name(spiffe_id),
        roots_pem=roots_pem,
        identity=tls.for_client,
        reuse_s=settings.proof_reuse_s,
        key=public_keys(token).verifier,
        audience=settings.trust_domain,
        clock=clock,
    )


def _anchors(settings: BrokerSettings) -> AnchorSet:
    anchors = production_anchors()
    return anchors if settings.snp_anchors is None else anchors.plus(parse_anchor_file(_read(settings.snp_anchors)))


def _ledger_endpoints(urls: tuple[str, ...]) -> list[Endpoint]:
    pairs = [url.partition("|") for url in urls]
    if not pairs or not all(name for _, _, name in pairs):
        raise Misconfigured("broker.settings", "ledger_urls are not URL|server name", got=urls)
    return [Endpoint(url=url, server_name=name) for url, _, name in pairs]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Misconfigured(
            "broker.no_file", "a file named in the settings cannot be read", expected=path, got=error
        ) from None


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise Misconfigured("broker.no_file", "a file named in the settings holds no certificate", got=path) from None


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)
