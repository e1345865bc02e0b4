"""Pair keys and news between two HSMs, in their attested session (PROTOCOLS.md 6; docs/spec/pair-key.md).

Whoever begins an epoch goes on with it until it is active, also after a crash and when the other end was away:
`keep_pairing` connects again. Both ends anchor the transcript on the ledger. A peer's news (revocations since a height,
contracts) are taken only as far as the ledger proves them.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import structlog

from moorline.channel.driver import ClientSession
from moorline.errors import Conflict, Malformed, MoorlineError, Refused
from moorline.hsm.calendar import Rotation
from moorline.hsm.exchange import Party
from moorline.hsm.pair import Ends
from moorline.ledger import records, standing
from moorline.ledger.client import Submitter
from moorline.ledger.records import AuditAnchorRecord, ContractRecord, HsmRecord
from moorline.ledger.transactions import AnchorLog, Sender, SenderKind
from moorline.services.broker import Broker
from moorline.services.broker_revocation import revocation_keys
from moorline.services.broker_role import no_such_operation
from moorline.storage.broker_pairs import News, Pair
from moorline.wire import keys, pair, schema
from moorline.wire.pair import (
    GrantsReply,
    PairConfirm,
    PairEpoch,
    PairOffer,
    PairReply,
    RevocationsCall,
    RevocationsReply,
    RevokedSerial,
)

_LOG: Final = structlog.stdlib.get_logger("broker")
_PAGE: Final = 32
_PAGES: Final = 64
_ALL_OF_A_HEIGHT: Final = "g"
"""After every serial number in hex."""
_CONTRACTS: Final = 64
_RETRY_S: Final = 5.0


def ends(broker: Broker, record: HsmRecord) -> Ends:
    """Our HSM and a peer whose ledger record is active."""
    return Ends(
        ledger_id=broker.trust.ledger_id,
        own=Party(provider=broker.settings.provider, hsm=broker.settings.hsm),
        peer=Party(provider=record.provider, hsm=record.id),
        peer_key=keys.parse_public(record.signing_public),
    )


# Responder -------------------------------------------------------------------------------------------------------------


async def answer(broker: Broker, record: HsmRecord, operation: str, body: bytes) -> bytes:
    """What a peer that was met may ask. Raises as hsm.pair."""
    both, now = ends(broker, record), broker.clock.now()
    if operation == "peer.pair_epoch":
        return schema.encode(PairEpoch(newest=await asyncio.to_thread(broker.pair_keys.newest_epoch, both)))
    if operation == "peer.pair":
        offer = schema.decode(PairOffer, body)
        return schema.encode(await asyncio.to_thread(broker.pair_keys.answer, both, offer, at=now))
    if operation == "peer.pair_confirm":
        confirm = schema.decode(PairConfirm, body)
        await asyncio.to_thread(broker.pair_keys.confirm, both, confirm, at=now)
        broker.pairing.set()
        return b""
    if operation == "peer.revocations":
        return schema.encode(await asyncio.to_thread(_revocations, broker, schema.decode(RevocationsCall, body)))
    if operation == "peer.grants":
        return schema.encode(GrantsReply(contracts=broker.settings.contracts[:_CONTRACTS]))
    raise no_such_operation(operation)


def _revocations(broker: Broker, asked: RevocationsCall) -> RevocationsReply:
    found = broker.revocations.on_ledger_since(asked.since, after=asked.after, limit=_PAGE + 1)
    told = (RevokedSerial(serial=one.serial, spiffe_id=one.spiffe_id, height=one.height or 0) for one in found[:_PAGE])
    return RevocationsReply(revoked=tuple(told), more=len(found) > _PAGE)


# Initiator -------------------------------------------------------------------------------------------------------------


async def agree(broker: Broker, record: HsmRecord, session: ClientSession, *, rotate: bool) -> None:
    """Agree on a pair key if it is due: none is active, one was left unfinished, or to rotate."""
    both = ends(broker, record)
    newest = await asyncio.to_thread(broker.pairs.newest, record.provider, record.id)
    with suppress(Refused):
        broker.pairs.active(record.provider, record.id)
        if not rotate and not (newest is not None and newest.pending):
            return
    for attempt in range(2):
        try:
            await _agreed(broker, both, session)
        except Conflict as conflict:
            if conflict.code != "pair.epoch_taken" or attempt:
                raise
            continue
        break
    broker.pairing.set()


async def _agreed(broker: Broker, both: Ends, session: ClientSession) -> None:
    theirs = schema.decode(PairEpoch, await session.call("peer.pair_epoch", b"")).newest
    # What either end anchored counts too: both may have been restored from before it, and an anchor never goes back.
    theirs = max(theirs, await _anchored_up_to(broker, both))
    now = broker.clock.now()
    row, offer = await asyncio.to_thread(broker.pair_keys.offer, both, theirs=theirs, at=now)
    try:
        reply = schema.decode(PairReply, await session.call("peer.pair", schema.encode(offer)))
    except Conflict as conflict:
        if conflict.code == "pair.epoch_taken":
            await asyncio.to_thread(broker.pair_keys.give_up, both, row)
        raise
    row, confirm = await asyncio.to_thread(broker.pair_keys.agree, both, row, reply)
    await session.call("peer.pair_confirm", schema.encode(confirm))
    await asyncio.to_thread(broker.pair_keys.activate, both, row, peer_signed=reply.statement, at=now)


async def _anchored_up_to(broker: Broker, both: Ends) -> int:
    """The highest pair epoch of these two on the ledger, by whichever of them; 0 if there is none."""
    own, peer = both.own, both.peer
    directions = ((own, peer), (peer, own))
    wanted = tuple(
        records.audit_anchor_key(one.provider, pair.anchor_name((one.provider, one.hsm), (other.provider, other.hsm)))
        for one, other in directions
    )
    state = await broker.ledger.state(wanted)
    there = (state.record(key) for key in wanted if state.has(key))
    return max((records.parse(AuditAnchorRecord, value).size for value in there), default=0)


async def ask_news(broker: Broker, record: HsmRecord, session: ClientSession) -> None:
    """Revocations since the last time, and contracts; only what the ledger proves is kept.

    Raises Refused("exchange.revocation_not_proven" | `ledger.*`).
    """
    known = await asyncio.to_thread(broker.pairs.news, record.provider, record.id)
    since, revoked = (0, 0) if known is None else (known.revoked_up_to, known.revoked)
    after = _ALL_OF_A_HEIGHT
    for _ in range(_PAGES):
        body = schema.encode(RevocationsCall(since=since, after=after))
        reply = schema.decode(RevocationsReply, await session.call("peer.revocations", body))
        await _require_revoked(broker, record, reply)
        if not reply.revoked:
            break
        revoked += len(reply.revoked)
        since, after = _next(reply.revoked[-1], since, after)
        if not reply.more:
            break
    grants = schema.decode(GrantsReply, await session.call("peer.grants", b""))
    contracts = [name for name in grants.contracts if await _between(broker, record, name)]
    news = News(
        provider=record.provider,
        hsm=record.id,
        revoked_up_to=since,
        revoked=revoked,
        contracts=",".join(contracts),
        at=broker.clock.now(),
    )
    await asyncio.to_thread(broker.pairs.keep_news, news)


def _next(last: RevokedSerial, since: int, after: str) -> tuple[int, str]:
    """Where to go on. Raises Malformed("exchange.revocations_order") for an answer that does not lead on."""
    if (last.height, last.serial) <= (since, after):
        raise Malformed("exchange.revocations_order", "the peer's revocations do not rise", expected=f"above {since}")
    return last.height, last.serial


async def _require_revoked(broker: Broker, record: HsmRecord, reply: RevocationsReply) -> None:
    wanted = [revocation_keys(one.serial, one.spiffe_id, record.provider) for one in reply.revoked]
    if not wanted:
        return
    state = await broker.ledger.state(tuple(key for keys_of_one in wanted for key in keys_of_one))
    for keys_of_one in wanted:
        if not any(state.has(key) for key in keys_of_one):
            raise Refused(
                "exchange.revocation_not_proven", "the peer calls revoked what the ledger does not", got=keys_of_one[0]
            )


async def _between(broker: Broker, record: HsmRecord, name: str) -> bool:
    """Whether the ledger has the contract, in force, between us and them."""
    contract = records.parse_name(name, "contract")
    state = await broker.ledger.state((records.contract_key(contract),))
    try:
        found = records.parse(ContractRecord, state.record(records.contract_key(contract)))
        state = await broker.ledger.state(
            standing.contract_keys(contract, provider=found.provider, service=found.service, grantee=found.grantee)
        )
        standing.active_contract(state, contract)
    except Refused:
        return False
    return {found.provider, found.grantee} == {broker.settings.provider, record.provider}


# What goes on by itself ------------------------------------------------------------------------------------------------


async def keep_pairing(broker: Broker) -> None:
    """Finish what was begun, anchor what was agreed, and begin anew what is due by calendar, until cancelled."""
    with suppress(MoorlineError):
        await asyncio.to_thread(broker.pair_keys.tidy)
    policy = broker.settings.rotation
    while True:
        broker.pairing.clear()
        anchored, finished = await _anchored(broker), await _finished(broker)
        rotated = policy is None or await _rotated(broker, policy)
        idle = None if policy is None else policy.every_s
        with suppress(TimeoutError):
            async with asyncio.timeout(idle if anchored and finished and rotated else _RETRY_S):
                await broker.pairing.wait()


async def _rotated(broker: Broker, policy: Rotation) -> bool:
    """A peer that is away is tried again: however long it was, there is one next epoch, and none is made up for."""
    from moorline.services.broker_peers import connect

    own = Party(provider=broker.settings.provider, hsm=broker.settings.hsm)
    done = True
    try:
        due = await asyncio.to_thread(broker.pair_keys.due, own, policy, broker.clock.now())
    except MoorlineError as error:
        _LOG.warning("pair keys not looked at", code=error.code)
        return False
    for peer in due:
        try:
            await connect(broker, peer.provider, peer.hsm, rotate=True)
        except MoorlineError as error:
            _LOG.warning("pair key not rotated yet", provider=peer.provider, hsm=peer.hsm, code=error.code)
            done = False
    return done


async def _finished(broker: Broker) -> bool:
    from moorline.services.broker_peers import connect

    done = True
    for one in await asyncio.to_thread(broker.pairs.pending):
        try:
            await connect(broker, one.provider, one.hsm)
        except MoorlineError as error:
            _LOG.warning("pair key not agreed yet", provider=one.provider, hsm=one.hsm, code=error.code)
            done = False
    return done


async def _anchored(broker: Broker) -> bool:
    done = True
    for one in await asyncio.to_thread(broker.pairs.not_anchored):
        try:
            await _anchor(broker, one)
        except MoorlineError as error:
            _LOG.warning("pair transcript not anchored yet", provider=one.provider, hsm=one.hsm, code=error.code)
            done = False
    return done


async def _anchor(broker: Broker, one: Pair) -> None:
    own = (broker.settings.provider, broker.settings.hsm)
    submitter = Submitter(
        broker.ledger_client,
        sender=Sender(kind=SenderKind.HSM, name="/".join(own)),
        signer=broker.identity.signer,
        ledger_id=broker.trust.ledger_id,
    )
    assert one.transcript is not None
    name = pair.anchor_name(own, (one.provider, one.hsm))
    receipt = await submitter.send(AnchorLog(log=name, size=one.epoch, root=one.transcript))
    await asyncio.to_thread(broker.pairs.anchored, one, height=receipt.height, at=broker.clock.now())
