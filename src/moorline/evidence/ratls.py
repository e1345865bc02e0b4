"""SGX evidence that travels in a certificate (RA-TLS) or behind an Open Enclave header. No trust, no crypto.

1. Open Enclave, extension 1.2.840.113556.10.1.1: a 16-byte header (version 1, report type 2 "remote", length), then a
   quote. Its key is bound by SHA-256 over the PEM form of the public key with a terminating zero byte.
2. Gramine and Occlum, extension 1.2.840.113741.1337.6: a quote. Its key is bound by SHA-256 over the SubjectPublicKeyInfo.

Either way the rest of the report data is zero. The certificate is read with `der`, not with an X.509 library: what matters
of it is four fields, and Open Enclave wrote NULL parameters after ecdsa-with-SHA256, which strict libraries refuse to read
at all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.errors import Malformed
from moorline.evidence import der
from moorline.evidence.der import DerReader

MAX_CERTIFICATE: Final = 1 << 17
_OE_HEADER: Final = struct.Struct("<IIQ")
_OE_VERSION: Final = 1
_OE_REMOTE: Final = 2
_EXTENSIONS: Final = 0xA3
_VERSION: Final = 0xA0


class RatlsForm(StrEnum):
    """Whose convention the certificate follows: it decides how the key is bound."""

    OPEN_ENCLAVE = "1.2.840.113556.10.1.1"
    GRAMINE = "1.2.840.113741.1337.6"


@dataclass(frozen=True, slots=True, kw_only=True)
class RatlsEvidence:
    """What a certificate with embedded evidence holds, untrusted. `signature_algorithm` is a dotted OID."""

    form: RatlsForm
    quote: bytes
    public_key: bytes
    """SubjectPublicKeyInfo, DER."""
    signed: bytes
    """The TBSCertificate, DER."""
    signature_algorithm: str
    signature: bytes


def parse_oe_report(data: bytes) -> bytes:
    """The quote behind an Open Enclave header. Raises Malformed("ratls.oe_header")."""
    if len(data) < _OE_HEADER.size:
        raise Malformed("ratls.oe_header", "not an Open Enclave report", expected=">= 16 bytes", got=len(data))
    version, kind, size = _OE_HEADER.unpack_from(data)
    if (version, kind, size) != (_OE_VERSION, _OE_REMOTE, len(data) - _OE_HEADER.size):
        raise Malformed(
            "ratls.oe_header", "not a remote Open Enclave report", expected="1, 2, length", got=f"{version}, {kind}, {size}"
        )
    return data[_OE_HEADER.size :]


def parse_ratls_certificate(data: bytes) -> RatlsEvidence:
    """The evidence in a DER certificate. Input is untrusted. Raises only Malformed (`ratls.*`, `der.malformed`)."""
    if len(data) > MAX_CERTIFICATE:
        raise Malformed(
            "ratls.too_large", "the certificate is too large", expected=f"<= {MAX_CERTIFICATE} bytes", got=len(data)
        )
    outer = DerReader(data)
    certificate = outer.sequence()
    outer.finish()
    _, body, signed = certificate.element()
    algorithm = _algorithm(certificate)
    signature = certificate.contents(der.BIT_STRING)
    certificate.finish()
    if signature[:1] != b"\x00":
        raise Malformed("ratls.certificate", "a signature that is not whole bytes")
    public_key, extensions = _body(body)
    found = [(RatlsForm(oid), value) for oid, value in extensions if oid in set(RatlsForm)]
    if len(found) != 1:
        raise Malformed("ratls.evidence", "the certificate must hold one piece of evidence", expected=1, got=len(found))
    form, value = found[0]
    return RatlsEvidence(
        form=form,
        quote=parse_oe_report(value) if form is RatlsForm.OPEN_ENCLAVE else value,
        public_key=public_key,
        signed=signed,
        signature_algorithm=algorithm,
        signature=signature[1:],
    )


def _algorithm(certificate: DerReader) -> str:
    """The OID; parameters may be absent or NULL, whatever the algorithm (divergence: see the module)."""
    identifier = certificate.sequence()
    oid = identifier.oid()
    if not identifier.empty and identifier.contents(der.NULL):
        raise Malformed("ratls.certificate", "a NULL with contents")
    identifier.finish()
    return oid


def _body(contents: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Public key and extensions of a TBSCertificate (RFC 5280, 4.1)."""
    body = DerReader(contents)
    if body.peek() == _VERSION:
        body.element()
    body.integer()
    for _ in range(4):  # signature, issuer, validity, subject: none of them is believed
        body.contents(der.SEQUENCE)
    tag, _, public_key = body.element()
    if tag != der.SEQUENCE:
        raise Malformed("ratls.certificate", "the certificate holds no public key")
    extensions: list[tuple[str, bytes]] = []
    while not body.empty:
        tag, value, _ = body.element()
        if tag == _EXTENSIONS:
            extensions = _extensions(value)
            body.finish()
    return public_key, extensions


def _extensions(contents: bytes) -> list[tuple[str, bytes]]:
    holder = DerReader(contents)
    listed = holder.sequence()
    holder.finish()
    found: list[tuple[str, bytes]] = []
    while not listed.empty:
        extension = listed.sequence()
        oid = extension.oid()
        if extension.peek() == der.BOOLEAN:
            extension.boolean()
        found.append((oid, extension.contents(der.OCTET_STRING)))
        extension.finish()
    return found
