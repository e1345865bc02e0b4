"""Checks of kernel settings, each with a stable id (SEC009 6.4): how much of the usual hardening is in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation

CAPABILITIES: Final = ("posture.score",)
_ENOUGH: Final = 0.8
_CHECKS: Final = (
    ("kptr", "/proc/sys/kernel/kptr_restrict", ("1", "2")),
    ("dmesg", "/proc/sys/kernel/dmesg_restrict", ("1",)),
    ("kexec", "/proc/sys/kernel/kexec_load_disabled", ("1",)),
    ("bpf", "/proc/sys/kernel/unprivileged_bpf_disabled", ("1", "2")),
    ("bpf_jit", "/proc/sys/net/core/bpf_jit_harden", ("1", "2")),
    ("ptrace", "/proc/sys/kernel/yama/ptrace_scope", ("1", "2", "3")),
    ("aslr", "/proc/sys/kernel/randomize_va_space", ("2",)),
    ("suid_dump", "/proc/sys/fs/suid_dumpable", ("0",)),
    ("hardlinks", "/proc/sys/fs/protected_hardlinks", ("1",)),
    ("symlinks", "/proc/sys/fs/protected_symlinks", ("1",)),
    ("fifos", "/proc/sys/fs/protected_fifos", ("1", "2")),
    ("regular", "/proc/sys/fs/protected_regular", ("1", "2")),
    ("sysrq", "/proc/sys/kernel/sysrq", ("0", "176", "16")),
    ("smt", "/sys/devices/system/cpu/smt/active", ("0",)),
    ("perf", "/proc/sys/kernel/perf_event_paranoid", ("2", "3", "4")),
)


def probe(tree: Tree) -> Iterator[Observation]:
    """The share of checks that pass; a setting that cannot be read does not pass."""
    name = CAPABILITIES[0]
    if not tree.has("/proc/sys/kernel"):
        yield not_probed(name, "/proc/sys is not there")
        return
    results = [(identifier, tree.read(path), wanted) for identifier, path, wanted in _CHECKS]
    passed = [identifier for identifier, read, wanted in results if read.ok and read.text in wanted]
    evidence = tuple(
        f"{identifier} {'passed' if identifier in passed else 'failed'}: {read.shown()}" for identifier, read, _ in results
    )
    score = f"{len(passed)}/{len(results)}"
    if len(passed) >= _ENOUGH * len(results):
        yield met(name, score, *evidence)
    else:
        yield not_met(name, f"{score} checks pass, {_ENOUGH:.0%} are asked", *evidence, value=score)
