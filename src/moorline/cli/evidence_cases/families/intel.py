"""Intel SGX and TDX: handed to `policy.intel_case`, which knows every Intel hint."""

from __future__ import annotations

from typing import Final

from moorline.cli.evidence_cases.case import Case, Entry
from moorline.cli.evidence_cases.compare import Facts
from moorline.errors import Unavailable
from moorline.policy import intel_case
from moorline.rats import Finding
from moorline.verification.intel_pck import production_intel_anchors

HINTS: Final = frozenset(
    {"sgx-quote", "tdx-quote", "oe-report", "ratls-cert", "ccel", "ccel-acpi-table", "tsm-json", "envelope-json"}
)


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    if case.files("trust_anchor_files"):
        raise Unavailable("material.unsupported", "Intel evidence is verified under the root that the package ships")
    outcome = intel_case.run_case(
        evidence=_files(case, case.evidence),
        endorsements=_files(case, case.endorsements),
        mode=case.mode,
        at=case.at,
        inputs=case.inputs,
        policy=case.policy,
        anchors=production_intel_anchors(),
    )
    facts.update(outcome.facts)
    return outcome.findings


def _files(case: Case, entries: tuple[Entry, ...]) -> list[intel_case.CaseFile]:
    return [intel_case.CaseFile(name=entry.file, hint=entry.hint, data=case.read(entry.file)) for entry in entries]
