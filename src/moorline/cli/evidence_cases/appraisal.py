"""Files in any order to one verdict: kinds by content, evidence and endorsements apart, one family, then policy.

What was not looked at is part of the verdict. Nothing is taken from evidence that should come from whoever asks: where
no nonce or report data is given, freshness is named as not appraised. The verdict depends on what was asked and on the bytes
of the files alone, so it can be computed again from a record (`record`).
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from moorline.cli.evidence_cases import classes, detect, families
from moorline.cli.evidence_cases.case import Case, Entry, Expected
from moorline.cli.evidence_cases.compare import Facts
from moorline.cli.evidence_cases.facts import facts_of
from moorline.clock import Instant, rendered
from moorline.digest import tagged_hash
from moorline.errors import Misconfigured, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.policy import language
from moorline.policy.host import trust_vector
from moorline.policy.language import Policy, PolicyText
from moorline.policy.match import meets
from moorline.policy.tpm import TpmFacts
from moorline.rats import (
    Assurance,
    AttestationResult,
    EvidenceRoot,
    Finding,
    Outcome,
    Tier,
    capped,
)
from moorline.verification.tdx import TdxClaims

AFFIRMING: Final = "affirming"
AUTHENTIC: Final = "authentic"
REFUSED: Final = "refused"
UNDECIDED: Final = "undecided"
LEASE_S: Final = 300
"""How long a token about a verdict holds."""

_LOGS: Final = frozenset({"eventlog", "ima"})
_UNTYPED: Final = frozenset({"cca-platform-token", "parsec-cca"})
"""Evidence whose authenticity is appraised, and for which no policy is defined."""
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
    """What came out. `status` is affirming (policy met), authentic (no policy was given), refused or undecided.

    `level` is what an affirming verdict is worth: at most what its root carries. `evidence` and `endorsements` are SHA-256
    of the files by name, `collateral_digest` names the endorsements that the verification used.
    """

    status: str
    at: Instant
    files: dict[str, str]
    family: str | None
    facts: Facts
    root: EvidenceRoot | None
    findings: tuple[Finding, ...]
    not_appraised: tuple[str, ...]
    error: MoorlineError | None
    policy_digest: str | None
    collateral_digest: str | None
    evidence: dict[str, str]
    endorsements: dict[str, str]
    references: dict[str, int]

    @property
    def level(self) -> Assurance:
        """The assurance of an affirming verdict, capped by its root; none of any other."""
        if self.status != AFFIRMING or self.root is None:
            return Assurance.NONE
        return capped(Assurance.HW_ATTESTED, self.root, simulated_allowed=False)

    @property
    def vector(self) -> dict[str, Tier]:
        """The AR4SI trustworthiness vector."""
        return trust_vector(self.findings)

    def as_json(self) -> dict[str, object]:
        """The verdict for programs, and for comparing it with another one."""
        return {
            "status": self.status,
            "at": rendered(self.at),
            "authenticity_only": self.policy_digest is None,
            "family": self.family,
            "root": None if self.root is None else self.root.value,
            "level": self.level.word,
            "trust_vector": {claim: tier.word for claim, tier in self.vector.items()},
            "policy_digest": self.policy_digest,
            "collateral_digest": self.collateral_digest,
            "evidence": self.evidence,
            "endorsements": self.endorsements,
            "references": self.references,
            "files": self.files,
            "facts": self.facts,
            "findings": [{**asdict(finding), "outcome": finding.outcome.value} for finding in self.findings],
            "not_appraised": list(self.not_appraised),
            "error": None if self.error is None else self.error.as_problem(),
        }

    def result(self, *, nonce: bytes) -> AttestationResult:
        """The verdict as an Attestation Result, to be signed. Raises Misconfigured("evidence.token_without_policy")."""
        if self.policy_digest is None:
            raise Misconfigured(
                "evidence.token_without_policy",
                "without a policy nothing was decided that could be signed",
                remedy="give a policy",
            )
        named = tagged_hash("evidence-files", *sorted(bytes.fromhex(one) for one in self.evidence.values()))
        bound = {"status": self.status, "collateral": self.collateral_digest or "none"}
        bound |= {f"evidence:{name}": digest for name, digest in self.evidence.items()}
        bound |= {f"collateral:{name}": digest for name, digest in self.endorsements.items()}
        bound |= {f"references:{name}": str(serial) for name, serial in self.references.items()}
        return AttestationResult(
            subject=f"evidence/{named.hex()}",
            verifier="moor evidence",
            issued=self.at,
            expires=Instant(self.at + LEASE_S),
            root=self.root or EvidenceRoot.NONE,
            simulated_allowed=False,
            vector=self.vector,
            findings=self.findings,
            policy_digest=bytes.fromhex(self.policy_digest),
            nonce=nonce,
            bound=bound,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What whoever appraises knows: what the evidence must be bound to, when, by which policy and reference values.

    `highest` is the highest serial that was seen of each set of reference values.
    """

    at: Instant
    nonce: str | None
    report_data: str | None
    policy: PolicyText | None
    references: tuple[bytes, ...] = ()
    highest: Mapping[str, int] | None = None


def kinds_of(files: dict[str, bytes]) -> dict[str, str]:
    """The kind of each file. Raises Unavailable (`evidence.*`), naming the file."""
    return {name: detect.kind_of(name, data) for name, data in files.items()}


def appraise(files: dict[str, bytes], asked: Asked) -> Verdict:
    """The verdict about `files` (name to contents). Never raises for what the files, or the reference values, hold."""
    draft = _Draft(asked=asked, files=files)
    try:
        draft.kinds = kinds_of(files)
        case = _case(files, draft.kinds, asked)
        draft.family = _family(case)
    except MoorlineError as error:
        return draft.failed(UNDECIDED, error)
    try:
        if asked.policy is not None:
            draft.policy = language.resolve(asked.policy, asked.references, now=asked.at, highest=asked.highest or {})
    except MoorlineError as error:  # reference values that do not count say nothing about the evidence
        return draft.failed(UNDECIDED, error)
    try:
        return _judged(case, draft)
    except (NotAuthentic, Refused) as error:
        return draft.failed(REFUSED, error)
    except MoorlineError as error:
        return draft.failed(UNDECIDED, error)


class _Draft:
    """What is known so far: a verdict that fails half-way still says what was found."""

    def __init__(self, *, asked: Asked, files: dict[str, bytes]) -> None:
        self.asked = asked
        self.files = files
        self.kinds: dict[str, str] = {}
        self.family: str | None = None
        self.facts: Facts = {}
        self.policy: Policy | None = None

    def _named_policy(self) -> str | None:
        """The policy with its reference values; its text alone where those were not reached, or did not count."""
        text = self.asked.policy
        if text is None:
            return None
        return (text.digest if self.policy is None else self.policy.digest).hex()

    def failed(self, status: str, error: MoorlineError) -> Verdict:
        """No verdict by policy was reached: refused because it is not authentic, or undecided."""
        outcome = Outcome.NOT_MET if status == REFUSED else Outcome.NOT_APPRAISED
        finding = Finding(
            code=error.code,
            outcome=outcome,
            claim=_claim_of(error.code),
            says=error.says,
            expected=error.expected,
            got=error.got,
            remedy=error.remedy,
        )
        return self.verdict(status=status, findings=(finding,), not_appraised=("policy",), error=error)

    def verdict(
        self,
        *,
        status: str,
        findings: tuple[Finding, ...],
        not_appraised: tuple[str, ...],
        root: EvidenceRoot | None = None,
        collateral: bytes | None = None,
        error: MoorlineError | None = None,
    ) -> Verdict:
        """The verdict, with everything that does not depend on how it came out."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        return Verdict(
            status=status,
            at=self.asked.at,
            files=self.kinds,
            family=self.family,
            facts=self.facts,
            root=root,
            findings=findings,
            not_appraised=not_appraised,
            error=error,
            policy_digest=self._named_policy(),
            collateral_digest=None if collateral is None else collateral.hex(),
            evidence={name: one for name, one in digests.items() if self.kinds.get(name) in detect.EVIDENCE},
            endorsements={name: one for name, one in digests.items() if self.kinds.get(name) not in detect.EVIDENCE},
            references={} if self.policy is None else {one.name: one.serial for one in self.policy.sets},
        )


def _judged(case: Case, draft: _Draft) -> Verdict:
    family, policy = draft.family, draft.policy
    assert family is not None  # set by the caller
    composite = any(entry.hint.startswith("azure-") for entry in case.evidence)
    gaps = _not_appraised(family, draft.asked, composite=composite)
    if family in _LOGS or case.evidence[0].hint in _UNTYPED:
        return _alone(case, draft, family, gaps)
    verified = _verified(case, family, draft)
    draft.family = _name(family, verified)
    held = verified.quote if isinstance(verified, TpmFacts) else verified
    if policy is None:
        return draft.verdict(
            status=AUTHENTIC, findings=(), not_appraised=gaps, root=held.root, collateral=held.collateral_digest
        )
    if policy.family != draft.family:
        raise Misconfigured(
            "evidence.policy_family", "the policy is for other evidence", expected=draft.family, got=policy.family
        )
    findings = policy.appraise(verified)
    refused = any(finding.outcome is Outcome.NOT_MET for finding in findings)
    return draft.verdict(
        status=REFUSED if refused else AFFIRMING,
        findings=findings,
        not_appraised=(*gaps, *(finding.code for finding in findings if finding.outcome is Outcome.NOT_APPRAISED)),
        root=held.root,
        collateral=held.collateral_digest,
    )


def _alone(case: Case, draft: _Draft, family: str, gaps: tuple[str, ...]) -> Verdict:
    """Evidence that is authentic or consistent and nothing more."""
    module: Any = importlib.import_module(f"moorline.cli.evidence_cases.families.{family}")
    if family in _LOGS:
        draft.facts.update(facts_of(case.evidence[0].hint, case.read(case.evidence[0].file)))
        raise Unavailable(
            "evidence.log_alone",
            "a log says what it says, and nothing more: no TPM's word is among the files",
            remedy="give the quote, its signature, its PCR values and the key, too",
        )
    module.run(case, draft.facts)
    if draft.policy is not None:
        raise Misconfigured(
            "evidence.policy_family", "no policy is defined for this kind of evidence", got=case.evidence[0].hint
        )
    return draft.verdict(status=AUTHENTIC, findings=(), not_appraised=gaps)


def _verified(case: Case, family: str, draft: _Draft) -> Any:  # noqa: ANN401 - each family proves something else
    module: Any = importlib.import_module(f"moorline.cli.evidence_cases.families.{family}")
    if family != "tpm":
        return module.verify(case, draft.facts)
    policy = draft.policy
    if policy is None or policy.family != "tpm":
        return module.verify(case, draft.facts, bank=lambda _name: True, allowed={})
    demand = policy.policy.bank
    return module.verify(case, draft.facts, bank=lambda name: meets(name, demand), allowed=policy.files)


def _name(family: str, verified: Any) -> str:  # noqa: ANN401 - as above
    if family != "intel":
        return family
    return "tdx" if isinstance(verified.value, TdxClaims) else "sgx"


def _claim_of(code: str) -> str:
    """The AR4SI claim that an error bears on: what was measured, or who it is."""
    return "executables" if classes.class_of(code) in ("replay", "log", "measurement") else "instance-identity"


def _not_appraised(family: str, asked: Asked, *, composite: bool) -> tuple[str, ...]:
    """What no rule looked at, beside what a policy leaves out."""
    gaps = [] if asked.policy is not None else ["policy"]
    needed = _BOUND.get(family)
    given = {"nonce_hex": asked.nonce, "report_data_hex": asked.report_data}
    if composite:
        gaps.append("the hardware evidence under the vTPM: only its authenticity")
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
