"""Concealment of resource usage (SEC009 5.2.5, 6.14): only an observer's test shows it, and that takes time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import not_met, not_probed
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation

_CHANNELS: Final = ("net", "cpu", "ram", "storage", "cache", "offload")
_OBSERVED: Final = ("net", "cpu", "ram", "storage")
CAPABILITIES: Final = tuple(f"conceal.{one}" for one in _CHANNELS)


def probe(tree: Tree) -> Iterator[Observation]:
    """The cache has one hard precondition a file shows: without a way to divide it, nothing conceals its use."""
    for name in CAPABILITIES:
        if name == "conceal.cache" and tree.has("/proc/cpuinfo") and not tree.names("/sys/fs/resctrl"):
            yield not_met(
                name, "the cache is not divided: resctrl is not mounted or not offered", "/sys/fs/resctrl: absent or empty"
            )
        else:
            channel = name.partition(".")[2]
            yield not_probed(
                name,
                "an observer has to fail to tell use from idleness, which takes time"
                + ("" if channel in _OBSERVED else "; no command here does it"),
                command=f"moor host probe concealment {channel} -- COMMAND" if channel in _OBSERVED else None,
            )
