"""What a broker is told: `broker.toml`, and whether it makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.errors import Misconfigured
from moorline.hsm.calendar import Rotation
from moorline.hsm.token import RemoteToken, Token, TokenLocation, open_token

_GRACE_MAX_S: Final = 120
_REUSE_MAX_S: Final = 5
_SESSIONS_MAX: Final = 65_536


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
    root_update: Path | None = None
    """PEM file with the next root, introduced by the present one and back (moor crl renew-root); CMP clients are told."""
    rotation: Rotation | None = None
    """Ages at which keys are replaced by themselves; left out, keys are rotated by command only."""


def require_sane(settings: BrokerSettings) -> None:
    """Raises Misconfigured("broker.settings") where two of them do not go together, and "rotation.settings"."""
    if settings.rotation is not None:
        settings.rotation.require_sane()
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
