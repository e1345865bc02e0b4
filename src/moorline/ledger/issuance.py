"""Was this certificate issued as the profile says (PROTOCOLS.md 2)? One step of a chain, judged at block time.

The state machine has no network, no clock and no OpenSSL store: it takes one certificate and the issuers the ledger knows,
and looks at signature, validity, CA flag, path length, key usage and name constraints, each exactly. Readers verify whole
chains (verification.chains) besides. Every refusal is `ledger.certificate_*`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from moorline.clock import Instant, rendered, to_datetime
from moorline.errors import Malformed, NotAuthentic
from moorline.ledger import hsm_certificate
from moorline.ledger.hsm_certificate import Recognised
from moorline.nfv import Role, SpiffeId
from moorline.wire import certificates, keys

_EXCLUDED: Final = frozenset(
    {x509.IPAddress(ipaddress.ip_network("0.0.0.0/0")), x509.IPAddress(ipaddress.ip_network("::/0"))}
)


_SIGNATURES: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ED25519,
    }
)
_ECDSA_SHA256: Final = ec.ECDSA(hashes.SHA256())
_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)


def authority(der: bytes, roots: Iterable[bytes], at: Instant) -> x509.Certificate:
    """An authority's certificate under one of `roots`."""
    return _ca(der, roots, at, path_length=2)


def provider(der: bytes, trust_domain: str, authorities: Iterable[bytes], at: Instant) -> x509.Certificate:
    """A provider's CA certificate under an authority's, critically constrained to exactly its trust domain."""
    certificate = _ca(der, authorities, at, path_length=1)
    try:
        found = certificate.extensions.get_extension_for_class(x509.NameConstraints)
    except x509.ExtensionNotFound:
        raise _constraints(trust_domain, "none") from None
    permitted = found.value.permitted_subtrees or []
    excluded = found.value.excluded_subtrees or []
    wanted = {x509.UniformResourceIdentifier(trust_domain), x509.DNSName(trust_domain), x509.RFC822Name("mail.invalid")}
    exact = set(permitted) == wanted and set(excluded) == _EXCLUDED
    if not found.critical or not exact or len(permitted) != len(wanted) or len(excluded) != len(_EXCLUDED):
        raise _constraints(trust_domain, "others, or not critical")
    return certificate


def issuing_ca(der: bytes, provider_cas: Iterable[bytes], at: Instant) -> x509.Certificate:
    """An issuing CA's certificate under a provider's."""
    return _ca(der, provider_cas, at, path_length=0)


def hsm(der: bytes, *, trust_domain: str, hsm_id: str, provider_cas: Sequence[bytes], at: Instant) -> bytes:
    """An HSM's certificate under a provider's, with its SPIFFE ID and an address (subject information access).

    The certified key, SubjectPublicKeyInfo in DER. `hsm_id` is a name (records.parse_name).
    """
    expected = SpiffeId(trust_domain=trust_domain, role=Role.HSM, segments=(hsm_id,))
    found = hsm_certificate.recognised(der, expected)  # as almost all are; the rest is judged, and refused, below
    if found is not None and _issued(found, provider_cas, at):
        return found.spki
    _hsm(der, expected, provider_cas, at)
    return spki(der)


def _issued(found: Recognised, provider_cas: Iterable[bytes], at: Instant) -> bool:
    """Whether one of these issued it, and both count at this time."""
    for der in provider_cas:
        issuer = _issuer(der)
        if issuer.name != found.issuer or not isinstance(issuer.key, ec.EllipticCurvePublicKey):
            continue
        try:
            issuer.key.verify(found.signature, found.signed, _ECDSA_SHA256)
        except InvalidSignature:
            continue
        return found.in_force(at) and _in_force(issuer.certificate, at)
    return False


@dataclass(frozen=True, slots=True)
class _Issuer:
    certificate: x509.Certificate
    name: bytes
    key: keys.PublicKey


@lru_cache(maxsize=512)  # as `parse`
def _issuer(der: bytes) -> _Issuer:
    certificate = parse(der)
    return _Issuer(certificate, certificate.subject.public_bytes(), public_key(certificate))


def _hsm(der: bytes, expected: SpiffeId, provider_cas: Iterable[bytes], at: Instant) -> None:
    certificate = _ca(der, provider_cas, at, path_length=0)
    try:
        found = certificates.spiffe_id_of(certificate)
    except Malformed as error:
        raise Malformed("ledger.certificate_name", "the HSM certificate has no SPIFFE ID", got=error.code) from None
    if found != expected:
        raise Malformed("ledger.certificate_name", "the HSM certificate is another's", expected=expected, got=found)
    names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    if names != [x509.UniformResourceIdentifier(str(expected)), x509.DNSName(certificates.dns_name(expected))]:
        raise Malformed(
            "ledger.certificate_name",
            "an HSM certificate names its SPIFFE ID, the DNS name that goes with it, and nothing else",
        )
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectInformationAccess)
    except x509.ExtensionNotFound:
        raise Malformed("ledger.certificate_address", "the HSM certificate has no address metadata") from None


@lru_cache(maxsize=512)  # bounded, by 20 KiB each; the same few issuers are looked at again and again
def parse(der: bytes) -> x509.Certificate:
    """As wire.certificates, with the ledger's code."""
    try:
        certificate = certificates.parse_certificate(der)
        public_key(certificate)
    except Malformed as error:
        raise Malformed("ledger.certificate_malformed", "a certificate cannot be used", got=error.code) from None
    if certificate.version is not x509.Version.v3 or certificate.public_bytes(serialization.Encoding.DER) != der:
        raise Malformed("ledger.certificate_malformed", "a certificate is version 3 in its one DER encoding")
    return certificate


def _strict(certificate: x509.Certificate) -> None:
    """What no certificate of ours has, whoever issued it: old hashes, odd serial numbers, extensions nobody understands."""
    if certificate.signature_algorithm_oid not in _SIGNATURES:
        raise Malformed(
            "ledger.certificate_algorithm",
            "a certificate is signed in a way that is not used here",
            expected="ECDSA with SHA-256 or SHA-384, or Ed25519",
            got=certificate.signature_algorithm_oid.dotted_string,
        )
    if not 0 < certificate.serial_number < certificates.SERIAL_END:
        raise Malformed(
            "ledger.certificate_serial",
            "a serial number is positive and has at most 20 octets (RFC 5280 4.1.2.2)",
            got=certificate.serial_number.bit_length(),
        )
    strange = [one.oid.dotted_string for one in certificate.extensions if one.critical and one.oid not in _UNDERSTOOD]
    if strange:
        raise Malformed(
            "ledger.certificate_extension", "a critical extension is not understood here", got=", ".join(strange)
        )


@lru_cache(maxsize=512)  # as `parse`
def spki(der: bytes) -> bytes:
    """SubjectPublicKeyInfo of a certificate's key, DER. Raises as `parse`."""
    return keys.public_bytes(public_key(parse(der)))


def authority_spkis(certificate: bytes, transaction_key: bytes, checkpoint_key: bytes) -> tuple[bytes, ...]:
    """The three keys of an authority as SubjectPublicKeyInfo; raises Malformed("ledger.key_malformed")."""
    try:
        checkpoint = keys.public_bytes(ed25519.Ed25519PublicKey.from_public_bytes(checkpoint_key))
    except ValueError:
        raise Malformed("ledger.key_malformed", "a checkpoint key cannot be used", got=len(checkpoint_key)) from None
    return (spki(certificate), transaction_key, checkpoint)


def public_key(certificate: x509.Certificate | x509.CertificateSigningRequest) -> keys.PublicKey:
    """The key of a certificate or request, if it is of a kind used here; raises Malformed("key.unsupported")."""
    key = certificate.public_key()
    if not isinstance(key, keys.PublicKey):
        raise Malformed("key.unsupported", "this kind of key is not used here", got=type(key).__name__)
    keys.algorithm_of(key)
    return key


def _ca(der: bytes, issuers: Iterable[bytes], at: Instant, *, path_length: int) -> x509.Certificate:
    certificate = parse(der)
    _strict(certificate)
    _usable(certificate, at, path_length)
    for issuer_der in issuers:
        issuer = parse(issuer_der)
        if certificates.signed_by(certificate, issuer):
            _valid(issuer, at)
            return certificate
    raise NotAuthentic(
        "ledger.certificate_issuer",
        "the certificate was not issued by anybody who may",
        got=certificate.issuer.rfc4514_string(),
        remedy="have it signed by the right CA",
    )


def _usable(certificate: x509.Certificate, at: Instant, path_length: int) -> None:
    _valid(certificate, at)
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise Malformed("ledger.certificate_profile", "the certificate lacks basic constraints or key usage") from None
    if not (basic.critical and basic.value.ca and basic.value.path_length == path_length and usage.key_cert_sign):
        raise Malformed(
            "ledger.certificate_profile",
            "the certificate is not the kind of CA it should be",
            expected=f"CA:TRUE critical, path length {path_length}, keyCertSign",
            got=f"CA:{basic.value.ca}, path length {basic.value.path_length}",
        )


def _in_force(certificate: x509.Certificate, at: Instant) -> bool:
    return certificate.not_valid_before_utc <= to_datetime(at) <= certificate.not_valid_after_utc


def _valid(certificate: x509.Certificate, at: Instant) -> None:
    if not _in_force(certificate, at):
        raise NotAuthentic(
            "ledger.certificate_validity",
            "a certificate is not valid at block time",
            expected=f"{certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}",
            got=rendered(at),
        )


def _constraints(trust_domain: str, got: str) -> Malformed:
    return Malformed(
        "ledger.certificate_constraints",
        "a provider's CA is critically name-constrained to exactly its trust domain",
        expected=f"permitted URI and DNS {trust_domain}, no IP, no e-mail",
        got=got,
    )
