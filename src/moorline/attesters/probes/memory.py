"""What this host can do to the memory of its guests, and whether memory is cleared (SEC009 6.1, 5.2.8).

`reach` lists every way that stands open, each from its real source; `inspection` shows by doing it that the first works.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from moorline.attesters.probes.hypervisor import guests
from moorline.attesters.probes.kernel import lockdown_mode
from moorline.attesters.probes.saying import arguments, configured, declared, met, not_met, not_probed
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation

CAPABILITIES: Final = ("mem.inspection.host_blocked", "mem.inspection.grantable", "cleanup.memory")
BROKER: Final = "/etc/moorline/inspection.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way into the memory of a guest: whether it is open, and what says so. `open` is None where it cannot be told."""

    name: str
    open: bool | None
    evidence: str


def reach(tree: Tree) -> tuple[Way, ...]:
    """Every way that is looked for. That one is closed says that this host did not leave it open now, nothing more."""
    locked = lockdown_mode(tree)
    scope = tree.read("/proc/sys/kernel/yama/ptrace_scope")
    kdump = tree.read("/sys/kernel/kexec_crash_loaded")
    ksm = tree.read("/sys/kernel/mm/ksm/run")
    swaps = [line.split()[0] for line in tree.read("/proc/swaps").text.splitlines()[1:] if line.split()]
    monitors = [one.pid for one in guests(tree) if one.monitor]
    core = tree.read("/proc/sys/kernel/core_pattern")
    device = tree.has("/dev/mem")
    return (
        Way(
            name="/proc/PID/mem and ptrace",
            open=None if scope.state in (State.DENIED, State.ODD) else scope.text != "3",
            evidence=scope.shown() if scope.ok else "no Yama: root, and the same user, may read any process",
        ),
        Way(
            name="/dev/mem",
            open=device and locked not in ("integrity", "confidentiality") and not configured(tree, "STRICT_DEVMEM"),
            evidence=f"/dev/mem: {'there' if device else 'absent'}, lockdown {locked or 'unknown'}",
        ),
        Way(
            name="/proc/kcore",
            open=tree.has("/proc/kcore") and locked != "confidentiality",
            evidence=f"/proc/kcore: {'there' if tree.has('/proc/kcore') else 'absent'}, lockdown {locked or 'unknown'}",
        ),
        Way(name="kdump", open=None if not kdump.ok else kdump.text == "1", evidence=kdump.shown()),
        Way(name="core dumps", open=bool(core.text), evidence=core.shown()),
        Way(name="same pages merged (KSM)", open=None if not ksm.ok else ksm.text == "1", evidence=ksm.shown()),
        Way(name="swap", open=bool(swaps), evidence=f"/proc/swaps: {', '.join(swaps) or 'none'}"),
        Way(
            name="QEMU monitor",
            open=bool(monitors),
            evidence=f"/proc: {len(monitors)} guests with a monitor that can dump memory",
        ),
    )


def probe(tree: Tree) -> Iterator[Observation]:
    """Inspection is never blocked by what a host says of itself: only a guest's own hardware report can show that."""
    ways = reach(tree)
    yield not_met(
        "mem.inspection.host_blocked",
        "whoever administers this host can read its guests, unless their own hardware report says otherwise",
        *(f"{way.name}: {_said(way.open)} ({way.evidence})" for way in ways),
        value="open: " + (", ".join(way.name for way in ways if way.open) or "nothing that was looked for"),
        improve="run functions in SEV-SNP or TDX guests; 'moor host inspect control' shows that this host reads them",
    )
    yield _grantable(tree)
    yield _cleared(tree)


def _said(is_open: bool | None) -> str:  # noqa: FBT001
    return "cannot be told" if is_open is None else "open" if is_open else "closed"


def _grantable(tree: Tree) -> Observation:
    name, read = "mem.inspection.grantable", tree.read(BROKER)
    if not read.ok:
        return not_met(name, "no inspection broker is configured here", read.shown())
    try:
        listed = tomllib.loads(read.text).get("approver")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        return not_met(name, f"the inspection broker's settings cannot be read: {error}", read.shown("unreadable"))
    approvers = {str(one.get("key")) for one in listed if isinstance(one, dict)} if isinstance(listed, list) else set()
    if len(approvers) < 2:
        return not_met(name, "the inspection broker does not name two approvers", read.shown(f"{len(approvers)} approvers"))
    return declared(name, f"{len(approvers)} approvers; root can go around it", read.shown(f"{len(approvers)} approvers"))


def _cleared(tree: Tree) -> Observation:
    name, words = "cleanup.memory", arguments(tree)
    freed = words.get("init_on_free")
    said = f"/proc/cmdline: init_on_free={freed}" if freed is not None else "/proc/cmdline: no init_on_free"
    if freed in ("1", "on", "y", "Y"):
        return met(name, "cleared when freed", said)
    if freed is None and configured(tree, "INIT_ON_FREE_DEFAULT_ON"):
        return met(name, "cleared when freed, by the kernel's default", "/boot/config: CONFIG_INIT_ON_FREE_DEFAULT_ON=y")
    if not tree.has("/proc/cmdline"):
        return not_probed(name, "the kernel's command line cannot be read", said)
    return not_met(name, "freed memory keeps its contents until it is used again", said)


def privileged() -> bool:
    """Whether this process runs as root: it then sees more, and can do more."""
    return os.geteuid() == 0
