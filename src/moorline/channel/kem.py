"""The KEM keys of a session, and what is sealed to them (HPKE, RFC 9180): MLKEM768_X25519, or P-256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from moorline.errors import Malformed, NotAuthentic

_MLKEM_PUBLIC: Final = 1184
_HYBRID_PUBLIC: Final = _MLKEM_PUBLIC + 32
_P256_POINT: Final = 65


@dataclass(frozen=True, slots=True, kw_only=True)
class KemKey:
    """An attester's MLKEM768_X25519 key pair; `public` is the raw form that `Hello.kem_public` carries (1216 bytes)."""

    private: hpke.MLKEM768X25519PrivateKey
    public: bytes

    @classmethod
    def of(cls, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> KemKey:
        """The pair of these two halves; made fresh for each session by the driver."""
        public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        return cls(private=hpke.MLKEM768X25519PrivateKey(mlkem, x25519), public=public)


KemPublic = hpke.MLKEM768X25519PublicKey | ec.EllipticCurvePublicKey
_HYBRID_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_P256_SUITE: Final = hpke.Suite(hpke.KEM.P256, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def suite_of(kem_public: bytes) -> tuple[hpke.Suite, KemPublic]:
    """The suite that goes with a KEM public key as `Hello` carries it, and the key. Raises Malformed("session.kem")."""
    try:
        if len(kem_public) == _HYBRID_PUBLIC:
            hybrid = hpke.MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(kem_public[:_MLKEM_PUBLIC]),
                X25519PublicKey.from_public_bytes(kem_public[_MLKEM_PUBLIC:]),
            )
            return _HYBRID_SUITE, hybrid
        if len(kem_public) == _P256_POINT:
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), kem_public)
            return _P256_SUITE, point
    except Exception as error:  # the key loaders raise several kinds on bytes that are not a key
        raise Malformed("session.kem", "the KEM public key is not one", got=type(error).__name__) from None
    raise Malformed("session.kem", "no KEM has public keys of this length", expected=f"{_HYBRID_PUBLIC} or {_P256_POINT}")


def seal_to(kem_public: bytes, plaintext: bytes, *, info: bytes) -> bytes:
    """HPKE base mode to a KEM public key as `Hello` carries it. Raises Malformed("session.kem")."""
    suite, public = suite_of(kem_public)
    return suite.encrypt(plaintext, public, info=info)


def open_sealed(kem: KemKey, sealed: bytes, *, info: bytes) -> bytes:
    """What `seal_to` sealed to this key with this info. Raises NotAuthentic("session.sealed_not_authentic")."""
    suite, _ = suite_of(kem.public)
    try:
        return suite.decrypt(sealed, kem.private, info=info)
    except Exception:  # InvalidTag, and ValueError for ciphertexts of another length; both mean the same
        raise NotAuthentic("session.sealed_not_authentic", "this was not sealed for this key and purpose") from None


def p256_raw(public: ec.EllipticCurvePublicKey) -> bytes:
    """A P-256 public key in the raw form of `Hello.kem_public`; 65 bytes."""
    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
