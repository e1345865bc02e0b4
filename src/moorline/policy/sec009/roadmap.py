"""The smallest set of changes to a host that closes a gap (SEC009 clause 8), computed exactly.

A change provides capabilities and may itself require some. What is asked is a set of demands; each demand is hit by the
changes that provide it, or something that serves as well. Among all sets of changes that hit every demand, also the demands
of the chosen changes themselves, the one with the fewest changes is taken; of those, the one with the least effort, then the
first by name. That is a minimal hitting set; branch and bound finds it, and a test compares it with trying all subsets.

A level above `asserted` is nothing a machine can give itself: such a need also asks `attested`, which enrolment provides.
A need that no change provides is in no roadmap; `impossible` names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from moorline.policy.sec009.catalogue import data
from moorline.policy.sec009.profile import Need
from moorline.rats import Assurance

ENROL: Final = "enrol"
ATTESTED: Final = "attested"
"""The demand that stands for "an attestation authority has verified this host"."""

EFFORTS: Final = ("command", "setting", "reboot", "software", "service", "people", "hardware", "platform")
"""From little to much. Each counts as its place in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that somebody can do to a host: what it is, how it is done, what it provides and what it presupposes."""

    id: str
    says: str
    how: str
    effort: str
    provides: frozenset[str]
    requires: frozenset[str]

    @property
    def weight(self) -> int:
        """The effort as a number."""
        return EFFORTS.index(self.effort)


@lru_cache(maxsize=1)
def changes() -> dict[str, Change]:
    """changes.json by id, in its order."""
    return {
        entry["id"]: Change(
            id=entry["id"],
            says=entry["says"],
            how=entry["how"],
            effort=entry["effort"],
            provides=frozenset(entry["provides"]),
            requires=frozenset(entry["requires"]),
        )
        for entry in data("changes.json")["changes"]
    }


def smallest(
    missing: Iterable[Need],
    levels: Mapping[str, Assurance],
    alternatives: Mapping[str, frozenset[str]],
    *,
    enrolled: bool,
) -> tuple[Change, ...]:
    """The roadmap for needs that are not met on a host that shows `levels`."""
    held = {name for name, level in levels.items() if level > Assurance.NONE} | ({ATTESTED} if enrolled else set())
    demands: set[str] = set()
    for need in missing:
        demands.add(need.capability)
        if need.minimum > Assurance.ASSERTED:
            demands.add(ATTESTED)
    chosen = cheapest(demands, held, alternatives, tuple(changes().values()))
    return tuple(change for change in changes().values() if change in chosen)


def impossible(
    demands: Iterable[str], alternatives: Mapping[str, frozenset[str]], available: Iterable[Change]
) -> frozenset[str]:
    """Demands that no change provides."""
    provided = {name for change in available for name in change.provides}
    return frozenset(one for one in demands if not ({one} | alternatives.get(one, frozenset())) & provided)


def cheapest(
    demands: Iterable[str],
    held: Iterable[str],
    alternatives: Mapping[str, frozenset[str]],
    available: tuple[Change, ...],
) -> frozenset[Change]:
    """The smallest set of `available` that hits `demands` and its own requirements, given what is `held` already.

    Demands that cannot be hit are left out, as are changes that would need one of them.
    """
    usable = _usable(set(held), alternatives, available)
    possible = frozenset(demands) - impossible(_unmet(demands, held, alternatives), alternatives, usable)
    search = _Search(alternatives=alternatives, available=usable)
    search.extend(frozenset(), frozenset(possible), frozenset(held))
    return search.best or frozenset()


def _usable(held: set[str], alternatives: Mapping[str, frozenset[str]], available: tuple[Change, ...]) -> tuple[Change, ...]:
    """The changes whose requirements can be had at all, from what is held and from each other."""
    reached: tuple[Change, ...] = ()
    while True:
        have = held | {name for change in reached for name in change.provides}
        grown = tuple(change for change in available if not _unmet(change.requires, have, alternatives))
        if grown == reached:
            return reached
        reached = grown


def _unmet(demands: Iterable[str], held: Iterable[str], alternatives: Mapping[str, frozenset[str]]) -> frozenset[str]:
    have = frozenset(held)
    return frozenset(one for one in demands if one not in have and not alternatives.get(one, frozenset()) & have)


class _Search:
    def __init__(self, *, alternatives: Mapping[str, frozenset[str]], available: tuple[Change, ...]) -> None:
        self._alternatives = alternatives
        self._available = available
        self.best: frozenset[Change] | None = None
        self._seen: set[frozenset[str]] = set()

    def extend(self, chosen: frozenset[Change], demands: frozenset[str], held: frozenset[str]) -> None:
        names = frozenset(change.id for change in chosen)
        if names in self._seen:
            return
        self._seen.add(names)
        open_demands = _unmet(demands, held, self._alternatives)
        if not open_demands:
            if self.best is None or _cost(chosen) < _cost(self.best):
                self.best = chosen
            return
        if self.best is not None and len(chosen) + 1 > len(self.best):
            return
        # The demand with the fewest ways out first: a demand with one way is no choice.
        ways = min((self._ways(one) for one in sorted(open_demands)), key=len)
        for change in ways:
            self.extend(chosen | {change}, demands | change.requires, held | change.provides)

    def _ways(self, demand: str) -> tuple[Change, ...]:
        wanted = {demand} | self._alternatives.get(demand, frozenset())
        return tuple(change for change in self._available if change.provides & wanted)


def _cost(chosen: frozenset[Change]) -> tuple[int, int, tuple[str, ...]]:
    return len(chosen), sum(change.weight for change in chosen), tuple(sorted(change.id for change in chosen))
