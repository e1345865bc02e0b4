"""How probes speak: one Observation a capability, with the level that a machine's word about itself has."""

from __future__ import annotations

from moorline.attesters.probes.tree import Read, State, Tree, cleaned
from moorline.policy.sec009.assessment import Observation, Status
from moorline.rats import Assurance, EvidenceRoot

SECURITYFS = "/sys/kernel/security"


def met(
    capability: str,
    value: str | None,
    *evidence: str,
    root: EvidenceRoot = EvidenceRoot.SOFTWARE,
    improve: str | None = None,
) -> Observation:
    """It is there, as far as the machine's own files say."""
    return Observation(
        capability=capability,
        status=Status.MET,
        value=None if value is None else cleaned(value, 400),
        seen=Assurance.ASSERTED,
        root=root,
        evidence=evidence,
        improve=improve,
    )


def not_met(
    capability: str, reason: str, *evidence: str, value: str | None = None, improve: str | None = None
) -> Observation:
    """It was looked for where it would be, and is not there."""
    return Observation(
        capability=capability,
        status=Status.NOT_MET,
        value=None if value is None else cleaned(value, 400),
        root=EvidenceRoot.SOFTWARE,
        evidence=evidence,
        reason=cleaned(reason, 400),
        improve=improve,
    )


def not_probed(capability: str, reason: str, *evidence: str, command: str | None = None) -> Observation:
    """It could not be looked at, or takes time; it counts as not there."""
    return Observation(
        capability=capability,
        status=Status.NOT_PROBED,
        evidence=evidence,
        reason=cleaned(reason, 400),
        command=command,
    )


def declared(capability: str, value: str, *evidence: str) -> Observation:
    """Somebody says so, and nothing shows it."""
    return Observation(
        capability=capability,
        status=Status.DECLARED,
        value=cleaned(value, 400),
        seen=Assurance.DECLARED,
        evidence=evidence,
    )


def unread(capability: str, read: Read) -> Observation:
    """A file that is there and tells nothing: denied, or not what it should be."""
    if read.state is State.DENIED:
        return not_probed(capability, f"{read.path} may be read by root only: run it as root", read.shown())
    return not_probed(capability, f"{read.path} cannot be used: {read.why}", read.shown())


def without_securityfs(tree: Tree, capability: str, read: Read) -> Observation | None:
    """`not_probed` where the kernel's security file system is not mounted at all: then its files say nothing."""
    if read.state is State.ABSENT and not tree.names(SECURITYFS):
        return not_probed(
            capability,
            f"{SECURITYFS} is empty: mount -t securityfs securityfs {SECURITYFS}, or look outside of the container",
            f"{SECURITYFS}: empty",
        )
    return None


def arguments(tree: Tree) -> dict[str, str]:
    """The kernel's command line: name to value (empty for a flag), the last one of a name as the kernel takes it."""
    found: dict[str, str] = {}
    for word in tree.read("/proc/cmdline").text.split():
        if word == "--":
            break  # what follows is init's, not the kernel's
        name, _, value = word.partition("=")
        found[name.replace("-", "_")] = value
    return found


def configured(tree: Tree, option: str) -> bool:
    """Whether the running kernel was built with CONFIG_`option`=y, as far as /boot tells."""
    release = tree.read("/proc/sys/kernel/osrelease").text
    if not release or "/" in release:
        return False
    config = tree.read(f"/boot/config-{release}", 1 << 20)
    return config.ok and f"\nCONFIG_{option}=y\n" in f"\n{config.text}\n"


def cpu_flags(tree: Tree) -> frozenset[str]:
    """The flags of the first processor."""
    for line in tree.read("/proc/cpuinfo", 4 << 20).text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def truth(text: str) -> bool:
    """Whether a kernel parameter file says yes."""
    return text.strip() in ("Y", "y", "1", "on")


def number(text: str) -> int | None:
    """The number a kernel file holds: up to nine ASCII digits, nothing else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None
