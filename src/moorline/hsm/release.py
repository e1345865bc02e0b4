"""May this function have its identity? The decision, pure; every rule runs, and the first that was not met refuses.

The procedure (PROTOCOLS.md 3, "The broker requires"):

1. the launch names this ledger, provider and HSM, and a channel profile this session has;
2. the token, recomputed inside the PKCS#11 token, is the one the function proves to hold;
3. the evidence carries the commitment, and measurement and chip are those of the launch;
4. simulated evidence counts only where the ledger's genesis says so;
5. the launch has not expired, its epoch is accepted, its sequence number is leased;
6. the service is registered with this package, measurement and profile;
7. the chip is the one registered for the host, and the host has a standing Attestation Result that meets the use case.

What this does NOT establish: that the token was not used before. That is the store's transaction, which comes after.
Evidence and result must have been verified by the caller: they come in as facts, with the root they rest on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Refused
from moorline.rats import AttestationResult, EvidenceRoot, Finding, Outcome, Tier
from moorline.storage.broker_epochs import Epoch, Lease
from moorline.wire import launch
from moorline.wire.launch import ChannelProfile, LaunchFields

GRACE_MAX_S: Final = 120
"""How long after an epoch's end a launch may expire (PROTOCOLS.md 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Who decides: the ledger, provider and HSM of this broker, and whether the genesis allows simulated evidence."""

    ledger_id: bytes
    provider: str
    hsm: str
    simulated_allowed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveFacts:
    """What verified evidence of the function says. `chip` is None where the technology or its owner hides it."""

    measurement: bytes
    chip: bytes | None
    commitment: bytes
    root: EvidenceRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRule:
    """What the ledger's record of the service permits; `packages` are pairs of package digest and measurement."""

    packages: frozenset[tuple[bytes, bytes]]
    profiles: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """The host as the attestation authority and the ledger know it. `gaps` are capabilities its use case lacks there.

    `result` is None if there is none that stands; `problem` then says why. `platform_chip` is the chip in the
    platform record. `result_digest` is SHA-256 of the result's token: it names the verdict a function stands on.
    """

    result: AttestationResult | None
    problem: str | None
    gaps: tuple[str, ...]
    platform_chip: bytes | None
    result_digest: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """Everything the decision rests on. `expected_token` is None if the epoch's key is not in the token."""

    place: Place
    fields: LaunchFields
    profile: ChannelProfile
    expected_token: bytes | None
    proof: bytes | None
    challenge_digest: bytes
    enclave: EnclaveFacts
    epoch: Epoch | None
    leases: tuple[Lease, ...]
    service: ServiceRule
    host: HostFacts
    now: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseDecision:
    """All findings, and the refusal of the first rule that was not met; None releases."""

    findings: tuple[Finding, ...]
    refusal: Refused | None

    def require(self) -> None:
        """Raise the refusal, if there is one."""
        if self.refusal is not None:
            raise self.refusal


def decide(request: ReleaseRequest) -> ReleaseDecision:
    """Run every rule. An exception other than Refused in a rule is a defect and is not caught."""
    return _decided(request, _RULES)


def decide_resumption(request: ReleaseRequest) -> ReleaseDecision:
    """Run every rule that is still about a function which has its identity and comes back to it.

    Its token is used up and its launch over, so rules 2 and 5 have nothing to judge: the identity key it proves to hold
    stands in their place, which the caller verified.
    """
    return _decided(request, tuple(rule for rule in _RULES if rule[0] not in _LAUNCH_ONLY))


def _decided(request: ReleaseRequest, rules: tuple[_Rule, ...]) -> ReleaseDecision:
    findings: list[Finding] = []
    first: Refused | None = None
    for name, rule in rules:
        try:
            rule(request)
        except Refused as refusal:
            first = first or refusal
            findings.append(
                Finding(
                    code=refusal.code,
                    outcome=Outcome.NOT_MET,
                    claim="instance-identity",
                    says=refusal.says,
                    expected=refusal.expected,
                    got=refusal.got,
                    remedy=refusal.remedy,
                )
            )
        else:
            says = _HPKE_ONLY if name == "launch.profile" and request.profile is ChannelProfile.HPKE_ONLY else "met"
            findings.append(Finding(code=name, outcome=Outcome.MET, claim="instance-identity", says=says))
    return ReleaseDecision(findings=tuple(findings), refusal=first)


# 1. This ledger, provider, HSM; this channel -----------------------------------------------------------------------------


def _ledger(request: ReleaseRequest) -> None:
    if request.fields.ledger_id != request.place.ledger_id:
        raise Refused(
            "launch.other_ledger",
            "the launch belongs to another ledger",
            expected=request.place.ledger_id,
            got=request.fields.ledger_id,
        )


def _provider(request: ReleaseRequest) -> None:
    if request.fields.provider != request.place.provider:
        raise Refused(
            "launch.other_provider",
            "the launch belongs to another provider",
            expected=request.place.provider,
            got=request.fields.provider,
        )


def _hsm(request: ReleaseRequest) -> None:
    if request.fields.hsm != request.place.hsm:
        raise Refused("launch.other_hsm", "the launch names another HSM", expected=request.place.hsm, got=request.fields.hsm)


def _profile(request: ReleaseRequest) -> None:
    if request.fields.profile is not request.profile:
        raise Refused(
            "launch.profile_mismatch",
            "the session is not of the channel profile the launch permits",
            expected=request.fields.profile,
            got=request.profile,
        )


# 2. The token ------------------------------------------------------------------------------------------------------------


def require_token(expected: bytes | None, proof: bytes | None, challenge_digest: bytes) -> None:
    """Raises Refused("launch.token_mismatch") unless `proof` is of `expected`. A broker asks this before anything costly."""
    # One code for all three: an attacker learns nothing about which epochs have keys.
    if expected is None or proof is None or not same(launch.token_proof(expected, challenge_digest), proof):
        raise Refused(
            "launch.token_mismatch",
            "the function does not prove the launch token of these launch fields",
            remedy="only functions launched by this provider's orchestrator get an identity",
        )


def _token(request: ReleaseRequest) -> None:
    require_token(request.expected_token, request.proof, request.challenge_digest)


# 3. Evidence and launch say the same -------------------------------------------------------------------------------------


def _commitment(request: ReleaseRequest) -> None:
    expected = launch.commitment(request.fields)
    if not same(expected, request.enclave.commitment):
        raise Refused(
            "launch.commitment_mismatch",
            "the evidence carries another commitment than these launch fields",
            expected=expected,
            got=request.enclave.commitment,
            remedy="the host must start the function with HOST_DATA = commitment",
        )


def _measurement(request: ReleaseRequest) -> None:
    if request.fields.measurement != request.enclave.measurement:
        raise Refused(
            "launch.measurement_mismatch",
            "other code runs than was launched",
            expected=request.fields.measurement,
            got=request.enclave.measurement,
        )


def _chip(request: ReleaseRequest) -> None:
    # A masked chip id refuses: this policy has no technology where the launch could name none (fail closed).
    if request.enclave.chip is None or request.fields.chip != request.enclave.chip:
        raise Refused(
            "launch.chip_mismatch",
            "the function runs on another chip than it was launched for",
            expected=request.fields.chip,
            got=request.enclave.chip or "masked",
        )


# 4. Simulated evidence ---------------------------------------------------------------------------------------------------


def _root(request: ReleaseRequest) -> None:
    allowed = {EvidenceRoot.HARDWARE, EvidenceRoot.TEST} if request.place.simulated_allowed else {EvidenceRoot.HARDWARE}
    if request.enclave.root not in allowed:
        raise Refused(
            "launch.root_not_accepted",
            "the evidence rests on a root that does not count on this ledger",
            expected="/".join(sorted(allowed)),
            got=request.enclave.root,
        )


# 5. Time, epoch, lease ---------------------------------------------------------------------------------------------------


def _expiry(request: ReleaseRequest) -> None:
    if request.now > request.fields.not_after:
        raise Refused(
            "launch.expired",
            "the launch has expired",
            expected=f"<= {request.fields.not_after}",
            got=request.now,
            remedy="launch again",
        )


def _epoch(request: ReleaseRequest) -> None:
    # accept_until can be pulled in when an epoch is closed early; launches made before may name a later end.
    epoch = request.epoch
    if epoch is None or request.now > epoch.accept_until or request.fields.not_after > epoch.not_after + GRACE_MAX_S:
        raise Refused(
            "launch.epoch_closed",
            "the launch epoch is over, or the launch was to outlive it",
            expected="none" if epoch is None else f"<= {epoch.accept_until}",
            got=max(request.now, request.fields.not_after),
            remedy="launch again in the running epoch",
        )


def _lease(request: ReleaseRequest) -> None:
    leased = any(
        lease.launcher == request.fields.launcher
        and lease.epoch == request.fields.epoch
        and lease.covers(request.fields.sequence, request.now)
        for lease in request.leases
    )
    if not leased:
        raise Refused(
            "launch.sequence_not_leased",
            "the launcher holds no lease for this sequence number",
            got=request.fields.sequence,
            remedy="let the launcher ask for a new lease and launch again",
        )


# 6. The service ----------------------------------------------------------------------------------------------------------


def _package(request: ReleaseRequest) -> None:
    if (request.fields.package_digest, request.fields.measurement) not in request.service.packages:
        raise Refused(
            "launch.package_not_registered",
            "the service is not registered with this package and measurement",
            got=request.fields.package_digest,
            remedy="register the package for the service on the ledger",
        )


def _service_profile(request: ReleaseRequest) -> None:
    if request.fields.profile not in request.service.profiles:
        raise Refused(
            "launch.profile_not_permitted",
            "the service is not registered with this channel profile",
            expected=sorted(request.service.profiles),
            got=request.fields.profile,
        )


# 7. The host -------------------------------------------------------------------------------------------------------------


def _platform(request: ReleaseRequest) -> None:
    if request.host.platform_chip != request.fields.chip:
        raise Refused(
            "launch.platform_not_registered",
            "the chip is not the one registered for this host",
            expected=request.host.platform_chip or "a platform record",
            got=request.fields.chip,
        )


def _host(request: ReleaseRequest) -> None:
    result = request.host.result
    refusal = None if result is None else result.first_refusal()
    standing = (
        result is not None
        and result.subject == f"host/{request.fields.host}"
        and result.status is Tier.AFFIRMING
        and request.now < result.expires
        and refusal is None
    )
    if not standing:
        raise Refused(
            "launch.host_not_standing",
            "the host has no standing Attestation Result that affirms it",
            expected=f"host/{request.fields.host} affirming",
            got=request.host.problem or (refusal.code if refusal else "no result, or expired"),
            remedy="see what the attestation authority says about the host",
        )


def _host_profile(request: ReleaseRequest) -> None:
    if request.host.gaps:
        raise Refused(
            "launch.host_below_profile",
            "the host does not have what the service's use case asks for",
            got=", ".join(request.host.gaps),
        )


_Rule = tuple[str, Callable[[ReleaseRequest], None]]

_HPKE_ONLY: Final = "met, by a session of the HPKE-only profile: TLS may have ended at a proxy, as the launch permits"
_LAUNCH_ONLY: Final = frozenset({"launch.token", "launch.expiry", "launch.epoch", "launch.lease"})

_RULES: Final[tuple[_Rule, ...]] = (
    ("launch.ledger", _ledger),
    ("launch.provider", _provider),
    ("launch.hsm", _hsm),
    ("launch.profile", _profile),
    ("launch.token", _token),
    ("launch.commitment", _commitment),
    ("launch.measurement", _measurement),
    ("launch.chip", _chip),
    ("launch.root", _root),
    ("launch.expiry", _expiry),
    ("launch.epoch", _epoch),
    ("launch.lease", _lease),
    ("launch.package", _package),
    ("launch.service_profile", _service_profile),
    ("launch.platform", _platform),
    ("launch.host", _host),
    ("launch.host_profile", _host_profile),
)
