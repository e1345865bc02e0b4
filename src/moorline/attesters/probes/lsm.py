"""Mandatory access control, and how the host agent is confined (SEC009 6.3)."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.hypervisor import guests, processes
from moorline.attesters.probes.saying import SECURITYFS, met, not_met, truth, unread, without_securityfs
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation

CAPABILITIES: Final = ("osac.lsm", "osac.seccomp_landlock.agent")
_CREATE_RULESET: Final = 444  # the same number on every architecture that has Landlock
_VERSION: Final = 1


def probe(tree: Tree) -> Iterator[Observation]:
    """The security module that enforces a policy, and the agent's system call filter."""
    yield _mandatory(tree)
    yield _agent(tree)


def _mandatory(tree: Tree) -> Observation:
    name, read = "osac.lsm", tree.read(f"{SECURITYFS}/lsm")
    selinux = tree.read("/sys/fs/selinux/enforce")
    apparmor = tree.read("/sys/module/apparmor/parameters/enabled")
    profiles = tree.read(f"{SECURITYFS}/apparmor/profiles", 1 << 20)
    unlabelled = [guest.pid for guest in guests(tree) if guest.label in ("", "unconfined")]
    evidence = tuple(one.shown() for one in (read, selinux, apparmor) if one.state is not State.ABSENT)
    if unlabelled:
        return not_met(name, f"guests run without a label of their own: {', '.join(unlabelled[:8])}", *evidence)
    if selinux.ok and selinux.text == "1":
        return met(name, "SELinux, enforcing", *evidence)
    if apparmor.ok and truth(apparmor.text):
        enforced = [line for line in profiles.text.splitlines() if line.endswith("(enforce)")]
        if enforced:
            return met(
                name, f"AppArmor, {len(enforced)} profiles enforced", *evidence, profiles.shown(f"{len(enforced)} enforced")
            )
        if profiles.state is State.DENIED:
            return unread(name, profiles)
        return not_met(name, "AppArmor is there and enforces no profile", *evidence)
    if selinux.ok:
        return not_met(name, "SELinux only warns", *evidence, value="SELinux, permissive")
    for odd in (selinux, apparmor):
        if odd.state in (State.DENIED, State.ODD):
            return unread(name, odd)
    if read.ok:
        return not_met(name, "no module that enforces a policy is active", *evidence, value=read.text)
    return without_securityfs(tree, name, read) or not_met(name, "neither SELinux nor AppArmor is active", *evidence)


def _agent(tree: Tree) -> Observation:
    name = "osac.seccomp_landlock.agent"
    abi = landlock_abi() if tree.live else 0
    able = f"landlock ABI {abi}" if abi else "landlock not asked" if not tree.live else "no landlock"
    agents = [pid for pid, words in processes(tree) if words[1:4] and "host run" in " ".join(words[:6])]
    if not agents:
        return not_met(name, "no host agent runs here", able, improve="moor host run, confined; then assess again")
    for pid in agents:
        status = tree.read(f"/proc/{pid}/status")
        fields = dict(line.split(":\t", 1) for line in status.text.splitlines() if ":\t" in line)
        said = f"/proc/{pid}/status: Seccomp {fields.get('Seccomp')}, NoNewPrivs {fields.get('NoNewPrivs')}"
        if fields.get("Seccomp") != "2" or fields.get("NoNewPrivs") != "1":
            return not_met(name, "the host agent runs without a system call filter", said, able)
    return met(name, f"{len(agents)} agents filtered", able)


def landlock_abi() -> int:
    """The version of Landlock the running kernel has; 0 for none. Asking changes nothing."""
    if platform.system() != "Linux":
        return 0
    call = ctypes.CDLL(None, use_errno=True).syscall
    return max(0, int(call(_CREATE_RULESET, None, 0, _VERSION)))
