"""What an issuing CA says about its own certificates: CRLs (RFC 5280 5) and OCSP responses (RFC 6960), signed in the token.

Both are views of the same list of revoked certificates, made here from arguments; who was revoked is for the caller to know
(services.broker_revocation takes it from the ledger). Rules:

1. a CRL is full, covers one issuing CA and end-entity certificates only (critical issuing distribution point, RFC 5280
   5.2.5), and its number rises;
2. an OCSP response is about one certificate (RFC 5019 2.1.1), signed by the issuing CA itself, so nothing about a
   delegate has to be believed; a nonce that was sent is sent back (RFC 9654);
3. `unknown` is for a serial number that was not issued here; a request about another issuer is `unauthorized`, never `good`;
4. every answer says when it ends to be one.

What none of them establishes: that whoever shows the certificate holds its key, and that a contract lets it do anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtensionOID

from moorline.clock import Instant, Validity, to_datetime
from moorline.errors import Malformed, Refused
from moorline.wire import certificates
from moorline.wire.certificates import Issuer

OCSP_REQUEST_CAP: Final = 4096
_NONCE_CAP: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokedCertificate:
    """A certificate that does not count any more: serial number, since when, and why (`x509.ReasonFlags`)."""

    serial: int
    at: Instant
    reason: x509.ReasonFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateStatus:
    """What is known about one serial number. `issued` is False for one that this CA never gave out."""

    issued: bool
    revoked: RevokedCertificate | None


def crl(
    issuer: Issuer, revoked: tuple[RevokedCertificate, ...], *, number: int, validity: Validity, url: str | None
) -> bytes:
    """A full CRL, DER. `validity` is thisUpdate and nextUpdate; `url` where it is published, as certificates name it.

    `number` must be greater than that of any CRL of this issuer before (RFC 5280 5.2.3): the caller keeps it.
    """
    identifier = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(to_datetime(validity.not_before))
        .next_update(to_datetime(validity.not_after))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    if url is not None:
        builder = builder.add_extension(_scope(url), critical=True)
    for one in revoked:
        builder = builder.add_revoked_certificate(_entry(one))
    return builder.sign(issuer.key, certificates.hash_for(issuer.key)).public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True, slots=True, kw_only=True)
class OcspQuestion:
    """One certificate somebody asks about. `nonce` is None if none was sent."""

    name_hash: bytes
    key_hash: bytes
    algorithm: hashes.HashAlgorithm
    serial: int
    nonce: bytes | None


def parse_ocsp(der: bytes) -> OcspQuestion:
    """The question of an OCSP request (DER), untrusted. Raises only Malformed("ocsp.request_malformed").

    One certificate a request; signatures of requestors are not looked at: the answers are public.
    """
    if len(der) > OCSP_REQUEST_CAP:
        raise _malformed(f"{len(der)} bytes")
    try:
        request = ocsp.load_der_ocsp_request(der)
        extensions = list(request.extensions)
        nonces = [one.value.nonce for one in extensions if isinstance(one.value, x509.OCSPNonce)]
        unknown = [one.oid.dotted_string for one in extensions if one.critical and not isinstance(one.value, x509.OCSPNonce)]
        question = OcspQuestion(
            name_hash=request.issuer_name_hash,
            key_hash=request.issuer_key_hash,
            algorithm=request.hash_algorithm,
            serial=request.serial_number,
            nonce=nonces[0] if nonces else None,
        )
    except Exception as error:  # the loader raises ValueError, NotImplementedError, UnsupportedAlgorithm on odd bytes
        raise _malformed(type(error).__name__) from None
    if unknown or (question.nonce is not None and not 0 < len(question.nonce) <= _NONCE_CAP):
        raise _malformed("a critical extension or a nonce of odd length")
    return question


def about(issuer: Issuer, question: OcspQuestion) -> None:
    """Raises Refused("ocsp.other_issuer") unless the question is about a certificate of this issuer (RFC 6960 4.1.1)."""
    if (question.name_hash, question.key_hash) != _issuer_hashes(issuer, question.algorithm):
        raise Refused("ocsp.other_issuer", "the question is about another issuing CA's certificate")


def asked_of(issuers: Sequence[Issuer], question: OcspQuestion) -> Issuer:
    """Whose certificate the question is about. Raises Refused("ocsp.other_issuer") where it is none of these."""
    for issuer in issuers:
        with suppress(Refused):
            about(issuer, question)
            return issuer
    raise Refused("ocsp.other_issuer", "this responder does not answer for that issuing CA")


def ocsp_answer(issuer: Issuer, question: OcspQuestion, status: CertificateStatus, *, validity: Validity) -> bytes:
    """A response (DER) signed by the issuing CA: good, revoked or unknown between thisUpdate and nextUpdate."""
    revoked = status.revoked
    kind = ocsp.OCSPCertStatus.GOOD if status.issued else ocsp.OCSPCertStatus.UNKNOWN
    builder = (
        ocsp.OCSPResponseBuilder()
        .add_response_by_hash(
            question.name_hash,
            question.key_hash,
            question.serial,
            question.algorithm,
            kind if revoked is None else ocsp.OCSPCertStatus.REVOKED,
            to_datetime(validity.not_before),
            to_datetime(validity.not_after),
            None if revoked is None else to_datetime(revoked.at),
            None if revoked is None else revoked.reason,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, issuer.certificate)
    )
    if question.nonce is not None:
        builder = builder.add_extension(x509.OCSPNonce(question.nonce), critical=False)
    response = builder.sign(issuer.key, certificates.hash_for(issuer.key))
    return response.public_bytes(serialization.Encoding.DER)


def ocsp_refusal(status: ocsp.OCSPResponseStatus) -> bytes:
    """An unsigned response that says why there is no answer (RFC 6960 2.3), DER."""
    return ocsp.OCSPResponseBuilder.build_unsuccessful(status).public_bytes(serialization.Encoding.DER)


def parse_crl(der: bytes) -> x509.CertificateRevocationList:
    """A CRL from DER; raises only Malformed("crl.undecodable"). Establishes no trust."""
    try:
        found = x509.load_der_x509_crl(der)
        _ = (found.issuer, found.last_update_utc, found.next_update_utc, found.extensions)
    except Exception as error:  # the loader raises several kinds on odd bytes
        raise Malformed(
            "crl.undecodable",
            "the bytes are not a CRL",
            got=type(error).__name__,
            remedy="give a certificate revocation list, DER or PEM",
        ) from None
    return found


def crl_number(found: x509.CertificateRevocationList) -> int | None:
    """The number of a CRL, None if it has none."""
    try:
        value = found.extensions.get_extension_for_oid(ExtensionOID.CRL_NUMBER).value
    except x509.ExtensionNotFound:
        return None
    return value.crl_number if isinstance(value, x509.CRLNumber) else None


def _scope(url: str) -> x509.IssuingDistributionPoint:
    return x509.IssuingDistributionPoint(
        full_name=[x509.UniformResourceIdentifier(url)],
        relative_name=None,
        only_contains_user_certs=True,
        only_contains_ca_certs=False,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )


def _entry(one: RevokedCertificate) -> x509.RevokedCertificate:
    builder = x509.RevokedCertificateBuilder().serial_number(one.serial).revocation_date(to_datetime(one.at))
    if one.reason is not x509.ReasonFlags.unspecified:  # RFC 5280 5.3.1: left out rather than said
        builder = builder.add_extension(x509.CRLReason(one.reason), critical=False)
    return builder.build()


def _issuer_hashes(issuer: Issuer, algorithm: hashes.HashAlgorithm) -> tuple[bytes, bytes]:
    """H(issuer's name) and H(its key, without tag and length), as RFC 6960 4.1.1 wants them."""
    public = issuer.certificate.public_key()
    bits = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return _hashed(algorithm, issuer.certificate.subject.public_bytes()), _hashed(algorithm, bits)


def _hashed(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    hasher = hashes.Hash(algorithm)
    hasher.update(data)
    return hasher.finalize()


def _malformed(got: str) -> Malformed:
    return Malformed("ocsp.request_malformed", "the bytes are not an OCSP request about one certificate", got=got)
