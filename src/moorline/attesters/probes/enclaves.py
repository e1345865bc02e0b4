"""Which hardware-mediated execution enclaves this host can give to guests (SEC009 6.16)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.hypervisor import guest_of
from moorline.attesters.probes.saying import cpu_flags, met, not_met, not_probed, number, truth, unread
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation

_PARAMETERS: Final = (
    ("hmee.sev", "/sys/module/kvm_amd/parameters/sev"),
    ("hmee.sev_es", "/sys/module/kvm_amd/parameters/sev_es"),
    ("hmee.sev_snp", "/sys/module/kvm_amd/parameters/sev_snp"),
    ("hmee.tdx", "/sys/module/kvm_intel/parameters/tdx"),
)
_CAPACITY: Final = "/sys/fs/cgroup/misc.capacity"
_CURRENT: Final = "/sys/fs/cgroup/misc.current"
_SLOTS: Final = ("sev_es", "sev", "tdx")
CAPABILITIES: Final = (*(name for name, _ in _PARAMETERS), "hmee.sgx", "hmee.slots.free", "hmee.tcb.minimum")


def probe(tree: Tree) -> Iterator[Observation]:
    """What the kernel's modules say they support. That a function really runs in one is shown by its own report only."""
    guest = guest_of(tree)
    for name, path in _PARAMETERS:
        read = tree.read(path)
        if read.ok and truth(read.text):
            yield met(name, f"enabled{f', in a guest of {guest}' if guest else ''}", read.shown())
        elif read.state in (State.DENIED, State.ODD):
            yield unread(name, read)
        else:
            yield not_met(name, "the kernel offers no such guests", read.shown())
    yield _sgx(tree)
    yield _slots(tree)
    yield not_probed(
        "hmee.tcb.minimum",
        "only a report that the processor signed for a guest tells its TCB",
        command="moor evidence collect in a guest, then moor evidence appraise elsewhere",
    )


def _sgx(tree: Tree) -> Observation:
    flag, device = "sgx" in cpu_flags(tree), tree.has("/dev/sgx_enclave")
    evidence = (
        f"/proc/cpuinfo: sgx {'in' if flag else 'not in'} flags",
        f"/dev/sgx_enclave: {'there' if device else 'absent'}",
    )
    if flag and device:
        return met("hmee.sgx", "enabled; code loaded after the start is outside of the measurement", *evidence)
    return not_met("hmee.sgx", "processor, firmware or kernel offer no SGX", *evidence)


def _slots(tree: Tree) -> Observation:
    name, capacity = "hmee.slots.free", tree.read(_CAPACITY)
    if not capacity.ok:
        if capacity.state is not State.ABSENT:
            return unread(name, capacity)
        return not_met(name, "the kernel counts no contexts for encrypted guests", capacity.shown())
    total, used = _numbers(capacity.text), _numbers(tree.read(_CURRENT).text)
    free = {kind: total[kind] - used.get(kind, 0) for kind in _SLOTS if kind in total}
    said = ", ".join(f"{kind} {number}" for kind, number in free.items())
    if any(number > 0 for number in free.values()):
        return met(name, said, capacity.shown(), tree.read(_CURRENT).shown())
    return not_met(name, "no context is free", capacity.shown(), value=said or None)


def _numbers(text: str) -> dict[str, int]:
    """`name number` a line; a line of another kind is none."""
    rows = [line.split() for line in text.splitlines()]
    read = {row[0]: number(row[1]) for row in rows if len(row) == 2}
    return {name: value for name, value in read.items() if value is not None}
