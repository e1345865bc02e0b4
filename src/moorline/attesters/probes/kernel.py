"""What the kernel lets root do to it: lockdown, module signatures (SEC009 6.3, 6.21)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import (
    SECURITYFS,
    arguments,
    configured,
    met,
    not_met,
    truth,
    unread,
    without_securityfs,
)
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation

CAPABILITIES: Final = ("kernel.lockdown", "kernel.module_signing")
_CHOSEN: Final = re.compile(r"\[(\w+)\]")


def lockdown_mode(tree: Tree) -> str | None:
    """`none`, `integrity` or `confidentiality`; None if the kernel does not tell."""
    chosen = _CHOSEN.search(tree.read(f"{SECURITYFS}/lockdown").text)
    return chosen[1] if chosen else None


def probe(tree: Tree) -> Iterator[Observation]:
    """Lockdown and module signatures."""
    yield _lockdown(tree)
    yield _modules(tree)


def _lockdown(tree: Tree) -> Observation:
    name, read = "kernel.lockdown", tree.read(f"{SECURITYFS}/lockdown")
    if not read.ok:
        if read.state is not State.ABSENT:
            return unread(name, read)
        return without_securityfs(tree, name, read) or not_met(name, "this kernel has no lockdown", read.shown())
    mode = lockdown_mode(tree)
    if mode not in ("integrity", "confidentiality"):
        return not_met(name, "the kernel is not locked down", read.shown(), value=mode or "unreadable")
    return met(
        name,
        mode,
        read.shown(),
        improve=None if mode == "confidentiality" else "lockdown=confidentiality also stops reading kernel memory",
    )


def _modules(tree: Tree) -> Observation:
    name = "kernel.module_signing"
    enforced = tree.read("/sys/module/module/parameters/sig_enforce")
    disabled = tree.read("/proc/sys/kernel/modules_disabled")
    if enforced.ok and truth(enforced.text):
        return met(name, "signed modules only", enforced.shown())
    if disabled.ok and disabled.text == "1":
        return met(name, "no module can be loaded until the next boot", disabled.shown())
    if lockdown_mode(tree) in ("integrity", "confidentiality"):
        return met(name, "lockdown refuses unsigned modules", tree.read(f"{SECURITYFS}/lockdown").shown())
    if configured(tree, "MODULE_SIG_FORCE"):
        return met(name, "built with CONFIG_MODULE_SIG_FORCE", "/boot/config: CONFIG_MODULE_SIG_FORCE=y")
    if "nomodule" in arguments(tree) or (tree.has("/proc/sys/kernel/osrelease") and not tree.has("/proc/modules")):
        return met(name, "this kernel loads no modules", "/proc/modules: absent or nomodule on the command line")
    if State.DENIED in (enforced.state, disabled.state):
        return unread(name, enforced if enforced.state is State.DENIED else disabled)
    return not_met(name, "unsigned modules can be loaded", enforced.shown(), disabled.shown())
