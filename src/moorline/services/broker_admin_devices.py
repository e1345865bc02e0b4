"""The provider's own door, devices: revoke a certificate, and see how far revocations are."""

from __future__ import annotations

import asyncio

from cryptography import x509
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from moorline.errors import Malformed
from moorline.services.broker import Broker
from moorline.services.broker_revocation import Lists

_REASONS = ("unspecified", "key_compromise", "affiliation_changed", "superseded", "cessation_of_operation")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RevokeRequest(_Request):
    """A certificate by serial number in hex, and why: a name of RFC 5280 5.3.1, words joined by _."""

    serial: str = Field(min_length=1, max_length=40)
    reason: str = "unspecified"


def add_routes(app: FastAPI, broker: Broker, lists: Lists) -> None:
    """Revocation on the admin socket."""

    @app.post("/v1/certificates/revoke")
    async def revoke(asked: RevokeRequest) -> dict[str, object]:
        """Revoke a certificate of this broker: at once in CRL and OCSP, and on the ledger."""
        if asked.reason not in _REASONS:
            raise Malformed("revocation.reason", "no such reason", expected=", ".join(_REASONS), got=asked.reason)
        reason = x509.ReasonFlags[asked.reason].name
        serial = asked.serial.lower().lstrip("0")
        await asyncio.to_thread(broker.revocations.revoke, serial, reason=reason, at=broker.clock.now())
        broker.revoking.set()
        return {"serial": serial, **await asyncio.to_thread(lists.facts)}

    @app.get("/v1/revocation")
    async def facts() -> dict[str, object]:
        """How far revocations are, and the bound within which one is seen everywhere."""
        return await asyncio.to_thread(lists.facts)
