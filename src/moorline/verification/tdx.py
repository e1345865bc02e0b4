"""Is a TDX quote authentic, current and bound to this challenge? The procedure is `intel_quote`; this adds TDX's own rules.

1. The quote is a TDX quote; steps 1 to 9 of `intel_quote`, with the TDX statements (`TDX` TCB info, identity `TD_QE`).
2. The TDX module that launched the domain is one that the TCB info knows: its version has an identity, MRSIGNERSEAM is
   that identity's, SEAMATTRIBUTES under the mask too. [tdx.module_unknown tdx.module_mismatch]
3. All 64 bytes of the domain's report data are the expected ones. [tdx.report_data_mismatch]

MRSEAM, MRTD, RTMRs, attributes and MRSERVICETD are facts for `policy.tdx`; an event log is judged against RTMRs by `ccel`.
"""

from __future__ import annotations

from dataclasses import dataclass

from moorline.clock import Instant
from moorline.errors import NotAuthentic
from moorline.evidence.dcap_quote import TeeType
from moorline.evidence.intel_collateral import TcbInfo, TcbStatus
from moorline.evidence.tdx_quote import TdReport, TdxQuote
from moorline.verification import intel_quote
from moorline.verification.intel_collateral import Collateral, IntelEndorsements, judge_collateral
from moorline.verification.intel_pck import IntelAnchors, PckCertificate
from moorline.verification.intel_quote import IntelNeeded, IntelPlatform
from moorline.verification.intel_tcb import TcbMatch, match_isv, match_platform, merged, module_identity, relaunch
from moorline.verification.verified import Verified


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxClaims:
    """What an authentic quote says: the domain's report and the platform it ran on. `trailing_zeros` is unsigned padding."""

    report: TdReport
    platform: IntelPlatform
    trailing_zeros: int


def endorsements_needed(quote: TdxQuote) -> IntelNeeded:
    """What to fetch for `quote`, by its own untrusted words. Raises Unavailable("intel.endorsement_missing"), Malformed."""
    return intel_quote.endorsements_needed(quote.header, quote.signature)


def verify_tdx(
    quote: TdxQuote,
    endorsements: IntelEndorsements,
    *,
    report_data: bytes,
    collateral: Collateral,
    anchors: IntelAnchors,
    now: Instant,
) -> Verified[TdxClaims]:
    """The claims of `quote`, authentic and bound to `report_data` (all 64 bytes, from the verifier's own state).

    Raises Unavailable, Malformed and NotAuthentic with the codes of `intel_quote` and above. Does not judge acceptability.
    """
    chain = intel_quote.judge_quote(quote.header, quote.signed(), quote.signature, anchors=anchors, now=now)
    qe_report = quote.signature.qe_report
    judged = judge_collateral(endorsements, chain, qe_report, TeeType.TDX, collateral=collateral, anchors=anchors, now=now)
    pck = chain.pck
    assert pck is not None  # a PCK chain
    platform = module = tcb_status = None
    if judged.tcb_info is not None:
        module = _module(judged.tcb_info, quote.report)  # 2
        platform = match_platform(judged.tcb_info, pck.components, pck.pce_svn, quote.report.tee_tcb_svn)
        tcb_status = _status(judged.tcb_info, quote.report, pck, _launch(platform, module))
    if not intel_quote.same_report_data(report_data, quote.report.report_data):  # 3
        raise NotAuthentic(
            "tdx.report_data_mismatch",
            "the quote is not bound to this challenge",
            remedy="ask for a new quote; one made for another session or nonce cannot be used",
        )
    claims = TdxClaims(
        report=quote.report,
        platform=intel_quote.platform_claims(
            chain,
            judged,
            collateral=collateral,
            qe_isv_svn=qe_report.isv_svn,
            platform=platform,
            module=module,
            tcb_status=tcb_status,
        ),
        trailing_zeros=quote.trailing_zeros,
    )
    return Verified._create(claims, root=chain.root, collateral_digest=judged.digest)  # noqa: SLF001 - this room makes them


def _module(info: TcbInfo, report: TdReport) -> TcbMatch | None:
    """Rule 2, and the module's TCB level; None where the platform's levels cover the module."""
    version = report.tee_tcb_svn[1]
    identity = module_identity(info, version)
    if identity is None:
        raise NotAuthentic(
            "tdx.module_unknown", "the TCB info knows no TDX module of this version", got=f"TDX_{version:02X}"
        )
    attributes = bytes(have & mask for have, mask in zip(report.seam_attributes, identity.attributes_mask, strict=True))
    if report.mr_signer_seam != identity.mr_signer or attributes != identity.attributes:
        raise NotAuthentic(
            "tdx.module_mismatch",
            "the TDX module is not the one of its identity",
            expected=identity.mr_signer + identity.attributes,
            got=report.mr_signer_seam + attributes,
        )
    return match_isv(identity.levels, report.tee_tcb_svn[0]) if version else None


def _launch(platform: TcbMatch, module: TcbMatch | None) -> TcbStatus:
    return platform.status if module is None else merged(platform.status, module.status)


def _status(info: TcbInfo, report: TdReport, pck: PckCertificate, launch: TcbStatus) -> TcbStatus:
    """The status of platform and module: at launch, and for TDREPORT 1.5 also now (`intel_tcb`, rule 5)."""
    svn = report.tee_tcb_svn_2
    if svn is None:
        return launch
    identity = module_identity(info, svn[1])
    if identity is None:
        return TcbStatus.NOT_SUPPORTED
    current = match_platform(info, pck.components, pck.pce_svn, svn).status
    if svn[1]:
        current = merged(current, match_isv(identity.levels, svn[0]).status)
    return relaunch(launch, current)
