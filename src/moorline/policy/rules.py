"""What the appraisals of enclaves have in common: one demand makes one finding, and silence refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from moorline.policy import match
from moorline.policy.match import AllBits, AtLeast, Exact, NotRequired, OneOf
from moorline.rats import EvidenceRoot, Finding, Outcome

DEMANDS: Final = (Exact, OneOf, AtLeast, AllBits)
"""The kinds of demand every family has; NotRequired is the other one."""


def judged(
    code: str,
    value: object,
    demand: object,
    *,
    claim: str,
    remedy: str | None,
    kinds: tuple[type, ...] = DEMANDS,
    test: Callable[[object, object], bool] = match.meets,
    words: Callable[[object], str] | None = None,
) -> Finding:
    """The finding of one demand. A demand that is None or none of `kinds` is NOT_MET, whatever the value."""
    said = words or shown
    title = code.partition(".")[2].replace("_", " ")
    if isinstance(demand, NotRequired):
        outcome, says = Outcome.NOT_APPRAISED, f"{title} was not asked for"
    elif not isinstance(demand, kinds):
        outcome, says = Outcome.NOT_MET, f"the policy says nothing about {title}, and silence refuses"
    elif test(value, demand):
        outcome, says = Outcome.MET, f"{title} is as demanded"
    else:
        outcome, says = Outcome.NOT_MET, f"{title} is not as demanded"
    return Finding(
        code=code,
        outcome=outcome,
        claim=claim,
        says=says,
        expected=said(demand),
        got=said(value),
        remedy=remedy if outcome is Outcome.NOT_MET else None,
    )


def judged_root(code: str, root: EvidenceRoot, *, simulated_allowed: bool) -> Finding:
    """The finding about what the evidence rests on: only hardware, or a simulated root where that is allowed."""
    real = root is EvidenceRoot.HARDWARE
    allowed = real or (root is EvidenceRoot.TEST and simulated_allowed)
    return Finding(
        code=code,
        outcome=Outcome.MET if allowed else Outcome.NOT_MET,
        claim="instance-identity",
        says="the evidence rests on hardware" if real else "the evidence does not rest on endorsed hardware",
        expected="hardware, or test where the genesis says simulated_allowed",
        got=root.value,
        remedy=None if allowed else "give the endorsement of the manufacturer for this device",
    )


def first_refusal(findings: tuple[Finding, ...]) -> Finding | None:
    """The first finding that was not met; of no findings at all, one that says so. None if nothing refuses."""
    if not findings:
        return Finding(
            code="policy.nothing_appraised",
            outcome=Outcome.NOT_MET,
            claim="configuration",
            says="nothing was appraised",
            remedy="give a policy",
        )
    return next((finding for finding in findings if finding.outcome is Outcome.NOT_MET), None)


def shown(value: object) -> str:
    """As `match.shown`, for sets and tuples too, in an order that does not depend on the process."""
    if isinstance(value, Exact):
        return shown(value.value)
    if isinstance(value, OneOf):
        return "one of {" + ", ".join(sorted(shown(option) for option in value.values)) + "}"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(shown(part) for part in value)) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(part) for part in value) + "]"
    return match.shown(value)
