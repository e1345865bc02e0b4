"""EC private keys that live in a token, in the shape `cryptography` knows: builders and signers use them as their own.

Subclassing the abstract class is enough for X.509, CSR, CRL and OCSP builders (FINDINGS.md); pyOpenSSL refuses such a key
for TLS, which is why a broker certifies a short-lived TLS key under its HSM key instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Final, Never

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from moorline.errors import Misconfigured
from moorline.hsm.token import Token

HSM_IDENTITY: Final = "hsm-identity"
ISSUING_CA: Final = "issuing-ca"
VERIFIER: Final = "verifier"
KEM: Final = "hsm-kem"
WRAPPING: Final = "wrapping"

_HALF: Final = 32

Buffer = bytes | bytearray | memoryview


class HeldEcKey(ec.EllipticCurvePrivateKey):
    """A P-256 signing key that something else holds. It signs; it neither agrees nor exports.

    `ecdsa` gives r | s (64 bytes) over a digest; `label` names the key in errors.
    """

    def __init__(self, point: bytes, ecdsa: Callable[[bytes], bytes], label: str) -> None:
        self._ecdsa = ecdsa
        self._label = label
        self._public = point_key(point)

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """A DER ECDSA signature. The hash is made here, the signature in the token."""
        algorithm = signature_algorithm.algorithm
        if isinstance(algorithm, Prehashed):
            digest = bytes(data)
        else:
            hasher = hashes.Hash(algorithm)
            hasher.update(data)
            digest = hasher.finalize()
        raw = self._ecdsa(digest)
        return encode_dss_signature(int.from_bytes(raw[:_HALF], "big"), int.from_bytes(raw[_HALF:], "big"))

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The key that verifies."""
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        """P-256."""
        return self._public.curve

    @property
    def key_size(self) -> int:
        """256 bits."""
        return self._public.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        """Refused: a signing key does not agree on keys."""
        raise self._stays(algorithm, peer_public_key)

    def private_numbers(self) -> Never:
        """Refused: the key does not leave its token."""
        raise self._stays()

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        format: serialization.PrivateFormat,  # noqa: A002 - the abstract class names it so
        encryption_algorithm: serialization.KeySerializationEncryption,
    ) -> bytes:
        """Refused: the key does not leave its token."""
        raise self._stays(encoding, format, encryption_algorithm)

    def __copy__(self) -> HeldEcKey:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> HeldEcKey:
        return copy.copy(self)

    def _stays(self, *_: object) -> Misconfigured:
        return Misconfigured("token.key_stays", "this key does not leave its token", got=self._label)


class TokenEcKey(HeldEcKey):
    """A P-256 signing key in a token, by its label."""

    def __init__(self, token: Token, label: str) -> None:
        super().__init__(token.ec_point(label), lambda digest: token.ecdsa(label, digest), label)


def point_key(point: bytes) -> ec.EllipticCurvePublicKey:
    """A public key from its 65-byte P-256 point."""
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
