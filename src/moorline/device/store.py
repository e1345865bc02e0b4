"""What a device keeps, in one directory that only its owner can read.

key.pem        its private key (mode 0600), made here; it never leaves
chain.pem      its certificate and the chain above it, leaf first
trust.cbor     the consortium as provisioned: ledger.LedgerTrust
ledger.json    where the ledger can be asked: [{"url", "server_name"}]
home.json      its provider's HSM, where it enrolled: {"url", "server_name"}
highest.cbor   the highest checkpoint seen; the device never goes back behind it
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.channel.tls import TlsIdentity
from moorline.errors import Malformed, Misconfigured
from moorline.ledger.checkpoint import Checkpoint
from moorline.ledger.client import Endpoint
from moorline.ledger.light_client import LedgerTrust
from moorline.wire import schema

KEY_FILE: Final = "key.pem"
CHAIN_FILE: Final = "chain.pem"
TRUST_FILE: Final = "trust.cbor"
LEDGER_FILE: Final = "ledger.json"
HOME_FILE: Final = "home.json"
HIGHEST_FILE: Final = "highest.cbor"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStore:
    """The directory of one device."""

    directory: Path

    def provision(self, trust: LedgerTrust, endpoints: tuple[Endpoint, ...]) -> None:
        """Write what the device is given by its owner, out of band, before it can trust anybody."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        listed = [{"url": endpoint.url, "server_name": endpoint.server_name} for endpoint in endpoints]
        self._write(TRUST_FILE, trust.encode())
        self._write(LEDGER_FILE, json.dumps(listed).encode())

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The device's key, made at the first call and kept, so that an interrupted enrolment can be repeated."""
        path = self.directory / KEY_FILE
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
            self._write(KEY_FILE, made.private_bytes(encoding, form, serialization.NoEncryption()))
            return made
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except Exception as error:  # the loader raises several kinds on bytes that are not a key
            raise _unreadable(KEY_FILE, type(error).__name__) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _unreadable(KEY_FILE, "not an EC key")
        return key

    def keep_chain(self, chain: tuple[bytes, ...]) -> None:
        """Take a new certificate and its chain (DER, leaf first)."""
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        self._write(CHAIN_FILE, b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates))

    def identity(self) -> TlsIdentity:
        """Key and chain, for TLS. Raises Misconfigured("device.not_enrolled")."""
        try:
            certificates = x509.load_pem_x509_certificates((self.directory / CHAIN_FILE).read_bytes())
        except FileNotFoundError:
            raise Misconfigured(
                "device.not_enrolled", "this device has no certificate yet", remedy="moor device enrol"
            ) from None
        except ValueError as error:
            raise _unreadable(CHAIN_FILE, str(error)) from None
        chain = tuple(one.public_bytes(serialization.Encoding.DER) for one in certificates)
        return TlsIdentity(key=self.key(), chain=chain)

    def trust(self) -> LedgerTrust:
        """The consortium as provisioned."""
        return LedgerTrust.parse(self._read(TRUST_FILE))

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where the ledger can be asked."""
        try:
            listed = json.loads(self._read(LEDGER_FILE))
            return tuple(Endpoint(url=one["url"], server_name=one["server_name"]) for one in listed)
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable(LEDGER_FILE, type(error).__name__) from None

    def keep_home(self, endpoint: Endpoint) -> None:
        """Remember where this device enrolled."""
        self._write(HOME_FILE, json.dumps({"url": endpoint.url, "server_name": endpoint.server_name}).encode())

    def home(self) -> Endpoint:
        """Where this device enrolled. Raises Misconfigured("device.not_provisioned")."""
        try:
            found = json.loads(self._read(HOME_FILE))
            return Endpoint(url=found["url"], server_name=found["server_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable(HOME_FILE, type(error).__name__) from None

    def highest(self) -> Checkpoint | None:
        """The highest checkpoint seen."""
        path = self.directory / HIGHEST_FILE
        return schema.decode(Checkpoint, path.read_bytes()) if path.exists() else None

    def keep_highest(self, checkpoint: Checkpoint) -> None:
        """Never go back behind this one; an older one changes nothing."""
        before = self.highest()
        if before is None or checkpoint.height > before.height:
            self._write(HIGHEST_FILE, schema.encode(checkpoint))

    def _read(self, name: str) -> bytes:
        try:
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise Misconfigured(
                "device.not_provisioned",
                f"the device's directory has no readable {name}",
                got=type(error).__name__,
                remedy="moor device enrol",
            ) from None

    def _write(self, name: str, data: bytes) -> None:
        beside = self.directory / f".{name}.new"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(self.directory / name)


def _unreadable(name: str, why: str) -> Malformed:
    return Malformed("device.store_unreadable", f"{name} in the device's directory cannot be read", got=why)
