"""Seals: what the maker of a block signs when it proposes one, before anybody cosigns. Pure.

A sequencer signs a checkpoint last, so a block that nobody took may be given up for another at the same height. Its seal
is what holds it to its word meanwhile: over ledger, term, height, attempt and the header's digest. An honest sequencer makes
one block an attempt, and counts attempts durably; two seals of one attempt over different headers are evidence
(ledger.evidence).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from moorline.digest import tagged
from moorline.errors import NotAuthentic
from moorline.ledger.blocks import Header, digest
from moorline.wire.schema import Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """Authority `name` proposes a block as sequencer of `term`, its attempt number `attempt` at that height."""

    term: int
    attempt: int
    name: str
    signature: Bytes64


def seal(header: Header, *, ledger_id: bytes, term: int, attempt: int, name: str, key: Ed25519PrivateKey) -> Seal:
    """The seal on a block with this header. The caller recorded block and attempt first."""
    signature = key.sign(_message(header, ledger_id, term, attempt))
    return Seal(term=term, attempt=attempt, name=name, signature=signature)


def verify(found: Seal, header: Header, *, ledger_id: bytes, authorities: Mapping[str, bytes]) -> None:
    """Raises NotAuthentic("ledger.seal_invalid") unless the authority it names sealed this header so.

    Whether that authority may propose in this term is for the caller to say.
    """
    public = authorities.get(found.name)
    try:
        if public is None:
            raise ValueError
        Ed25519PublicKey.from_public_bytes(public).verify(
            found.signature, _message(header, ledger_id, found.term, found.attempt)
        )
    except (InvalidSignature, ValueError):
        raise NotAuthentic(
            "ledger.seal_invalid", "the seal on the proposed block is not its maker's", got=found.name
        ) from None


def _message(header: Header, ledger_id: bytes, term: int, attempt: int) -> bytes:
    numbers = (number.to_bytes(8, "big") for number in (term, header.height, attempt))
    return tagged("ledger-proposal-seal", ledger_id, *numbers, digest(header))
