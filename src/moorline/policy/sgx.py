"""Is an authentic SGX enclave acceptable? The Appraisal Policy for Evidence, one field a demand, and its appraisal.

Input is `Verified[SgxClaims]`, so authenticity, freshness and binding are settled. There are no defaults; see
`policy.intel`, which judges the machine.

    rule                       AR4SI claim          what goes wrong without it
    sgx.root                   instance-identity    a simulated platform counts as real
    sgx.debug                  runtime-opaque       the host reads and writes the enclave's memory
    sgx.mr_enclave             executables          other code
    sgx.mr_signer .isv_prod_id .isv_ext_prod_id .isv_family_id  executables   another vendor's, or another product's code
    sgx.isv_svn .config_svn    executables          an old version of it
    sgx.config_id              configuration        other start-up configuration under the same measurement
    sgx.attributes .xfrm .misc_select  configuration   provisioning keys, state components or features nobody examined
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Refused
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
from moorline.verification.sgx import SgxClaims
from moorline.verification.verified import Verified


@dataclass(frozen=True, slots=True, kw_only=True)
class SgxPolicy:
    """What an enclave must be. Every field must be given. `attributes` is FLAGS as a number, DEBUG included."""

    debug: Match[bool]
    mr_enclave: Match[bytes]
    mr_signer: Match[bytes]
    isv_prod_id: Match[int]
    isv_ext_prod_id: Match[bytes]
    isv_family_id: Match[bytes]
    isv_svn: Match[int]
    config_id: Match[bytes]
    config_svn: Match[int]
    attributes: Match[int]
    xfrm: Match[int]
    misc_select: Match[int]
    platform: IntelPlatformPolicy


_CLAIMS: Final = {
    "debug": "runtime-opaque",
    "mr_enclave": "executables",
    "mr_signer": "executables",
    "isv_prod_id": "executables",
    "isv_ext_prod_id": "executables",
    "isv_family_id": "executables",
    "isv_svn": "executables",
    "config_id": "configuration",
    "config_svn": "executables",
    "attributes": "configuration",
    "xfrm": "configuration",
    "misc_select": "configuration",
}
_REMEDIES: Final = {
    "debug": "build and sign the enclave without the debug attribute",
    "mr_enclave": "start the registered package, or register this measurement",
}


def strict_sgx_policy(
    *, mr_enclave: Match[bytes], mr_signer: Match[bytes], isv_svn: Match[int], platform: IntelPlatformPolicy
) -> SgxPolicy:
    """The policy for an enclave of our own, known by its measurement: no debug; what is not asked has its reason."""
    measured = NotRequired("MRENCLAVE already pins the code and its attributes at build")
    unused = NotRequired("our enclaves do not use key separation and sharing")
    return SgxPolicy(
        debug=Exact(value=False),
        mr_enclave=mr_enclave,
        mr_signer=mr_signer,
        isv_prod_id=measured,
        isv_ext_prod_id=unused,
        isv_family_id=unused,
        isv_svn=isv_svn,
        config_id=Exact(bytes(64)),
        config_svn=unused,
        attributes=measured,
        xfrm=measured,
        misc_select=measured,
        platform=platform,
    )


def appraise_sgx(verified: Verified[SgxClaims], policy: SgxPolicy, *, simulated_allowed: bool) -> tuple[Finding, ...]:
    """One finding a rule: the root, the enclave in the order of the fields, the machine. Never raises: "no" is a finding."""
    report = verified.value.report
    found = [root_finding("sgx.root", verified.root, simulated_allowed=simulated_allowed)]
    for name, claim in _CLAIMS.items():
        demand = getattr(policy, name)
        found.append(finding("sgx." + name, claim, getattr(report, name), demand, remedy=_REMEDIES.get(name)))
    return (*found, *appraise_platform(verified.value.platform, policy.platform))


def require_sgx(findings: tuple[Finding, ...]) -> None:
    """Raises Refused("sgx.policy_not_met"), naming the first rule that was not met; no findings at all is a refusal too."""
    first = rules.first_refusal(findings)
    if first is not None:
        raise Refused(
            "sgx.policy_not_met",
            first.says,
            expected=first.expected,
            got=f"{first.code}: {first.got}",
            remedy=first.remedy,
        )


def sgx_policy_digest(policy: SgxPolicy) -> bytes:
    """SHA-256 that names this policy, for results and logs."""
    fields = [
        f"{field.name}={demand_shown(getattr(policy, field.name))}".encode()
        for field in dataclasses.fields(policy)
        if field.name != "platform"
    ]
    return digest.tagged_hash("sgx-policy", platform_policy_digest(policy.platform), *fields)
