"""What the HPKE-only profile signs, because no TLS connection vouches for it (PROTOCOLS.md 4, HPKE-only profile).

Where TLS ends at a proxy, everybody between it and the broker could make a message 2, and message 4 too: the KEM key it is
sealed to stands in message 1. So both are COSE_Sign1 by the HSM key that the ledger has for the broker, and each says what
it belongs to: message 2 to this message 1, message 4 to these messages 1 to 3. One that was recorded in another session
does not verify here. No socket, clock or key of ours: the signature is made by the driver, in the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from moorline.channel.messages import pack, unpack
from moorline.digest import Digest256, same
from moorline.errors import MoorlineError, NotAuthentic
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size
from moorline.wire.session import Answer, Challenge, Signed

CHALLENGE: Final = "session-challenge"
ANSWER: Final = "session-answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What is signed: the digest of everything before (H(message 1), or H(messages 1..3)), and the message itself."""

    before: Bytes32
    message: Annotated[bytes, Size(at_most=128 * 1024)]


def payload(before: Digest256, message: Challenge | Answer) -> bytes:
    """The bytes to sign for a message 2 or 4."""
    return schema.encode(Bound(before=before, message=pack(message)))


def framed(signature: bytes) -> bytes:
    """The frame body around a COSE_Sign1."""
    return pack(Signed(cose=signature))


class SignedMessage:
    """A message 2 or 4 as it came: readable, and worth nothing before `require_signed`."""

    def __init__(self, purpose: str, body: bytes) -> None:
        """Raises Malformed."""
        self._sign1 = cose.parse(purpose, unpack(Signed, body).cose)
        self._bound = schema.decode(Bound, self._sign1.payload)

    def challenge(self) -> Challenge:
        """The challenge inside. Raises Malformed."""
        return unpack(Challenge, self._bound.message)

    def answer(self) -> Answer:
        """The answer inside. Raises Malformed."""
        return unpack(Answer, self._bound.message)

    def require_signed(self, key: keys.PublicKey, before: Digest256) -> None:
        """Raises NotAuthentic("session.not_signed_by_hsm" | "session.signed_for_another")."""
        try:
            cose.verify(self._sign1, key)
        except MoorlineError as error:
            raise NotAuthentic(
                "session.not_signed_by_hsm",
                "a message of the broker is not signed by the HSM key on the ledger",
                expected=cose.key_id(key),
                got=error.code,
                remedy="somebody between you and the broker made it",
            ) from None
        if not same(self._bound.before, before):
            raise NotAuthentic(
                "session.signed_for_another",
                "a message of the broker was signed for another session",
                expected=before,
                got=self._bound.before,
                remedy="somebody between you and the broker replayed it",
            )
