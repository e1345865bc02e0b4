"""Is an authentic TDX domain acceptable? The Appraisal Policy for Evidence, one field a demand, and its appraisal.

Input is `Verified[TdxClaims]`, so authenticity, freshness and binding are settled. There are no defaults; see
`policy.intel`, which judges the machine.

    rule                       AR4SI claim          what goes wrong without it
    tdx.root                   instance-identity    a simulated platform counts as real
    tdx.debug                  runtime-opaque       the host reads the domain's memory and registers
    tdx.sept_ve_disable        runtime-opaque       the host injects exceptions by taking pages away
    tdx.migratable             runtime-opaque       a migration domain of the host's choice receives the state
    tdx.mr_service_td          runtime-opaque       a service domain bound to this one; zero unless it is meant
    tdx.pks .key_locker .perfmon .xfam  configuration   features nobody examined, counters that observe the domain
    tdx.unknown_attributes     runtime-opaque       attribute bits without a meaning yet, among them those for debug
    tdx.mr_td                  executables          other firmware
    tdx.rtmr0 ... rtmr3        executables          other boot, kernel, command line or run-time measurements
    tdx.mr_config_id .mr_owner .mr_owner_config  configuration   other configuration or another owner
    tdx.mr_seam .mr_signer_seam .seam_attributes  hardware   another TDX module, or one not signed by Intel
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Refused
from moorline.evidence.tdx_quote import TdReport
from moorline.policy import rules
from moorline.policy.intel import (
    IntelPlatformPolicy,
    appraise_platform,
    demand_shown,
    finding,
    platform_policy_digest,
    root_finding,
)
from moorline.policy.match import Exact, Match, NotRequired
from moorline.rats import Finding
from moorline.verification.tdx import TdxClaims
from moorline.verification.verified import Verified

NO_SERVICE_TD: Final = bytes(48)
INTEL_SEAM_SIGNER: Final = bytes(48)
"""MRSIGNERSEAM of a module that Intel signed is zero (Intel TDX Module ABI, TEE_TCB_INFO)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TdxPolicy:
    """What a domain must be. Every field must be given. TDREPORT 1.0 has no MRSERVICETD: only NotRequired accepts it."""

    debug: Match[bool]
    sept_ve_disable: Match[bool]
    migratable: Match[bool]
    mr_service_td: Match[bytes]
    pks: Match[bool]
    key_locker: Match[bool]
    perfmon: Match[bool]
    unknown_attributes: Match[int]
    xfam: Match[int]
    mr_td: Match[bytes]
    rtmr0: Match[bytes]
    rtmr1: Match[bytes]
    rtmr2: Match[bytes]
    rtmr3: Match[bytes]
    mr_config_id: Match[bytes]
    mr_owner: Match[bytes]
    mr_owner_config: Match[bytes]
    mr_seam: Match[bytes]
    mr_signer_seam: Match[bytes]
    seam_attributes: Match[bytes]
    platform: IntelPlatformPolicy


_CLAIMS: Final = {
    "debug": "runtime-opaque",
    "sept_ve_disable": "runtime-opaque",
    "migratable": "runtime-opaque",
    "mr_service_td": "runtime-opaque",
    "pks": "configuration",
    "key_locker": "configuration",
    "perfmon": "configuration",
    "unknown_attributes": "runtime-opaque",
    "xfam": "configuration",
    "mr_td": "executables",
    "rtmr0": "executables",
    "rtmr1": "executables",
    "rtmr2": "executables",
    "rtmr3": "executables",
    "mr_config_id": "configuration",
    "mr_owner": "configuration",
    "mr_owner_config": "configuration",
    "mr_seam": "hardware",
    "mr_signer_seam": "hardware",
    "seam_attributes": "hardware",
}
_REMEDIES: Final = {
    "debug": "launch the domain without debug",
    "sept_ve_disable": "launch the domain with SEPT_VE_DISABLE",
    "mr_td": "start the registered package, or register this measurement",
    "mr_service_td": "launch without a service domain; only a version 5 quote can show that there is none",
}


def strict_tdx_policy(
    *,
    mr_td: Match[bytes],
    rtmrs: tuple[Match[bytes], Match[bytes], Match[bytes], Match[bytes]],
    mr_config_id: Match[bytes],
    xfam: Match[int],
    mr_seam: Match[bytes],
    mr_service_td: Match[bytes],
    platform: IntelPlatformPolicy,
) -> TdxPolicy:
    """The policy for a domain that we launched ourselves: no debug, no migration, Intel's module; the rest has reasons."""
    return TdxPolicy(
        debug=Exact(value=False),
        sept_ve_disable=Exact(value=True),
        migratable=Exact(value=False),
        mr_service_td=mr_service_td,
        pks=NotRequired("supervisor protection keys protect the domain from itself only"),
        key_locker=Exact(value=False),
        perfmon=Exact(value=False),
        unknown_attributes=Exact(0),
        xfam=xfam,
        mr_td=mr_td,
        rtmr0=rtmrs[0],
        rtmr1=rtmrs[1],
        rtmr2=rtmrs[2],
        rtmr3=rtmrs[3],
        mr_config_id=mr_config_id,
        mr_owner=Exact(bytes(48)),
        mr_owner_config=Exact(bytes(48)),
        mr_seam=mr_seam,
        mr_signer_seam=Exact(INTEL_SEAM_SIGNER),
        seam_attributes=Exact(bytes(8)),
        platform=platform,
    )


def appraise_tdx(verified: Verified[TdxClaims], policy: TdxPolicy, *, simulated_allowed: bool) -> tuple[Finding, ...]:
    """One finding a rule: the root, the domain in the order of the fields, the machine. Never raises: "no" is a finding."""
    found = [root_finding("tdx.root", verified.root, simulated_allowed=simulated_allowed)]
    for name, claim in _CLAIMS.items():
        value = _value(verified.value.report, name)
        found.append(finding("tdx." + name, claim, value, getattr(policy, name), remedy=_REMEDIES.get(name)))
    return (*found, *appraise_platform(verified.value.platform, policy.platform))


def require_tdx(findings: tuple[Finding, ...]) -> None:
    """Raises Refused("tdx.policy_not_met"), naming the first rule that was not met; no findings at all is a refusal too."""
    first = rules.first_refusal(findings)
    if first is not None:
        raise Refused(
            "tdx.policy_not_met",
            first.says,
            expected=first.expected,
            got=f"{first.code}: {first.got}",
            remedy=first.remedy,
        )


def tdx_policy_digest(policy: TdxPolicy) -> bytes:
    """SHA-256 that names this policy, for results and logs."""
    fields = [
        f"{field.name}={demand_shown(getattr(policy, field.name))}".encode()
        for field in dataclasses.fields(policy)
        if field.name != "platform"
    ]
    return digest.tagged_hash("tdx-policy", platform_policy_digest(policy.platform), *fields)


def _value(report: TdReport, name: str) -> object:
    if name.startswith("rtmr"):
        return report.rtmrs[int(name.removeprefix("rtmr"))]
    return getattr(report, name)
