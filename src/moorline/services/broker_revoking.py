"""Revocations on the ledger, by the HSM key: intended in the store first, tried until the ledger has them.

1. the signed transaction is kept before it is submitted: submitted again, it gives the same receipt and not a second effect
2. it is submitted; a ledger that has the revocation already is as good
3. the ledger's proof of it is what counts, and its height is kept
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

import structlog

from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import records, transactions
from moorline.ledger.client import VALID_FOR_BLOCKS
from moorline.ledger.records import RevocationKind
from moorline.ledger.transactions import Revoke, Sender, SenderKind
from moorline.services.broker import Broker
from moorline.storage.broker_instances import Revocation
from moorline.storage.broker_revocations import Revoked

_LOG: Final = structlog.stdlib.get_logger("broker")
_AT_ONCE: Final = 32
_RETRY_MIN_S: Final = 0.25
_RETRY_MAX_S: Final = 15.0


async def keep_revoking(broker: Broker) -> None:
    """Make every intended revocation until cancelled. Many at a time: with a host falls all that runs on it."""
    pause = _RETRY_MIN_S
    while True:
        broker.revoking.clear()
        instances = await asyncio.to_thread(broker.instances.pending)
        certificates = await asyncio.to_thread(broker.revocations.pending)
        works = [(one.id, partial(revoke, broker, one)) for one in instances]
        works += [(one.serial, partial(revoke_certificate, broker, one)) for one in certificates]
        turn = asyncio.Semaphore(_AT_ONCE)
        done = all(await asyncio.gather(*(_made(turn, name, work) for name, work in works)))
        pause = _RETRY_MIN_S if done else min(2 * pause, _RETRY_MAX_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if done else pause):
                await broker.revoking.wait()


async def _made(turn: asyncio.Semaphore, name: str, work: Callable[[], Awaitable[None]]) -> bool:
    """Whether it was made; what was not is tried again."""
    async with turn:
        try:
            await work()
        except MoorlineError as error:
            _LOG.warning("revocation not made yet", id=name, code=error.code)
            return False
    return True


async def revoke(broker: Broker, one: Revocation) -> None:
    """Make one revocation. Raises what the ledger says, and Unavailable if the proof is not there yet."""

    def keep(data: bytes | None) -> None:
        broker.instances.sign_revocation(one.id, data)

    height = await _revoked(broker, RevocationKind.INSTANCE, one.id, one.data, keep)
    await asyncio.to_thread(broker.instances.revoked, one, height=height, at=broker.clock.now())
    _tell(broker)


async def revoke_certificate(broker: Broker, one: Revoked) -> None:
    """Tell the ledger of a certificate that this broker revoked. Raises as `revoke`."""

    def keep(data: bytes | None) -> None:
        broker.revocations.sign(one.serial, data)

    height = await _revoked(broker, RevocationKind.CERTIFICATE, one.serial, one.data, keep)
    await asyncio.to_thread(broker.revocations.committed, one.serial, height=height, at=broker.clock.now())


async def _revoked(
    broker: Broker, kind: RevocationKind, name: str, data: bytes | None, keep: Callable[[bytes | None], None]
) -> int:
    """The height at which the ledger shows the revocation. Numbers are those of the module's docstring."""
    if data is None:
        data = await _signed(broker, kind, name)
        await asyncio.to_thread(keep, data)  # 1
    try:
        await broker.ledger_client.submit(data)  # 2
    except Unavailable:
        raise  # it may have arrived: the same transaction is submitted again
    except MoorlineError as error:
        if error.code != "ledger.already_revoked":
            await asyncio.to_thread(keep, None)  # it can be no more; make another
            raise
    key = records.revocation_key(kind, broker.settings.provider, name)
    state = await broker.ledger.state((key,))
    try:
        state.record(key)  # 3
    except MoorlineError as error:
        raise Unavailable("revocation.not_seen", "the ledger does not show the revocation yet", got=error.code) from None
    return state.height


def _tell(broker: Broker) -> None:
    """Whoever waits for a revocation looks again."""
    broker.revoked.set()
    broker.revoked.clear()


async def _signed(broker: Broker, kind: RevocationKind, name: str) -> bytes:
    height = (await broker.ledger_client.checkpoint()).height
    payload = transactions.make(
        Revoke(kind=kind, id=name),
        sender=Sender(kind=SenderKind.HSM, name=f"{broker.settings.provider}/{broker.settings.hsm}"),
        ledger_id=broker.trust.ledger_id,
        nonce=secrets.token_bytes(32),
        valid_until=height + VALID_FOR_BLOCKS,
    )
    return await asyncio.to_thread(transactions.sign, payload, broker.identity.signer)
