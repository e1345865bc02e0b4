"""All probes of a machine, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from moorline.attesters.probes import (
    boot,
    concealment,
    cpu,
    enclaves,
    hsm,
    hwrng,
    ima,
    intrusion,
    iommu,
    kernel,
    location,
    lsm,
    memory,
    mounts,
    network,
    posture,
    provided,
    remote_access,
    statements,
    storage,
    tpm,
)
from moorline.attesters.probes.saying import not_probed
from moorline.attesters.probes.tree import Tree, cleaned
from moorline.policy.sec009.assessment import Observation

DERIVED: Final = "pool.type"
"""The one capability that no probe speaks about: it follows from the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One noun: the capabilities it speaks about, and how it is asked."""

    noun: str
    capabilities: tuple[str, ...]
    run: Callable[[Tree, int], Iterator[Observation]]


def _timeless(probe: Callable[[Tree], Iterator[Observation]], tree: Tree, now: int) -> Iterator[Observation]:
    del now
    return probe(tree)


_TIMELESS: Final = (
    boot,
    kernel,
    ima,
    tpm,
    cpu,
    enclaves,
    memory,
    iommu,
    lsm,
    mounts,
    storage,
    hwrng,
    remote_access,
    network,
    concealment,
    hsm,
    provided,
    posture,
)
_TIMED: Final = (intrusion, statements, location)

PROBES: Final = (
    *(
        Probe(noun=one.__name__.rpartition(".")[2], capabilities=one.CAPABILITIES, run=partial(_timeless, one.probe))
        for one in _TIMELESS
    ),
    *(Probe(noun=one.__name__.rpartition(".")[2], capabilities=one.CAPABILITIES, run=one.probe) for one in _TIMED),
)


def host_name(tree: Tree) -> str:
    """What the machine calls itself; `unknown` if it does not say."""
    said = tree.read("/proc/sys/kernel/hostname").text or tree.read("/etc/hostname").text
    return cleaned(said, 253) or "unknown"


def observe(tree: Tree, now: int) -> Iterator[Observation]:
    """What every probe saw. One that breaks over what it read is `not_probed`, and does not take the others along."""
    for probe in PROBES:
        seen: list[Observation] = []
        try:
            seen.extend(probe.run(tree, now))
        except Exception as error:  # a probe reads a stranger's files: its defect must cost its own answer only
            spoken = {one.capability for one in seen}
            seen.extend(
                not_probed(name, f"the probe '{probe.noun}' broke: {type(error).__name__}")
                for name in probe.capabilities
                if name not in spoken
            )
        yield from seen
