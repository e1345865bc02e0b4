"""Key pairs from seeds, by what a pool holds: profile of a launch, or kind of a fresh key (wire.session.KeyKind).

P-256 and P-384 by FIPS 186-5 A.2.1 (extra random bits), Ed25519 by RFC 8032 5.1.5, ML-DSA-65 by FIPS 204 (algorithm 6, from
its 32-byte seed); RSA-2048, for peers that speak nothing else, from OpenSSL's own generator. Pure but for that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa

from moorline.wire.session import KeyKind

_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (SP 800-186 3.2.1.3)
_ORDER_384: Final = int(
    "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16
)  # of P-384 (SP 800-186 3.2.1.4)
P256_SEED: Final = 40  # 64 bits more than the order has, so that the remainder has no bias one could use
_SEEDS: Final = {KeyKind.P384.value: 56, KeyKind.ED25519.value: 32, KeyKind.ML_DSA_65.value: 32, KeyKind.RSA2048.value: 0}

_Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | mldsa.MLDSA65PrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """Both halves: SubjectPublicKeyInfo and PKCS#8, DER."""

    public: bytes
    private: bytes


def seed_bytes(profile: str) -> int:
    """How many random bytes a pair of this profile is made from; 0 if its library draws its own."""
    return _SEEDS.get(profile, P256_SEED)


def pair(profile: str, seed: bytes) -> KeyPair:
    """The key pair of this seed. Profiles that are no KeyKind are those of launches, which have P-256 keys."""
    key = _private(profile, seed)
    return KeyPair(
        public=key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        private=key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def p256(seed: bytes) -> ec.EllipticCurvePrivateKey:
    """A P-256 key pair from 40 random bytes (SP 800-56A 5.6.1.2.1)."""
    return _derived(seed, ec.SECP256R1(), _ORDER)


def _private(profile: str, seed: bytes) -> _Key:
    if profile == KeyKind.ED25519:
        return ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    if profile == KeyKind.RSA2048:
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if profile == KeyKind.P384:
        return _derived(seed, ec.SECP384R1(), _ORDER_384)
    if profile == KeyKind.ML_DSA_65:
        return mldsa.MLDSA65PrivateKey.from_seed_bytes(seed)
    return p256(seed)


def _derived(seed: bytes, curve: ec.EllipticCurve, order: int) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(seed, "big") % (order - 1) + 1, curve)
