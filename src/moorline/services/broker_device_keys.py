"""Keys for devices and functions that talk without forward secrecy (PROTOCOLS.md 7), each from its own HSM.

Both HSMs ask the same questions of the ledger, and come to the same answers:

1. the contract is in force between the function's provider and the device's, about this service, and names the profile;
2. the service is registered with the profile;
3. the device is of the grantee's trust domain and not revoked; the other HSM is active;
4. the contract's conditions permit this device now.

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
from moorline.hsm.authorisation import AccessFacts, decide_access
from moorline.hsm.exchange import Party
from moorline.ledger import records, standing
from moorline.ledger.light_client import ProvenState
from moorline.ledger.records import ContractRecord, RevocationKind
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.services import http
from moorline.services.broker import Broker
from moorline.services.broker_role import require_not_revoked, revocable_keys
from moorline.storage.broker_pairs import Claim
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
    await asyncio.to_thread(broker.pairs.claim, claim)
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
        caller = http.require(request, Role.DEVICE, trust_domain=broker.settings.trust_domain)
        serial = f"{http.peer_certificate(request).serial_number:x}"
        _, revoked = await asyncio.to_thread(broker.revocations.find, serial)
        if revoked is not None:
            raise Refused("est.certificate_revoked", "the certificate shown was revoked", got=serial)
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
        peer=f"{wish.function.provider}/{wish.function.hsm}",
        contract=wish.contract,
        key_id=made.key_id,
        at=Instant(now),
    )
    return sealed


async def _require_allowed(broker: Broker, wish: _Wish) -> bytes:
    """The four questions of the module's docstring; a bundle that proves the contract."""
    key = records.contract_key(wish.contract)
    state = await broker.ledger.state((key,))
    named = records.parse(ContractRecord, state.record(key))
    _require_about(named, wish)
    grantee = named.grantee
    revocable = ((RevocationKind.DEVICE, grantee, wish.device.segments[0]),)
    contract_keys = standing.contract_keys(
        wish.contract, provider=wish.function.provider, service=wish.service, grantee=grantee
    )
    other = wish.function if wish.home.provider == broker.settings.provider else wish.home
    bundle, state = await broker.ledger.proven(
        (*contract_keys, *standing.hsm_keys(other.provider, other.hsm), *revocable_keys(revocable))
    )
    contract = _contract(state, wish)  # 1
    service = standing.active_service(state, wish.function.provider, wish.service)
    if PROFILE not in service.profiles:  # 2
        raise Refused("nopfs.not_allowed", "the service is not registered with this profile", got=wish.service)
    owner = standing.active_provider(state, grantee)
    if wish.device.role is not Role.DEVICE or owner.trust_domain != wish.device.trust_domain:  # 3
        raise Refused("access.not_granted", "the contract grants nothing to this caller", got=str(wish.device))
    require_not_revoked(state, revocable)
    standing.active_hsm(state, other.provider, other.hsm)
    facts = AccessFacts(
        device=str(wish.device),
        device_provider=grantee,
        device_trust_domain=wish.device.trust_domain,
        device_name=wish.device.segments[0],
        provider=wish.function.provider,
        service=wish.service,
        use_case=service.use_case,
        profiles=service.profiles,
        contract=wish.contract,
        profile=PROFILE,
        now=broker.clock.now(),
    )
    decision = decide_access(contract.conditions, facts)  # 4
    if not decision.allowed:
        raise Refused("access.not_granted", "the contract's conditions do not permit this device", got=decision.rule)
    return bundle


def _contract(state: ProvenState, wish: _Wish) -> ContractRecord:
    contract = standing.active_contract(state, wish.contract)
    _require_about(contract, wish)
    if PROFILE not in contract.profiles:
        raise Refused(
            "nopfs.not_allowed",
            "the contract does not allow this profile",
            expected=PROFILE,
            got=", ".join(contract.profiles),
            remedy="agree on a contract with --profile no-pfs, or connect with TLS",
        )
    return contract


def _require_about(contract: ContractRecord, wish: _Wish) -> None:
    found = (contract.provider, contract.service, contract.grantee)
    if found != (wish.function.provider, wish.service, wish.home.provider):
        raise Refused("access.other_contract", "the contract is about something else", got="/".join(found))


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
