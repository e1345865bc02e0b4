"""Which host gets a function, and for every other host why not. A pure function of what was already verified.

A host qualifies if, in this order:

1. it is a registered, active platform of the provider (`placement.no_platform`);
2. somebody runs a host agent there that this orchestrator can ask (`placement.no_agent`), and no guest of an earlier
   generation of the same function may still be there (`placement.guest_left`);
3. it has a standing Attestation Result (`placement.no_result`) that has not ended (`placement.result_expired`);
4. that result affirms (`placement.host_contraindicated`, with the first rule that was not met);
5. it does not rest on simulated anchors, unless the ledger's genesis allows them (`placement.simulated_root`);
6. it shows every capability of the use case's profile (`placement.capability_missing`);
7. the place its result certifies and the place the ledger names are one (`placement.location_disagrees`), inside the
   jurisdiction (`placement.jurisdiction`).

Rules 5 to 7 are all judged, so that an operator sees everything that is wrong with a host at once; the code is the first's.
Among the qualified the one with the fewest functions wins, then the first by name: the same input gives the same choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moorline.clock import Instant, rendered
from moorline.policy import sec009
from moorline.rats import Assurance, AttestationResult, CapabilityLevel, EvidenceRoot, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What the ledger proves about a host: `location` such as `EU/DE`, and its chip's identity (empty if it has none)."""

    chip_id: bytes
    location: str
    simulated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView:
    """Everything known about one host. `result` is verified and addressed to us; `problem` says why there is none."""

    host: str
    platform: Platform | None
    result: AttestationResult | None
    reachable: bool
    functions: int
    guest_left: bool = False
    problem: tuple[str, str] | None = None  # code, in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a function needs of its host."""

    use_case: str
    jurisdiction: str
    simulated_allowed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostVerdict:
    """One host: whether it qualifies, and if not the code of the first reason and all reasons in words."""

    host: str
    eligible: bool
    code: str | None
    says: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The chosen host, or None, with a verdict about every host."""

    chosen: str | None
    says: str
    verdicts: tuple[HostVerdict, ...]

    def as_json(self) -> dict[str, object]:
        """For the HTTP interface and the record of the launch."""
        return {
            "chosen": self.chosen,
            "says": self.says,
            "verdicts": [
                {"host": verdict.host, "eligible": verdict.eligible, "code": verdict.code, "says": list(verdict.says)}
                for verdict in self.verdicts
            ],
        }


def place(hosts: Iterable[HostView], demand: Demand, *, now: Instant) -> Placement:
    """The decision. Raises Refused("sec009.use_case_unknown") only; that no host fits is a value."""
    views = sorted(hosts, key=lambda view: view.host)
    verdicts = tuple(judge(view, demand, now=now) for view in views)
    qualified = [view for view, verdict in zip(views, verdicts, strict=True) if verdict.eligible]
    if not qualified:
        says = f"no host meets use case {demand.use_case} in {demand.jurisdiction}"
        return Placement(chosen=None, says=says, verdicts=verdicts)
    best = min(qualified, key=lambda view: (view.functions, view.host))
    says = (
        f"{best.host} meets use case {demand.use_case} in {demand.jurisdiction}"
        f" ({len(qualified)} of {len(views)} hosts do; it runs {best.functions} functions)"
    )
    return Placement(chosen=best.host, says=says, verdicts=verdicts)


def judge(view: HostView, demand: Demand, *, now: Instant) -> HostVerdict:
    """One host against a demand; see the rules at the top."""
    profile = sec009.profile(demand.use_case)
    # 1 to 4
    early = _standing(view, now)
    if early is not None:
        return HostVerdict(host=view.host, eligible=False, code=early[0], says=(early[1],))
    result, platform = view.result, view.platform
    assert result is not None
    assert platform is not None
    reasons: list[tuple[str, str]] = []
    # 5
    if EvidenceRoot.TEST is result.root and not demand.simulated_allowed:
        reasons.append(("placement.simulated_root", "its evidence rests on a simulated anchor"))
    if platform.simulated and not demand.simulated_allowed:
        reasons.append(("placement.simulated_root", "the ledger lists it as a simulated platform"))
    # 6
    missing = sec009.gap(profile, (*result.capabilities, *_vouched(platform)))
    reasons.extend(("placement.capability_missing", item.says) for item in missing)
    # 7
    reasons.extend(_place_of(result, platform, demand))
    if reasons:
        return HostVerdict(host=view.host, eligible=False, code=reasons[0][0], says=tuple(says for _, says in reasons))
    says = f"affirmed until {rendered(result.expires)}, in {platform.location}, {len(profile)} capabilities shown"
    return HostVerdict(host=view.host, eligible=True, code=None, says=(says,))


def within(location: str, jurisdiction: str) -> bool:
    """True if a place such as `EU/DE` lies in a jurisdiction such as `EU` or `EU/DE`."""
    return location == jurisdiction or location.startswith(jurisdiction + "/")


def certified_location(result: AttestationResult) -> str | None:
    """The place a result shows at `asserted` or better, or None."""
    for capability in result.capabilities:
        if capability.capability == "location.geo" and capability.level >= Assurance.ASSERTED:
            return capability.value
    return None


def _standing(view: HostView, now: Instant) -> tuple[str, str] | None:
    if view.platform is None:
        return "placement.no_platform", _because(view, "it is not an active platform on the ledger")
    if not view.reachable:
        return "placement.no_agent", "this orchestrator knows no host agent there"
    if view.guest_left:
        return "placement.guest_left", "it never confirmed that an earlier generation of this function stopped"
    if view.result is not None:
        return _affirmed(view.result, view.host, now)
    if view.problem is not None and view.problem[0].partition(".")[0] not in ("result", "peer"):
        # The verifier answered with the rule that withdrew the result: the host was judged, and failed.
        return "placement.host_contraindicated", f"{view.problem[1]} [{view.problem[0]}]"
    return "placement.no_result", _because(view, "it has no standing Attestation Result")


def _affirmed(result: AttestationResult, host: str, now: Instant) -> tuple[str, str] | None:
    if result.subject != f"host/{host}":
        return "placement.no_result", f"the result is about {result.subject}"
    if result.expires <= now:
        return "placement.result_expired", f"its result ended at {rendered(result.expires)}"
    if result.status is not Tier.AFFIRMING:
        finding = result.first_refusal()
        why = f"{finding.says} [{finding.code}]" if finding is not None else f"its status is {result.status.word}"
        return "placement.host_contraindicated", why
    return None


def _because(view: HostView, says: str) -> str:
    return says if view.problem is None else f"{says}: {view.problem[1]} [{view.problem[0]}]"


def _vouched(platform: Platform) -> tuple[CapabilityLevel, ...]:
    """What the provider declares on the ledger, and nobody has measured."""
    declared = Assurance.DECLARED
    place = CapabilityLevel(capability="location.jurisdiction", level=declared, value=platform.location)
    chip = CapabilityLevel(capability="hmee.sev_snp", level=declared, value=platform.chip_id.hex())
    return (place, chip) if platform.chip_id else (place,)


def _place_of(result: AttestationResult, platform: Platform, demand: Demand) -> list[tuple[str, str]]:
    certified = certified_location(result)
    reasons = []
    if certified is not None and certified != platform.location:
        reasons.append(
            ("placement.location_disagrees", f"its TPM certifies {certified}, the ledger says {platform.location}")
        )
    if not within(platform.location, demand.jurisdiction):
        reasons.append(("placement.jurisdiction", f"it is in {platform.location}, outside {demand.jurisdiction}"))
    return reasons
