"""What a function leaves behind on its host (SEC009 5.2.8): network, memory, storage and keys, by what the kernel lists.

`held` is taken before the function starts, and again after it ended; what is there then and was not before is a leftover.
Each time something of the probe's own is put there and has to be found (the positive control): a view that misses it misses
others too, and says nothing about its kind. A busy host has new things of its own: `about` says which count, by a name.

| area    | kinds                                                                                     |
|---------|-------------------------------------------------------------------------------------------|
| network | sockets, neighbours, interfaces, named network namespaces                                 |
| memory  | processes, System V shared memory, semaphores and queues, POSIX queues, control groups    |
| storage | files in folders that everybody shares (also POSIX shared memory), mounts                 |
| keys    | the kernel's keys and keyrings, as far as this user may see them                          |

That nothing is left meets `cleanup.network` and no other capability: pages, blocks and keys that are listed no more may not
have been cleared all the same, and how they are is known from elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from moorline.attesters.probes import leftovers_keys, leftovers_memory, leftovers_network, leftovers_storage
from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.policy.sec009.assessment import Observation

CAPABILITIES: Final = {
    "network": "cleanup.network",
    "memory": "cleanup.memory",
    "storage": "cleanup.storage.method.*",
    "keys": "cleanup.keys",
}
"""Areas, and what of the catalogue each is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of thing: how all of it is listed, and how one is put there that the list must show, as the line it has."""

    area: str
    read: Callable[[], set[str]]
    planted: Callable[[], contextlib.AbstractContextManager[str]]


KINDS: Final[dict[str, Kind]] = {
    "network": Kind(area="network", read=leftovers_network.read, planted=leftovers_network.planted),
    "processes": Kind(area="memory", read=leftovers_memory.processes, planted=leftovers_memory.process),
    "shared memory": Kind(area="memory", read=leftovers_memory.segments, planted=leftovers_memory.segment),
    "semaphores": Kind(area="memory", read=leftovers_memory.semaphores, planted=leftovers_memory.semaphore),
    "queues": Kind(area="memory", read=leftovers_memory.queues, planted=leftovers_memory.queue),
    "POSIX queues": Kind(area="memory", read=leftovers_memory.posix_queues, planted=leftovers_memory.posix_queue),
    "control groups": Kind(area="memory", read=leftovers_memory.groups, planted=leftovers_memory.group),
    "files": Kind(area="storage", read=leftovers_storage.files, planted=leftovers_storage.file),
    "mounts": Kind(area="storage", read=leftovers_storage.mounts, planted=leftovers_storage.mount),
    "keys": Kind(area="keys", read=leftovers_keys.keys, planted=leftovers_keys.key),
}
Held = Mapping[str, frozenset[str] | None]
"""What there is of each kind, a line a thing; None where the control was not found, or could not be put there."""


def held(areas: Collection[str] = tuple(CAPABILITIES)) -> dict[str, frozenset[str] | None]:
    """What is there now of each kind of these areas."""
    return {name: _seen(kind) for name, kind in KINDS.items() if kind.area in areas}


def left(before: Held, now: Held, about: Collection[str] = ()) -> dict[str, list[str] | None]:
    """What there is of each kind of `now` and was not before: all of it, or what names something of `about`."""
    found: dict[str, list[str] | None] = {}
    for name, things in now.items():
        known = before.get(name)
        new = None if things is None or known is None else sorted(things - known)
        found[name] = None if new is None else [one for one in new if not about or any(text in one for text in about)]
    return found


def judge(area: str, found: Mapping[str, list[str] | None]) -> Observation:
    """What `left` found of one area, as an observation."""
    mine = {name: found.get(name) for name, kind in KINDS.items() if kind.area == area}
    things = [one for new in mine.values() for one in new or ()]
    blind = [name for name, new in mine.items() if new is None]
    looked = f"looked at: {', '.join(name for name in mine if name not in blind) or 'nothing'}"
    if things:
        return not_met(CAPABILITIES[area], f"{len(things)} things are left: {'; '.join(things[:8])}", looked)
    if blind:
        return not_probed(CAPABILITIES[area], f"the probe did not see what it put there itself: {', '.join(blind)}", looked)
    if area == "network":
        return met(CAPABILITIES[area], "nothing is left", f"{looked}; its own socket was found each time")
    return not_probed(
        CAPABILITIES[area], "nothing is left; whether what it was in has been cleared is not seen by looking", looked
    )


def _seen(kind: Kind) -> frozenset[str] | None:
    try:
        found = kind.read()
        with kind.planted() as mine:
            if mine not in kind.read():
                return None
    except OSError:
        return None
    return frozenset(found)
