"""Signatures of the verifier key, which stays in the token, for the provider's attestation authority and nobody else.

The key signs Attestation Results (EAR) and security events: JWS signing inputs with one of those two headers. Whatever else
is asked for is refused, so that a signature of this key never serves another purpose.
"""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Final

from fastapi import FastAPI, Request

from moorline.errors import Refused
from moorline.nfv import Role
from moorline.services import http
from moorline.services.broker import Broker
from moorline.wire import base64url, security_event

MOST: Final = 128
_HEADERS: Final = ({"alg": "ES256", "typ": "JWT"}, security_event.HEADER)
_CAP: Final = 96 * 1024


def add_routes(app: FastAPI, broker: Broker) -> None:
    """`POST /v1/sign`."""

    @app.post("/v1/sign")
    async def sign(request: Request) -> dict[str, list[str]]:
        """The attestation authority only: signatures of the verifier key over JWS signing inputs, 128 at most."""
        caller = http.require(request, Role.VERIFIER, trust_domain=broker.settings.trust_domain)
        if caller.segments != (broker.settings.verifier,):
            raise Refused("http.not_authorised", "this verifier is not the one of this broker", got=str(caller))
        messages = _signing_inputs(await request.body())
        made = await asyncio.to_thread(lambda: [broker.verifier.signer.sign(message) for message in messages])
        return {"signatures": [base64.b64encode(signature).decode("ascii") for signature in made]}


def _signing_inputs(body: bytes) -> list[bytes]:
    try:
        asked = json.loads(body)
        if set(asked) != {"key", "messages"} or asked["key"] != "verifier" or not 0 < len(asked["messages"]) <= MOST:
            raise _not_signed()
        return [_signing_input(text) for text in asked["messages"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _not_signed() from None


def _signing_input(text: str) -> bytes:
    message = base64.b64decode(text, validate=True)
    header, _, payload = message.partition(b".")
    named, claims = base64url.decode(header), base64url.decode(payload)
    if (
        len(message) > _CAP
        or named is None
        or claims is None
        or json.loads(named) not in _HEADERS
        or not isinstance(json.loads(claims), dict)
    ):
        raise _not_signed()
    return message


def _not_signed() -> Refused:
    return Refused(
        "broker.sign_refused",
        "the verifier key signs Attestation Results and security events, and nothing else",
        expected='{"key": "verifier", "messages": [base64 of a JWS signing input, ES256; 128 at most]}',
    )
