"""A provider's broker: the one process that owns its token, and everything that asks the token for something.

Three doors. The session port (broker_sessions): attested launchers, functions, hosts and peer HSMs. HTTPS (broker_est,
`POST /v1/sign`): devices that enrol, and the attestation authority that has its results signed. A unix socket
(broker_admin): the provider's own people. This module puts the parts together; broker_run runs
them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.clock import Clock, SystemClock
from moorline.errors import Misconfigured
from moorline.hsm import root_update
from moorline.hsm.issuers import Looks
from moorline.hsm.issuing import HsmIdentity, IssuingCa
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA
from moorline.hsm.launch_keys import LaunchKeys, Terms
from moorline.hsm.pair import PairKeys
from moorline.hsm.pool import KeyPool, Watermarks
from moorline.hsm.release_policy import ReleasePolicy
from moorline.hsm.root_update import RootUpdate
from moorline.hsm.rotation import RotatingToken, in_force, retiring
from moorline.hsm.verifier_keys import VerifierKeys
from moorline.ledger.client import Endpoint, LedgerClient
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, SpiffeId
from moorline.services.broker_access import AccessLog
from moorline.services.broker_batches import Batches
from moorline.services.broker_clock import RisingClock
from moorline.services.broker_explain import Decisions
from moorline.services.broker_function_steps import FunctionSteps
from moorline.services.broker_hosts import HostAuthority
from moorline.services.broker_open import OpenFunctions
from moorline.services.broker_settings import BrokerSettings, require_sane, token_of
from moorline.services.broker_tls import TlsKeys
from moorline.services.key_maker import KeyMaker
from moorline.services.ledger_view import LedgerView
from moorline.services.waking import Wake
from moorline.storage.broker_decisions import DecisionStore
from moorline.storage.broker_enrolments import EnrolmentStore
from moorline.storage.broker_instances import InstanceStore
from moorline.storage.broker_pairs import PairStore
from moorline.storage.broker_revocations import RevocationStore
from moorline.storage.broker_store import BrokerStore
from moorline.storage.hsm_store import HsmStore, KeyRow
from moorline.verification.anchors import AnchorSet, parse_anchor_file, production_anchors
from moorline.wire import certificates
from moorline.wire.session import RekeyReply

if TYPE_CHECKING:
    from moorline.services.broker_rekeying import Rekey


class Followed:
    """The number of the last change to the keys (HsmStore.key_changes) that this process acts on.

    `renew` is what a door does when the broker's certificate or issuing CA is another one.
    """

    def __init__(self, changes: int) -> None:
        self.changes = changes
        self.turn = threading.Lock()
        self.renew: dict[str, Callable[[], None]] = {}


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
    key_maker: KeyMaker
    ledger: LedgerView
    ledger_client: LedgerClient
    hosts: HostAuthority | None
    anchors: AnchorSet
    tls: TlsKeys
    verifier: VerifierKeys
    followed: Followed
    """How far this process has followed what other processes did to the keys."""
    refill: Wake
    rekeying: Batches[Rekey, RekeyReply]
    steps: FunctionSteps
    judged: Wake
    instances: InstanceStore
    open: OpenFunctions
    revoking: Wake
    revoked: Wake
    anchoring: asyncio.Lock
    decisions: Decisions
    access_log: AccessLog
    explanations: DecisionStore
    effects: dict[str, float]
    """Seconds from the last lost verdict to the last session closed: since the verifier's event, and since it was read."""
    revocations: RevocationStore
    enrolments: EnrolmentStore
    manufacturer_roots: bytes | None
    root_update: RootUpdate | None
    hsm: HsmStore
    pairs: PairStore
    pair_keys: PairKeys
    pairing: Wake

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
        """Close token and database, and end the process that makes keys."""
        self.key_maker.close()
        self.token.close()
        self.store.close()
        self.hsm.close()


def compose(settings: BrokerSettings, *, clock: Clock | None = None) -> Broker:
    """Open everything the broker needs. Raises Misconfigured naming what is wrong; nothing listens yet."""
    require_sane(settings)
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
    trust = LedgerTrust.parse(trust_bytes)
    changes, rows = hsm.key_changes(), hsm.key_rows()
    identity, ca = _identity(settings, token, rows, above), _issuing_ca(settings, token, rows, above, trust)
    tls = TlsKeys(identity, clock)
    verifier = VerifierKeys(token, rows)
    revocations = RevocationStore(store)
    pairs = PairStore(store)
    key_maker = KeyMaker()
    client = LedgerClient([Endpoint.parse(text) for text in settings.ledger_urls], roots_pem=roots_pem)
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
        launch_keys=LaunchKeys(token, store, _terms(settings)),
        pool=KeyPool(token, store, Watermarks(low=settings.pool_low, high=settings.pool_high), ahead=key_maker.make),
        key_maker=key_maker,
        ledger=LedgerView(client, trust, store, clock, reuse_s=settings.proof_reuse_s),
        ledger_client=client,
        hosts=_hosts(settings, verifier, tls, roots_pem, clock),
        anchors=_anchors(settings),
        tls=tls,
        verifier=verifier,
        followed=Followed(changes),
        refill=Wake(),
        rekeying=Batches(),
        steps=FunctionSteps(store),
        judged=Wake(),
        instances=InstanceStore(store),
        open=OpenFunctions(),
        revoking=Wake(),
        revoked=Wake(),
        anchoring=asyncio.Lock(),
        revocations=revocations,
        enrolments=EnrolmentStore(store, revocations, quota=settings.device_certificates),
        manufacturer_roots=_manufacturer_roots(settings),
        root_update=_root_update(settings, roots_pem),
        decisions=Decisions(_release_policy(settings)),
        access_log=AccessLog(),
        explanations=DecisionStore(store),
        hsm=hsm,
        effects={},
        pairs=pairs,
        pair_keys=PairKeys(token, pairs, lambda: identity.signer),
        pairing=Wake(),
    )


def _identity(
    settings: BrokerSettings, token: RotatingToken, rows: Sequence[KeyRow], above: tuple[bytes, ...]
) -> HsmIdentity:
    spiffe_id = SpiffeId(trust_domain=settings.trust_domain, role=Role.HSM, segments=(settings.hsm,))
    own = in_force(rows, HSM_IDENTITY, _certificates(settings.hsm_certificate)[0])
    return HsmIdentity(token, certificate=own.certificate, above=above, spiffe_id=spiffe_id, label=own.label)


def _issuing_ca(
    settings: BrokerSettings, token: RotatingToken, rows: Sequence[KeyRow], above: tuple[bytes, ...], trust: LedgerTrust
) -> IssuingCa:
    active = in_force(rows, ISSUING_CA, _certificates(settings.issuing_ca_certificate)[0])
    return IssuingCa(
        token,
        certificate=active.certificate,
        label=active.label,
        retiring=retiring(rows, ISSUING_CA),
        above=above,
        trust_domain=settings.trust_domain,
        life_s=settings.svid_s,
        looks=Looks(last_s=settings.revocation_poll_s + trust.max_age_s, every_s=settings.revocation_poll_s),
        published=settings.revocation_url,
    )


def _terms(settings: BrokerSettings) -> Terms:
    return Terms(
        epoch_s=settings.epoch_s,
        grace_s=settings.grace_s,
        lease_count=settings.lease_count,
        lease_s=settings.lease_s,
    )


def _release_policy(settings: BrokerSettings) -> ReleasePolicy:
    if settings.release_policy is not None:
        return ReleasePolicy(_read(settings.release_policy).decode("utf-8", "replace"), name=str(settings.release_policy))
    shipped = resources.files("moorline.services.defaults") / "release.cedar"
    return ReleasePolicy(shipped.read_text("utf-8"), name="the shipped release policy")


def _manufacturer_roots(settings: BrokerSettings) -> bytes | None:
    if (settings.listen_bootstrap is None) != (settings.manufacturer_roots is None):
        raise Misconfigured("broker.settings", "listen_bootstrap and manufacturer_roots belong together")
    if settings.manufacturer_roots is None:
        return None
    _certificates(settings.manufacturer_roots)
    return _read(settings.manufacturer_roots)


def _root_update(settings: BrokerSettings, roots_pem: bytes) -> RootUpdate | None:
    if settings.root_update is None:
        return None
    roots = tuple(_der(each) for each in x509.load_pem_x509_certificates(roots_pem))
    return root_update.verify(_read(settings.root_update), roots)


def _hosts(
    settings: BrokerSettings, verifier: VerifierKeys, tls: TlsKeys, roots_pem: bytes, clock: Clock
) -> HostAuthority | None:
    if settings.verifier is None or settings.verifier_url is None:
        return None
    spiffe_id = SpiffeId(trust_domain=settings.trust_domain, role=Role.VERIFIER, segments=(settings.verifier,))
    return HostAuthority(
        url=settings.verifier_url,
        server_name=certificates.dns_name(spiffe_id),
        roots_pem=roots_pem,
        identity=tls.for_client,
        reuse_s=settings.proof_reuse_s,
        keys=verifier.accepted,
        audience=settings.trust_domain,
        clock=clock,
    )


def _anchors(settings: BrokerSettings) -> AnchorSet:
    anchors = production_anchors()
    return anchors if settings.snp_anchors is None else anchors.plus(parse_anchor_file(_read(settings.snp_anchors)))


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
