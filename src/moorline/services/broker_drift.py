"""The verifier's events as the broker acts on them (PROTOCOLS.md 8): what runs on a host that lost its verdict, ends.

1. the loss is recorded with everything live on that host, in one transaction with the cursor; from then on nothing of it is
   renewed or resumed, and its storage key is withheld;
2. its sessions are closed, each function told why;
3. its identities are revoked on the ledger (broker_revoking).

Only 1 must survive a crash: sessions end with the process, and the intention of 3 is part of 1. A verifier that cannot be
reached is no verdict: the broker waits and asks again, and meanwhile renews nothing it cannot ask about. Events take rights
away and give none, so they count by the verifier's TLS identity; results, which give, count by their signature.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog

from moorline.errors import MoorlineError, Refused
from moorline.services.broker import Broker
from moorline.services.broker_hosts import HostAuthority
from moorline.services.broker_open import superseded
from moorline.storage import broker_generations as generations
from moorline.storage import verifier_events
from moorline.storage.broker_generations import Generation

_LOG: Final = structlog.stdlib.get_logger("broker")
_WAIT_S: Final = 20
_RETRY_MIN_S: Final = 0.5
_RETRY_MAX_S: Final = 15.0
_LOOK_EVERY_S: Final = 0.5


async def keep_watching(broker: Broker) -> None:
    """Act on the verifier's events until cancelled; a provider without hosts has none."""
    if broker.hosts is None:
        await asyncio.Event().wait()
        return
    pause = _RETRY_MIN_S
    while True:
        try:
            await watch(broker, broker.hosts)
            pause = _RETRY_MIN_S
        except MoorlineError as error:
            _LOG.info("verifier's events not read", code=error.code)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)


async def watch(broker: Broker, hosts: HostAuthority, *, wait_s: int = _WAIT_S) -> None:
    """Ask once for events and act on them. Raises what the verifier answers, or Unavailable if it does not."""
    after = await asyncio.to_thread(broker.instances.cursor)
    try:
        page = await hosts.events(after=after, wait_s=wait_s)
    except MoorlineError as error:
        if error.code != "events.cursor_unknown":
            raise
        await look_around(broker, hosts)
        return
    for event in page.events:
        hosts.forget(event.host)
        if event.kind == verifier_events.LOST:
            began = time.monotonic()
            ended = await asyncio.to_thread(broker.instances.act_on_loss, event, at=broker.clock.now())
            _close(broker, ended, event.code)
            # The verifier tells whole seconds: the first figure is within one of the truth, the second is exact.
            broker.effects.update(event=float(max(0, broker.clock.now() - event.at)), broker=time.monotonic() - began)
    if page.next != after:
        await asyncio.to_thread(broker.instances.move_cursor, page.next)


async def keep_ending(broker: Broker) -> None:
    """End the sessions here that another broker process of this database ended or superseded, until cancelled."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        held = broker.open.held()
        if not held:
            continue
        try:
            ended = await asyncio.to_thread(broker.instances.ended_of, tuple(held))
            elsewhere = await asyncio.to_thread(broker.instances.held_elsewhere, held)
        except MoorlineError as error:
            _LOG.info("ended instances not read", code=error.code)
            continue
        for one in ended:
            broker.open.end(one.instance, one.generation, _why(one))
        for name in elsewhere:
            if broker.open.held().get(name) == held[name]:  # and not a newer one that came here meanwhile
                broker.open.end(*name, superseded())


def _why(one: Generation) -> Refused:
    if one.state == generations.RETIRED:
        return Refused("renewal.instance_revoked", "this generation was retired and its identity revoked", got=one.code)
    if one.state == generations.SUPERSEDED:
        return Refused("renewal.generation_behind", "a later generation of this instance was launched", got=one.generation)
    return _host_lost(one.code)


async def look_around(broker: Broker, hosts: HostAuthority) -> None:
    """The verifier's database was restored and its events say nothing to us: look at every host that is in use instead."""
    page = await hosts.events(after=0, wait_s=0)
    await asyncio.to_thread(broker.instances.forget_losses)
    for host in await asyncio.to_thread(broker.instances.hosts_in_use):
        said = await hosts.standing(host)
        code = said.refusal(host)
        if said.said and code is not None:
            found = await asyncio.to_thread(
                broker.instances.act_on_absence, host, code, cursor=page.newest, at=broker.clock.now()
            )
            _close(broker, found, code)
    # Last: a broker that dies before this finds the cursor unknown again, and looks again.
    await asyncio.to_thread(broker.instances.move_cursor, page.newest)


def _host_lost(code: str) -> Refused:
    return Refused(
        "renewal.host_not_standing",
        "the host lost its standing; the identity is revoked and not renewed",
        got=code,
        remedy="the orchestrator launches the function again on another host",
    )


def _close(broker: Broker, ended: tuple[Generation, ...], code: str) -> None:
    for one in ended:
        _LOG.warning("instance halted", instance=one.instance, generation=one.generation, host=one.host, code=code)
        broker.open.end(one.instance, one.generation, _host_lost(code))
    if ended:
        broker.revoking.set()
