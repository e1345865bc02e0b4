"""Digests over what was said in a session, and the keys that follow (spec/attested-session.md, Hashes and keys)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from moorline.digest import Digest256, Digest512, RunningHash, tagged, tagged_hash, tagged_hash512, tagged_mac
from moorline.wire.session import SessionRole

ATTESTER: Final = b"attester"
BROKER: Final = b"broker"

Exporter = Callable[[str, bytes], bytes]
"""(label, context) -> 32 bytes of keying material of this TLS connection."""


def message_digest(body: bytes) -> Digest256:
    """H(message): over the frame body exactly as sent."""
    return tagged_hash("session-message", body)


def transcript(*bodies: bytes) -> Digest256:
    """H(messages 1..n)."""
    so_far = begun()
    for body in bodies:
        so_far.add(body)
    return so_far.digest()


def begun() -> RunningHash:
    """H(messages 1..n) to be, before message 1."""
    return RunningHash("session-transcript")


def binding(role: SessionRole, exporter: bytes, hello: Digest256, challenge: Digest256, proof: bytes | None) -> Digest512:
    """What evidence must carry as its report data: this connection, H(message 1), H(message 2), this proof. 64 bytes."""
    return tagged_hash512("session", role.value.encode(), exporter, hello, challenge, proof or b"")


def exporter_label(role: SessionRole) -> str:
    """The label under which the TLS exporter is asked."""
    return f"EXPORTER-moorline-{role.value}"


def derive(key: bytes, *info: bytes) -> bytes:
    """A key under K for one use; 32 bytes."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=tagged("session-keys", *info)).derive(key)


def confirm_mac(key: bytes, digest: bytes) -> Digest256:
    """What message 5 holds: over H(messages 1..4), under a key that only who opened message 4 has."""
    return tagged_mac(derive(key, b"confirm", digest), "session-confirm", digest)


def no_exporter(_label: str, _context: bytes) -> bytes:
    """The exporter of the HPKE-only profile."""
    return b""  # TLS ends at a proxy: there is no connection that both ends share
