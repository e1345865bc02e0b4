"""From a use case to what a host must show before placement, and what it lacks.

Table 9 marks requirements for the use case; `requirement_capabilities.json` says for each of them what a host shows and what
another part of the system shows at another moment (at release, during the run). Only the former can decide a placement; the
latter is listed too, so that nobody takes a short profile for a weak one. A requirement with neither refuses to load.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from moorline.policy.sec009.catalogue import assurance, catalogue, data
from moorline.rats import Assurance, CapabilityLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A capability that a host must show, at least at `minimum`, and the requirements that ask for it."""

    capability: str
    minimum: Assurance
    requirements: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceNeed:
    """A part of a requirement that another part of the system meets; `capability` is None where the model has no name."""

    requirement: str
    capability: str | None
    minimum: Assurance
    by: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A need that a host does not meet: what it showed instead, and the same in words."""

    need: Need
    shown: Assurance
    says: str


def requirements_of(use_case: str) -> tuple[str, ...]:
    """The requirements that table 9 marks, in clause order. Raises Refused("sec009.use_case_unknown")."""
    return catalogue().use_case(use_case).requirements


def profile(use_case: str) -> tuple[Need, ...]:
    """What a host must show for a use case: each capability once, with the highest minimum any requirement asks for.

    Raises Refused("sec009.use_case_unknown").
    """
    levels: dict[str, Assurance] = {}
    asked: dict[str, list[str]] = {}
    for requirement in requirements_of(use_case):
        for capability, minimum in _host_table()[requirement]:
            levels[capability] = max(minimum, levels.get(capability, Assurance.NONE))
            asked.setdefault(capability, []).append(requirement)
    return tuple(
        Need(capability=name, minimum=level, requirements=tuple(asked[name])) for name, level in sorted(levels.items())
    )


def fulfilled_by_services(use_case: str) -> tuple[ServiceNeed, ...]:
    """What other parts of the system answer for, in the same use case."""
    marked = set(requirements_of(use_case))
    return tuple(need for need in _service_table() if need.requirement in marked)


def gap(needs: Iterable[Need], shown: Iterable[CapabilityLevel]) -> tuple[Gap, ...]:
    """What is missing, in words; empty means that every need is met. A capability nobody showed counts as `none`."""
    levels: dict[str, Assurance] = {}
    for capability in shown:
        levels[capability.capability] = max(capability.level, levels.get(capability.capability, Assurance.NONE))
    missing = []
    for need in needs:
        level = levels.get(need.capability, Assurance.NONE)
        if level < need.minimum:
            says = (
                f"{need.capability} is {level.word}, at least {need.minimum.word} is needed "
                f"(SEC009 {', '.join(need.requirements)})"
            )
            missing.append(Gap(need=need, shown=level, says=says))
    return tuple(missing)


@lru_cache(maxsize=1)
def _host_table() -> dict[str, tuple[tuple[str, Assurance], ...]]:
    return {
        requirement: tuple((item["capability"], assurance(item["minimum"])) for item in entry["host"])
        for requirement, entry in data("requirement_capabilities.json")["requirements"].items()
    }


@lru_cache(maxsize=1)
def _service_table() -> tuple[ServiceNeed, ...]:
    return tuple(
        ServiceNeed(
            requirement=requirement,
            capability=item["capability"],
            minimum=assurance(item["minimum"]),
            by=item["by"],
            how=item["how"],
        )
        for requirement, entry in data("requirement_capabilities.json")["requirements"].items()
        for item in entry["service"]
    )
