"""What Moorline asks of a token, whoever holds it: this process (`local`) or the owner process (`remote`).

Keys are used by name and never shown: no operation returns one. Names are the labels of PKCS#11 objects. Every operation
may raise Unavailable (`token.failed`, `token.gone`, `token.lacks`) and, where a key is named,
Misconfigured("token.key_missing").
tests/hsm/test_token_port.py is the conformance suite; it runs on SoftHSM2, on tpm2-pkcs11 over swtpm as far as that serves,
and through an owner process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """A key in the token as the token itself describes it. None: the token does not say.

    `kind` is `private`, `public`, `secret` or `data`; `trust_needed` is CKA_WRAP_WITH_TRUSTED: an extractable key leaves
    only under a wrapping key that the security officer marked as trusted.
    """

    label: str
    kind: str
    type: str
    sensitive: bool | None
    extractable: bool | None
    never_extractable: bool | None
    local: bool | None
    trust_needed: bool | None
    uses: tuple[str, ...]


class Token(Protocol):
    """An open token. Safe for threads."""

    # -- randomness
    def random(self, size: int) -> bytes:
        """`size` bytes of the token's generator."""
        ...

    # -- EC P-256
    def generate_ec_key(self, label: str, *, derive: bool = False, recoverable: bool = False) -> bytes:
        """Make a P-256 key pair in the token, to sign with or (`derive`) to agree with; the 65-byte public point.

        Not extractable; with `recoverable` only under a wrapping key the security officer trusts (hsm.backup).
        Raises Misconfigured("token.key_exists").
        """
        ...

    def ec_point(self, label: str) -> bytes:
        """The uncompressed public point (65 bytes) of an EC key in the token."""
        ...

    def ecdsa(self, label: str, digest: bytes) -> bytes:
        """The signature r | s (64 bytes) over a digest, which the caller made."""
        ...

    def agree(self, label: str, peer_point: bytes, into: str) -> None:
        """ECDH with a peer's 65-byte point; the x coordinate becomes the non-extractable HMAC key `into` in the token.

        Nothing of the secret is returned. Raises Misconfigured("token.key_exists").
        """
        ...

    # -- secrets
    def generate_wrapping_key(self, label: str, *, recoverable: bool = False) -> None:
        """Make an AES-256 key in the token for `seal` and `unseal`. Raises Misconfigured("token.key_exists")."""
        ...

    def seal(self, label: str, plaintext: bytes, bound_to: bytes) -> bytes:
        """A nonce, then ciphertext and tag of AES-256-GCM in the token; `bound_to` is authenticated and not contained."""
        ...

    def unseal(self, label: str, sealed: bytes, bound_to: bytes) -> bytes:
        """What `seal` was given. Raises NotAuthentic("token.unseal") if any bit of it, or `bound_to`, is another."""
        ...

    def import_mac_key(self, label: str, value: bytes) -> None:
        """Put an HMAC key into the token for good; it can be used there and never read back."""
        ...

    def mac(self, label: str, message: bytes) -> bytes:
        """HMAC-SHA-256 in the token; 32 bytes."""
        ...

    # -- what is there
    def has_secret(self, label: str) -> bool:
        """Whether a secret key of this name is in the token."""
        ...

    def has_key(self, label: str) -> bool:
        """Whether a private key of this name is in the token."""
        ...

    def destroy_secret(self, label: str) -> None:
        """Destroy a secret key; nothing happens if it is gone already."""
        ...

    def destroy_key(self, label: str) -> None:
        """Destroy a key pair, both halves; nothing happens if it is gone already."""
        ...

    def inspect(self) -> tuple[KeyFacts, ...]:
        """Every object the token shows to this login, by label and kind."""
        ...

    # -- counters
    def counter(self, label: str) -> int:
        """The value of a counter in the token; 0 if it never advanced."""
        ...

    def advance(self, label: str) -> int:
        """Raise a counter by one, durably, and return the new value."""
        ...

    def close(self) -> None:
        """Close the sessions. The token can be opened again afterwards."""
        ...
