"""A change of verdict as a Security Event Token (RFC 8417), pushed as RFC 8935 says: one event a token, ES256, compact JWS.

1. The header is the one header we write, byte for byte; its type keeps an event from ever passing for an Attestation Result.
2. The signature is verified under the key the receiver pins, before a claim is read.
3. Audience, issuer and one event of a kind we know; duplicate members are refused.

A token says that something happened. It has no expiry: a receiver that was away gets what it missed. `jti` is the same in
every delivery of one event, so a receiver that keeps the highest cursor it has acted on loses nothing and acts on nothing
twice. What stands now is asked, not heard (GET /v1/results/{host}).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic
from moorline.wire import base64url, keys

MEDIA_TYPE: Final = "application/secevent+jwt"
HEADER: Final = {"alg": "ES256", "typ": "secevent+jwt"}
MAX_TOKEN: Final = 8192
KINDS: Final = ("verdict_gained", "verdict_lost")
_URN: Final = "urn:moorline:event:"
_CLAIMS: Final = frozenset({"iss", "aud", "iat", "toe", "jti", "sub_id", "events"})
_DETAILS: Final = frozenset({"cursor", "code", "result_expires"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityEvent:
    """One verdict gained or lost. `at` is when it happened, `code` why it was lost (empty for one gained).

    `cursor` rises with every event of one verifier; `result_expires` is of the result that was gained or lost.
    """

    verifier: str
    host: str
    kind: str
    cursor: int
    at: Instant
    code: str
    result_expires: Instant

    @property
    def jti(self) -> str:
        """The token's identifier, the same for every delivery and every receiver of this event."""
        return f"{self.verifier}/events/{self.cursor}"


def signing_input(event: SecurityEvent, *, audience: str, issued: Instant) -> bytes:
    """The bytes to sign with ES256, for a signer that is elsewhere; `assemble` makes the token."""
    claims = {
        "iss": event.verifier,
        "aud": audience,
        "iat": issued,
        "toe": event.at,
        "jti": event.jti,
        "sub_id": {"format": "opaque", "id": event.host},
        "events": {
            _URN + event.kind.replace("_", "-"): {
                "cursor": event.cursor,
                "code": event.code,
                "result_expires": event.result_expires,
            }
        },
    }
    body = json.dumps(claims, separators=(",", ":"), sort_keys=True, ensure_ascii=True).encode("ascii")
    return _HEADER_TEXT + b"." + base64url.encode(body)


def assemble(message: bytes, signature: bytes) -> bytes:
    """The token from `signing_input` and its signature (r | s, 64 bytes)."""
    return message + b"." + base64url.encode(signature)


def parse_verified(token: bytes, key: keys.PublicKey, *, issuer: str, audience: str) -> SecurityEvent:
    """The event in `token`, signed by `key` of the verifier `issuer` for `audience`. `token` is untrusted.

    Raises Malformed (`event.*`) and NotAuthentic ("event.algorithm" | "event.audience" | "event.issuer" |
    "signature.invalid"). That an event is new is the receiver's to know, by its cursor.
    """
    parts = token.split(b".")
    if len(token) > MAX_TOKEN or len(parts) != 3:
        raise Malformed("event.not_a_token", "not a signed token of three parts", expected=f"<= {MAX_TOKEN} bytes")
    if parts[0] != _HEADER_TEXT or not isinstance(key, ec.EllipticCurvePublicKey) or keys.algorithm_of(key) != keys.ES256:
        raise NotAuthentic("event.algorithm", "not an ES256 security event of ours", expected="ES256, no other header")
    keys.verify(key, _unb64(parts[2]), parts[0] + b"." + parts[1])
    try:
        claims = json.loads(_unb64(parts[1]), object_pairs_hook=_unique)
        found = _event(claims)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        # any other shape than ours gives one of these while it is taken apart
        raise Malformed("event.claim", "a claim is missing or of the wrong type", got=type(error).__name__) from None
    if claims["aud"] != audience:
        raise NotAuthentic("event.audience", "the event is meant for somebody else", expected=audience, got=claims["aud"])
    if found.verifier != issuer:
        raise NotAuthentic("event.issuer", "the event is another verifier's", expected=issuer, got=found.verifier)
    return found


def _event(claims: dict[str, Any]) -> SecurityEvent:
    _shape(claims, _CLAIMS)
    _shape(claims["sub_id"], frozenset({"format", "id"}))
    ((name, details),) = claims["events"].items()
    _shape(details, _DETAILS)
    kind = name.removeprefix(_URN).replace("-", "_")
    found = SecurityEvent(
        verifier=_text(claims["iss"]),
        host=_text(claims["sub_id"]["id"]),
        kind=kind,
        cursor=_integer(details["cursor"]),
        at=Instant(_integer(claims["toe"])),
        code=_text(details["code"]),
        result_expires=Instant(_integer(details["result_expires"])),
    )
    _integer(claims["iat"])
    if name != _URN + kind.replace("_", "-") or kind not in KINDS or claims["jti"] != found.jti:
        raise ValueError
    return found


def _shape(item: object, names: frozenset[str]) -> None:
    if not isinstance(item, dict) or set(item) != names:
        raise TypeError


def _text(item: object) -> str:
    if not isinstance(item, str):
        raise TypeError
    return item


def _integer(item: object) -> int:
    if not isinstance(item, int) or isinstance(item, bool) or item < 0:
        raise TypeError
    return item


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError
    return made


def _unb64(text: bytes) -> bytes:
    data = base64url.decode(text)
    if data is None:
        raise Malformed("event.base64", "not base64url in its one encoding")
    return data


_HEADER_TEXT: Final = base64url.encode(json.dumps(HEADER, separators=(",", ":")).encode("ascii"))
