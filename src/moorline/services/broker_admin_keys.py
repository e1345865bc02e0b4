"""Lives of keys and approvals of custodians at the admin socket."""

from __future__ import annotations

import asyncio
import base64
import binascii

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from moorline.clock import Instant
from moorline.errors import Malformed
from moorline.hsm.approvals import Request, digest
from moorline.hsm.calendar import due_at, waits_for_the_provider
from moorline.hsm.lifecycle import State
from moorline.services import broker_keys
from moorline.services.broker import Broker
from moorline.storage.hsm_store import KeyRow
from moorline.wire import schema


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RoleRequest(_Asked):
    """A role whose key is to be rotated."""

    role: str


class LabelRequest(_Asked):
    """A key by its label."""

    label: str


class ActivationRequest(_Asked):
    """A begun key and its certificate, PEM; none for a KEM or verifier key."""

    label: str
    certificate: str | None = None


class DestructionRequest(_Asked):
    """What is to be destroyed, and the approved request (hex); without one, one is made."""

    label: str
    request: str | None = None


class ApprovalRequest(_Asked):
    """A request (hex) and a custodian's signature, base64."""

    request: str
    signed: str


def add_routes(app: FastAPI, broker: Broker) -> None:
    """All routes about keys and approvals."""
    _key_routes(app, broker)
    _approval_routes(app, broker)


def _key_routes(app: FastAPI, broker: Broker) -> None:
    @app.get("/v1/hsm/keys")
    async def keys() -> dict[str, list[dict[str, object]]]:
        """Keys with their states and dates."""
        found = await asyncio.to_thread(broker.hsm.key_rows)
        policy = broker.settings.rotation
        return {"keys": [{**shown(row), "due": due_at(row, policy), "waits_for": _waits_for(row)} for row in found]}

    @app.post("/v1/hsm/keys/rotate")
    async def rotate(asked: RoleRequest) -> dict[str, object]:
        """Begin a new key of a role; a wrapping key is used at once, others wait for their certificate."""
        row, public = await asyncio.to_thread(broker_keys.begin, broker, asked.role)
        return {**shown(row), "public_key": base64.b64encode(public).decode("ascii")}

    @app.post("/v1/hsm/keys/activate")
    async def activate(asked: ActivationRequest) -> dict[str, object]:
        """Use a begun key from now on; the ledger must have its certificate."""
        return shown(await broker_keys.activate(broker, asked.label, asked.certificate))

    @app.post("/v1/hsm/keys/rewrap")
    async def rewrap() -> dict[str, int]:
        """Seal everything under the active wrapping key, as far as it is not."""
        done = await asyncio.to_thread(broker_keys.rewrap_now, broker)
        return {
            "sealed_again": done.sealed_again,
            "already": done.already,
            "changed": done.changed,
            "unreadable": done.unreadable,
        }

    @app.post("/v1/hsm/keys/retire")
    async def retire(asked: LabelRequest) -> dict[str, object]:
        """End the use of a retiring key."""
        return shown(await asyncio.to_thread(broker_keys.retire, broker, asked.label))

    @app.post("/v1/hsm/keys/destroy")
    async def destroy(asked: DestructionRequest) -> dict[str, object]:
        """Destroy a key that a quorum approved; without a request, make one for them to approve."""
        if asked.request is None:
            return described(await asyncio.to_thread(broker_keys.ask_to_destroy, broker, asked.label))
        return shown(await asyncio.to_thread(broker_keys.destroy, broker, asked.label, request_id(asked.request)))


def _approval_routes(app: FastAPI, broker: Broker) -> None:
    @app.get("/v1/hsm/requests")
    async def requests() -> dict[str, list[dict[str, object]]]:
        """Requests for approval, open and past, with who approved."""
        return {"requests": await asyncio.to_thread(_requests, broker)}

    @app.post("/v1/hsm/approvals")
    async def approve(asked: ApprovalRequest) -> dict[str, object]:
        """A custodian's signature for a request."""
        try:
            signed = base64.b64decode(asked.signed, validate=True)
        except binascii.Error:
            raise Malformed("broker.request_malformed", "an approval is base64") from None
        found, count = await asyncio.to_thread(broker_keys.take_approval, broker, request_id(asked.request), signed)
        needed = (await asyncio.to_thread(broker_keys.circle, broker)).quorum
        return {**described(found), "approved": count, "needed": needed}


def _requests(broker: Broker) -> list[dict[str, object]]:
    found = []
    for data, used in broker.hsm.requests():
        asked = schema.decode(Request, data)
        names = [name for name, _, _ in broker.hsm.approvals(asked.id)]
        found.append({**described(asked), "approved_by": names, "used": used, "data": base64.b64encode(data).decode()})
    return found


def request_id(text: str) -> bytes:
    """A request's id from hex. Raises Malformed("broker.request_malformed")."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Malformed("broker.request_malformed", "a request's id is hex", got=text) from None


def described(asked: Request) -> dict[str, object]:
    """A request for people."""
    return {
        "request": asked.id.hex(),
        "operation": asked.operation.value,
        "target": asked.target,
        "not_after": Instant(asked.not_after),
        "digest": digest(asked).hex(),
    }


def _waits_for(row: KeyRow) -> str:
    return "provider" if waits_for_the_provider(row) else ""


def shown(row: KeyRow) -> dict[str, object]:
    """A key for people; moments are seconds, absent ones None."""
    return {
        "label": row.label,
        "role": row.role,
        "state": State(row.state).value,
        "created": row.created,
        "active": row.active,
        "retiring": row.retiring,
        "retire_after": row.retire_after,
        "retired": row.retired,
        "destroyed": row.destroyed,
    }
