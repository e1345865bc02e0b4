"""Is an Intel platform acceptable? What the policies for SGX and TDX share: demands on the machine, and findings.

    rule                       AR4SI claim         what goes wrong without it
    intel.status               hardware            known holes: platform, TDX module and quoting enclave, merged
    intel.advisories           hardware            a status that stands while an advisory applies that nobody accepted
    intel.tcb_evaluation .qe_evaluation  hardware  an older evaluation, in which today's holes are not yet known
    intel.tcb_date             hardware            a TCB that is too old whatever its status says
    intel.collateral           instance-identity   nobody looked at Intel's statements, or a store's word was taken for it
    intel.revocation           instance-identity   a revoked platform
    intel.fmspc .sgx_type      hardware            a processor family nobody examined
    intel.ppid .platform_instance_id  instance-identity   any Intel processor in the world is as good as the registered one
    intel.dynamic_platform .cached_keys .smt_enabled  hardware  packages added later, keys kept by the service, SMT

`NotSupported` (no TCB level matches) is met by no demand on the status. There are no defaults: a field that is None or of
another kind refuses, and what is not asked is `NotRequired(reason)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Misconfigured
from moorline.evidence.intel_collateral import TcbStatus
from moorline.policy import rules
from moorline.policy.match import Exact, Match, NotRequired, meets, shown
from moorline.rats import EvidenceRoot, Finding, Outcome
from moorline.verification.intel_collateral import Collateral
from moorline.verification.intel_quote import IntelPlatform


@dataclass(frozen=True, slots=True)
class Within:
    """Every advisory is one of `accepted`. The empty set accepts none."""

    accepted: frozenset[str]


@dataclass(frozen=True, slots=True)
class NoneOf:
    """No advisory is one of `rejected`, which cannot be empty: not to ask is `NotRequired`."""

    rejected: frozenset[str]

    def __post_init__(self) -> None:
        if not self.rejected:
            raise Misconfigured(
                "policy.empty_rejection", "a list of rejected advisories that rejects none", remedy="say NotRequired"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelPlatformPolicy:
    """What the machine must be. Every field must be given; see the table above for what each prevents."""

    status: Match[TcbStatus]
    advisories: Within | NoneOf | NotRequired
    tcb_evaluation: Match[int]
    qe_evaluation: Match[int]
    tcb_date: Match[int]
    collateral: Match[Collateral]
    revocation: Match[bool]
    fmspc: Match[bytes]
    sgx_type: Match[int]
    ppid: Match[bytes]
    platform_instance_id: Match[bytes]
    dynamic_platform: Match[bool]
    cached_keys: Match[bool]
    smt_enabled: Match[bool]


_CLAIMS: Final = {
    "status": "hardware",
    "advisories": "hardware",
    "tcb_evaluation": "hardware",
    "qe_evaluation": "hardware",
    "tcb_date": "hardware",
    "collateral": "instance-identity",
    "revocation": "instance-identity",
    "fmspc": "hardware",
    "sgx_type": "hardware",
    "ppid": "instance-identity",
    "platform_instance_id": "instance-identity",
    "dynamic_platform": "hardware",
    "cached_keys": "hardware",
    "smt_enabled": "hardware",
}
_REMEDIES: Final = {
    "status": "update the platform (firmware, TDX module, quoting enclave), or configure it as Intel's advisory says",
    "collateral": "give the verifier TCB info, QE identity and both CRLs with their signers' chains",
    "revocation": "give the verifier both CRLs",
    "tcb_evaluation": "fetch TCB info of a newer evaluation",
    "qe_evaluation": "fetch the QE identity of a newer evaluation",
    "ppid": "register this platform, or start the function on a registered one",
}


def strict_platform_policy(
    *, status: Match[TcbStatus], advisories: Within | NoneOf | NotRequired, evaluation: Match[int], ppid: Match[bytes]
) -> IntelPlatformPolicy:
    """The demands on a machine of our own: full collateral, CRLs looked at; what is not asked is said with its reason."""
    package = NotRequired("the platform is identified by its PPID")
    return IntelPlatformPolicy(
        status=status,
        advisories=advisories,
        tcb_evaluation=evaluation,
        qe_evaluation=evaluation,
        tcb_date=NotRequired("the evaluation number says how new the TCB must be"),
        collateral=Exact(Collateral.FULL),
        revocation=Exact(value=True),
        fmspc=NotRequired("TCB info is per FMSPC, and there is one"),
        sgx_type=NotRequired("the registered platform's memory protection is known"),
        ppid=ppid,
        platform_instance_id=package,
        dynamic_platform=package,
        cached_keys=package,
        smt_enabled=NotRequired("the host's own profile decides about SMT"),
    )


def appraise_platform(platform: IntelPlatform, policy: IntelPlatformPolicy) -> tuple[Finding, ...]:
    """One finding a rule, in the order of the fields. Never raises: "no" is a finding."""
    values = _values(platform)
    found: list[Finding] = []
    for name, claim in _CLAIMS.items():
        demand = getattr(policy, name)
        test = {"status": _status_meets, "advisories": _advisories_meet}.get(name, meets)
        found.append(finding("intel." + name, claim, values[name], demand, test=test, remedy=_REMEDIES.get(name)))
    return tuple(found)


def platform_policy_digest(policy: IntelPlatformPolicy) -> bytes:
    """SHA-256 that names these demands, as a part of the policy they belong to."""
    parts = [f"{field.name}={demand_shown(getattr(policy, field.name))}".encode() for field in dataclasses.fields(policy)]
    return digest.tagged_hash("intel-platform-policy", *parts)


def finding(
    code: str,
    claim: str,
    value: object,
    demand: object,
    *,
    test: Callable[[object, object], bool] = meets,
    remedy: str | None = None,
) -> Finding:
    """What the rule `code` saw: `value` against `demand`. Silence of a policy refuses."""
    kinds = (*rules.DEMANDS, Within, NoneOf)
    return rules.judged(code, value, demand, claim=claim, remedy=remedy, kinds=kinds, test=test, words=demand_shown)


def root_finding(code: str, root: EvidenceRoot, *, simulated_allowed: bool) -> Finding:
    """Whether the evidence may rest on what it rests on. `simulated_allowed` comes from the ledger's genesis only."""
    real = root is EvidenceRoot.HARDWARE
    allowed = real or (root is EvidenceRoot.TEST and simulated_allowed)
    return Finding(
        code=code,
        outcome=Outcome.MET if allowed else Outcome.NOT_MET,
        claim="instance-identity",
        says="the platform is of the vendor" if real else "the platform is SIMULATED",
        expected="hardware, or test where the genesis says simulated_allowed",
        got=root.value,
        remedy=None if allowed else "use real hardware, or a ledger whose genesis says simulated_allowed",
    )


def demand_shown(value: object) -> str:
    """A value or a demand in words, as `match.shown`, with sets of advisories."""
    if isinstance(value, Within):
        return "within {" + ", ".join(sorted(value.accepted)) + "}"
    if isinstance(value, NoneOf):
        return "none of {" + ", ".join(sorted(value.rejected)) + "}"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(str(one) for one in value)) + "}"
    return shown(value)


def _status_meets(value: object, demand: object) -> bool:
    return value is not TcbStatus.NOT_SUPPORTED and meets(value, demand)


def _advisories_meet(value: object, demand: object) -> bool:
    if not isinstance(value, frozenset):
        return False
    if isinstance(demand, Within):
        return value <= demand.accepted
    return isinstance(demand, NoneOf) and value.isdisjoint(demand.rejected)


def _values(platform: IntelPlatform) -> Mapping[str, object]:
    pck = platform.pck
    return {
        "status": platform.status,
        # Without a status nothing is known about advisories either: an empty set must not look like a clean bill.
        "advisories": None if platform.status is None else platform.advisories,
        "tcb_evaluation": platform.tcb_evaluation,
        "qe_evaluation": platform.qe_evaluation,
        "tcb_date": platform.tcb_date,
        "collateral": platform.collateral,
        "revocation": platform.revocation_checked,
        "fmspc": pck.fmspc,
        "sgx_type": pck.sgx_type,
        "ppid": pck.ppid,
        "platform_instance_id": pck.platform_instance_id,
        "dynamic_platform": pck.dynamic_platform,
        "cached_keys": pck.cached_keys,
        "smt_enabled": pck.smt_enabled,
    }
