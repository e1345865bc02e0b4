"""Keys for devices and functions that talk without forward secrecy (PROTOCOLS.md 7), each from its own HSM.

Both HSMs ask the same questions of the ledger, and come to the same answers: those of services.contract_decision, and
whether the other HSM is active.

Then K of each direction is a MAC in the token under the pair key. The function's broker claims the key for one instance, for
good, before it gives it away; the device's home HSM logs that it sealed one. Keys end after `max_age`: a device that is
revoked, or a contract that is withdrawn, is noticed at the next key.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import Response

from moorline.channel.session import seal_to
from moorline.clock import Instant
from moorline.errors import Refused
from moorline.hsm.exchange import Party
from moorline.ledger import standing
from moorline.nfv import SpiffeId, parse_name
from moorline.services import contract_decision
from moorline.services.broker import Broker
from moorline.services.broker_access import require_own_device
from moorline.services.contract_decision import Wish
from moorline.storage.broker_pairs import Claim, PairUse
from moorline.wire import schema
from moorline.wire.http import CBOR_TYPE
from moorline.wire.launch import LaunchFields
from moorline.wire.nopfs import (
    PROFILE,
    DeviceKeyRequest,
    DeviceKeys,
    Direction,
    FunctionKeyCall,
    FunctionKeyReply,
    KeyContext,
    sealing_info,
)

COUNT: Final = 1 << 16
"""Records a key is good for in each direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """A device, a function, and the contract it goes by, as one of the two HSMs was asked."""

    device: SpiffeId
    home: Party
    function: Party
    service: str
    contract: str


async def for_function(broker: Broker, fields: LaunchFields, body: bytes) -> bytes:
    """Operation "device.key": keys for one instance, once. Raises Refused (`nopfs.*`, `ledger.*`, "pair.none"), Conflict."""
    asked = schema.decode(FunctionKeyCall, body)
    if asked.service != fields.service:
        raise Refused("broker.other_service", "a function asks for its own service only", got=asked.service)
    wish = _Wish(
        device=SpiffeId.parse(asked.device),
        home=Party(provider=parse_name(asked.home_provider, "provider"), hsm=parse_name(asked.home_hsm, "HSM")),
        function=Party(provider=broker.settings.provider, hsm=broker.settings.hsm),
        service=asked.service,
        contract=parse_name(asked.contract, "contract"),
    )
    bundle = await _require_allowed(broker, wish)
    now = broker.clock.now()
    epoch = (await asyncio.to_thread(broker.pairs.active, wish.home.provider, wish.home.hsm)).epoch
    context = _context(broker, wish, epoch, asked.device_nonce, asked.function_nonce)
    claim = Claim(
        key_id=context.key_id(),
        instance=fields.instance,
        generation=fields.generation,
        device=asked.device,
        contract=wish.contract,
        first=0,
        count=COUNT,
        at=now,
    )
    of = PairUse(provider=wish.home.provider, hsm=wish.home.hsm, epoch=epoch)
    await asyncio.to_thread(broker.pairs.claim, claim, of=of)
    keys = await asyncio.to_thread(_keys, broker, wish.home, context)
    return schema.encode(
        FunctionKeyReply(
            pair_epoch=epoch,
            key_id=context.key_id(),
            to_function=keys[Direction.TO_FUNCTION],
            to_device=keys[Direction.TO_DEVICE],
            count=COUNT,
            not_after=now + broker.trust.max_age_s,
            bundle=bundle,
        )
    )


def add_routes(app: FastAPI, broker: Broker) -> None:
    """The home HSM's side, on the broker's HTTPS door."""

    @app.post("/v1/device-keys")
    async def device_keys(request: Request) -> Response:
        """A device of this provider only: its keys for a function of another, sealed to the KEM key it sends."""
        caller = await require_own_device(broker, request)
        return Response(await for_device(broker, caller, await request.body()), media_type=CBOR_TYPE)


async def for_device(broker: Broker, device: SpiffeId, body: bytes) -> bytes:
    """The keys of a device that TLS authenticated, sealed. Raises as `for_function`."""
    asked = schema.decode(DeviceKeyRequest, body)
    wish = _Wish(
        device=device,
        home=Party(provider=broker.settings.provider, hsm=broker.settings.hsm),
        function=Party(provider=parse_name(asked.function_provider, "provider"), hsm=parse_name(asked.function_hsm, "HSM")),
        service=parse_name(asked.service, "service"),
        contract=parse_name(asked.contract, "contract"),
    )
    await _require_allowed(broker, wish)
    context = _context(broker, wish, asked.pair_epoch, asked.device_nonce, asked.function_nonce)
    keys = await asyncio.to_thread(_keys, broker, wish.function, context)
    now = broker.clock.now()
    made = DeviceKeys(
        key_id=context.key_id(),
        to_function=keys[Direction.TO_FUNCTION],
        to_device=keys[Direction.TO_DEVICE],
        count=COUNT,
        not_after=now + broker.trust.max_age_s,
    )
    sealed = seal_to(asked.kem_public, schema.encode(made), info=sealing_info(body))
    await asyncio.to_thread(
        broker.pairs.sealed_for_device,
        device=str(device),
        of=PairUse(provider=wish.function.provider, hsm=wish.function.hsm, epoch=asked.pair_epoch),
        contract=wish.contract,
        key_id=made.key_id,
        at=Instant(now),
    )
    return sealed


async def _require_allowed(broker: Broker, wish: _Wish) -> bytes:
    """The questions of the module's docstring; a bundle that proves the contract."""
    asked = Wish(
        device=wish.device,
        device_provider=wish.home.provider,
        function_provider=wish.function.provider,
        service=wish.service,
        contract=wish.contract,
        profile=PROFILE,
        post_quantum=False,
    )
    other = wish.function if wish.home.provider == broker.settings.provider else wish.home
    bundle, state = await broker.ledger.proven(
        (*contract_decision.wanted_keys(asked), *standing.hsm_keys(other.provider, other.hsm))
    )
    decision = contract_decision.decided(state, asked, now=broker.clock.now())
    standing.active_hsm(state, other.provider, other.hsm)
    if not decision.allowed:
        raise Refused("access.not_granted", "the contract's conditions do not permit this device", got=decision.rule)
    return bundle


def _context(broker: Broker, wish: _Wish, epoch: int, device_nonce: bytes, function_nonce: bytes) -> KeyContext:
    return KeyContext(
        ledger_id=broker.trust.ledger_id,
        device_provider=wish.home.provider,
        device_hsm=wish.home.hsm,
        function_provider=wish.function.provider,
        function_hsm=wish.function.hsm,
        pair_epoch=epoch,
        device=str(wish.device),
        service=wish.service,
        device_nonce=device_nonce,
        function_nonce=function_nonce,
    )


def _keys(broker: Broker, peer: Party, context: KeyContext) -> dict[Direction, bytes]:
    """Both keys. Raises Refused("pair.none") if the pair epoch is not active here."""
    return {direction: broker.pair_keys.mac(peer, context.pair_epoch, context.message(direction)) for direction in Direction}
