"""Fresh keys for running functions, several made together (broker_batches): one transaction, one wait for the disk.

In a batch each stands for itself: one that is refused takes nothing along. Of each,

1. the key is taken from the pool, gone from the database before, and certified;
2. that the generation lives is judged in the transaction that records certificate and audit entry;
3. key and certificate leave after that. A key of somebody who ended meanwhile is lost, as one of a broker that died is: the
session of such a one is closed within half a second, so that nobody empties a pool by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moorline.clock import Instant
from moorline.errors import MoorlineError, Refused
from moorline.nfv import SpiffeId
from moorline.services.broker import Broker
from moorline.services.broker_role import activation, issued
from moorline.storage.broker_instances import Renewal
from moorline.wire.session import KeyKind, RekeyReply


@dataclass(frozen=True, slots=True, kw_only=True)
class Rekey:
    """One function's wish, already found renewable by ledger, host and policy."""

    instance: str
    generation: int
    service: str
    spiffe_id: SpiffeId
    kind: KeyKind


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    rekey: Rekey
    private_key: bytes
    renewal: Renewal


def rekeyed(broker: Broker, wanted: Sequence[Rekey]) -> list[RekeyReply | Exception]:
    """What each gets, in order. Numbers are those of the module's docstring. Raises what the database raises."""
    now = broker.clock.now()
    made = [_made(broker, one, now) for one in wanted]  # 1
    recorded = iter(
        broker.instances.renew_all([one.renewal for one in made if isinstance(one, _Made)], kind="function-renewed", at=now)
    )  # 2
    broker.refill.set()
    return [_reply(broker, one, next(recorded)) if isinstance(one, _Made) else one for one in made]  # 3


def _made(broker: Broker, wanted: Rekey, now: Instant) -> _Made | MoorlineError:
    try:
        public, private_key = broker.pool.take(wanted.service, wanted.kind, now)
        leaf = broker.ca.issue(public, wanted.spiffe_id, now)
        certificate = issued(leaf, wanted.spiffe_id, public)
    except MoorlineError as error:
        return error
    renewal = Renewal(instance=wanted.instance, generation=wanted.generation, issued=certificate)
    return _Made(rekey=wanted, private_key=private_key, renewal=renewal)


def _reply(broker: Broker, made: _Made, refused: Refused | None) -> RekeyReply | Refused:
    if refused is not None:
        return refused
    der, name = made.renewal.issued.der, str(made.rekey.spiffe_id)
    return RekeyReply(private_key=made.private_key, activation=activation(broker, der, name))
