"""A private key on its way to a device, in CMS (RFC 5652) as RFC 7030 4.4.2 wants it: signed, then enveloped to the device.

1. the key is an AsymmetricKeyPackage (RFC 5958): a SEQUENCE of one OneAsymmetricKey, which is what PKCS#8 became
2. SignedData over it, signed by the issuing CA: whoever made the key stands for it; its chain comes with it
3. EnvelopedData around that, for one P-256 key: ephemeral-static ECDH (RFC 5753 3.1.1: X9.63 KDF with SHA-256, AES-256 key
   wrap), content under AES-256-CBC, which is what EnvelopedData can do; its integrity is the signature's inside

Pure but for the ephemeral key and the content key, which the caller draws. `openssl cms -decrypt` is the oracle.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, padding, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.x963kdf import X963KDF
from cryptography.hazmat.primitives.keywrap import aes_key_wrap

from moorline.wire.certificates import Issuer
from moorline.wire.der import bits, integer, octets, oid, sequence, set_of, tagged, tlv

_SIGNED_DATA: Final = oid("1.2.840.113549.1.7.2")
_ENVELOPED_DATA: Final = oid("1.2.840.113549.1.7.3")
_KEY_PACKAGE: Final = oid("2.16.840.1.101.2.1.2.78.5")
_CONTENT_TYPE: Final = oid("1.2.840.113549.1.9.3")
_MESSAGE_DIGEST: Final = oid("1.2.840.113549.1.9.4")
_SHA256: Final = sequence(oid("2.16.840.1.101.3.4.2.1"))
_ECDSA_SHA256: Final = sequence(oid("1.2.840.10045.4.3.2"))
_EC_KEY: Final = sequence(oid("1.2.840.10045.2.1"))
_AES256_WRAP: Final = sequence(oid("2.16.840.1.101.3.4.1.45"))
_STD_ECDH_SHA256: Final = sequence(oid("1.3.132.1.11.1"), _AES256_WRAP)
_AES256_CBC: Final = oid("2.16.840.1.101.3.4.1.42")
_KEY: Final = 32
_BLOCK: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What has to be random: an ephemeral P-256 key, a content key of 32 bytes, an IV of 16. Each serves one message."""

    ephemeral: ec.EllipticCurvePrivateKey
    content_key: bytes
    iv: bytes


def signed_key_package(pkcs8: bytes, issuer: Issuer, above: tuple[bytes, ...]) -> bytes:
    """1 and 2: SignedData (DER), as it stands inside of 3. `above` are further certificates that come with the signer's."""
    package = sequence(pkcs8)
    attributes = (
        sequence(_CONTENT_TYPE, set_of(_KEY_PACKAGE)),
        sequence(_MESSAGE_DIGEST, set_of(octets(hashlib.sha256(package).digest()))),
    )
    signed = set_of(*attributes)  # RFC 5652 5.4: the signature is over the SET, which stands there under [0]
    assert isinstance(issuer.key, ec.EllipticCurvePrivateKey)
    signer = sequence(
        integer(3),
        tlv(0x80, key_identifier(issuer.certificate.public_key())),
        _SHA256,
        tagged(0, b"".join(sorted(attributes))),
        _ECDSA_SHA256,
        octets(issuer.key.sign(signed, ec.ECDSA(hashes.SHA256()))),
    )
    own = issuer.certificate.public_bytes(serialization.Encoding.DER)
    return sequence(
        integer(3),
        set_of(_SHA256),
        sequence(_KEY_PACKAGE, tagged(0, octets(package))),
        tagged(0, b"".join(sorted((own, *above)))),
        set_of(signer),
    )


def content_info(signed: bytes) -> bytes:
    """SignedData (DER) by itself, as whoever opened the envelope hands it on: `openssl cms -verify`."""
    return sequence(_SIGNED_DATA, tagged(0, signed))


def enveloped(signed: bytes, recipient: ec.EllipticCurvePublicKey, drawn: Drawn) -> bytes:
    """3: ContentInfo of EnvelopedData (DER) around SignedData, for the holder of one key."""
    shared = drawn.ephemeral.exchange(ec.ECDH(), recipient)
    info = sequence(_AES256_WRAP, tagged(2, octets((8 * _KEY).to_bytes(4, "big"))))  # ECC-CMS-SharedInfo, RFC 5753 7.2
    wrapping = X963KDF(algorithm=hashes.SHA256(), length=_KEY, sharedinfo=info).derive(shared)
    point = drawn.ephemeral.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    reader = sequence(tagged(0, octets(key_identifier(recipient))), octets(aes_key_wrap(wrapping, drawn.content_key)))
    agreement = tagged(
        1,
        integer(3) + tagged(0, tagged(1, _EC_KEY + bits(point))) + _STD_ECDH_SHA256 + sequence(reader),
    )
    encrypted = tlv(0x80, _encrypted(signed, drawn))
    algorithm = sequence(_AES256_CBC, octets(drawn.iv))
    body = sequence(integer(2), set_of(agreement), sequence(_SIGNED_DATA, algorithm, encrypted))
    return sequence(_ENVELOPED_DATA, tagged(0, body))


def key_identifier(public: object) -> bytes:
    """SubjectKeyIdentifier of a key: SHA-1 of its bits (RFC 5280 4.2.1.2, method 1)."""
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return x509.SubjectKeyIdentifier.from_public_key(public).digest


def _encrypted(content: bytes, drawn: Drawn) -> bytes:
    padder = padding.PKCS7(_BLOCK).padder()
    encryptor = Cipher(algorithms.AES(drawn.content_key), modes.CBC(drawn.iv)).encryptor()
    return encryptor.update(padder.update(content) + padder.finalize()) + encryptor.finalize()
