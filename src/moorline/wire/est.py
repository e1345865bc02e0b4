"""Bodies of EST (RFC 7030, RFC 8951): base64 of DER both ways, CSRs in, certs-only CMS and multipart answers out. Pure.

Everything that comes in is untrusted and either a value or Malformed. A CSR's names are not looked at, but for the
common name, which says which device an installer's account wants; its signature proves possession of its key (RFC 7030 3.4).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import NameOID

from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.wire import cms, keys
from moorline.wire.der import OCTET_STRING

CSR_TYPE: Final = "application/pkcs10"
CERTS_ONLY: Final = "application/pkcs7-mime; smime-type=certs-only"
ENVELOPED: Final = "application/pkcs7-mime; smime-type=server-generated-key"
CSR_CAP: Final = 16 * 1024
_IDENTIFIER_CAP: Final = 64
BOUNDARY: Final = "moorline-est-boundary"
MULTIPART: Final = f'multipart/mixed; boundary="{BOUNDARY}"'
_ASYMMETRIC_DECRYPT_KEY: Final = "1.2.840.113549.1.9.16.2.54"
_SYMMETRIC_DECRYPT_KEY: Final = "1.2.840.113549.1.9.16.2.37"
CSR_ATTRIBUTES: Final = bytes.fromhex(
    # SEQUENCE { SEQUENCE { id-ecPublicKey, SET { prime256v1 } }, ecdsa-with-SHA256 } (RFC 7030 4.5.2)
    "3021301506072a8648ce3d0201310a06082a8648ce3d03010706082a8648ce3d040302"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Csr:
    """A certification request: its P-256 key, whether it signed the request, and the one common name if there is one.

    `decrypt_key` is the identifier of the key to which a private key made here is to be encrypted; None: TLS is enough.
    `wants_shared_key` names a key that both ends share, for the same.
    """

    public: ec.EllipticCurvePublicKey
    possessed: bool
    common_name: str | None
    decrypt_key: bytes | None
    wants_shared_key: bool


def parse_csr(der: bytes, *, possession: bool = True) -> Csr:
    """A PKCS#10 request (DER). Raises Malformed (`est.*`) and, with `possession`, NotAuthentic("est.possession").

    Without `possession` the signature is not looked at: server-side key generation ignores it (RFC 7030 4.4.1).
    """
    if len(der) > CSR_CAP:
        raise Malformed("est.csr_too_large", "the CSR is too large", expected=f"<= {CSR_CAP} bytes", got=len(der))
    try:
        csr = x509.load_der_x509_csr(der)
        public = csr.public_key()
        # The signature comes last, in whole bytes: the library ignores how many bits of it are said to be unused.
        possessed = csr.is_signature_valid and der.endswith(b"\x00" + csr.signature)
        weak = isinstance(csr.signature_hash_algorithm, hashes.SHA1 | hashes.MD5)
        names = [str(one.value) for one in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        attributes = {one.oid.dotted_string: (one.value, one._type) for one in csr.attributes}  # noqa: SLF001 - no other way
    except Exception as error:  # the loader raises ValueError, UnsupportedAlgorithm and others on odd bytes
        raise Malformed("est.csr_malformed", "the bytes are not a PKCS#10 request", got=type(error).__name__) from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Malformed("est.key_kind", "only P-256 keys are certified", expected="P-256")
    if possession and weak:
        raise NotAuthentic(
            "est.csr_algorithm", "a request signed over SHA-1 or MD5 proves nothing", expected="SHA-256 or longer"
        )
    if possession and not possessed:
        raise NotAuthentic(
            "est.possession", "the request is not signed by its own key", remedy="sign the request with the key it names"
        )
    return Csr(
        public=public,
        possessed=possessed,
        common_name=names[0] if len(names) == 1 else None,
        decrypt_key=_decrypt_key(attributes.get(_ASYMMETRIC_DECRYPT_KEY)),
        wants_shared_key=_SYMMETRIC_DECRYPT_KEY in attributes,
    )


def _decrypt_key(attribute: tuple[bytes, int] | None) -> bytes | None:
    if attribute is None:
        return None
    value, tag = attribute
    if tag != OCTET_STRING or not 0 < len(value) <= _IDENTIFIER_CAP:
        raise Malformed("est.key_identifier", "AsymmetricDecryptKeyIdentifier is an OCTET STRING", expected="1 to 64 bytes")
    return value


def csr_key(der: bytes) -> keys.PublicKey:
    """The key of a PKCS#10 request whose holder signed it."""
    return parse_csr(der).public


def decoded(content_type: str, body: bytes) -> bytes:
    """The DER of a request body. The transfer encoding is base64 whatever a header says about it (RFC 8951 3)."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != CSR_TYPE:
        raise Malformed("est.media_type", "a CSR comes as application/pkcs10", expected=CSR_TYPE, got=media_type)
    if len(body) > 2 * CSR_CAP:
        raise Malformed("est.csr_too_large", "the CSR is too large", expected=f"<= {CSR_CAP} bytes", got=len(body))
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        raise Malformed("est.csr_malformed", "a CSR comes as base64 of DER") from None


def certs_only(ders: tuple[bytes, ...]) -> bytes:
    """Certificates as certs-only CMS (RFC 5272 4.1), DER."""
    loaded = [x509.load_der_x509_certificate(der) for der in ders]
    return pkcs7.serialize_certificates(loaded, serialization.Encoding.DER)


def encoded(der: bytes) -> bytes:
    """Base64 in one line (RFC 8951 3.1, RFC 4648): some clients cannot skip line breaks."""
    return base64.b64encode(der)


def key_and_certificate(private_key: bytes, leaf: bytes, *, enveloped: bool = False) -> bytes:
    """The answer to serverkeygen (RFC 7030 4.4.2): the key and its certificate.

    The key is PKCS#8, protected by TLS alone, or `enveloped` in CMS (wire.cms).
    """
    parts = ((ENVELOPED if enveloped else "application/pkcs8", private_key), (CERTS_ONLY, certs_only((leaf,))))
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Type: {kind}\r\nContent-Transfer-Encoding: base64\r\n\r\n".encode()
        + encoded(der)
        + b"\r\n"
        for kind, der in parts
    )
    return body + f"--{BOUNDARY}--\r\n".encode()


def recipient(csr: Csr, shown: x509.Certificate | None) -> ec.EllipticCurvePublicKey | None:
    """The key to which a private key made here is to be encrypted beyond TLS (RFC 7030 4.4.1); None: none was asked for.

    It is that of the certificate that TLS verified, or that of the request if it signed the request. Raises
    Refused("est.key_encryption") where another one is named: a request for encryption is never answered in the clear.
    """
    if csr.decrypt_key is None and not csr.wants_shared_key:
        return None
    known = ([csr.public] if csr.possessed else []) + ([] if shown is None else [shown.public_key()])
    for key in known:
        fits = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
        if fits and cms.key_identifier(key) == csr.decrypt_key:
            assert isinstance(key, ec.EllipticCurvePublicKey)
            return key
    raise Refused(
        "est.key_encryption",
        "private keys are encrypted to the key of the certificate shown, or to the one that signed the request",
        expected="AsymmetricDecryptKeyIdentifier: SHA-1 of that key's bits (RFC 5280 4.2.1.2)",
        remedy="name one of these keys, or make the private key on the device",
    )
