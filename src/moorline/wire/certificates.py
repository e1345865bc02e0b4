"""The X.509 profile (PROTOCOLS.md 2): root -> authority -> provider -> { HSM, issuing CA } -> leaves. Pure builders.

Every builder takes the subject's public key, the issuer's certificate and key (any `cryptography` key object, also one whose
operations happen in a token), the validity and a serial number, and returns a certificate. Nothing is read from clock or
randomness. A provider's certificate is critically name-constrained to its trust domain; leaves carry one SPIFFE URI and one
DNS name made from it, so that ordinary TLS clients can check the name too.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from moorline.clock import Validity, to_datetime
from moorline.errors import Malformed
from moorline.nfv import SpiffeId
from moorline.wire.keys import CertifiedKey, PrivateKey, PublicKey

MAX_CERTIFICATE_BYTES: Final = 20 * 1024
LEAF_MAX_LIFE_S: Final = 3600
SERIAL_END: Final = 1 << 159
"""Serial numbers are positive and below this: 20 octets (RFC 5280 4.1.2.2)."""
_CA_REPOSITORY: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.48.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pointers:
    """Where to ask about a certificate: its issuer's CRL, its OCSP responder, the issuer's certificate. URLs."""

    crl: str
    ocsp: str
    issuer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A certificate and the key that signs under it."""

    certificate: x509.Certificate
    key: PrivateKey


def dns_name(spiffe_id: SpiffeId) -> str:
    """The DNS name that goes with a SPIFFE ID: `<segments, last first>.<role>.<trust domain>`."""
    return ".".join((*reversed(spiffe_id.segments), spiffe_id.role.value, spiffe_id.trust_domain))


def root_certificate(key: PrivateKey, *, name: str, validity: Validity, serial: int) -> x509.Certificate:
    """The consortium root, self-signed; made at the genesis ceremony, kept offline afterwards."""
    subject = _name(name)
    builder = _ca(subject, key.public_key(), subject, validity, serial, path_length=3)
    return builder.sign(key, hash_for(key))


def cross_certificate(root: x509.Certificate, *, issuer: Issuer, validity: Validity, serial: int) -> x509.Certificate:
    """A root's name and key under another root (RFC 4210 4.4): a way from the one to the other."""
    public = root.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return _signed(_ca(root.subject, public, issuer.certificate.subject, validity, serial, path_length=3), issuer)


def authority_certificate(
    public: PublicKey, *, name: str, issuer: Issuer, validity: Validity, serial: int
) -> x509.Certificate:
    """An authority, under the root; it signs providers."""
    return _signed(_ca(_name(name), public, issuer.certificate.subject, validity, serial, path_length=2), issuer)


def provider_certificate(
    public: PublicKey, *, name: str, trust_domain: str, issuer: Issuer, validity: Validity, serial: int
) -> x509.Certificate:
    """A provider, under an authority, critically constrained to its trust domain (URI and DNS); no IP, no e-mail."""
    constraints = x509.NameConstraints(
        # Permitting e-mail only at a reserved name that cannot exist (RFC 2606) excludes all of it.
        permitted_subtrees=[
            x509.UniformResourceIdentifier(trust_domain),
            x509.DNSName(trust_domain),
            x509.RFC822Name("mail.invalid"),
        ],
        excluded_subtrees=[
            x509.IPAddress(ipaddress.ip_network("0.0.0.0/0")),
            x509.IPAddress(ipaddress.ip_network("::/0")),
        ],
    )
    builder = _ca(_name(name), public, issuer.certificate.subject, validity, serial, path_length=1)
    return _signed(builder.add_extension(constraints, critical=True), issuer)


def hsm_certificate(
    public: PublicKey, *, spiffe_id: SpiffeId, address: str, issuer: Issuer, validity: Validity, serial: int
) -> x509.Certificate:
    """An HSM's identity, under the provider, CA with path length 0. `address` (a URL) is its subject information access."""
    builder = _ca(_name(spiffe_id.segments[-1]), public, issuer.certificate.subject, validity, serial, path_length=0)
    builder = builder.add_extension(_names(spiffe_id), critical=False).add_extension(
        x509.SubjectInformationAccess([x509.AccessDescription(_CA_REPOSITORY, x509.UniformResourceIdentifier(address))]),
        critical=False,
    )
    return _signed(builder, issuer)


def issuing_ca_certificate(
    public: PublicKey, *, name: str, issuer: Issuer, validity: Validity, serial: int
) -> x509.Certificate:
    """An issuing CA, under the provider; it signs functions, devices, hosts and services only."""
    return _signed(_ca(_name(name), public, issuer.certificate.subject, validity, serial, path_length=0), issuer)


def leaf_certificate(
    public: CertifiedKey,
    *,
    spiffe_id: SpiffeId,
    issuer: Issuer,
    validity: Validity,
    serial: int,
    pointers: Pointers | None = None,
) -> x509.Certificate:
    """An X509-SVID with client and server usage. Raises Malformed("certificate.life") beyond one hour of life.

    Without `pointers` it names no CRL and no OCSP responder: its life is short, and our own ends ask the ledger.
    """
    require_short_lived(validity)
    builder = (
        _base(_name(spiffe_id.segments[-1]), public, issuer.certificate.subject, validity, serial)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(_names(spiffe_id), critical=False)
    )
    return _signed(builder if pointers is None else _pointed(builder, pointers), issuer)


def require_short_lived(validity: Validity) -> None:
    """Raises Malformed("certificate.life") beyond the hour that a leaf may live."""
    if validity.not_after - validity.not_before > LEAF_MAX_LIFE_S:
        raise Malformed(
            "certificate.life",
            "a leaf certificate lives too long",
            expected=f"<= {LEAF_MAX_LIFE_S} s",
            got=validity.not_after - validity.not_before,
        )


def distribution_point(url: str) -> x509.DistributionPoint:
    """Where a CRL is, as a certificate names it (RFC 5280 4.2.1.13) and as the CRL itself does (5.2.5)."""
    return x509.DistributionPoint(
        full_name=[x509.UniformResourceIdentifier(url)], relative_name=None, reasons=None, crl_issuer=None
    )


def spiffe_id_of(certificate: x509.Certificate) -> SpiffeId:
    """The one SPIFFE ID of a certificate. Raises Malformed("certificate.spiffe_id") if there is none, or more than one URI.

    It establishes nothing about who issued the certificate.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError, x509.DuplicateExtension):
        raise Malformed("certificate.spiffe_id", "the certificate has no readable subject alternative name") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise Malformed("certificate.spiffe_id", "the certificate has not exactly one URI", expected=1, got=len(uris))
    return SpiffeId.parse(uris[0])


def signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's name is the one given and its key made the signature; nothing of times, or what it may sign."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # ValueError (name, algorithm), TypeError (key) or InvalidSignature: not this one
        return False
    return True


def parse_certificate(der: bytes) -> x509.Certificate:
    """A certificate from DER; raises only Malformed (`certificate.*`). Establishes no trust."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise Malformed(
            "certificate.too_large", "the certificate is too large", expected=MAX_CERTIFICATE_BYTES, got=len(der)
        )
    try:
        certificate = x509.load_der_x509_certificate(der)
        # Parsed only when asked for: whatever is odd in them must show here and not in somebody's judgement later.
        _ = (certificate.extensions, certificate.public_key(), certificate.issuer, certificate.subject)
        _ = (certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.serial_number)
        _ = certificate.signature_algorithm_oid
    except Exception as error:  # the loader raises several kinds on odd bytes; all mean the same here
        raise Malformed("certificate.undecodable", "the bytes are not a certificate", got=type(error).__name__) from None
    return certificate


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _names(spiffe_id: SpiffeId) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id)), x509.DNSName(dns_name(spiffe_id))])


def _base(
    subject: x509.Name, public: CertifiedKey, issuer: x509.Name, validity: Validity, serial: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(to_datetime(validity.not_before))
        .not_valid_after(to_datetime(validity.not_after))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _ca(
    subject: x509.Name, public: PublicKey, issuer: x509.Name, validity: Validity, serial: int, *, path_length: int
) -> x509.CertificateBuilder:
    return (
        _base(subject, public, issuer, validity, serial)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(ca=True), critical=True)
    )


def _pointed(builder: x509.CertificateBuilder, pointers: Pointers) -> x509.CertificateBuilder:
    locations = [
        x509.AccessDescription(oid, x509.UniformResourceIdentifier(url))
        for oid, url in (
            (AuthorityInformationAccessOID.OCSP, pointers.ocsp),
            (AuthorityInformationAccessOID.CA_ISSUERS, pointers.issuer),
        )
    ]
    return builder.add_extension(x509.AuthorityInformationAccess(locations), critical=False).add_extension(
        x509.CRLDistributionPoints([distribution_point(pointers.crl)]), critical=False
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(builder: x509.CertificateBuilder, issuer: Issuer) -> x509.Certificate:
    issuer_id = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id)
    return builder.add_extension(identifier, critical=False).sign(issuer.key, hash_for(issuer.key))


def hash_for(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384 | None:
    """The hash that goes with a signing key; None for Ed25519, which brings its own."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return None
    return hashes.SHA384() if isinstance(key.curve, ec.SECP384R1) else hashes.SHA256()
