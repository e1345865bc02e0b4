"""What the demo has built so far, and the small acts its people do."""

from __future__ import annotations

import base64
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.cli.demo.stage import Process, Stage
from moorline.clock import Instant, SystemClock
from moorline.hsm.ceremony import HsmPublicKeys
from moorline.ledger.ceremony import Ceremony
from moorline.ledger.client import LedgerClient, Submitter
from moorline.nfv import Role, SpiffeId
from moorline.wire import keys
from moorline.wire.certificates import Issuer, dns_name
from moorline.wire.http import ClientIdentity, HttpClient

CONSORTIUM: Final = "consortium.test"
AUTHORITIES: Final = ("authority-1", "authority-2", "authority-3", "authority-4")
MAX_AGE_S: Final = 8
HSM: Final = "hsm-1"
ISSUING_CA: Final = "ca-1"
VERIFIER: Final = "verifier-1"
ORCHESTRATOR: Final = "orchestrator-1"
SERVICE: Final = "records"
CONTRACT: Final = "alpha-records-beta"
USE_CASE: Final = "4.7"
LOCATION: Final = "EU/DE"
ELSEWHERE: Final = "NA/US"


@dataclass(slots=True, kw_only=True)
class Provider:
    """One operator: its offline key, its HSM's broker, and how its operator reaches it."""

    name: str
    directory: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate
    submitter: Submitter
    sessions: str
    https: str
    keys: HsmPublicKeys | None = None
    broker: Process | None = None

    @property
    def trust_domain(self) -> str:
        """The provider's trust domain."""
        return f"{self.name}.test"

    @property
    def issuer(self) -> Issuer:
        """The provider as issuer of its HSM's certificates."""
        return Issuer(certificate=self.certificate, key=self.key)

    @property
    def admin_socket(self) -> Path:
        """The broker's admin socket, for the operator on its machine."""
        return self.directory / "broker" / "admin.sock"

    def name_of(self, role: Role, identifier: str) -> str:
        """The DNS name in the certificate of one of the provider's services."""
        return dns_name(SpiffeId(trust_domain=self.trust_domain, role=role, segments=(identifier,)))

    def admin(self) -> HttpClient:
        """The broker's admin interface."""
        return HttpClient("http://broker", server_name="", roots_pem=b"", uds=str(self.admin_socket))


@dataclass(slots=True, kw_only=True)
class World:
    """Everything the steps hand on to one another."""

    stage: Stage
    consortium: Ceremony
    ledger: LedgerClient
    providers: dict[str, Provider] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def alpha(self) -> Provider:
        """The provider that offers the function."""
        return self.providers["alpha"]

    @property
    def beta(self) -> Provider:
        """The provider of the device."""
        return self.providers["beta"]

    @property
    def roots_pem(self) -> bytes:
        """The consortium's roots."""
        return self.consortium.roots_pem

    @property
    def roots_file(self) -> Path:
        """The same as a file."""
        return self.consortium.directory / "roots.pem"

    @property
    def trust_file(self) -> Path:
        """The ledger trust everybody is provisioned with."""
        return self.consortium.directory / "trust.cbor"

    async def aclose(self) -> None:
        """Close what the world holds open."""
        await self.ledger.aclose()

    def ledger_urls(self) -> tuple[str, ...]:
        """The authorities as services are configured with them, `url|server name`."""
        return tuple(f"{endpoint.url}|{endpoint.server_name}" for endpoint in self.consortium.endpoints)


def now() -> Instant:
    """The present."""
    return SystemClock().now()


def since(started: float) -> int:
    """Milliseconds since `started` (time.monotonic)."""
    return round((time.monotonic() - started) * 1000)


def free_addresses(count: int) -> list[str]:
    """Loopback addresses nobody listens on; all held at once so that they differ."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in held]
    finally:
        for one in held:
            one.close()


async def issue(provider: Provider, role: Role, identifier: str, directory: Path) -> ClientIdentity:
    """An identity for a service or person of a provider, issued by its broker to a key made here; written as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    spiffe_id = SpiffeId(trust_domain=provider.trust_domain, role=role, segments=(identifier,))
    async with provider.admin() as admin:
        answer: Any = await admin.post_json(
            "/v1/svid",
            {
                "public_key": base64.b64encode(keys.public_bytes(key.public_key())).decode(),
                "spiffe_id": str(spiffe_id),
            },
        )
    identity = ClientIdentity(certificate_chain_pem=answer["chain"].encode(), private_key_pem=private_pem(key))
    write_identity(identity, directory)
    return identity


def write_identity(identity: ClientIdentity, directory: Path) -> None:
    """`chain.pem` and `key.pem` (0600) in `directory`."""
    (directory / "chain.pem").write_bytes(identity.certificate_chain_pem)
    key_file = directory / "key.pem"
    key_file.touch(mode=0o600)
    key_file.write_bytes(identity.private_key_pem)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def pem(*certificates: x509.Certificate) -> bytes:
    """Certificates as PEM, in order."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def der(certificate: x509.Certificate) -> bytes:
    """A certificate as DER."""
    return certificate.public_bytes(serialization.Encoding.DER)
