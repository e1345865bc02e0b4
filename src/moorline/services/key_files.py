"""Public keys of others in files: one, or several while a key is rotated; replaced by people, read again when they are."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import serialization

from moorline.errors import Misconfigured, MoorlineError
from moorline.wire import keys

_END: Final = "-----END PUBLIC KEY-----"


def load_public(path: Path) -> keys.PublicKey:
    """A public key from a file: PEM, or DER SubjectPublicKeyInfo. Raises Misconfigured("orchestrator.key_unreadable")."""
    found = load_publics(path)
    if len(found) != 1:
        raise Misconfigured("orchestrator.key_unreadable", "the key file holds more than one key", got=path)
    return found[0]


class KeyFile:
    """The public keys in a file, read again when it changed; while it cannot be read, those it had before.

    Raises Misconfigured("orchestrator.key_unreadable") at the start. Files are replaced, not written to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = self._stat()
        self._keys = load_publics(path)

    def __call__(self) -> tuple[keys.PublicKey, ...]:
        """The keys of now."""
        with suppress(Misconfigured):
            version = self._stat()
            if version != self._version:
                self._keys, self._version = load_publics(self._path), version
        return self._keys

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise Misconfigured("orchestrator.key_unreadable", "the key file cannot be read", got=error) from None
        return found.st_mtime_ns, found.st_ino, found.st_size


def load_publics(path: Path) -> tuple[keys.PublicKey, ...]:
    """All public keys of a PEM file, or the one of a DER file. Raises Misconfigured("orchestrator.key_unreadable")."""
    try:
        data = path.read_bytes()
        parts = [f"{part}{_END}" for part in data.decode("ascii").split(_END)[:-1]] if data.startswith(b"-----BEGIN") else []
        loaded = [serialization.load_pem_public_key(part.strip().encode("ascii")) for part in parts]
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        ders = [one.public_bytes(serialization.Encoding.DER, spki) for one in loaded] or [data]
        return tuple(keys.parse_public(der) for der in ders)
    except (OSError, ValueError, MoorlineError) as error:
        raise Misconfigured("orchestrator.key_unreadable", "the key file cannot be read", got=f"{path}: {error}") from None
