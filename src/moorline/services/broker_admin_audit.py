"""The broker's secure log at its admin socket: the provider anchors it and reads it for an export."""

from __future__ import annotations

import asyncio
import base64

from fastapi import FastAPI
from fastapi.responses import Response

from moorline.services import broker_audit
from moorline.services.broker import Broker
from moorline.services.service_audit import page_response


def add_routes(app: FastAPI, broker: Broker) -> None:
    """All routes about the log but `GET /v1/audit`."""

    @app.post("/v1/audit/anchor")
    async def anchor() -> dict[str, object]:
        """Anchor the log now; what an export needs: checkpoints by log, and the ledger's proof."""
        anchored = await broker_audit.anchor(broker)
        return {
            "provider": broker.settings.provider,
            "hsm": broker.settings.hsm,
            "log": broker_audit.own_log(broker),
            "ledger_id": broker.trust.ledger_id.hex(),
            "size": anchored.size,
            "height": anchored.height,
            "checkpoints": {
                log: [{"size": one.checkpoint.size, "signed": _b64(one.signed)} for one in signed]
                for log, signed in anchored.covered.items()
            },
            "bundle": _b64(anchored.bundle),
        }

    @app.get("/v1/audit/export")
    async def export(first: int = 0, size: int = 0) -> Response:
        """Entries from number `first` up to `size`, as many as one answer holds: a CBOR sequence of byte strings."""
        return await asyncio.to_thread(page_response, broker.store.audit_rows, first, size)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
