"""`POST /v1/instances/{instance}/retire`: the orchestrator, or an operator, ends one generation of an instance for good.

1. its keys are destroyed in the store, in one transaction with the intention to revoke it, and erased from the files
2. its session is closed, the function told why
3. its identity is revoked on the ledger; the answer waits for that, and asking again is safe

What it does NOT establish stands in the answer under `not_proven`: the enclave keeps its copy of the storage key in memory
until it stops, and copies of the database made before hold the wrapped key, which this HSM's token could still unwrap.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from moorline.errors import Malformed, Refused, Unavailable
from moorline.nfv import Role, parse_name
from moorline.services import http
from moorline.services.broker import Broker
from moorline.storage.broker_instances import Revocation
from moorline.wire.launch import identity_name, require_instance_name

NOT_PROVEN: Final = ("enclave-memory", "database-copies")
_LEDGER_WAIT_S: Final = 10.0
_GENERATION_MAX: Final = 1 << 31
_REASON_CHARS: Final = 256


class RetireRequest(BaseModel):
    """Which generation, and why; the reason goes into the audit log."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    generation: int = Field(ge=1, lt=_GENERATION_MAX)
    reason: str = Field(min_length=1, max_length=_REASON_CHARS)


def add_routes(app: FastAPI, broker: Broker) -> None:
    """Retirement on the broker's HTTPS door."""

    @app.post("/v1/instances/{instance}/retire")
    async def retire_instance(request: Request, instance: str, asked: RetireRequest) -> dict[str, object]:
        """For orchestrators and operators of the own trust domain; repeatable."""
        caller = http.require(request, Role.ORCHESTRATOR, Role.OPERATOR, trust_domain=broker.settings.trust_domain)
        if not asked.reason.isprintable():
            raise Malformed("retire.request", "the reason is not printable text")
        return await retire(broker, instance, asked.generation, by=str(caller), reason=asked.reason)


async def retire(broker: Broker, instance: str, generation: int, *, by: str, reason: str) -> dict[str, object]:
    """Numbers are those of the module's docstring. Raises Unavailable("retire.revocation_pending") while 3 is under way."""
    require_instance_name(parse_name(instance, "instance"))
    identity = parse_name(identity_name(instance, generation), "instance")
    known = await asyncio.to_thread(
        broker.instances.retire, instance, generation, by=by, reason=reason, at=broker.clock.now()
    )
    erased = await asyncio.to_thread(broker.instances.erase)  # 1
    gone = Refused("renewal.instance_revoked", "this generation was retired and its identity revoked", got=reason)
    broker.open.end(instance, generation, gone)  # 2
    broker.revoking.set()
    revoked = await _revoked(broker, identity)  # 3
    destroyed = [what for what in known.destroyed.split(",") if what]
    not_proven = [*NOT_PROVEN, *(() if erased else ("write-ahead-log",))] if destroyed else []
    return {
        "instance": instance,
        "generation": generation,
        "destroyed": destroyed,
        "not_proven": not_proven,
        "revoked_at_height": revoked.height,
    }


async def _revoked(broker: Broker, identity: str) -> Revocation:
    loop = asyncio.get_running_loop()
    until = loop.time() + _LEDGER_WAIT_S
    while True:
        waiting = broker.revoked  # asked before the look, so that what comes after it wakes this
        turn = asyncio.ensure_future(waiting.wait())
        try:
            found = await asyncio.to_thread(broker.instances.revocation, identity)
            if found is not None and found.height is not None:
                return found
            if loop.time() >= until:
                raise Unavailable(
                    "retire.revocation_pending",
                    "the keys are destroyed; the ledger does not have the revocation yet",
                    remedy="ask again: the broker goes on by itself",
                    retry_after_s=2,
                )
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await asyncio.shield(turn)
        finally:
            turn.cancel()
