"""Whether this machine is itself a guest or a container, and what it does to guests of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline.attesters.probes.saying import cpu_flags
from moorline.attesters.probes.tree import Tree, cleaned

_VENDORS: Final = (
    "QEMU",
    "KVM",
    "VMware",
    "Xen",
    "innotek",
    "Amazon EC2",
    "Google",
    "Microsoft Corporation Virtual",
    "Bochs",
)
_MAX_PROCESSES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A QEMU process: its id, its security label, and whether a monitor can dump its memory."""

    pid: str
    label: str
    monitor: bool


def guest_of(tree: Tree) -> str | None:
    """What this machine is a guest of, or None. A machine can hide it: then a virtual thing is taken for a real one."""
    vendor = tree.read("/sys/class/dmi/id/sys_vendor").text
    product = tree.read("/sys/class/dmi/id/product_name").text
    said = f"{vendor} {product}".strip()
    if any(one.lower() in said.lower() for one in _VENDORS) or "virtual machine" in said.lower():
        return cleaned(said, 60)
    kind = tree.read("/sys/hypervisor/type").text
    if kind:
        return cleaned(kind, 60)
    return "hypervisor flag of the processor" if "hypervisor" in cpu_flags(tree) else None


def container(tree: Tree) -> str | None:
    """The kind of container this is looked at from, or None."""
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if tree.has(path):
            return kind
    named = tree.read("/proc/1/environ").text
    for word in named.replace("\\x00", " ").replace("\x00", " ").split():
        if word.startswith("container="):
            return cleaned(word.partition("=")[2], 30) or None
    return None


def processes(tree: Tree) -> list[tuple[str, list[str]]]:
    """Process ids with their command lines; those that cannot be read are left out."""
    found = []
    for name in [name for name in tree.names("/proc") if name.isdecimal()][:_MAX_PROCESSES]:
        words = tree.read(f"/proc/{name}/cmdline").data.decode("utf-8", "replace").split("\x00")
        if words and words[0]:
            found.append((name, words))
    return found


def guests(tree: Tree) -> list[Guest]:
    """The QEMU processes that can be seen."""
    found = []
    for pid, words in processes(tree):
        if not words[0].rpartition("/")[2].startswith(("qemu-system-", "qemu-kvm")):
            continue
        monitor = any(word in ("-monitor", "-qmp", "-mon") or word.startswith("mode=control") for word in words)
        found.append(Guest(pid=pid, label=cleaned(tree.read(f"/proc/{pid}/attr/current").text, 80), monitor=monitor))
    return found
