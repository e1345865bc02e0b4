"""Detached CMS signatures (RFC 5652): who signed these bytes, according to the message itself.

What is accepted, and nothing else: SignedData of one signer, detached content of type id-data, SHA-256, signed attributes
with content-type and message-digest, ECDSA on P-256 or RSA PKCS#1 v1.5 of 2048 to 4096 bits. Signed attributes are required
because without them one signature value could be read over the content or over attributes (RFC 5652 5.4 has no domain
separation between the two).

1. Parse SignedData strictly; anything unusual is Malformed.
2. Find the one certificate that the signer identifier names.
3. The message-digest attribute equals SHA-256 of the content.
4. The signature over the DER of the signed attributes verifies under that certificate.

`verify` returns the signer's certificate and the others found; whether anybody trusts that signer is not decided here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import pkcs7

from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic
from moorline.evidence.cms import (
    CONTENT_TYPE,
    DATA,
    MESSAGE_DIGEST,
    IssuerAndSerial,
    SignedData,
    SignerInfo,
    parse_detached,
    signed_attribute,
)
from moorline.wire.certificates import parse_certificate

MAX_CERTIFICATES: Final = 8

_SHA256: Final = "2.16.840.1.101.3.4.2.1"
_ECDSA_SHA256: Final = "1.2.840.10045.4.3.2"
_RSA_ALGORITHMS: Final = ("1.2.840.113549.1.1.1", "1.2.840.113549.1.1.11")

SignerKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """Whose key signed the content, and the other certificates that came along (untrusted, for building a chain)."""

    signer: x509.Certificate
    others: tuple[x509.Certificate, ...]


def sign(content: bytes, *, certificate: x509.Certificate, key: SignerKey) -> bytes:
    """A detached CMS signature over `content`, DER. The signing time is this machine's and nobody relies on it."""
    builder = pkcs7.PKCS7SignatureBuilder().set_data(content).add_signer(certificate, key, hashes.SHA256())
    options = [pkcs7.PKCS7Options.DetachedSignature, pkcs7.PKCS7Options.Binary, pkcs7.PKCS7Options.NoCapabilities]
    return builder.sign(serialization.Encoding.DER, options)


def verify(message: bytes, content: bytes, *, known: tuple[x509.Certificate, ...] = ()) -> Signed:
    """The signer of `content` according to the detached signature `message` (DER, untrusted).

    `known` are certificates from elsewhere (an entry certificate file) in which the signer may also be found. Raises
    Malformed(`cms.*`) or NotAuthentic("cms.content_digest" | "cms.signature"). It does NOT establish that the signer's
    certificate is valid, unexpired or trusted.
    """
    # 1
    data = _parse(message)
    signer = data.signers.as_list()[0]
    certificates = [_readable(asn1.encode_der(entry)) for entry in _entries(data)]
    # 2
    certificate = _named(signer.sid, (*certificates, *known))
    # 3
    attributes = signer.signed_attributes
    if attributes is None:
        raise Malformed("cms.signed_attributes", "the signer has no signed attributes", remedy="sign with attributes")
    if signed_attribute(attributes, CONTENT_TYPE) != asn1.encode_der(x509.ObjectIdentifier(DATA)):
        raise Malformed("cms.signed_attributes", "the signed content type is not id-data", expected=DATA)
    digest = hashlib.sha256(content).digest()
    if not same(signed_attribute(attributes, MESSAGE_DIGEST), asn1.encode_der(digest)):
        raise NotAuthentic("cms.content_digest", "the signature is over other content", got=digest)
    # 4
    _verify_signature(certificate, signer, asn1.encode_der(attributes))
    others = tuple(other for other in (*certificates, *known) if other != certificate)
    return Signed(signer=certificate, others=others)


def _parse(message: bytes) -> SignedData:
    data = parse_detached(message)
    digest = data.signers.as_list()[0].digest_algorithm.algorithm.dotted_string
    if digest != _SHA256:
        raise Malformed("cms.algorithm", "another digest than SHA-256", expected=_SHA256, got=digest)
    return data


def _entries(data: SignedData) -> list[asn1.TLV]:
    entries: list[asn1.TLV] = [] if data.certificates is None else data.certificates.as_list()
    if len(entries) > MAX_CERTIFICATES:
        raise Malformed("cms.certificates", "too many certificates", expected=MAX_CERTIFICATES, got=len(entries))
    return entries


def _readable(der: bytes) -> x509.Certificate:
    certificate = parse_certificate(der)
    try:
        # The library parses names and times when they are first asked for, and raises then.
        _ = certificate.issuer, certificate.subject, certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except ValueError:
        raise Malformed("cms.certificates", "a certificate has a name or time that cannot be read") from None
    return certificate


def _named(sid: IssuerAndSerial | bytes, certificates: tuple[x509.Certificate, ...]) -> x509.Certificate:
    for certificate in certificates:
        if isinstance(sid, bytes):
            if _key_identifier(certificate) == sid:
                return certificate
        elif (certificate.issuer.public_bytes(), certificate.serial_number) == (asn1.encode_der(sid.issuer), sid.serial):
            return certificate
    raise Malformed("cms.certificates", "the signer's certificate is not in the message", got=len(certificates))


def _key_identifier(certificate: x509.Certificate) -> bytes | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return None


def _verify_signature(certificate: x509.Certificate, signer: SignerInfo, signed: bytes) -> None:
    key = certificate.public_key()
    algorithm = signer.signature_algorithm.algorithm.dotted_string
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1) and algorithm == _ECDSA_SHA256:
            key.verify(signer.signature, signed, ec.ECDSA(hashes.SHA256()))
            return
        if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096 and algorithm in _RSA_ALGORITHMS:
            key.verify(signer.signature, signed, padding.PKCS1v15(), hashes.SHA256())
            return
    except InvalidSignature:
        raise NotAuthentic("cms.signature", "the CMS signature does not verify under the signer's certificate") from None
    raise Malformed("cms.algorithm", "this key or signature algorithm is not used here", got=algorithm)
