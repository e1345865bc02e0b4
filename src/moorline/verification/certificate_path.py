"""A path of certificates in a given order, for vendors whose evidence brings its own (Nitro, PSA, GCE vTPM).

The path is DER, leaf first, anchor last; whether the anchor is trusted is the caller's business. In order:

1. every certificate decodes, and none is too large;                                               path.certificate_malformed
2. the anchor is a self-signed CA;                                                                             path.anchor
3. each certificate is signed by the next, whose subject is its issuer, with ECDSA or RSA and SHA-2;           path.broken
4. every issuer is a CA that may sign certificates, within its path length, and the leaf is none;              path.not_ca
5. no certificate has a critical extension that is not handled here;                                         path.critical
6. all are valid at the time asked for, which is judged by `in_force`, at each call.      path.expired path.not_yet_valid

It does not look at revocation: neither vendor publishes lists for these certificates. Steps 1 to 5 depend on bytes
alone, so paths that hold are kept, bounded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID

from moorline.clock import Instant, Validity, rendered
from moorline.errors import Malformed, NotAuthentic

MAX_CERTIFICATE: Final = 8192
MAX_PATH: Final = 8
_HANDLED: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPath:
    """A path that holds, at the times in `validity` only. `key` is the leaf's."""

    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    validity: tuple[Validity, ...]


@lru_cache(maxsize=256)  # a pure function of bytes; a failure is never kept
def judge_path(path: tuple[bytes, ...]) -> JudgedPath:
    """The path, by rules 1 to 5. Raises Malformed and NotAuthentic (`path.*`)."""
    if not 2 <= len(path) <= MAX_PATH:
        raise NotAuthentic("path.broken", "a path is a leaf, its issuers and an anchor", expected=f"2 to {MAX_PATH}")
    certificates = [parsed(der) for der in path]
    leaf, anchor = certificates[0], certificates[-1]
    if anchor.subject != anchor.issuer or not _signed_by(anchor, anchor) or not _is_ca(anchor, below=len(path) - 2):
        raise NotAuthentic("path.anchor", "the anchor is not a self-signed certificate of a CA")
    for below, (subject, issuer) in enumerate(pairwise(certificates)):
        if subject.issuer != issuer.subject or not _signed_by(subject, issuer):
            raise NotAuthentic("path.broken", "a certificate is not signed by the next one", got=f"position {below}")
        if not _is_ca(issuer, below=below):
            raise NotAuthentic("path.not_ca", "an issuer may not sign this certificate", got=f"position {below + 1}")
    if _basic(leaf) is not None and _is_ca(leaf, below=0):
        raise NotAuthentic("path.not_ca", "the leaf is a CA")
    for certificate in certificates:
        _only_handled(certificate)
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise NotAuthentic("path.leaf_key", "the leaf holds neither an RSA nor an elliptic key", got=type(key).__name__)
    return JudgedPath(key=key, validity=tuple(_validity(certificate) for certificate in certificates))


def in_force(path: JudgedPath, now: Instant) -> None:
    """Returns if every certificate is valid at `now` (rule 6). Raises NotAuthentic."""
    for position, interval in enumerate(path.validity):
        if now < interval.not_before:
            raise NotAuthentic(
                "path.not_yet_valid",
                f"certificate {position} of the path is not valid yet",
                expected=f">= {rendered(interval.not_before)}",
                got=rendered(now),
            )
        if now > interval.not_after:
            raise NotAuthentic(
                "path.expired",
                f"certificate {position} of the path has expired",
                expected=f"<= {rendered(interval.not_after)}",
                got=rendered(now),
            )


def parsed(der: bytes) -> x509.Certificate:
    """A certificate whose lazily decoded parts have been decoded once, so that nothing raises later. Establishes no trust.

    Raises only Malformed("path.certificate_malformed").
    """
    if len(der) > MAX_CERTIFICATE:
        raise Malformed("path.certificate_malformed", "a certificate is too large", expected=f"<= {MAX_CERTIFICATE} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names of Google's CAs are longer than X.520 allows
            certificate = x509.load_der_x509_certificate(der)
            _ = (certificate.extensions, certificate.subject, certificate.issuer, certificate.public_key())
            _ = (certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.signature_hash_algorithm)
    except Exception as error:  # the library raises ValueError, UnsupportedAlgorithm, DuplicateExtension and others
        raise Malformed("path.certificate_malformed", "not a certificate", got=type(error).__name__) from None
    return certificate


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    if not isinstance(certificate.signature_hash_algorithm, _HASHES):
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # InvalidSignature, ValueError for names, TypeError for keys that cannot sign: all mean no
        return False
    return True


def _basic(certificate: x509.Certificate) -> x509.BasicConstraints | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return None


def _is_ca(certificate: x509.Certificate, *, below: int) -> bool:
    """A CA that may have `below` CAs beneath it (RFC 5280 4.2.1.9). Key usage must be present and allow it (4.2.1.3)."""
    constraints = _basic(certificate)
    if constraints is None or not constraints.ca:
        return False
    if constraints.path_length is not None and constraints.path_length < below:
        return False
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return False


def _only_handled(certificate: x509.Certificate) -> None:
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _HANDLED:
            raise NotAuthentic(
                "path.critical",
                "a certificate has a critical extension that is not handled",
                got=extension.oid.dotted_string,
            )


def _validity(certificate: x509.Certificate) -> Validity:
    return Validity(
        not_before=Instant(int(certificate.not_valid_before_utc.timestamp())),
        not_after=Instant(int(certificate.not_valid_after_utc.timestamp())),
    )
