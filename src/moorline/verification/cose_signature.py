"""Does this key authenticate this COSE message? For tokens of others (CCA, PSA, Nitro); ours are in `wire.cose`.

1. The algorithm is one that the caller allows, and it is the one of the key: ES256 with P-256, ES384 with P-384, ES512 with
   P-521 (RFC 9053 2.1), HMAC with SHA-2 and a full tag (RFC 9053 3.1). A token never chooses how it is checked.
2. The signature is exactly r and s, each as long as the curve's order; the MAC exactly as long as the hash.
3. It holds over the Sig_structure or MAC_structure (RFC 9052 4.4, 6.3) of the protected header and payload as they
   came, without external data.
"""

from __future__ import annotations

import hmac
from typing import Final

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline.errors import NotAuthentic
from moorline.evidence import eat_cbor
from moorline.evidence.eat_cbor import Cose

ES256: Final = -7
ES384: Final = -35
ES512: Final = -36

_SIGN: Final[dict[int, tuple[type[ec.EllipticCurve], hashes.HashAlgorithm, int]]] = {
    ES256: (ec.SECP256R1, hashes.SHA256(), 32),
    ES384: (ec.SECP384R1, hashes.SHA384(), 48),
    ES512: (ec.SECP521R1, hashes.SHA512(), 66),
}
_MAC: Final = {5: "sha256", 6: "sha384", 7: "sha512"}
_MAC_BYTES: Final = {5: 32, 6: 48, 7: 64}
ALL_SIGNATURES: Final = frozenset(_SIGN)
ALL_MACS: Final = frozenset(_MAC)
_LEAST_MAC_KEY: Final = 16


def public_key(spki: bytes) -> ec.EllipticCurvePublicKey:
    """The EC key in a DER SubjectPublicKeyInfo. Raises NotAuthentic("cose.key_unusable") for anything else."""
    try:
        key = serialization.load_der_public_key(spki)
    except Exception as error:  # ValueError, UnsupportedAlgorithm and others, by kind of defect
        raise NotAuthentic("cose.key_unusable", "not a public key", got=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NotAuthentic("cose.key_unusable", "the key is not an elliptic-curve key", got=type(key).__name__)
    return key


def point_key(point: bytes, curve: ec.EllipticCurve) -> ec.EllipticCurvePublicKey:
    """The key of an uncompressed point. Raises NotAuthentic("cose.key_unusable") if it is not on the curve."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    except ValueError:
        raise NotAuthentic("cose.key_unusable", "the key is not a point of its curve", expected=curve.name) from None


def verify_sign1(cose: Cose, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, *, allowed: frozenset[int]) -> None:
    """Returns if `key` signed `cose`. Raises NotAuthentic (`cose.*`)."""
    if cose.tag == eat_cbor.TAG_MAC0 or cose.algorithm not in allowed or cose.algorithm not in _SIGN:
        raise NotAuthentic(
            "cose.algorithm_not_allowed",
            "the token is not signed with an algorithm allowed here",
            expected=sorted(allowed),
            got=cose.algorithm,
        )
    curve, algorithm, size = _SIGN[cose.algorithm]
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NotAuthentic("cose.key_unusable", "the key is not an elliptic-curve key", got=type(key).__name__)
    if not isinstance(key.curve, curve):
        raise NotAuthentic(
            "cose.key_curve", "the key is of another curve than the algorithm", expected=curve.name, got=key.curve.name
        )
    if len(cose.signature) != 2 * size:
        raise NotAuthentic("cose.signature_invalid", "the signature has the wrong length", expected=2 * size)
    r, s = (int.from_bytes(half, "big") for half in (cose.signature[:size], cose.signature[size:]))
    try:
        key.verify(encode_dss_signature(r, s), _structure("Signature1", cose), ec.ECDSA(algorithm))
    except InvalidSignature:
        raise NotAuthentic("cose.signature_invalid", "the token is not signed by this key") from None


def verify_mac0(cose: Cose, key: bytes, *, allowed: frozenset[int]) -> None:
    """Returns if `cose` was authenticated with the symmetric `key`. Raises NotAuthentic (`cose.*`).

    Whoever can check a MAC could have made it: this shows nothing to a third party.
    """
    if cose.tag != eat_cbor.TAG_MAC0 or cose.algorithm not in allowed or cose.algorithm not in _MAC:
        raise NotAuthentic(
            "cose.algorithm_not_allowed",
            "the token is not authenticated with an algorithm allowed here",
            expected=sorted(allowed),
            got=cose.algorithm,
        )
    if len(key) < _LEAST_MAC_KEY:
        raise NotAuthentic("cose.key_unusable", "the symmetric key is too short", expected=f">= {_LEAST_MAC_KEY} bytes")
    tag = hmac.digest(key, _structure("MAC0", cose), _MAC[cose.algorithm])
    if len(cose.signature) != _MAC_BYTES[cose.algorithm] or not hmac.compare_digest(tag, cose.signature):
        raise NotAuthentic("cose.signature_invalid", "the token is not authenticated with this key")


def _structure(context: str, cose: Cose) -> bytes:
    """RFC 9052 4.4: a protected header that is an encoded empty map counts as the empty byte string; ours never is empty."""
    return cbor2.dumps([context, cose.protected, b"", cose.payload])
