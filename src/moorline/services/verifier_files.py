"""The files a verifier's settings name: read, or refused with their path."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.errors import Misconfigured
from moorline.wire import certificates, keys

_SPKI: Final = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def read(path: Path) -> bytes:
    """Its bytes. Raises Misconfigured("verifier.unreadable")."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Misconfigured(
            "verifier.unreadable", "a configured file cannot be read", got=f"{path}: {error.strerror}"
        ) from None


def certificate(path: Path) -> bytes:
    """A certificate, PEM or DER, as DER."""
    data = read(path)
    if data.lstrip().startswith(b"-----BEGIN"):
        return x509.load_pem_x509_certificate(data).public_bytes(serialization.Encoding.DER)
    return certificates.parse_certificate(data).public_bytes(serialization.Encoding.DER)


def public_key(path: Path) -> keys.PublicKey:
    """A certificate or a public key, PEM or DER."""
    data = read(path)
    if not data.lstrip().startswith(b"-----BEGIN"):
        return keys.parse_public(data)
    try:
        if b"BEGIN CERTIFICATE" in data:
            der = x509.load_pem_x509_certificate(data).public_key().public_bytes(*_SPKI)
        else:
            der = serialization.load_pem_public_key(data).public_bytes(*_SPKI)
    except ValueError:
        raise Misconfigured("verifier.signer_unreadable", "not a certificate or public key", got=path) from None
    return keys.parse_public(der)
