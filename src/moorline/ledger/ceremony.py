"""The genesis ceremony: makes the root, the founding authorities, the genesis and the trust file, in one directory.

It is run once, where the root key may exist; afterwards `root/` goes offline and each folder of `authorities/` to its owner.
What is written, private keys with mode 0600:

    genesis.cbor  trust.cbor  trust.toml  roots.pem
    root/root.key.pem  root/root.pem
    authorities/<name>/authority.toml  genesis.cbor  ca.key.pem  ca.pem  transaction.key.pem  checkpoint.key.pem
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from moorline.clock import Instant, Validity
from moorline.errors import Misconfigured
from moorline.ledger import genesis as genesis_module
from moorline.ledger import trust_file
from moorline.ledger.client import Endpoint
from moorline.ledger.genesis import Genesis, GenesisAuthority, Parameters
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, SpiffeId
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

_DAY_S: Final = 24 * 3600
ROOT_LIFE_S: Final = 20 * 365 * _DAY_S
AUTHORITY_LIFE_S: Final = 5 * 365 * _DAY_S
PROVIDER_LIFE_S: Final = 2 * 365 * _DAY_S
BACKDATED_S: Final = 60
"""Certificates start a minute early, so that a verifier whose clock is a little behind takes them."""

NEXT: Final = "next"
"""Folder, within an authority's, of the keys that it proposed and that do not count yet."""

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceremony:
    """What came of it."""

    directory: Path
    genesis: Genesis
    trust: LedgerTrust

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """How to reach the authorities, the sequencer first."""
        return endpoints(self.genesis)

    @property
    def roots_pem(self) -> bytes:
        """The consortium roots, PEM."""
        return pem_of(self.genesis.roots)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorityKeys:
    """One authority's private side, as its folder holds it."""

    name: str
    ca: Issuer
    transaction: ec.EllipticCurvePrivateKey
    checkpoint: ed25519.Ed25519PrivateKey

    def signer(self) -> keys.Signer:
        """Signs this authority's transactions."""
        return keys.KeySigner(self.transaction)


def genesis_ceremony(
    directory: Path,
    *,
    names: Sequence[str],
    consortium_domain: str,
    simulated_allowed: bool,
    parameters: Parameters,
    addresses: Mapping[str, str],
    now: Instant,
    sequencer: str | None = None,
) -> Ceremony:
    """Makes and writes everything. The first name is the sequencer unless another is given.

    Raises Misconfigured("ledger.ceremony_done") if the directory holds a genesis already, Malformed if the values make no
    sense.
    """
    if (directory / "genesis.cbor").exists():
        raise Misconfigured("ledger.ceremony_done", "there is a genesis here already", got=directory)
    root_key = ec.generate_private_key(ec.SECP384R1())
    root = certificates.root_certificate(
        root_key, name=f"{consortium_domain} root", validity=_validity(now, ROOT_LIFE_S), serial=_serial()
    )
    made = {name: _authority(name, Issuer(certificate=root, key=root_key), now) for name in sorted(names)}
    genesis = genesis_module.parse(
        Genesis(
            version=genesis_module.VERSION,
            consortium_domain=consortium_domain,
            time_ms=now * 1000,
            simulated_allowed=simulated_allowed,
            parameters=parameters,
            roots=(_der(root),),
            authorities=tuple(_public(found, addresses[name]) for name, found in made.items()),
            sequencer=sequencer or names[0],
        ).encode()
    )
    for name, found in made.items():
        _write_authority(directory / "authorities" / name, found, genesis)
    write_private(directory / "root" / "root.key.pem", key_pem(root_key))
    write_public(directory / "root" / "root.pem", pem_of([_der(root)]))
    write_public(directory / "roots.pem", pem_of(genesis.roots))
    write_public(directory / "trust.cbor", genesis.trust().encode())
    write_public(directory / "trust.toml", trust_file.render(genesis.trust()).encode())
    write_public(directory / "genesis.cbor", genesis.encode())  # last: its presence says that all is there
    return Ceremony(directory=directory, genesis=genesis, trust=genesis.trust())


def endpoints(genesis: Genesis) -> tuple[Endpoint, ...]:
    """How to reach the founding authorities, the sequencer first, since transactions go through it."""
    ordered = sorted(genesis.authorities, key=lambda one: (one.name != genesis.sequencer, one.name))
    return tuple(
        Endpoint(
            url=f"https://{one.address}",
            server_name=certificates.dns_name(authority_id(genesis.consortium_domain, one.name)),
        )
        for one in ordered
    )


def load_authority(directory: Path) -> AuthorityKeys:
    """An authority's keys from its folder. Raises Misconfigured("ledger.authority_folder")."""
    try:
        certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        ca, transaction, checkpoint = (
            serialization.load_pem_private_key((directory / f"{which}.key.pem").read_bytes(), None)
            for which in ("ca", "transaction", "checkpoint")
        )
    except (OSError, ValueError) as error:
        raise Misconfigured("ledger.authority_folder", "an authority's folder cannot be read", got=error) from None
    if not (
        isinstance(ca, ec.EllipticCurvePrivateKey)
        and isinstance(transaction, ec.EllipticCurvePrivateKey)
        and isinstance(checkpoint, ed25519.Ed25519PrivateKey)
    ):
        raise Misconfigured("ledger.authority_folder", "an authority's keys are of the wrong kind", got=directory)
    return AuthorityKeys(
        name=directory.name,
        ca=Issuer(certificate=certificate, key=ca),
        transaction=transaction,
        checkpoint=checkpoint,
    )


def join_authority(directory: Path, *, genesis: bytes, root: Path, address: str, now: Instant) -> AuthorityKeys:
    """The folder of an authority that joins later, named as the folder, certified by the root of a ceremony.

    It counts once the authorities in force admitted it. Raises Misconfigured("ledger.authority_folder") if the root's folder
    cannot be read or the new folder holds keys.
    """
    found = genesis_module.parse(genesis)
    if (directory / "ca.key.pem").exists():
        raise Misconfigured("ledger.authority_folder", "there are an authority's keys already", got=directory)
    made = _authority(directory.absolute().name, load_root(root, found), now)
    _write_keys(directory, made, genesis)
    write_public(directory / "authority.toml", _settings(made.name, address).encode())
    return made


def load_root(root: Path, genesis: Genesis) -> Issuer:
    """The root's key and certificate from its folder. Raises Misconfigured("ledger.authority_folder")."""
    try:
        certificate = x509.load_pem_x509_certificate((root / "root.pem").read_bytes())
        key = serialization.load_pem_private_key((root / "root.key.pem").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise Misconfigured("ledger.authority_folder", "the root's folder cannot be read", got=error) from None
    if _der(certificate) not in genesis.roots or not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Misconfigured("ledger.authority_folder", "this root is not the genesis's", got=root)
    return Issuer(certificate=certificate, key=key)


def make_next_keys(directory: Path) -> AuthorityKeys:
    """The keys an authority will have: `next/` in its folder, made if it is not there. Its CA key and certificate stay."""
    found = load_next(directory)
    if found is not None:
        return found
    write_private(directory / NEXT / "transaction.key.pem", key_pem(ec.generate_private_key(ec.SECP256R1())))
    write_private(directory / NEXT / "checkpoint.key.pem", key_pem(ed25519.Ed25519PrivateKey.generate()))
    made = load_next(directory)
    assert made is not None, "both files were just written"
    return made


def load_next(directory: Path) -> AuthorityKeys | None:
    """The next keys of an authority, or None if there are none. Raises Misconfigured("ledger.authority_folder")."""
    if not (directory / NEXT / "checkpoint.key.pem").exists():
        return None
    current = load_authority(directory)
    moved = not (directory / NEXT / "transaction.key.pem").exists()  # `take_next_keys` was stopped in between
    transaction = _private(directory / ("." if moved else NEXT) / "transaction.key.pem")
    checkpoint = _private(directory / NEXT / "checkpoint.key.pem")
    if not isinstance(transaction, ec.EllipticCurvePrivateKey) or not isinstance(checkpoint, ed25519.Ed25519PrivateKey):
        raise Misconfigured("ledger.authority_folder", "an authority's next keys are of the wrong kind", got=directory)
    return AuthorityKeys(name=current.name, ca=current.ca, transaction=transaction, checkpoint=checkpoint)


def take_next_keys(directory: Path) -> None:
    """Put the next keys in place of those there are, which are gone then. Killed in between, it is simply run again."""
    for name in ("transaction.key.pem", "checkpoint.key.pem"):  # the checkpoint key last: `load_next` looks for it
        if (directory / NEXT / name).exists():
            (directory / NEXT / name).replace(directory / name)
    (directory / NEXT).rmdir()


def _private(path: Path) -> object:
    try:
        return serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise Misconfigured("ledger.authority_folder", "an authority's next keys cannot be read", got=error) from None


def issue_provider(
    authority: Issuer, public: keys.PublicKey, *, name: str, trust_domain: str, now: Instant
) -> x509.Certificate:
    """A provider's CA certificate, signed by an authority, as AdmitProvider wants it."""
    return certificates.provider_certificate(
        public,
        name=name,
        trust_domain=trust_domain,
        issuer=authority,
        validity=_validity(now, PROVIDER_LIFE_S),
        serial=_serial(),
    )


def authority_id(consortium_domain: str, name: str) -> SpiffeId:
    """The identity an authority's TLS certificate carries."""
    return SpiffeId(trust_domain=consortium_domain, role=Role.AUTHORITY, segments=(name,))


def tls_identity(authority: AuthorityKeys, consortium_domain: str, *, now: Instant) -> tuple[bytes, bytes]:
    """A fresh P-256 key certified for at most an hour under the authority's CA key: chain and key, PEM, in memory only."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = certificates.leaf_certificate(
        key.public_key(),
        spiffe_id=authority_id(consortium_domain, authority.name),
        issuer=authority.ca,
        validity=_validity(now, certificates.LEAF_MAX_LIFE_S - BACKDATED_S),
        serial=_serial(),
    )
    return pem_of([_der(leaf), _der(authority.ca.certificate)]), key_pem(key)


def pem_of(ders: Sequence[bytes]) -> bytes:
    """Certificates in PEM, one after the other."""
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM) for der in ders)


def key_pem(key: PrivateKey) -> bytes:
    """A private key in PKCS#8 PEM, not encrypted."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def write_private(path: Path, data: bytes) -> None:
    """A new file only its owner reads; its folder is made with mode 0700."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_public(path: Path, data: bytes) -> None:
    """A file that anybody may read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(data)


def certified_authority(public: keys.PublicKey, *, name: str, root: Issuer, now: Instant) -> x509.Certificate:
    """An authority's CA certificate under the root, as long-lived as they are."""
    validity = _validity(now, AUTHORITY_LIFE_S)
    return certificates.authority_certificate(public, name=name, issuer=root, validity=validity, serial=_serial())


def _authority(name: str, root: Issuer, now: Instant) -> AuthorityKeys:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certified_authority(key.public_key(), name=name, root=root, now=now)
    return AuthorityKeys(
        name=name,
        ca=Issuer(certificate=certificate, key=key),
        transaction=ec.generate_private_key(ec.SECP256R1()),
        checkpoint=ed25519.Ed25519PrivateKey.generate(),
    )


def _public(authority: AuthorityKeys, address: str) -> GenesisAuthority:
    return GenesisAuthority(
        name=authority.name,
        certificate=_der(authority.ca.certificate),
        transaction_key=keys.public_bytes(authority.transaction.public_key()),
        checkpoint_key=authority.checkpoint.public_key().public_bytes_raw(),
        address=address,
    )


def _write_keys(directory: Path, authority: AuthorityKeys, genesis: bytes) -> None:
    assert isinstance(authority.ca.key, ec.EllipticCurvePrivateKey)
    write_private(directory / "ca.key.pem", key_pem(authority.ca.key))
    write_private(directory / "transaction.key.pem", key_pem(authority.transaction))
    write_private(directory / "checkpoint.key.pem", key_pem(authority.checkpoint))
    write_public(directory / "ca.pem", pem_of([_der(authority.ca.certificate)]))
    write_public(directory / "genesis.cbor", genesis)


def _write_authority(directory: Path, authority: AuthorityKeys, genesis: Genesis) -> None:
    _write_keys(directory, authority, genesis.encode())
    listen = next(found.address for found in genesis.authorities if found.name == authority.name)
    write_public(directory / "authority.toml", _settings(authority.name, listen).encode())


def _settings(name: str, listen: str) -> str:
    return f'name = "{name}"\nlisten = "{listen}"\ndirectory = "."\n'


def _validity(now: Instant, life_s: int) -> Validity:
    return Validity(not_before=Instant(now - BACKDATED_S), not_after=Instant(now + life_s))


def _serial() -> int:
    return int.from_bytes(secrets.token_bytes(16)) >> 1 | 1


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)
