"""The device's end of CMP (RFC 9483 4.1.3, p10cr): a certificate, asked for in a message that the device's key signs.

For a key that TLS libraries cannot use (in a PKCS#11 token or a TPM): it signs the message, not the connection. So it
renews its own certificate, and has short-lived TLS keys certified (device.tls_key).

1. the request is a PKCS#10 by the key to be certified; the device's key signs the message, which brings its certificate
2. the answer is for this transaction and nonce, and signed by an issuing CA that leads to the consortium root
3. what it certified is the caller's to verify (device.enrolment): this returns untrusted certificates
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.verification.chains import verify_ca
from moorline.wire import cmp, cmp_reply
from moorline.wire.certificates import parse_certificate
from moorline.wire.cmp import Body, Message
from moorline.wire.cmp_elements import Algorithm
from moorline.wire.cmp_reply import Reply
from moorline.wire.http import HttpClient

PATH: Final = "/.well-known/cmp"
MEDIA_TYPE: Final = "application/pkixcmp"
_ECDSA_SHA256: Final = Algorithm(oid="1.2.840.10045.4.3.2", parameters=b"")
_NONCE: Final = 16


async def certified(
    client: HttpClient,
    key: ec.EllipticCurvePrivateKey,
    chain: tuple[bytes, ...],
    csr: bytes,
    *,
    roots: tuple[bytes, ...],
    now: Instant,
) -> tuple[bytes, ...]:
    """The certificate (DER) for a PKCS#10 (DER), then what else the answer brought. `chain` is the device's, leaf first.

    Raises Refused("cmp.refused") with the server's words, Malformed("cmp.malformed"), NotAuthentic("cmp.answer"), `chain.*`.
    """
    asked = _request(chain[0], csr, now)
    signature = key.sign(cmp_reply.protected_part(asked), ec.ECDSA(hashes.SHA256()))
    body = cmp_reply.encode(asked, signature, chain)
    answer = cmp.parse(await client.send("POST", PATH, content=body, headers={"content-type": MEDIA_TYPE}))
    _require_answered(answer, asked)
    _require_signed(answer, roots, now)
    if answer.body is Body.ERROR:
        raise Refused("cmp.refused", "the server did not certify", got=cmp.error_text(answer.content))
    if answer.body is not Body.CP:
        raise NotAuthentic("cmp.answer", "the answer is of another kind", expected="cp", got=answer.body.name.lower())
    return (cmp.issued_certificate(answer.content), *answer.extra_certificates)


def _request(leaf: bytes, csr: bytes, now: Instant) -> Reply:
    certificate = parse_certificate(leaf)
    identifier = x509.SubjectKeyIdentifier.from_public_key(certificate.public_key())
    return Reply(
        sender=cmp_reply.directory_name(certificate.subject),
        recipient=cmp_reply.directory_name(certificate.issuer),
        time=datetime.fromtimestamp(now, UTC).strftime("%Y%m%d%H%M%SZ"),
        algorithm=_ECDSA_SHA256,
        reference=identifier.digest,
        transaction=secrets.token_bytes(_NONCE),
        sender_nonce=secrets.token_bytes(_NONCE),
        recipient_nonce=None,
        body=Body.P10CR,
        content=csr,
        info=((cmp.IMPLICIT_CONFIRM, b"\x05\x00"),),
    )


def _require_answered(answer: Message, asked: Reply) -> None:
    header = answer.header
    if (header.transaction, header.recipient_nonce) != (asked.transaction, asked.sender_nonce):
        raise NotAuthentic("cmp.answer", "the answer is to another request", expected="transaction and nonce of this one")


def _require_signed(answer: Message, roots: tuple[bytes, ...], now: Instant) -> None:
    """2. Raises NotAuthentic."""
    algorithm, protection, shown = answer.header.algorithm, answer.protection, answer.extra_certificates
    if algorithm is None or algorithm.oid != _ECDSA_SHA256.oid or protection is None or not shown:
        raise NotAuthentic("cmp.answer", "the answer is not signed with ECDSA and SHA-256")
    verify_ca(shown[0], shown[1:], roots, now)
    public = parse_certificate(shown[0]).public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise NotAuthentic("cmp.answer", "the issuing CA's key is of another kind")
    try:
        public.verify(protection, answer.protected, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise NotAuthentic("cmp.answer", "the answer is not signed by the issuing CA it brings") from None


def pkcs10(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """A certification request (DER) for a key, signed by it."""
    try:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    except ValueError as error:
        raise Malformed("device.name", "this is no name of a device", got=error) from None
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)
