"""Verdicts as signed EAR (policy.ear), with a key from a file."""

from __future__ import annotations

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from moorline.errors import Misconfigured
from moorline.policy import ear
from moorline.rats import AttestationResult
from moorline.wire import keys


def any_signer(pem: bytes) -> keys.KeySigner:
    """A key that can sign what we sign. Raises Misconfigured("evidence.key")."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except Exception as error:  # the loader raises ValueError, TypeError for a password, UnsupportedAlgorithm
        raise Misconfigured(
            "evidence.key", "not a private key in PEM without a password", got=type(error).__name__
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise Misconfigured("evidence.key", "a key that is not used here", expected="P-256, P-384 or Ed25519")
    return keys.KeySigner(key)


def signer(pem: bytes) -> keys.KeySigner:
    """A key that can sign an EAR: P-256. Raises Misconfigured("evidence.key")."""
    made = any_signer(pem)
    if made.algorithm != keys.ES256:
        raise Misconfigured("evidence.key", "an EAR is signed with ES256", expected="a P-256 key")
    return made


def sign(result: AttestationResult, by: keys.KeySigner, *, audience: str) -> str:
    """The result as EAR in a JWT."""
    return ear.encode(result, by, audience=audience)


def says(token: str, result: AttestationResult, *, audience: str) -> bool:
    """True if `token` says exactly `result`, whoever signed it."""
    return token.rpartition(".")[0].encode() == ear.signing_input(result, audience=audience)
