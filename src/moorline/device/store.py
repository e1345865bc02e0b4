"""What a device keeps, in one directory that only its owner can read.

key.pem        its private key (mode 0600), made here; it never leaves
key.json       in place of it: in which PKCS#11 token or TPM the key is (device.keys)
tls.pem        then: a TLS key of an hour (mode 0600) and its chain, certified on the word of that key (device.tls_key)
chain.pem      its certificate and the chain above it, leaf first
trust.cbor     the consortium as provisioned: ledger.LedgerTrust
ledger.json    where the ledger can be asked: [{"url", "server_name"}]
home.json      its provider's HSM, where it enrolled: {"url", "server_name"}
highest.cbor   the highest checkpoint seen; the device never goes back behind it
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.channel.tls import TlsIdentity
from moorline.device.keys import WHERE_FILE, Where, decode, encode
from moorline.errors import Malformed, Misconfigured
from moorline.ledger.checkpoint import Checkpoint
from moorline.ledger.client import Endpoint
from moorline.ledger.light_client import LedgerTrust
from moorline.storage import whole_files
from moorline.wire import schema

KEY_FILE: Final = "key.pem"
CHAIN_FILE: Final = "chain.pem"
TRUST_FILE: Final = "trust.cbor"
LEDGER_FILE: Final = "ledger.json"
HOME_FILE: Final = "home.json"
HIGHEST_FILE: Final = "highest.cbor"
TLS_FILE: Final = "tls.pem"


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

    def hold_key(self, where: Where) -> None:
        """Have the key in a token or TPM from now on. Raises Misconfigured("device.key_elsewhere") if it is not there."""
        if (self.directory / KEY_FILE).exists() or (self.held_elsewhere and self.where() != where):
            raise Misconfigured(
                "device.key_elsewhere",
                "this device has a key already, somewhere else",
                got=self.directory,
                remedy="enrol with another --dir: a device's key does not move",
            )
        self._write(WHERE_FILE, encode(where))

    @property
    def held_elsewhere(self) -> bool:
        """Whether the key is in a token or TPM."""
        return (self.directory / WHERE_FILE).exists()

    def where(self) -> Where:
        """The token or TPM that has the key. Raises Misconfigured("device.not_provisioned")."""
        return decode(self._read(WHERE_FILE))

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The device's key, made at the first call and kept, so that an interrupted enrolment can be repeated."""
        if self.held_elsewhere:
            return self.where().key()
        path = self.directory / KEY_FILE
        if not path.exists():
            made = ec.generate_private_key(ec.SECP256R1())
            encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
            self._write(KEY_FILE, made.private_bytes(encoding, form, serialization.NoEncryption()))
            return made
        return _private(path.read_bytes(), KEY_FILE)

    def keep_chain(self, chain: tuple[bytes, ...]) -> None:
        """Take a new certificate and its chain (DER, leaf first)."""
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        self._write(CHAIN_FILE, b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates))

    def chain(self) -> tuple[bytes, ...]:
        """The certificate of the device's own key and the chain above it. Raises Misconfigured("device.not_enrolled")."""
        return self._chain(CHAIN_FILE, "moor device enrol")

    def identity(self) -> TlsIdentity:
        """Key and chain, for TLS: the device's own key, or the TLS key of the hour where that is elsewhere.

        Raises Misconfigured("device.not_enrolled").
        """
        if not self.held_elsewhere:
            return TlsIdentity(key=self.key(), chain=self.chain())
        chain = self._chain(TLS_FILE, "moor device renew")
        return TlsIdentity(key=_private(self._read(TLS_FILE), TLS_FILE), chain=chain)

    def keep_tls(self, key: ec.EllipticCurvePrivateKey, chain: tuple[bytes, ...]) -> None:
        """Take a TLS key and its chain (DER, leaf first), in one file: there is never one without the other."""
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        pem = key.private_bytes(encoding, form, serialization.NoEncryption())
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        self._write(TLS_FILE, pem + b"".join(one.public_bytes(encoding) for one in certificates))

    def tls_leaf(self) -> bytes | None:
        """The certificate (DER) of the TLS key of the hour; None if there is none."""
        return self._chain(TLS_FILE, "")[0] if (self.directory / TLS_FILE).exists() else None

    def _chain(self, name: str, remedy: str) -> tuple[bytes, ...]:
        try:
            certificates = x509.load_pem_x509_certificates((self.directory / name).read_bytes())
        except FileNotFoundError:
            raise Misconfigured("device.not_enrolled", "this device has no certificate yet", remedy=remedy) from None
        except ValueError as error:
            raise _unreadable(name, str(error)) from None
        return tuple(one.public_bytes(serialization.Encoding.DER) for one in certificates)

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
        whole_files.replace(self.directory / name, data, mode=whole_files.PRIVATE)


def _private(pem: bytes, name: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except Exception as error:  # the loader raises several kinds on bytes that are not a key
        raise _unreadable(name, type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _unreadable(name, "not an EC key")
    return key


def _unreadable(name: str, why: str) -> Malformed:
    return Malformed("device.store_unreadable", f"{name} in the device's directory cannot be read", got=why)
