"""What a machine meets of SEC009, judged from what its probes saw: capabilities, measures, approach, use cases.

1. Every capability of the model is in the assessment, once. One that no probe spoke about is `not_probed`.
2. The assurance of a capability is the lowest of: how it was seen, the cap of the root that rests on, and the best the model
   grants. What a machine says about itself rests on software, so it is `asserted` at most, whatever its files say; more
   comes from an Attestation Result of an attestation authority that was verified before it is handed in (`attested`).
3. A measure of table 11 is met by capabilities (measure_capabilities.json), all clauses of it, at the minimum; or it is a
   service's, and then the assessment says whose. `not_probed` never counts as met.
4. The approach (7.2.1, 7.2.2 type 1 or 2, 7.2.3) follows from the core measures and nothing else; nobody can enter it.
   Measures that are a service's do not stand in its way: they are the deployment's, and are listed with their service.
5. A use case of table 9 may be hosted if every capability its requirements ask of a host is there at its minimum. What is
   missing is listed, and the smallest set of changes that would close it is computed (`roadmap`).

It does not establish that any of it is true: that takes an attestation authority on another machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from moorline.clock import Instant
from moorline.policy.sec009 import roadmap
from moorline.policy.sec009.catalogue import Capability, assurance, capabilities, catalogue, data
from moorline.policy.sec009.profile import Need, fulfilled_by_services, profile
from moorline.rats import ROOT_CAP, Assurance, CapabilityLevel, EvidenceRoot

SINGLE: Final = "7.2.1"
POOLED_1: Final = "7.2.2.1"
POOLED_2: Final = "7.2.2.2"
UNRESTRICTED: Final = "7.2.3"
NO_APPROACH: Final = "none"

_CONCEALMENT: Final = "6.14"
_CLEAN_UP: Final = ("cleanup.memory", "cleanup.storage.method.*")
_ENTROPY: Final = ("entropy.hw_source", "entropy.health")
_DERIVED: Final = "pool.type"


class Status(StrEnum):
    """What became of a capability or a measure. SERVICE: another part of the system answers for it, not this host."""

    MET = "met"
    NOT_MET = "not_met"
    DECLARED = "declared"
    NOT_PROBED = "not_probed"
    SERVICE = "service"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a probe saw of one capability. `seen` is how well; `root` what that rests on; `command` runs what takes time."""

    capability: str
    status: Status
    value: str | None = None
    seen: Assurance = Assurance.NONE
    root: EvidenceRoot = EvidenceRoot.NONE
    evidence: tuple[str, ...] = ()
    reason: str | None = None
    improve: str | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessedCapability:
    """One capability in the assessment; `assurance` is after the caps, NONE unless met or declared."""

    id: str
    status: Status
    value: str | None
    variability: str
    attestable: str
    assurance: Assurance
    root: EvidenceRoot
    evidence: tuple[str, ...]
    reason: str | None
    improve: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessedMeasure:
    """One measure of clause 6: `by` are the capabilities that meet it, or `service:` and the service that does."""

    id: str
    title: str
    status: Status
    by: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessedUseCase:
    """One use case of clause 4: what a host lacks for it, the smallest set of changes, and what services answer for."""

    id: str
    title: str
    may_host: bool
    missing: tuple[str, ...]
    roadmap: tuple[roadmap.Change, ...]
    services: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """Everything that was found out about one machine at one time."""

    host: str
    at: Instant
    privileged: bool
    capabilities: tuple[AssessedCapability, ...]
    measures: tuple[AssessedMeasure, ...]
    approach: str
    use_cases: tuple[AssessedUseCase, ...]

    def capability(self, identifier: str) -> AssessedCapability:
        """The capability of the model with this id; raises KeyError for one the model does not have."""
        return next((one for one in self.capabilities if one.id == identifier), None) or _unknown(identifier)

    def use_case(self, identifier: str) -> AssessedUseCase:
        """The use case; raises Refused("sec009.use_case_unknown")."""
        catalogue().use_case(identifier)
        return next(one for one in self.use_cases if one.id == identifier)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureRule:
    """What meets a measure: one capability of every clause, or the services."""

    id: str
    title: str
    clauses: tuple[tuple[str, ...], ...]
    minimum: Assurance
    services: tuple[str, ...]


@lru_cache(maxsize=1)
def measure_rules() -> dict[str, MeasureRule]:
    """measure_capabilities.json, typed, in clause order."""
    titles = {entry["id"]: entry["title"] for entry in data("catalogue.json")["measures"]}
    return {
        identifier: MeasureRule(
            id=identifier,
            title=titles[identifier],
            clauses=tuple(tuple(clause) for clause in entry["all_of"]),
            minimum=assurance(entry["minimum"]),
            services=tuple(entry["services"]),
        )
        for identifier, entry in data("measure_capabilities.json")["measures"].items()
    }


def assess(
    observations: Iterable[Observation],
    *,
    host: str,
    at: Instant,
    privileged: bool,
    attested: Iterable[CapabilityLevel] = (),
) -> Assessment:
    """The assessment. `attested` are levels of a verified Attestation Result about this very host that holds at `at`."""
    lifted = {one.capability: one for one in attested}
    seen: dict[str, Observation] = {}
    for one in observations:
        seen.setdefault(one.capability, one)
    found = {
        name: _assessed(model, seen.get(name), lifted.get(name))
        for name, model in capabilities().items()
        if name != _DERIVED
    }
    levels = {name: one.assurance for name, one in found.items()}
    measures = tuple(_measure(rule, found) for rule in measure_rules().values())
    approach = _approach({one.id: one.status for one in measures}, levels)
    found[_DERIVED] = _pool(approach)
    return Assessment(
        host=host,
        at=at,
        privileged=privileged,
        capabilities=tuple(found[name] for name in capabilities()),
        measures=measures,
        approach=approach,
        use_cases=tuple(_use_case(identifier, levels, bool(lifted)) for identifier in catalogue().use_cases),
    )


def _assessed(model: Capability, one: Observation | None, lifted: CapabilityLevel | None) -> AssessedCapability:
    if one is None:
        one = Observation(
            capability=model.name, status=Status.NOT_PROBED, reason="no probe of this build speaks about this capability"
        )
    level = min(one.seen, ROOT_CAP[one.root], model.max_assurance)
    if one.status not in (Status.MET, Status.DECLARED):
        level = Assurance.NONE
    elif one.status is Status.DECLARED:
        level = min(level, Assurance.DECLARED)
    status, value, evidence, reason = one.status, one.value, one.evidence, one.reason
    if one.command is not None:
        reason = f"{reason}; run: {one.command}" if reason else f"run: {one.command}"
    if lifted is not None and lifted.level > level:
        level = min(lifted.level, model.max_assurance)
        status, value, reason = Status.MET, lifted.value or value, None
        evidence = (*evidence, "attestation result: verified")
    return AssessedCapability(
        id=model.name,
        status=status,
        value=value,
        variability="static" if model.static else "dynamic",
        attestable="run_time" if model.run_time else "boot_only",
        assurance=level,
        root=one.root,
        evidence=evidence,
        reason=reason,
        improve=_improve(model, one, level, status),
    )


def _improve(model: Capability, one: Observation, level: Assurance, status: Status) -> str | None:
    if status is Status.MET and level >= model.max_assurance:
        return None
    if one.improve is not None:
        return one.improve
    if status in (Status.MET, Status.DECLARED):
        change = roadmap.changes().get(roadmap.ENROL)
        return change.how if change is not None and level >= Assurance.ASSERTED else None
    provider = next((change for change in roadmap.changes().values() if model.name in change.provides), None)
    return None if provider is None else provider.how


def _measure(rule: MeasureRule, found: Mapping[str, AssessedCapability]) -> AssessedMeasure:
    if not rule.clauses:
        return AssessedMeasure(
            id=rule.id, title=rule.title, status=Status.SERVICE, by=tuple(f"service:{name}" for name in rule.services)
        )
    by: list[str] = []
    worst = Status.MET
    for clause in rule.clauses:
        meets = [name for name in clause if found[name].assurance >= rule.minimum]
        by.extend(meets)
        if meets:
            if all(found[name].status is Status.DECLARED for name in meets):
                worst = max(worst, Status.DECLARED, key=_BADNESS.__getitem__)
            continue
        unknown = any(found[name].status is Status.NOT_PROBED for name in clause)
        worst = max(worst, Status.NOT_PROBED if unknown else Status.NOT_MET, key=_BADNESS.__getitem__)
    services = tuple(f"service:{name}" for name in rule.services)
    return AssessedMeasure(id=rule.id, title=rule.title, status=worst, by=(*by, *services))


_BADNESS: Final = {Status.MET: 0, Status.SERVICE: 0, Status.DECLARED: 1, Status.NOT_PROBED: 2, Status.NOT_MET: 3}


def _approach(measures: Mapping[str, Status], levels: Mapping[str, Assurance]) -> str:
    core = data("catalogue.json")["table11_core"]

    def holds(approach: str) -> bool:
        # DECLARED counts: the model grants people and doors no more than a declaration.
        return all(measures[one] in (Status.MET, Status.DECLARED, Status.SERVICE) for one in core[approach])

    around = all(levels[name] >= Assurance.ASSERTED for name in (*_CLEAN_UP, *_ENTROPY))
    if holds(UNRESTRICTED) and around:
        return UNRESTRICTED
    if holds("7.2.2"):
        return POOLED_2 if measures[_CONCEALMENT] is Status.MET else POOLED_1
    return SINGLE if holds(SINGLE) else NO_APPROACH


def _pool(approach: str) -> AssessedCapability:
    model = capabilities()[_DERIVED]
    derived = Observation(
        capability=_DERIVED,
        status=Status.NOT_MET if approach == NO_APPROACH else Status.MET,
        value=approach,
        seen=Assurance.ASSERTED,
        root=EvidenceRoot.SOFTWARE,
        evidence=("derived from the measures of table 11, never entered",),
        reason="core measures of every approach are missing" if approach == NO_APPROACH else None,
        improve="see the measures that are not met" if approach == NO_APPROACH else None,
    )
    return _assessed(model, derived, None)


@lru_cache(maxsize=1)
def alternatives() -> dict[str, frozenset[str]]:
    """Capabilities that serve as well as the one a requirement names (another kind of enclave for the same end)."""
    return {name: frozenset(others) for name, others in data("measure_capabilities.json")["alternatives"].items()}


def shown_for(need: Need, levels: Mapping[str, Assurance]) -> Assurance:
    """The best level at which the capability of a need, or one that serves as well, is shown."""
    names = {need.capability} | alternatives().get(need.capability, frozenset())
    return max(levels.get(name, Assurance.NONE) for name in names)


def _use_case(identifier: str, levels: Mapping[str, Assurance], enrolled: bool) -> AssessedUseCase:  # noqa: FBT001
    needs = profile(identifier)
    missing = tuple(need for need in needs if shown_for(need, levels) < need.minimum)
    return AssessedUseCase(
        id=identifier,
        title=catalogue().use_case(identifier).title,
        may_host=not missing,
        missing=tuple(need.capability for need in missing),
        roadmap=roadmap.smallest(missing, levels, alternatives(), enrolled=enrolled),
        services=tuple(sorted({f"{one.requirement}: {one.by}" for one in fulfilled_by_services(identifier)})),
    )


def _unknown(identifier: str) -> AssessedCapability:
    raise KeyError(identifier)
