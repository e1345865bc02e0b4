"""Whether the processor's known vulnerabilities are mitigated (SEC009 5.2.5, 6.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import arguments, met, not_met, unread
from moorline.attesters.probes.tree import Tree, cleaned
from moorline.policy.sec009.assessment import Observation

DIRECTORY: Final = "/sys/devices/system/cpu/vulnerabilities"
CAPABILITIES: Final = ("cpu.vulnerabilities.mitigated",)


def probe(tree: Tree) -> Iterator[Observation]:
    """One file a vulnerability: `Not affected`, `Mitigation: ...`, `Vulnerable...`, or something newer.

    Anything but the first two counts as open, and so does SMT where the kernel says that it makes a mitigation incomplete.
    """
    name = CAPABILITIES[0]
    files = tree.names(DIRECTORY)
    if not files:
        yield not_met(name, "the kernel does not tell about vulnerabilities", f"{DIRECTORY}: absent or empty")
        return
    open_ones = []
    for file in files:
        read = tree.read(f"{DIRECTORY}/{file}")
        if not read.ok:
            yield unread(name, read)
            return
        said = read.text
        if not said.startswith(("Not affected", "Mitigation:", "KVM: Mitigation")) or "SMT vulnerable" in said:
            open_ones.append(f"{file}: {cleaned(said, 80)}")
    smt = tree.read("/sys/devices/system/cpu/smt/control")
    off = arguments(tree).get("mitigations") == "off"
    evidence = (f"{DIRECTORY}: {len(files)} files", smt.shown(), *(f"{DIRECTORY}/{one}" for one in open_ones))
    if off:
        evidence = (*evidence, "/proc/cmdline: mitigations=off")
    if open_ones or off:
        yield not_met(name, f"{len(open_ones)} of {len(files)} are open", *evidence, value=", ".join(open_ones) or "off")
    else:
        yield met(name, f"{len(files)} known, none open; SMT {smt.text or 'unknown'}", *evidence)
