"""A longer life for an authority's CA certificate: the same key and name, certified again by the root, which stays offline.

1. the authority writes a request, signed by its CA key;
2. where the root is, the request is certified; who does it compares name and fingerprint with the authority's people;
3. the authority checks what came back, keeps it beside the old one, and proposes it to the others (RotateAuthorityKey);
4. once the ledger has it, it takes the place of the old one.

Everything certified under the CA's key goes on to chain: the key is the same. Another key is another authority.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from moorline.clock import Instant
from moorline.errors import Malformed, Misconfigured, NotAuthentic, Refused
from moorline.ledger import issuance
from moorline.ledger.ceremony import certified_authority, load_authority, load_root, pem_of, write_public
from moorline.ledger.genesis import parse as parse_genesis
from moorline.nfv import parse_name
from moorline.wire.keys import public_bytes

NEXT_CA: Final = "ca.next.pem"


def request(directory: Path) -> bytes:
    """A certificate request (PEM) for the CA key of the authority whose folder this is."""
    found = load_authority(directory)
    made = x509.CertificateSigningRequestBuilder().subject_name(found.ca.certificate.subject)
    return made.sign(found.ca.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def certify(pem: bytes, *, genesis: bytes, root: Path, now: Instant) -> x509.Certificate:
    """The certificate that a request asks for, under the root of the genesis. It counts once the ledger has it.

    Raises Malformed("authority.request_malformed"), NotAuthentic("authority.request_signature"), and Misconfigured as
    `ceremony.load_root`. It does not establish whose request it is: compare the fingerprint.
    """
    try:
        asked = x509.load_pem_x509_csr(pem)
        (name,) = asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        public = issuance.public_key(asked)
    except ValueError:
        raise Malformed(
            "authority.request_malformed",
            "the file is not an authority's request",
            remedy="moor authority renew-ca --request FILE makes it",
        ) from None
    if not asked.is_signature_valid:
        raise NotAuthentic("authority.request_signature", "the request is not signed by the key it asks for")
    return certified_authority(
        public, name=parse_name(str(name.value), "authority"), root=load_root(root, parse_genesis(genesis)), now=now
    )


def keep(directory: Path, pem: bytes, *, genesis: bytes, now: Instant) -> bytes:
    """Keep a new certificate (PEM) beside the old one; its DER. Nothing changes until `take`.

    Raises Malformed, Refused("authority.other_key" | "authority.no_longer_life"), and as `issuance.authority`.
    """
    old = load_authority(directory)
    try:
        new = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise Malformed("authority.certificate_malformed", "the file is not a certificate") from None
    der = new.public_bytes(serialization.Encoding.DER)
    issuance.authority(der, parse_genesis(genesis).roots, now)
    if new.subject != old.ca.certificate.subject or issuance.spki(der) != public_bytes(old.ca.key.public_key()):
        raise Refused(
            "authority.other_key",
            "the certificate is of another name or key",
            expected=old.name,
            got=new.subject.rfc4514_string(),
            remedy="have the request of this very folder certified",
        )
    if new.not_valid_after_utc <= old.ca.certificate.not_valid_after_utc:
        raise Refused("authority.no_longer_life", "the certificate does not live longer than the one there is")
    write_public(directory / NEXT_CA, pem_of([der]))
    return der


def kept(directory: Path) -> bytes | None:
    """DER of the certificate that waits, or None. Raises Misconfigured("ledger.authority_folder")."""
    path = directory / NEXT_CA
    if not path.exists():
        return None
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    except (OSError, ValueError) as error:
        raise Misconfigured("ledger.authority_folder", "the next CA certificate cannot be read", got=error) from None


def take(directory: Path) -> None:
    """Put the certificate that waits in place of the old one."""
    (directory / NEXT_CA).replace(directory / "ca.pem")
