"""Keys, certificates and anchors that a case or a person supplies, in the forms people keep them in.

What cannot be used leaves an appraisal undecided: Unavailable("material.*"). None of it is trusted for being here; the
caller says what it vouches for.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import warnings
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.utils import CryptographyDeprecationWarning

from moorline.cli.evidence_cases.case import Case
from moorline.errors import NotAuthentic, Unavailable
from moorline.rats import EvidenceRoot

_PEM: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----[^-]+-----END \1-----")
_CURVES: Final[dict[str, ec.EllipticCurve]] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def supplied_root(case: Case) -> EvidenceRoot:
    """What keys that come with a case are worth: software, unless whoever appraises vouches for more (`supplied_root`)."""
    return EvidenceRoot(case.text("supplied_root") or EvidenceRoot.SOFTWARE)


def spki(data: bytes) -> bytes:
    """The DER SubjectPublicKeyInfo of a key in PEM, DER or JWK, or of the key in a certificate."""
    if data.lstrip().startswith(b"{"):
        try:
            return spki_of_jwk(json.loads(data))
        except ValueError as error:
            raise _no_key(type(error).__name__) from None
    try:
        if b"-----BEGIN CERTIFICATE" in data:
            return _encoded(x509.load_pem_x509_certificate(data).public_key())
        if b"-----BEGIN" in data:
            return _encoded(serialization.load_pem_public_key(data))
        return _encoded(serialization.load_der_public_key(data))
    except Exception as error:  # the library raises ValueError, UnsupportedAlgorithm and others
        raise _no_key(type(error).__name__) from None


def spki_of_certificate(der: bytes) -> bytes:
    """The DER SubjectPublicKeyInfo of the key in a certificate."""
    return _encoded(decoded(der).public_key())


def _encoded(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def spki_of_jwk(jwk: object) -> bytes:
    """The DER SubjectPublicKeyInfo of an EC key in JWK (RFC 7517), already decoded from JSON."""
    if not isinstance(jwk, dict) or jwk.get("kty") != "EC" or jwk.get("crv") not in _CURVES:
        raise _no_key("not an EC key on a known curve")
    x, y = (int.from_bytes(base64url(jwk.get(name)), "big") for name in ("x", "y"))
    try:
        key = ec.EllipticCurvePublicNumbers(x, y, _CURVES[jwk["crv"]]).public_key()
    except ValueError as error:
        raise _no_key(str(error)) from None
    return _encoded(key)


def base64url(value: object) -> bytes:
    """The bytes of a base64url text, padded or not."""
    if not isinstance(value, str):
        raise _no_key("not base64url")
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _no_key("not base64url") from None


def certificates(data: bytes) -> list[bytes]:
    """Every certificate in PEM, in order, or the one that DER is; DER. An empty list if there is none in PEM."""
    if b"-----BEGIN" not in data:
        return [data]
    found: list[bytes] = []
    for match in _PEM.finditer(data):
        if match.group(1) == b"CERTIFICATE":
            body = match.group(0).split(b"-----")[2]
            try:
                found.append(base64.b64decode(b"".join(body.split()), validate=True))
            except (binascii.Error, ValueError):
                raise Unavailable("material.certificate_undecodable", "a certificate in PEM cannot be decoded") from None
    return found


def decoded(der: bytes) -> x509.Certificate:
    """A certificate whose names and extensions decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)  # every AMD VCEK has serial number 0
            certificate = x509.load_der_x509_certificate(der)
        _ = (certificate.subject, certificate.issuer, certificate.extensions)
    except Exception as error:  # ValueError, UnsupportedAlgorithm, DuplicateExtension and others
        raise Unavailable(
            "material.anchor_undecodable", "a certificate that was supplied cannot be decoded", got=type(error).__name__
        ) from None
    return certificate


def anchors(case: Case) -> tuple[bytes, ...]:
    """The roots that a case names instead of the shipped ones, DER. Empty where it names none.

    One that does not decode leaves the case undecided; one that is no self-signed CA is NotAuthentic("material.anchor").
    """
    found: list[bytes] = []
    for file in case.files("trust_anchor_files"):
        supplied = certificates(case.read(file))
        if not supplied:
            raise Unavailable("material.anchor_undecodable", "a trust anchor cannot be decoded", got=file)
        for der in supplied:
            certificate = decoded(der)
            if not is_ca(certificate) or not _self_signed(certificate):
                raise NotAuthentic("material.anchor", "a trust anchor is not a self-signed CA certificate", got=file)
            found.append(der)
    return tuple(found)


def _self_signed(certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(certificate)
    except Exception:  # InvalidSignature, ValueError for names, TypeError for keys that cannot sign: all mean no
        return False
    return True


def is_ca(certificate: x509.Certificate) -> bool:
    """The certificate says that it is a CA."""
    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except x509.ExtensionNotFound:
        return False


def ordered_path(supplied: list[bytes]) -> tuple[bytes, ...]:
    """Leaf and issuers in order, from certificates in any order, by names alone; self-signed ones are left out."""
    parsed = [(der, decoded(der)) for der in supplied]
    leaves = [(der, one) for der, one in parsed if not is_ca(one)]
    if len(leaves) != 1:
        raise Unavailable(
            "material.leaf_ambiguous", "the certificates do not hold exactly one that is no CA", got=len(leaves)
        )
    path, current = [leaves[0][0]], leaves[0][1]
    for _ in parsed:
        above = next(
            ((der, one) for der, one in parsed if one.subject == current.issuer and one.subject != one.issuer), None
        )
        if above is None or above[0] in path:
            break
        path.append(above[0])
        current = above[1]
    return tuple(path)


def _no_key(got: str) -> Unavailable:
    return Unavailable("material.key_undecodable", "a key that was supplied cannot be used", got=got)
