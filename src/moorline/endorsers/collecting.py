"""Fetching items into a store: each one asked for, judged, stored; what failed is reported and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from moorline.clock import Clock
from moorline.endorsers.port import Endorser
from moorline.errors import MoorlineError
from moorline.storage.collateral_intake import ROOT_CRL, Offered, Outcome, failed, root_first, take
from moorline.storage.collateral_store import CollateralStore
from moorline.verification.collateral import ItemKind, ItemName
from moorline.verification.collateral_judging import Anchors


async def collect(
    names: Iterable[ItemName],
    endorser: Endorser,
    store: CollateralStore,
    *,
    anchors: Anchors,
    clock: Clock,
    told: Callable[[Outcome], None],
) -> tuple[Outcome, ...]:
    """Every item of `names`, and Intel's root CRL first where any of them needs it. `told` hears each outcome as it comes.

    Items are asked for one after the other: vendors limit rates, and `transport` keeps the pace anyhow. Raises only what the
    store raises; a vendor that fails is an outcome of its item.
    """
    wanted = set(names)
    if any(name.kind.value.startswith("intel-") for name in wanted):
        wanted.add(ROOT_CRL)
    outcomes: list[Outcome] = []
    for name in root_first(wanted):
        outcome = await _one(name, endorser, store, anchors=anchors, clock=clock)
        told(outcome)
        outcomes.append(outcome)
    return tuple(outcomes)


async def _one(name: ItemName, endorser: Endorser, store: CollateralStore, *, anchors: Anchors, clock: Clock) -> Outcome:
    try:
        fetched = await endorser.fetch(name)
    except MoorlineError as error:
        return failed(name, error)
    now = clock.now()
    offered = Offered(name=name, data=fetched.data, source=fetched.source, fetched=now)
    return take(offered, store, anchors=anchors, now=now)


def settled(names: Iterable[ItemName], held: Iterable[ItemName]) -> tuple[ItemName, ...]:
    """`names` without the certificates that are held: those of a chip at a TCB do not change, and AMD limits who asks."""
    have = {name for name in held if name.kind is ItemKind.SNP_VCEK}
    return tuple(name for name in names if name not in have)
