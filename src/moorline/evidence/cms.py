"""SignedData of CMS and PKCS #7 (RFC 5652, 5), as detached signatures carry it: bytes to untrusted facts.

1. DER and nothing else: what was read is written again and must give the same bytes.
2. The content is of type id-data and not in the message; there is exactly one signer.

Who signed, over what, and with which algorithms is for whoever verifies (`orchestration.cms` for packages,
`verification.ima_modsig` for files).
"""

from __future__ import annotations

from typing import Annotated, Final

from cryptography import x509
from cryptography.hazmat import asn1

from moorline.errors import Malformed

MAX_CMS_BYTES: Final = 128 * 1024
DATA: Final = "1.2.840.113549.1.7.1"
CONTENT_TYPE: Final = "1.2.840.113549.1.9.3"
MESSAGE_DIGEST: Final = "1.2.840.113549.1.9.4"
_SIGNED_DATA: Final = "1.2.840.113549.1.7.2"


@asn1.sequence
class Algorithm:
    """AlgorithmIdentifier (RFC 5280, 4.1.1.2)."""

    algorithm: x509.ObjectIdentifier
    parameters: asn1.Null | None


@asn1.sequence
class Encapsulated:
    """EncapsulatedContentInfo; no content is there where the signature is detached."""

    content_type: x509.ObjectIdentifier
    content: Annotated[bytes | None, asn1.Explicit(0)]


@asn1.sequence
class IssuerAndSerial:
    """IssuerAndSerialNumber; the name as it is encoded."""

    issuer: asn1.TLV
    serial: int


@asn1.sequence
class Attribute:
    """One attribute with its values, undecoded."""

    kind: x509.ObjectIdentifier
    values: asn1.SetOf[asn1.TLV]


@asn1.sequence
class SignerInfo:
    """SignerInfo; `sid` is a subject key identifier where it is bytes."""

    version: int
    sid: IssuerAndSerial | Annotated[bytes, asn1.Implicit(0)]
    digest_algorithm: Algorithm
    signed_attributes: Annotated[asn1.SetOf[Attribute] | None, asn1.Implicit(0)]
    signature_algorithm: Algorithm
    signature: bytes
    unsigned_attributes: Annotated[asn1.SetOf[Attribute] | None, asn1.Implicit(1)]


@asn1.sequence
class SignedData:
    """SignedData."""

    version: int
    digest_algorithms: asn1.SetOf[Algorithm]
    encapsulated: Encapsulated
    certificates: Annotated[asn1.SetOf[asn1.TLV] | None, asn1.Implicit(0)]
    revocations: Annotated[asn1.SetOf[asn1.TLV] | None, asn1.Implicit(1)]
    signers: asn1.SetOf[SignerInfo]


@asn1.sequence
class ContentInfo:
    """The outermost structure."""

    content_type: x509.ObjectIdentifier
    content: Annotated[SignedData, asn1.Explicit(0)]


def parse_detached(message: bytes) -> SignedData:
    """Rules 1 and 2. Raises only Malformed (`cms.*`)."""
    if len(message) > MAX_CMS_BYTES:
        raise Malformed("cms.too_large", "the CMS message is too large", expected=MAX_CMS_BYTES, got=len(message))
    try:
        info = asn1.decode_der(ContentInfo, message)
        canonical = asn1.encode_der(info)
    except Exception as error:  # the decoder raises ValueError; a subclass of another kind must not pass either
        raise Malformed("cms.undecodable", "the bytes are not a CMS SignedData in DER", got=type(error).__name__) from None
    data = info.content
    if canonical != message:
        raise Malformed("cms.undecodable", "the CMS message is not in DER")
    if info.content_type.dotted_string != _SIGNED_DATA or data.encapsulated.content_type.dotted_string != DATA:
        raise Malformed("cms.kind", "not SignedData over id-data", got=info.content_type.dotted_string)
    if data.encapsulated.content is not None:
        raise Malformed("cms.not_detached", "the signature carries content of its own")
    if len(data.signers.as_list()) != 1:
        raise Malformed("cms.signers", "exactly one signer is expected", expected=1, got=len(data.signers.as_list()))
    return data


def signed_attribute(attributes: asn1.SetOf[Attribute], kind: str) -> bytes:
    """The DER of the one value of the one attribute of `kind`. Raises Malformed("cms.signed_attributes")."""
    found = [attribute for attribute in attributes.as_list() if attribute.kind.dotted_string == kind]
    if len(found) != 1 or len(found[0].values.as_list()) != 1:
        raise Malformed("cms.signed_attributes", "a signed attribute is missing or repeated", expected=kind, got=len(found))
    value: bytes = asn1.encode_der(found[0].values.as_list()[0])
    return value
