"""Secure logs at the broker's HTTPS door: orchestrators and verifiers have theirs signed."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Final

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from moorline.audit import checkpoint as checkpoints
from moorline.errors import Refused
from moorline.nfv import Role
from moorline.services import broker_audit, http
from moorline.services.broker import Broker
from moorline.services.broker_audit import ShownLog

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_NODES: Final = 128


class ShownRequest(BaseModel):
    """A log as its service has it; `proof` that it continues the last checkpoint, hex (RFC 9162 2.1.4)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    log: str
    size: int = Field(gt=0, lt=1 << 62)
    root: _Digest
    head: _Digest
    proof: list[_Digest] = Field(default=[], max_length=_NODES)


def add_routes(app: FastAPI, broker: Broker) -> None:
    """For orchestrators and verifiers of the own trust domain, each for its own log."""

    @app.get("/v1/audit/checkpoint")
    async def last(request: Request) -> dict[str, object]:
        """What was last signed of the caller's log; size 0 if nothing was."""
        log = _callers_log(broker, request)
        known = await asyncio.to_thread(broker_audit.last_shown, broker, log)
        return {"log": log, "size": 0 if known is None else known.size, "root": "" if known is None else known.root.hex()}

    @app.post("/v1/audit/checkpoint")
    async def checkpoint(request: Request, asked: ShownRequest) -> dict[str, object]:
        """Sign the caller's log, if it continues what was signed of it before."""
        log = _callers_log(broker, request)
        if asked.log != log:
            raise Refused("audit.other_log", "a service has its own log signed", expected=log, got=asked.log[:80])
        shown = ShownLog(
            log=log,
            size=asked.size,
            root=bytes.fromhex(asked.root),
            head=bytes.fromhex(asked.head),
            proof=tuple(bytes.fromhex(node) for node in asked.proof),
        )
        signed = await asyncio.to_thread(broker_audit.sign_shown, broker, shown)
        return {"log": log, "size": shown.size, "checkpoint": _b64(signed)}


def _callers_log(broker: Broker, request: Request) -> str:
    caller = http.require(request, Role.ORCHESTRATOR, Role.VERIFIER, trust_domain=broker.settings.trust_domain)
    return checkpoints.log_name(caller.role.value, caller.segments[0])


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
