"""Whether devices are kept away from memory that is not theirs, and can be given away (SEC009 6.19)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import arguments, met, not_met, number
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation

_GROUPS: Final = "/sys/kernel/iommu_groups"
_NET: Final = "/sys/class/net"
CAPABILITIES: Final = ("dma.iommu.isolation", "net.sriov")


def probe(tree: Tree) -> Iterator[Observation]:
    """IOMMU groups with devices in them, and network devices with virtual functions."""
    groups = [group for group in tree.names(_GROUPS) if tree.names(f"{_GROUPS}/{group}/devices")]
    tables = [name for name in ("DMAR", "IVRS", "IORT") if tree.has(f"/sys/firmware/acpi/tables/{name}")]
    words = arguments(tree)
    evidence = (
        f"{_GROUPS}: {len(groups)} groups with devices",
        f"/sys/firmware/acpi/tables: {', '.join(tables) or 'neither DMAR nor IVRS nor IORT'}",
        *(f"/proc/cmdline: {name}={words[name]}" for name in ("intel_iommu", "amd_iommu", "iommu") if name in words),
    )
    off = [name for name in ("intel_iommu", "amd_iommu", "iommu") if words.get(name) == "off"]
    if groups and not off:
        yield met("dma.iommu.isolation", f"{len(groups)} groups", *evidence)
    else:
        yield not_met("dma.iommu.isolation", "no device stands behind an IOMMU", *evidence)
    cards = []
    for name in tree.names(_NET):
        total = tree.read(f"{_NET}/{name}/device/sriov_totalvfs")
        if total.ok and (number(total.text) or 0) > 0:
            cards.append((name, total))
    if cards:
        yield met(
            "net.sriov", ", ".join(f"{name} {total.text}" for name, total in cards), *(total.shown() for _, total in cards)
        )
    else:
        yield not_met("net.sriov", "no network device offers virtual functions", f"{_NET}: none with sriov_totalvfs > 0")
