"""Tenants of the virtual HSM at the admin socket."""

from __future__ import annotations

import asyncio
import base64

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from moorline.hsm.approvals import Operation
from moorline.hsm.tenants import MOST_KEYS, MOST_OPERATIONS, MOST_UID
from moorline.services import broker_keys
from moorline.services.broker import Broker
from moorline.services.broker_admin_keys import described, request_id
from moorline.services.broker_tenants import OpenTenants, require
from moorline.storage.hsm_store import TenantRow


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NewTenantRequest(_Asked):
    """A tenant, whose processes run as user `uid`, with its share of the token and its quotas."""

    name: str
    uid: int = Field(ge=0, le=MOST_UID)
    weight: int = Field(default=1, ge=1, le=100)
    keys: int = Field(default=64, ge=1, le=MOST_KEYS)
    operations: int = Field(default=60_000, ge=1, le=MOST_OPERATIONS)


class TenantRequest(_Asked):
    """A tenant by its name."""

    name: str


class TenantDestructionRequest(_Asked):
    """A tenant, and the approved request (hex); without one, one is made."""

    name: str
    request: str | None = None


def add_routes(app: FastAPI, broker: Broker, tenants: OpenTenants | None) -> None:
    """All routes about tenants."""

    @app.get("/v1/hsm/tenants")
    async def listed() -> dict[str, list[dict[str, object]]]:
        """All tenants, also destroyed ones with the signed record of it."""
        found = await asyncio.to_thread(require(tenants).rows)
        return {"tenants": [_shown(row, tenants) for row in found]}

    @app.post("/v1/hsm/tenants")
    async def create(asked: NewTenantRequest) -> dict[str, object]:
        """A new tenant with a token of its own."""
        row = await asyncio.to_thread(
            require(tenants).create,
            asked.name,
            uid=asked.uid,
            weight=asked.weight,
            keys=asked.keys,
            operations=asked.operations,
        )
        await asyncio.to_thread(_log, broker, "tenant-created", asked.name)
        return _shown(row, tenants)

    @app.post("/v1/hsm/tenants/suspend")
    async def suspend(asked: TenantRequest) -> dict[str, str]:
        """Shut a tenant's door; its keys stay."""
        await asyncio.to_thread(require(tenants).suspend, asked.name)
        await asyncio.to_thread(_log, broker, "tenant-suspended", asked.name)
        return {"name": asked.name, "state": "suspended"}

    @app.post("/v1/hsm/tenants/resume")
    async def resume(asked: TenantRequest) -> dict[str, str]:
        """Open a suspended tenant's door again."""
        await asyncio.to_thread(require(tenants).resume, asked.name)
        await asyncio.to_thread(_log, broker, "tenant-resumed", asked.name)
        return {"name": asked.name, "state": "active"}

    @app.post("/v1/hsm/tenants/rotate")
    async def rotate(asked: TenantRequest) -> dict[str, str]:
        """A new PIN for a tenant's token."""
        await asyncio.to_thread(require(tenants).rotate, asked.name)
        await asyncio.to_thread(_log, broker, "tenant-rotated", asked.name)
        return {"name": asked.name, "state": "active"}

    @app.post("/v1/hsm/tenants/destroy")
    async def destroy(asked: TenantDestructionRequest) -> dict[str, object]:
        """Destroy a tenant that a quorum approved; without a request, make one for them to approve.

        A destruction that began and could not end goes on without another request.
        """
        virtual = require(tenants)
        began = await asyncio.to_thread(virtual.destruction_began, asked.name)  # before a request is made, or used up
        if not began:
            if asked.request is None:
                return described(await asyncio.to_thread(broker_keys.ask, broker, Operation.TENANT_DESTROY, asked.name))
            identifier = request_id(asked.request)
            await asyncio.to_thread(broker_keys.use, broker, identifier, Operation.TENANT_DESTROY, asked.name)
        proof = await asyncio.to_thread(virtual.destroy, asked.name)
        await asyncio.to_thread(_log, broker, "tenant-destroyed", asked.name)
        return {"name": asked.name, "state": "destroyed", "proof": base64.b64encode(proof).decode("ascii")}


def _shown(row: TenantRow, tenants: OpenTenants | None) -> dict[str, object]:
    return {
        "name": row.name,
        "state": row.state,
        "uid": row.uid,
        "weight": row.weight,
        "keys": row.keys,
        "operations": row.operations,
        "served": require(tenants).is_open(row.name),
        "at": row.changed,
        "socket": str(require(tenants).door_of(row.name)),
        "proof": None if row.proof is None else base64.b64encode(row.proof).decode("ascii"),
    }


def _log(broker: Broker, event: str, name: str) -> None:
    with broker.store.transaction() as c:
        broker.store.append_in(c, broker.clock.now(), event, {"tenant": name})
