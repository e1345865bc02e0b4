"""Intel SGX and TDX: handed to `policy.intel_case`, which knows every Intel hint."""

from __future__ import annotations

from typing import Final

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.case import Case, Entry
from moorline.cli.evidence_cases.compare import Facts
from moorline.policy import intel_case
from moorline.rats import EvidenceRoot, Finding
from moorline.verification.intel_pck import IntelAnchor, IntelAnchors, production_intel_anchors
from moorline.verification.sgx import SgxClaims
from moorline.verification.tdx import TdxClaims
from moorline.verification.verified import Verified

HINTS: Final = frozenset({"sgx-quote", "tdx-quote", "oe-report", "ratls-cert", "ccel", "ccel-acpi-table"})


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    outcome = intel_case.run_case(
        evidence=_files(case, case.evidence),
        endorsements=_files(case, case.endorsements),
        mode=case.mode,
        at=case.at,
        inputs=case.inputs,
        policy=case.policy,
        anchors=_anchors(case),
        simulated_allowed=bool(case.files("trust_anchor_files")),
    )
    facts.update(outcome.facts)
    return outcome.findings


def verify(case: Case, facts: Facts) -> Verified[SgxClaims] | Verified[TdxClaims]:
    """What the case proves, before any policy."""
    verified, found = intel_case.verify_case(
        evidence=_files(case, case.evidence),
        endorsements=_files(case, case.endorsements),
        at=case.at,
        inputs=case.inputs,
        anchors=_anchors(case),
    )
    facts.update(found)
    return verified


def _anchors(case: Case) -> IntelAnchors:
    """Intel's root, or the keys of the roots that the case names."""
    named = material.anchors(case)
    if not named:
        return production_intel_anchors()
    return IntelAnchors(
        anchors=tuple(IntelAnchor(public_key=material.spki_of_certificate(der), root=EvidenceRoot.TEST) for der in named)
    )


def _files(case: Case, entries: tuple[Entry, ...]) -> list[intel_case.CaseFile]:
    return [intel_case.CaseFile(name=entry.file, hint=entry.hint, data=case.read(entry.file)) for entry in entries]
