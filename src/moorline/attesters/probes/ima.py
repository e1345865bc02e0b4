"""Integrity at run time: what IMA measures and appraises (SEC009 5.1.5, 6.21)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import (
    SECURITYFS,
    arguments,
    met,
    not_met,
    not_probed,
    number,
    unread,
    without_securityfs,
)
from moorline.attesters.probes.tree import State, Tree
from moorline.errors import Malformed
from moorline.evidence.ima import parse_line
from moorline.policy.sec009.assessment import Observation

LIST: Final = f"{SECURITYFS}/ima/ascii_runtime_measurements"
_COUNT: Final = f"{SECURITYFS}/ima/runtime_measurements_count"
_CAP: Final = 64 << 20
CAPABILITIES: Final = ("ima.measurement", "ima.appraisal.enforced", "integrity.runtime")


def probe(tree: Tree) -> Iterator[Observation]:
    """The measurement list, appraisal, and why integrity at run time needs a verifier."""
    yield _measurement(tree)
    yield _appraisal(tree)
    yield not_probed(
        "integrity.runtime",
        "whether all that ran is allowed takes reference values and a verifier on another machine",
        command="moor host run (with [attestation]), and moor verifier run elsewhere",
    )


def _measurement(tree: Tree) -> Observation:
    name, count = "ima.measurement", tree.read(_COUNT)
    entries = number(count.text) if count.ok else None
    if entries is not None:
        if entries > 1:
            return met(name, f"{entries} entries", count.shown())
        return not_met(name, "IMA holds no more than boot_aggregate: no policy measures files", count.shown())
    read = tree.read(LIST, _CAP)
    if not read.ok:
        if read.state is not State.ABSENT:
            return unread(name, read)
        return without_securityfs(tree, name, read) or not_met(name, "this kernel has no IMA", read.shown())
    lines = read.data.split(b"\n")[:-1]
    try:
        # The first and the last are enough to know that it is a list; the verifier reads them all.
        for line in lines[:1] + lines[-1:]:
            parse_line(line)
    except Malformed as error:
        return not_met(name, f"the list is no IMA list: {error}", read.shown(f"{len(read.data)} bytes"))
    if len(lines) < 2:
        return not_met(name, "IMA holds no more than boot_aggregate: no policy measures files", read.shown())
    return met(name, f"{len(lines)} entries", read.shown(f"{len(lines)} entries"))


def _appraisal(tree: Tree) -> Observation:
    name, words = "ima.appraisal.enforced", arguments(tree)
    policy = tree.read(f"{SECURITYFS}/ima/policy", 1 << 20)
    mode = words.get("ima_appraise")
    said = f"/proc/cmdline: ima_appraise={mode}" if mode is not None else "/proc/cmdline: no ima_appraise"
    if mode in ("off", "log", "fix"):
        return not_met(name, "appraisal does not refuse", said, value=mode)
    rules = [line for line in policy.text.splitlines() if line.startswith("appraise ")] if policy.ok else []
    if rules and tree.has(f"{SECURITYFS}/ima"):
        return met(name, f"{len(rules)} rules", said, policy.shown(f"{len(rules)} appraise rules"))
    if mode == "enforce" and "appraise_tcb" in words.get("ima_policy", "") and tree.has(f"{SECURITYFS}/ima"):
        return met(name, "appraise_tcb", said, f"/proc/cmdline: ima_policy={words['ima_policy']}")
    if policy.state is State.DENIED:
        return unread(name, policy)
    missing = without_securityfs(tree, name, policy)
    return missing or not_met(name, "no rule appraises files", said, policy.shown())
