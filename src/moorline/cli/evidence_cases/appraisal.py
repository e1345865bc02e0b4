"""Files in any order to one verdict: kinds by content, evidence and endorsements apart, one family, then policy.

What was not looked at is part of the verdict. Nothing is taken from evidence that should come from whoever asks: where
no nonce or report data is given, freshness is named as not appraised.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moorline.cli.evidence_cases import detect, families
from moorline.cli.evidence_cases.case import Case, Entry, Expected
from moorline.cli.evidence_cases.compare import Facts
from moorline.cli.evidence_cases.policy_file import PolicyFile
from moorline.clock import Instant
from moorline.errors import Misconfigured, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.rats import Finding, Outcome

AFFIRMING: Final = "affirming"
AUTHENTIC: Final = "authentic"
REFUSED: Final = "refused"
UNDECIDED: Final = "undecided"
_TYPED: Final = frozenset({"snp", "cca", "psa", "nitro"})
_LOGS: Final = frozenset({"eventlog", "ima"})
_BOUND: Final = {
    "snp": "report_data_hex",
    "intel": "report_data_hex",
    "cca": "nonce_hex",
    "psa": "nonce_hex",
    "nitro": "nonce_hex",
    "tpm": "nonce_hex",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came out. `status` is affirming (policy met), authentic (no policy was given), refused or undecided."""

    status: str
    files: dict[str, str]
    family: str | None
    facts: Facts
    root: str | None
    findings: tuple[Finding, ...]
    not_appraised: tuple[str, ...]
    error: MoorlineError | None
    policy_digest: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What whoever appraises knows: what the evidence must be bound to, when, and by which policy."""

    at: Instant
    nonce: str | None
    report_data: str | None
    policy: PolicyFile | None


def kinds_of(files: dict[str, bytes]) -> dict[str, str]:
    """The kind of each file. Raises Unavailable (`evidence.*`), naming the file."""
    return {name: detect.kind_of(name, data) for name, data in files.items()}


def appraise(files: dict[str, bytes], asked: Asked) -> Verdict:
    """The verdict about `files` (name to contents). Never raises for what the files hold."""
    facts: Facts = {}
    kinds: dict[str, str] = {}
    family: str | None = None
    try:
        kinds = kinds_of(files)
        case = _case(files, kinds, asked)
        family = _family(case)
        return _judged(case, family, kinds, facts, asked)
    except (NotAuthentic, Refused) as error:
        return _failed(REFUSED, kinds, family, facts, error, asked)
    except MoorlineError as error:
        return _failed(UNDECIDED, kinds, family, facts, error, asked)


def _judged(case: Case, family: str, kinds: dict[str, str], facts: Facts, asked: Asked) -> Verdict:
    module: Any = importlib.import_module(f"moorline.cli.evidence_cases.families.{family}")
    gaps = _not_appraised(family, asked)
    findings: tuple[Finding, ...] = ()
    status, root = AUTHENTIC, None
    if asked.policy is None:
        module.run(case, facts)
        if family in _LOGS:
            raise Unavailable(
                "evidence.log_alone",
                "the log is consistent, and nothing more: no TPM's word is among the files",
                remedy="give the quote, its signature, its PCR values and the key, too",
            )
    else:
        if asked.policy.family != family or family not in _TYPED:
            raise Misconfigured(
                "evidence.policy_family", "the policy is for other evidence", expected=family, got=asked.policy.family
            )
        verified = module.verify(case, facts)
        findings = asked.policy.appraise(verified)
        root = verified.root.value
        refused = any(finding.outcome is Outcome.NOT_MET for finding in findings)
        status = REFUSED if refused else AFFIRMING
        gaps = (*gaps, *(finding.code for finding in findings if finding.outcome is Outcome.NOT_APPRAISED))
    return Verdict(
        status=status,
        files=kinds,
        family=family,
        facts=facts,
        root=root,
        findings=findings,
        not_appraised=gaps,
        error=None,
        policy_digest=None if asked.policy is None else asked.policy.digest.hex(),
    )


def _failed(
    status: str, kinds: dict[str, str], family: str | None, facts: Facts, error: MoorlineError, asked: Asked
) -> Verdict:
    return Verdict(
        status=status,
        files=kinds,
        family=family,
        facts=facts,
        root=None,
        findings=(),
        not_appraised=("policy",),
        error=error,
        policy_digest=None if asked.policy is None else asked.policy.digest.hex(),
    )


def _not_appraised(family: str, asked: Asked) -> tuple[str, ...]:
    """What no rule looked at, beside what a policy leaves out."""
    gaps = [] if asked.policy is not None else ["policy"]
    needed = _BOUND.get(family)
    given = {"nonce_hex": asked.nonce, "report_data_hex": asked.report_data}
    if needed is not None and given[needed] is None:
        gaps.append("freshness and binding: no --nonce or --report-data was given")
    return tuple(gaps)


def _case(files: dict[str, bytes], kinds: dict[str, str], asked: Asked) -> Case:
    entries = [Entry(name, kind) for name, kind in kinds.items()]
    evidence = tuple(entry for entry in entries if entry.hint in detect.EVIDENCE)
    endorsements = tuple(entry for entry in entries if entry.hint not in detect.EVIDENCE)
    if not evidence:
        raise Unavailable(
            "evidence.none",
            "none of the files is evidence",
            got=", ".join(f"{name}: {kind}" for name, kind in kinds.items()),
        )
    return Case(
        family="",
        name="",
        folder=Path(),
        kind="evidence",
        mode="authentic",
        at=asked.at,
        evidence=evidence,
        endorsements=endorsements,
        reference=(),
        inputs=_inputs(evidence, endorsements, asked),
        policy={},
        expected=Expected(outcome="accept", code_class=None),
        per_file=None,
        facts={},
        contents=files,
    )


def _inputs(evidence: tuple[Entry, ...], endorsements: tuple[Entry, ...], asked: Asked) -> dict[str, object]:
    """What the families must be told; the keys of the case schema."""
    keyed = any(entry.hint in ("public-key-pem", "public-key-jwk", "tpmt-public") for entry in endorsements)
    composite = any(entry.hint.startswith("azure-") for entry in evidence)
    inputs: dict[str, object] = {
        "collateral": "full",
        "ak_trust": "composite" if composite else "given" if keyed else "certificate",
        "sha1_signatures": "refused",
    }
    if asked.nonce is not None:
        inputs["nonce_hex"] = asked.nonce
    if asked.report_data is not None:
        inputs["report_data_hex"] = asked.report_data
    if asked.policy is not None:
        inputs["supplied_root"] = asked.policy.supplied_root.value
    return inputs


def _family(case: Case) -> str:
    run = families.family_of(case)
    if run is None:
        raise Unavailable(
            "evidence.mixed",
            "these kinds of evidence do not belong together",
            got=", ".join(f"{entry.file}: {entry.hint}" for entry in case.evidence),
            remedy="appraise one evidence at a time",
        )
    return run.__module__.rsplit(".", 1)[-1]
