"""What this HSM says about connections of devices: for its own devices as their home, for its own functions as theirs.

Both HSMs decide by the same questions (services.contract_decision) and sign what they decided (wire.access), a no as well as
a yes. The function's HSM decides with the home's statement before it: either no is a no. Each log gets both decisions:

- the function's, when it answers `device.authorise`: the home's statement came with the question;
- the home's, when the device brings its statement back together with the function's (`POST /v1/access/answers`).

A connection is judged again every max_age; the log holds each decision once, and again when it changes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI, Request
from fastapi.responses import Response

from moorline.errors import NotAuthentic, Refused
from moorline.ledger import access
from moorline.ledger.access import Expected
from moorline.ledger.light_client import ProvenState
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.services import contract_decision, http
from moorline.services.broker_callers import require_recorded
from moorline.services.contract_decision import Wish
from moorline.wire import schema
from moorline.wire.access import (
    PROFILE_TLS,
    RULE_CAP,
    AccessAnswer,
    AccessQuestion,
    AccessStatement,
    Connection,
    Side,
    parse_statement,
    sign_statement,
    statement_digest,
)
from moorline.wire.http import CBOR_TYPE
from moorline.wire.launch import LaunchFields, identity_name
from moorline.wire.session import AuthoriseDeviceCall, AuthoriseDeviceReply

if TYPE_CHECKING:
    from moorline.services.broker import Broker

_REMEMBERED: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """A decision of this HSM, before it is signed."""

    allowed: bool
    rule: str


class AccessLog:
    """Which decisions stand in the secure log already: the newest so many, of this process. Owned by one event loop."""

    def __init__(self) -> None:
        self._logged: OrderedDict[tuple[Side, str, bytes], tuple[bool, str]] = OrderedDict()

    def news(self, logged_by: Side, found: AccessStatement) -> bool:
        """Whether the log has not got this decision about this connection, and has it from now on."""
        key = (logged_by, f"{found.side}", found.connection.binding)
        said = (found.allowed, found.rule)
        known = self._logged.get(key) == said
        self._logged[key] = said
        self._logged.move_to_end(key)
        while len(self._logged) > _REMEMBERED:
            self._logged.popitem(last=False)
        return not known


# The function's HSM ----------------------------------------------------------------------------------------------------


async def authorise_device(broker: Broker, fields: LaunchFields, asked: AuthoriseDeviceCall) -> AuthoriseDeviceReply:
    """A decision with the home's before it; a "no" is an answer, not an error.

    That the device holds the key of its certificate, and that the connection is as it says, is for the function to know: it
    ended the TLS connection. Raises Refused("broker.other_service"), and what the home's statement is refused for:
    Malformed, NotAuthentic, Refused (`access.*`, `ledger.*`).
    """
    connection = asked.connection
    _require_own_function(broker, fields, connection)
    wish = _wish(connection)
    keys = (*contract_decision.wanted_keys(wish), *access.statement_keys(asked.home))
    bundle, state = await broker.ledger.proven(keys)
    expected = Expected(side=Side.HOME, connection=connection, max_age_s=broker.trust.max_age_s)
    home = access.require_about(state, asked.home, expected, now=broker.clock.now())
    own = _decided(broker, state, wish)
    made, signed = await _signed(broker, Side.FUNCTION, connection, own, answers=asked.home)
    await _logged(broker, Side.FUNCTION, home, asked.home)
    await _logged(broker, Side.FUNCTION, made, signed)
    refusing = next((one for one in (home, made) if not one.allowed), None)
    return AuthoriseDeviceReply(
        allowed=refusing is None,
        refused_by="" if refusing is None else refusing.side.value,
        rule=made.rule if refusing is None else refusing.rule,
        statement=signed,
        bundle=bundle,
    )


def _require_own_function(broker: Broker, fields: LaunchFields, connection: Connection) -> None:
    name = SpiffeId(
        trust_domain=broker.settings.trust_domain,
        role=Role.SERVICE,
        segments=(fields.service, identity_name(fields.instance, fields.generation)),
    )
    said = (connection.function, connection.function_provider, connection.service, connection.profile)
    if said != (str(name), broker.settings.provider, fields.service, PROFILE_TLS):
        raise Refused("broker.other_service", "a function asks for itself only", expected=str(name), got=connection.function)


# The home HSM ----------------------------------------------------------------------------------------------------------


def add_routes(app: FastAPI, broker: Broker) -> None:
    """The home HSM's side, on the broker's HTTPS door, for devices of this provider."""

    @app.post("/v1/access")
    async def say(request: Request) -> Response:
        """May this device of ours use this connection? The signed answer, yes or no (wire.access)."""
        device = await require_own_device(broker, request)
        asked = schema.decode(AccessQuestion, await request.body())
        return Response(await for_device(broker, device, asked), media_type=CBOR_TYPE)

    @app.post("/v1/access/answers")
    async def answered(request: Request) -> Response:
        """What the function's HSM said to our statement, for our log."""
        device = await require_own_device(broker, request)
        await take_answer(broker, device, schema.decode(AccessAnswer, await request.body()))
        return Response(b"", media_type=CBOR_TYPE)


async def require_own_device(broker: Broker, request: Request) -> SpiffeId:
    """A device of this provider whose certificate was recorded and not revoked here. Raises Refused."""
    caller = http.require(request, Role.DEVICE, trust_domain=broker.settings.trust_domain)
    await asyncio.to_thread(require_recorded, broker, http.peer_der(request) or b"")
    return caller


async def for_device(broker: Broker, device: SpiffeId, asked: AccessQuestion) -> bytes:
    """Our statement about a connection of a device that TLS authenticated here."""
    connection = asked.connection
    _require_own_device_named(broker, device, connection)
    wish = _wish(connection)
    _, state = await broker.ledger.proven(contract_decision.wanted_keys(wish))
    made, signed = await _signed(broker, Side.HOME, connection, _decided(broker, state, wish), answers=None)
    await _logged(broker, Side.HOME, made, signed)
    return signed


async def take_answer(broker: Broker, device: SpiffeId, answer: AccessAnswer) -> None:
    """Log what the function's HSM said. Raises unless it is that HSM's word, and answers a statement of ours."""
    home = parse_statement(answer.home)
    _require_own_device_named(broker, device, home.connection)
    _, state = await broker.ledger.proven((*access.statement_keys(answer.home), *access.statement_keys(answer.function)))
    now, age = broker.clock.now(), broker.trust.max_age_s
    access.require_about(state, answer.home, Expected(side=Side.HOME, connection=home.connection, max_age_s=age), now=now)
    expected = Expected(side=Side.FUNCTION, connection=home.connection, max_age_s=age, answers=answer.home)
    await _logged(broker, Side.HOME, access.require_about(state, answer.function, expected, now=now), answer.function)


def _require_own_device_named(broker: Broker, device: SpiffeId, connection: Connection) -> None:
    if (connection.device, connection.device_provider) != (str(device), broker.settings.provider):
        raise NotAuthentic(
            "access.other_device",
            "a device asks for itself only",
            expected=str(device),
            got=f"{connection.device} of {connection.device_provider}",
        )


# Both ------------------------------------------------------------------------------------------------------------------


def _wish(connection: Connection) -> Wish:
    return Wish(
        device=SpiffeId.parse(connection.device),
        device_provider=parse_name(connection.device_provider, "provider"),
        function_provider=parse_name(connection.function_provider, "provider"),
        service=parse_name(connection.service, "service"),
        contract=parse_name(connection.contract, "contract"),
        profile=connection.profile,
        post_quantum=connection.post_quantum,
    )


def _decided(broker: Broker, state: ProvenState, wish: Wish) -> _Said:
    try:
        found = contract_decision.decided(state, wish, now=broker.clock.now())
    except Refused as refusal:
        return _Said(allowed=False, rule=refusal.code)
    return _Said(allowed=found.allowed, rule=found.rule[:RULE_CAP])


async def _signed(
    broker: Broker, side: Side, connection: Connection, said: _Said, *, answers: bytes | None
) -> tuple[AccessStatement, bytes]:
    now = broker.clock.now()
    made = AccessStatement(
        ledger_id=broker.trust.ledger_id,
        side=side,
        provider=broker.settings.provider,
        hsm=broker.settings.hsm,
        connection=connection,
        allowed=said.allowed,
        rule=said.rule,
        issued=now,
        not_after=now + broker.trust.max_age_s,
        answers=b"" if answers is None else statement_digest(answers),
    )
    return made, await asyncio.to_thread(sign_statement, made, broker.identity.signer)


async def _logged(broker: Broker, logged_by: Side, found: AccessStatement, signed: bytes) -> None:
    if not broker.access_log.news(logged_by, found):
        return
    connection = found.connection
    entry: dict[str, object] = {
        "device": connection.device,
        "decided_by": f"{found.side} {found.provider}/{found.hsm}",
        "allowed": found.allowed,
        "rule": found.rule,
        "function": connection.function,
        "contract": connection.contract,
        "profile": connection.profile,
        "post_quantum": connection.post_quantum,
        "binding": connection.binding,
        "statement": statement_digest(signed),
    }
    await asyncio.to_thread(broker.store.append, "access-decided", entry, at=broker.clock.now())
