"""Taking one item into a store: judged, compared with its mark, stored, and what became of it as a value.

Fetching and importing differ in where bytes come from and in nothing else; both end here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.clock import Instant
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.storage.collateral_store import CollateralStore, StoredItem
from moorline.verification.collateral import Freshness, ItemKind, ItemName, Judged, freshness
from moorline.verification.collateral_judging import Anchors, Held, judge, tpm_crl_of
from moorline.verification.intel_pck import pem_certificates

ROOT_CRL: Final = ItemName(kind=ItemKind.INTEL_ROOT_CRL, subject="root")


class Taken(StrEnum):
    """What became of an item. `undecided`: it could not be judged now, as without the root CRL."""

    STORED = "stored"
    UNCHANGED = "unchanged"
    REFUSED = "refused"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """An item on its way in, by the word of whoever brought it."""

    name: ItemName
    data: bytes
    source: str
    fetched: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one item, and what was found when it was judged, if it came that far."""

    name: ItemName
    taken: Taken
    judged: Judged | None
    error: MoorlineError | None


def failed(name: ItemName, error: MoorlineError) -> Outcome:
    """The outcome of an item that was refused, or could not be had."""
    refused = isinstance(error, NotAuthentic | Refused)
    return Outcome(name=name, taken=Taken.REFUSED if refused else Taken.UNDECIDED, judged=None, error=error)


def take(offered: Offered, store: CollateralStore, *, anchors: Anchors, now: Instant) -> Outcome:
    """Judge and store one item. Refusals are outcomes; only a store that does not work raises."""
    held = _held(offered.name, store, now)
    try:
        judged = judge(offered.name, offered.data, anchors=anchors, held=held, now=now)
    except MoorlineError as error:
        return failed(offered.name, error)
    item = StoredItem(judged=judged, source=offered.source, fetched=offered.fetched, data=offered.data)
    try:
        put = store.put(item)
    except Refused as error:
        return Outcome(name=offered.name, taken=Taken.REFUSED, judged=judged, error=error)
    return Outcome(name=offered.name, taken=Taken(put.value), judged=judged, error=None)


def _held(name: ItemName, store: CollateralStore, now: Instant) -> Held:
    """What judging `name` takes. A CRL that is not current says nothing, and keeps nothing out."""
    if name.kind is ItemKind.TPM_CRL:
        others = [item for item in _tpm_items(store) if item.name != name]
        in_force = [item for item in others if freshness(item.judged.validity, now) is Freshness.CURRENT]
        return Held(root_crl=None, tpm_crls=tuple(tpm_crl_of(item.data) for item in in_force))
    root = None if name == ROOT_CRL else store.get(ROOT_CRL)
    if name.kind is not ItemKind.SNP_VCEK:
        return Held(root_crl=None if root is None else root.data)
    subject = f"{name.subject.partition('/')[0]}/vcek"
    chain = store.get(ItemName(kind=ItemKind.SNP_CHAIN, subject=subject))
    crl = store.get(ItemName(kind=ItemKind.SNP_CRL, subject=subject))
    current = crl is not None and freshness(crl.judged.validity, now) is Freshness.CURRENT
    return Held(
        root_crl=None,
        authorities=() if chain is None else pem_certificates(chain.data)[:1],
        snp_crl=crl.data if crl is not None and current else None,
    )


def tpm_crls(store: CollateralStore) -> tuple[bytes, ...]:
    """Every TPM maker's CRL that a store holds, current or not: one that has ended refuses what it is about.

    Not verified here: `verification.tpm_revocation` does that, each time.
    """
    return tuple(tpm_crl_of(item.data) for item in _tpm_items(store))


def _tpm_items(store: CollateralStore) -> Iterator[StoredItem]:
    held = (store.get(name) for name in store.names() if name.kind is ItemKind.TPM_CRL)
    return (item for item in held if item is not None)


def root_first(names: Iterable[ItemName]) -> list[ItemName]:
    """`names` in an order in which each can be judged: Intel's root CRL first, AMD's chains and CRLs before chips."""
    return sorted(set(names), key=lambda name: (name != ROOT_CRL, name))
