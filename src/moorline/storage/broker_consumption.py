"""Launches that ask at one time, consumed and confirmed together, in one transaction.

Where a statement is a call into a library (SQLite), and where only a few ask, each is consumed as one that comes alone
(broker_alone). Where each statement is a message there and back and many ask, a few statements serve all of them. Either way
only the plain ones are taken together: a number and keys that nobody showed before, a new instance, a standing lease, a host
without a loss, a key pair that is ready, and nothing of it twice among those who ask. Everything else, whatever it is, is
left to the single step (broker_launches), which judges it after these: no refusal and no alarm is made here. For a plain one
the same is written as by the single step, entry for entry; a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import MoorlineError
from moorline.storage import broker_alone as alone
from moorline.storage import broker_certificates as certificates
from moorline.storage import broker_epochs as epochs
from moorline.storage import broker_facts as facts
from moorline.storage import broker_generations as generations
from moorline.storage import broker_launches as launches
from moorline.storage import broker_pool as pool
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_launches import CONSUMED, Fresh, Launch
from moorline.storage.broker_pool import PoolEntry, Taken

T = TypeVar("T")

_FEW: Final = 8
"""Launches up to which two statements each are fewer than what serves any number."""

_L: Final = launches.LAUNCHES
_OF_KEYS: Final = sa.select(_L.c.kem_digest, _L.c.signing_digest).where(
    sa.or_(
        _L.c.kem_digest.in_(sa.bindparam("kems", expanding=True)),
        _L.c.signing_digest.in_(sa.bindparam("signings", expanding=True)),
    )
)
_NUMBERED: Final = sa.select(_L.c.launcher, _L.c.epoch, _L.c.sequence).where(
    _L.c.launcher.in_(sa.bindparam("launchers", expanding=True)),
    _L.c.epoch.in_(sa.bindparam("epochs", expanding=True)),
    _L.c.sequence.in_(sa.bindparam("sequences", expanding=True)),
)
_OF_SIGNERS: Final = sa.select(_L).where(_L.c.signing_digest.in_(sa.bindparam("signings", expanding=True)))
_CONFIRM: Final = (
    sa.update(_L)
    .where(_L.c.signing_digest.in_(sa.bindparam("signings", expanding=True)))
    .values(state=launches.CONFIRMED, wrapped=None)
)


@dataclass(frozen=True, slots=True)
class Consumption:
    """One launch that asks to be used up (BrokerStore.consume)."""

    launch: Launch
    at: Instant
    fresh: Fresh


@dataclass(frozen=True, slots=True)
class Confirmation:
    """One launch whose attester confirmed, and its certificate (BrokerStore.confirm)."""

    launch: Launch
    issued: Issued
    at: Instant


def consume(c: sa.Connection, one: Consumption) -> Taken | MoorlineError:
    """Of one that comes alone: in two statements if it is plain, else by the single step."""
    taken = alone.consume(c, one.launch, one.at, one.fresh)
    return launches.consume(c, one.launch, one.at, one.fresh) if taken is None else taken


def confirm(c: sa.Connection, one: Confirmation) -> Issued:
    """As `consume`. Raises as `broker_launches.confirm`."""
    kept = alone.confirm(c, one.launch, one.issued, one.at)
    return launches.confirm(c, one.launch, one.issued, one.at) if kept is None else kept


def consume_plain(c: sa.Connection, asked: Sequence[Consumption]) -> Sequence[Taken | MoorlineError | None]:
    """What each plain one took; None for those that the single step must judge."""
    if _one_by_one(c, asked):
        return [alone.consume(c, one.launch, one.at, one.fresh) for one in asked]
    return consume_many(c, asked)


def confirm_plain(c: sa.Connection, asked: Sequence[Confirmation]) -> Sequence[Issued | None]:
    """The certificate of each plain one: consumed by this very signer, live, not confirmed before; None for the others."""
    if _one_by_one(c, asked):
        return [alone.confirm(c, one.launch, one.issued, one.at) for one in asked]
    return confirm_many(c, asked)


def _one_by_one(c: sa.Connection, asked: Sequence[object]) -> bool:
    return c.dialect.name == "sqlite" or len(asked) <= _FEW


def consume_many(c: sa.Connection, asked: Sequence[Consumption]) -> list[Taken | MoorlineError | None]:
    """As `consume_plain`, in as many statements whether they are two or sixty."""
    apart = _distinct(asked, lambda one: _marks(one.launch))
    seen = _seen(c, [one.launch for one in apart])
    now = facts.risen(c, max(one.at for one in asked))
    leased = epochs.leased_all(c, [_number(one.launch) for one in apart], now)
    lost = generations.losses(c, {one.launch.host for one in apart})
    known = generations.known(c, {one.launch.instance for one in apart})
    known |= launches.known_instances(c, {one.launch.instance for one in apart})
    plain = [
        one
        for one in apart
        if not (_marks(one.launch) & seen)
        and now <= one.fresh.not_after
        and _number(one.launch) in leased
        and lost.get(one.launch.host, 0) <= one.fresh.verdicts_seen
        and one.launch.instance not in known
    ]
    pairs = _pairs(c, plain)
    _write(c, [(one, pairs[id(one)]) for one in plain if id(one) in pairs])
    return [_taken(one, pairs.get(id(one))) for one in asked]


def confirm_many(c: sa.Connection, asked: Sequence[Confirmation]) -> list[Issued | None]:
    """As `confirm_plain`, in as many statements whether they are two or sixty."""
    apart = _distinct(asked, lambda one: frozenset({one.launch.signing_digest, one.issued.spiffe_id}))
    rows = {
        row.signing_digest: row for row in c.execute(_OF_SIGNERS, {"signings": [one.launch.signing_digest for one in apart]})
    }
    ended = generations.ended(c, [(one.launch.instance, one.launch.generation) for one in apart])
    plain = [
        one
        for one, why in zip(apart, ended, strict=True)
        if why is None and _is_open(rows.get(one.launch.signing_digest), one.launch)
    ]
    if plain:
        c.execute(_CONFIRM, {"signings": [one.launch.signing_digest for one in plain]})
        certificates.insert(c, *(one.issued for one in plain))
        said = [{"instance": one.launch.instance, "serial": one.issued.serial} for one in plain]
        facts.append_all(c, max(one.at for one in plain), [("launch-confirmed", body) for body in said])
    done = {id(one) for one in plain}
    return [one.issued if id(one) in done else None for one in asked]


def _is_open(row: sa.Row[tuple[object, ...]] | None, launch: Launch) -> bool:
    return row is not None and row.state == CONSUMED and (row.launcher, row.epoch, row.sequence) == _number(launch)


def _number(launch: Launch) -> tuple[bytes, int, int]:
    return launch.launcher, launch.epoch, launch.sequence


def _marks(launch: Launch) -> frozenset[Hashable]:
    """What two launches must not have in common to be consumed side by side."""
    return frozenset(
        {_number(launch), ("kem", launch.kem_digest), ("signing", launch.signing_digest), ("instance", launch.instance)}
    )


def _distinct(asked: Sequence[T], marks: Callable[[T], frozenset[Hashable]]) -> list[T]:
    """Those that share no mark with one before them."""
    taken: set[Hashable] = set()
    found = []
    for one in asked:
        mine = marks(one)
        if not mine & taken:
            found.append(one)
        taken |= mine
    return found


def _seen(c: sa.Connection, wanted: Sequence[Launch]) -> set[Hashable]:
    """The marks of launches that are on record already."""
    keys = {"kems": [one.kem_digest for one in wanted], "signings": [one.signing_digest for one in wanted]}
    found: set[Hashable] = set()
    for row in c.execute(_OF_KEYS, keys):
        found |= {("kem", row.kem_digest), ("signing", row.signing_digest)}
    numbers = {
        "launchers": sorted({one.launcher for one in wanted}),
        "epochs": sorted({one.epoch for one in wanted}),
        "sequences": sorted({one.sequence for one in wanted}),
    }
    return found | {(row.launcher, row.epoch, row.sequence) for row in c.execute(_NUMBERED, numbers)}


def _pairs(c: sa.Connection, plain: Sequence[Consumption]) -> dict[int, PoolEntry]:
    """A key pair for each, gone from its pool, as far as there are some."""
    of_pool: dict[tuple[str, str], list[Consumption]] = {}
    for one in plain:
        of_pool.setdefault((one.launch.service, one.launch.profile), []).append(one)
    pairs = {}
    for (service, profile), some in of_pool.items():
        for one, entry in zip(some, pool.take_some(c, service, profile, len(some)), strict=False):
            pairs[id(one)] = entry
    return pairs


def _write(c: sa.Connection, taken: Sequence[tuple[Consumption, PoolEntry]]) -> None:
    if not taken:
        return
    launches.keep(c, [(one.launch, entry, one.at) for one, entry in taken])
    generations.begin_all(
        c,
        [(launches.generation_of(one.launch, one.fresh, one.at), one.fresh.storage, one.fresh.nonce) for one, _ in taken],
    )
    said = [("launch-consumed", launches.entry(one.launch, one.fresh)) for one, _ in taken]
    facts.append_all(c, max(one.at for one, _ in taken), said)


def _taken(one: Consumption, entry: PoolEntry | None) -> Taken | None:
    if entry is None:
        return None
    return Taken(public=entry.public, wrapped=entry.wrapped, again=False, storage=one.fresh.storage)
