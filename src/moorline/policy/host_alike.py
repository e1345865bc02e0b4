"""Verdicts about many hosts, once a period: what the rules say about the same boot and the same files is worked out once.

`AlikeHosts.appraise` comes to what `policy.host.appraise_host` comes to, field by field (tests/hosts/test_alike.py). Hosts
of one fleet boot alike, and a host that stands shows the same thing again and again; of ten thousand verdicts nearly all
have the same findings about what was measured.

1. What is a host's own is judged for each verdict: that its quote was verified, its place by its tag and the time, what
   landmarks say.
2. What depends on measurements alone is kept under everything it depends on: the boot state (this very object), the
   standing of its files, whether the clock is safe, what the evidence rests on. Policy and reference values are those of
   one `AlikeHosts`; other values are another.
3. Vector, spread of doubt and capabilities depend on which rules were met, and on the words of a tag: those of 1 are under
   what is kept, too.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from moorline.policy import host
from moorline.policy.host import Appraisal, HostFacts, HostPolicy
from moorline.policy.reference_values import Reference
from moorline.rats import AttestationResult, CapabilityLevel, EvidenceRoot, Finding, Outcome, Submodule, Tier
from moorline.verification.eventlog import BootState

KEPT: Final = 1024
"""Kinds of verdict that are kept; more are worked out again."""


@dataclass(frozen=True, slots=True)
class _Case:
    """What a verdict depends on, but for the host's own identifiers, its challenge and the time."""

    boot_digest: bytes
    files: host.FileStanding | None
    clock_safe: bool
    root: EvidenceRoot
    simulated_allowed: bool
    place: tuple[tuple[str, Outcome], ...]
    words: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A verdict that was worked out, without what is one host's own. `boot` is the state it was worked out from."""

    boot: BootState | None
    measured: tuple[Finding, ...]
    vector: dict[str, Tier]
    capabilities: tuple[CapabilityLevel, ...]
    submodules: tuple[Submodule, ...]


class AlikeHosts:
    """Judges hosts by one policy and one set of reference values."""

    def __init__(self, policy: HostPolicy, reference: Reference) -> None:
        self._policy, self._reference = policy, reference
        self._digest = host.policy_digest(policy, reference)
        self._kept: OrderedDict[_Case, _Kept] = OrderedDict()

    def appraise(self, facts: HostFacts, appraisal: Appraisal) -> AttestationResult:
        """The verdict about one host, as `policy.host.appraise_host` has it."""
        place = host.findings_of_place(facts, self._policy, appraisal.issued)  # 1
        case = _case(facts, appraisal, place)
        kept = self._kept.get(case)
        if kept is None or kept.boot is not facts.boot:
            return self._worked_out(case, facts, appraisal)
        return AttestationResult(
            subject=f"host/{facts.host}",
            verifier=appraisal.verifier,
            issued=appraisal.issued,
            expires=appraisal.expires,
            root=facts.quote.root,
            simulated_allowed=appraisal.simulated_allowed,
            vector=kept.vector,
            findings=(host.finding_of_identity(facts), *kept.measured, *place),
            policy_digest=self._digest,
            nonce=appraisal.nonce,
            capabilities=kept.capabilities,
            bound=host.bound(facts),
            submodules=kept.submodules,
        )

    def _worked_out(self, case: _Case, facts: HostFacts, appraisal: Appraisal) -> AttestationResult:
        result = host.appraise_host(facts, self._policy, reference=self._reference, appraisal=appraisal)
        measured = result.findings[1 : len(result.findings) - len(case.place)]
        self._kept[case] = _Kept(facts.boot, measured, result.vector, result.capabilities, result.submodules)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return result


def _case(facts: HostFacts, appraisal: Appraisal, place: tuple[Finding, ...]) -> _Case:
    tag = None if facts.location is None else facts.location.tag
    return _Case(
        facts.boot_digest,
        facts.files,
        facts.quote.value.clock.safe,
        facts.quote.root,
        appraisal.simulated_allowed,
        tuple([(finding.code, finding.outcome) for finding in place]),
        () if tag is None else (tag.location, tag.geographical, tag.logical),
    )
