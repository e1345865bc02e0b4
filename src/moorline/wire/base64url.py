"""base64url without padding (RFC 4648 5, RFC 7515 2), in its one encoding."""

from __future__ import annotations

import base64


def encode(data: bytes) -> bytes:
    """The text of `data`, ASCII, no padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def decode(text: bytes) -> bytes | None:
    """The bytes of an untrusted text, or None unless it is exactly what `encode` writes of them."""
    try:
        data = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
    return data if encode(data) == text else None
