"""Which Intel platforms fall out of date when a later TCB evaluation becomes the standard one? Numbered once here.

1. A platform is rated as verification rates it (`verification.intel_tcb`): its PCK's SVNs, for TDX the module that runs now,
   and its quoting enclave where its identity at the same evaluation is held; once by the standard evaluation, then by each
   later one that is held, in their order.
2. Good means neither out of date, nor revoked, nor unknown. A platform that is good now FALLS at the first evaluation that
   rates it otherwise; one that is good throughout STAYS; one that is not good now has fallen already (OUT).
3. Where no later evaluation is held, nothing can be said: UNKNOWN.
4. Intel signs when an evaluation's recovery event was, not when it becomes the standard. `expected` is that date and the lag
   the caller assumes, an estimate and never more.

Nothing here verifies evidence: facts about a platform are its own words, and false facts give a false forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.clock import Instant
from moorline.evidence.dcap_quote import TeeType, tee_of
from moorline.evidence.intel_collateral import EvaluationNumbers, QeIdentity, TcbInfo, TcbStatus
from moorline.evidence.sgx_quote import parse_sgx_quote
from moorline.evidence.tdx_quote import parse_tdx_quote
from moorline.verification.intel_pck import read_pck
from moorline.verification.intel_quote import endorsements_needed
from moorline.verification.intel_tcb import NO_LEVEL, TcbMatch, match_isv, match_platform, merged, module_identity

_NOT_GOOD: Final = frozenset(
    {
        TcbStatus.OUT_OF_DATE,
        TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
        TcbStatus.REVOKED,
        TcbStatus.NOT_SUPPORTED,
    }
)


class Prospect(StrEnum):
    """Rules 2 and 3."""

    STAYS = "stays"
    FALLS = "falls"
    OUT = "out"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformFacts:
    """What a platform says of its TCB. `tee_tcb_svn` is of TDX only, and that of the module that runs now.

    `qe_isv_svn` is None where the quoting enclave is not known, as in facts that come from a PCK certificate.
    """

    name: str
    tee: TeeType
    fmspc: bytes
    components: tuple[int, ...]
    pce_svn: int
    tee_tcb_svn: bytes | None
    qe_isv_svn: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One TCB evaluation of a platform family, from judged statements. The identity is of the same evaluation, or None."""

    tcb_info: TcbInfo
    qe_identity: QeIdentity | None

    @property
    def number(self) -> int:
        """Its number; statements of old versions have none and count as 0."""
        return self.tcb_info.evaluation or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """A platform's status by one evaluation, and everything known against it. `parts` names what was rated."""

    evaluation: int
    status: TcbStatus
    advisories: frozenset[str]
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Rule 2 for one platform. `then` is the rating at which it falls, or the last one held; the dates are its."""

    platform: PlatformFacts
    prospect: Prospect
    now: Rating | None
    then: Rating | None
    advisories: frozenset[str]
    event: Instant | None
    expected: Instant | None


def facts_of_quote(name: str, quote: bytes) -> PlatformFacts:
    """The facts in an SGX or TDX quote and its PCK certificate, unverified.

    Raises Malformed, and Unavailable("intel.endorsement_missing") for a quote without its certificate.
    """
    if tee_of(quote) is TeeType.SGX:
        sgx = parse_sgx_quote(quote)
        header, signature, svn = sgx.header, sgx.signature, None
    else:
        tdx = parse_tdx_quote(quote)
        header, signature = tdx.header, tdx.signature
        svn = tdx.report.tee_tcb_svn_2 or tdx.report.tee_tcb_svn
    endorsements_needed(header, signature)  # says what is missing where the chain is not in the quote
    pck, _ = read_pck(signature.certification.data)
    return PlatformFacts(
        name=name,
        tee=header.tee_type,
        fmspc=pck.fmspc,
        components=pck.components,
        pce_svn=pck.pce_svn,
        tee_tcb_svn=svn,
        qe_isv_svn=signature.qe_report.isv_svn,
    )


def rate(platform: PlatformFacts, evaluation: Evaluation) -> Rating:
    """Rule 1 for one evaluation."""
    info = evaluation.tcb_info
    matches = {"platform": match_platform(info, platform.components, platform.pce_svn, platform.tee_tcb_svn)}
    if platform.tee_tcb_svn is not None and platform.tee_tcb_svn[1]:
        module = module_identity(info, platform.tee_tcb_svn[1])
        matches["module"] = NO_LEVEL if module is None else match_isv(module.levels, platform.tee_tcb_svn[0])
    if evaluation.qe_identity is not None and platform.qe_isv_svn is not None:
        matches["quoting enclave"] = match_isv(evaluation.qe_identity.levels, platform.qe_isv_svn)
    return Rating(
        evaluation=evaluation.number,
        status=_all(list(matches.values())),
        advisories=frozenset(advisory for match in matches.values() for advisory in match.advisories),
        parts=tuple(matches),
    )


def forecast(
    platform: PlatformFacts,
    standard: Evaluation | None,
    later: Sequence[Evaluation],
    *,
    evaluations: EvaluationNumbers | None,
    lag_s: int,
) -> Forecast:
    """What becomes of a platform. `later` may hold the standard evaluation too, or one twice; order does not matter."""
    if standard is None:
        return _told(platform, Prospect.UNKNOWN, None, None, evaluations, lag_s)
    now = rate(platform, standard)
    newer = {one.number: one for one in later if one.number > standard.number}
    ratings = [rate(platform, newer[number]) for number in sorted(newer)]
    if now.status in _NOT_GOOD:
        return _told(platform, Prospect.OUT, now, ratings[-1] if ratings else None, evaluations, lag_s)
    if not ratings:
        return _told(platform, Prospect.UNKNOWN, now, None, evaluations, lag_s)
    falling = next((rating for rating in ratings if rating.status in _NOT_GOOD), None)
    prospect = Prospect.STAYS if falling is None else Prospect.FALLS
    return _told(platform, prospect, now, falling or ratings[-1], evaluations, lag_s)


def _told(
    platform: PlatformFacts,
    prospect: Prospect,
    now: Rating | None,
    then: Rating | None,
    evaluations: EvaluationNumbers | None,
    lag_s: int,
) -> Forecast:
    events = {} if evaluations is None else {number: event for number, event, _ in evaluations.numbers}
    event = None if then is None else events.get(then.evaluation)
    before = frozenset() if now is None else now.advisories
    return Forecast(
        platform=platform,
        prospect=prospect,
        now=now,
        then=then,
        advisories=frozenset() if then is None else then.advisories - before,
        event=event,
        expected=None if event is None else Instant(event + lag_s),
    )


def _all(matches: Sequence[TcbMatch]) -> TcbStatus:
    status = matches[0].status
    for match in matches[1:]:
        status = merged(status, match.status)
    return status
