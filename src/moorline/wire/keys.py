"""Public keys and signatures as they travel: keys as DER SubjectPublicKeyInfo, signatures as COSE wants them.

Three algorithms and no negotiation: ES256 on P-256, ES384 on P-384, EdDSA on Ed25519 (RFC 9053 2). The algorithm follows
from the key; a message that names another one is refused.
"""

from __future__ import annotations

from typing import Final, Protocol, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from moorline.errors import Malformed, NotAuthentic

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
CertifiedKey = PublicKey | rsa.RSAPublicKey
"""Keys that may stand in a certificate issued here. RSA is for peers of functions that speak nothing else; nothing of ours
verifies by it.
"""
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

ES256: Final = -7
ES384: Final = -35
EDDSA: Final = -8


class Signer(Protocol):
    """Something that signs with one key it does not show: software, a token, a remote broker."""

    @property
    def algorithm(self) -> int:
        """The COSE algorithm number."""
        ...

    def public_key(self) -> PublicKey:
        """The key that verifies."""
        ...

    def sign(self, message: bytes) -> bytes:
        """The signature over `message` in COSE form (r | s for ECDSA)."""
        ...


class KeySigner:
    """A `Signer` over any `cryptography` private key, also one whose operations happen in a token."""

    def __init__(self, key: PrivateKey) -> None:
        self._key = key
        self._public = key.public_key()
        self.algorithm = algorithm_of(self._public)

    def public_key(self) -> PublicKey:
        """The key that verifies."""
        return self._public

    def sign(self, message: bytes) -> bytes:
        """The signature over `message` in COSE form."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(message)
        width = _WIDTHS[self.algorithm]
        r, s = decode_dss_signature(self._key.sign(message, _ECDSA[self.algorithm]))
        return r.to_bytes(width, "big") + s.to_bytes(width, "big")


def algorithm_of(key: PublicKey) -> int:
    """The one COSE algorithm this key signs with; raises Malformed("key.unsupported") for other keys."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return EDDSA
    if isinstance(key, ec.EllipticCurvePublicKey):
        if isinstance(key.curve, ec.SECP256R1):
            return ES256
        if isinstance(key.curve, ec.SECP384R1):
            return ES384
    raise Malformed("key.unsupported", "this kind of key is not used here", expected="P-256, P-384 or Ed25519")


def verify(key: PublicKey, signature: bytes, message: bytes) -> None:
    """Raises NotAuthentic("signature.invalid") unless `signature` (COSE form) is by `key` over `message`."""
    verify_as(algorithm_of(key), key, signature, message)


def verify_as(algorithm: int, key: PublicKey, signature: bytes, message: bytes) -> None:
    """As `verify`, for who knows the key's algorithm already."""
    try:
        if algorithm == EDDSA:
            cast("ed25519.Ed25519PublicKey", key).verify(signature, message)
            return
        width = _WIDTHS[algorithm]
        if len(signature) != 2 * width:
            raise NotAuthentic("signature.invalid", "the signature has the wrong length", expected=2 * width)
        r, s = int.from_bytes(signature[:width], "big"), int.from_bytes(signature[width:], "big")
        cast("ec.EllipticCurvePublicKey", key).verify(encode_dss_signature(r, s), message, _ECDSA[algorithm])
    except InvalidSignature:
        raise NotAuthentic(
            "signature.invalid", "the signature does not verify under this key", remedy="find out who sent it"
        ) from None


def public_bytes(key: CertifiedKey) -> bytes:
    """DER SubjectPublicKeyInfo."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def parse_public(der: bytes) -> PublicKey:
    """A supported public key from DER SubjectPublicKeyInfo; raises only Malformed (`key.*`)."""
    try:
        key = serialization.load_der_public_key(der)
    except Exception as error:  # the loader raises ValueError, UnsupportedAlgorithm and others on odd bytes
        raise Malformed("key.undecodable", "the bytes are not a public key", got=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise Malformed("key.unsupported", "this kind of key is not used here", expected="P-256, P-384 or Ed25519")
    algorithm_of(key)
    if public_bytes(key) != der:
        raise Malformed("key.not_canonical", "the public key is not in its one DER encoding")
    return key


_WIDTHS: Final = {ES256: 32, ES384: 48}
_ECDSA: Final = {ES256: ec.ECDSA(hashes.SHA256()), ES384: ec.ECDSA(hashes.SHA384())}
