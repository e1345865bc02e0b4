"""The attestation authority as the broker asks it: what it says about a host now, and which key it enrolled for it.

An Attestation Result counts by its signature, made with the verifier key in this provider's own token, and not by the
connection it came over.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass

from moorline.clock import Clock
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.policy.ear import parse_verified
from moorline.rats import AttestationResult
from moorline.wire import keys
from moorline.wire.http import ClientIdentity, HttpClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The result that stands for a host, or why none does (a code)."""

    result: AttestationResult | None
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAuthority:
    """The verifier of this provider."""

    url: str
    server_name: str
    roots_pem: bytes
    identity: Callable[[], ClientIdentity]
    key: keys.PublicKey
    audience: str
    clock: Clock

    async def standing(self, host: str) -> Standing:
        """The verified result about a host. Raises Unavailable if the verifier cannot be asked: that decides nothing."""
        try:
            answer = await self._get(f"/v1/results/{host}")
            jwt = answer.get("ear") if isinstance(answer, dict) else None
            if not isinstance(jwt, str):
                raise Malformed("broker.verifier_answer", "the attestation authority's answer has no result")
            result = parse_verified(jwt, self.key, now=self.clock.now(), audience=self.audience)
        except (Refused, Malformed, NotAuthentic) as error:
            return Standing(result=None, problem=error.code)
        return Standing(result=result, problem=None)

    async def enrolled_key(self, host: str) -> bytes:
        """TPMT_PUBLIC of the attestation key enrolled for a host. Raises what the verifier answers."""
        answer = await self._get(f"/v1/hosts/{host}/enrolment")
        try:
            assert isinstance(answer, dict)
            return base64.b64decode(answer["ak_public"], validate=True)
        except (AssertionError, KeyError, TypeError, binascii.Error):
            raise Malformed("broker.verifier_answer", "the attestation authority's answer has no key") from None

    async def _get(self, path: str) -> object:
        # A client for each question: the broker's own certificate is replaced within the hour.
        async with HttpClient(
            self.url, server_name=self.server_name, roots_pem=self.roots_pem, identity=self.identity()
        ) as client:
            return await client.get_json(path)
