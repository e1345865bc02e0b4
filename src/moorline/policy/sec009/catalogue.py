"""The catalogue and the capability model, typed, from the package's own data files (trusted: they ship with the code)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from moorline.errors import Refused
from moorline.rats import Assurance


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A clause 5 item, in our words. `principle` items (5.0.x) frame the others and are in no table."""

    id: str
    title: str
    group: str
    paraphrase: str
    principle: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UseCase:
    """A clause 4 use case and the requirements that table 9 marks for it."""

    id: str
    title: str
    paraphrase: str
    requirements: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """A capability of a host or service, its table 10 class, and the best assurance it can ever have."""

    name: str
    static: bool
    run_time: bool
    max_assurance: Assurance
    evidence: str
    clauses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Requirements and use cases by id. `table9` maps a requirement to the use cases that need it."""

    requirements: dict[str, Requirement]
    use_cases: dict[str, UseCase]
    table9: dict[str, tuple[str, ...]]

    def use_case(self, identifier: str) -> UseCase:
        """The use case; raises Refused("sec009.use_case_unknown")."""
        found = self.use_cases.get(identifier)
        if found is None:
            raise Refused(
                "sec009.use_case_unknown",
                "SEC009 has no such use case",
                expected=", ".join(self.use_cases),
                got=identifier,
                remedy="name one of clause 4",
            )
        return found


def assurance(word: str) -> Assurance:
    """The level that a data file spells `declared`, `asserted`, `measured` or `hw_attested`."""
    return Assurance[word.upper()]


def data(name: str) -> Any:  # noqa: ANN401 - JSON of our own, typed by the caller
    """One of the data files, as parsed JSON."""
    return json.loads(files("moorline.policy.sec009").joinpath(name).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """The catalogue."""
    raw = data("catalogue.json")
    requirements = {
        entry["id"]: Requirement(
            id=entry["id"],
            title=entry["title"],
            group=entry["group"],
            paraphrase=entry["paraphrase"],
            principle=entry.get("kind") == "principle",
        )
        for entry in raw["requirements"]
    }
    table9 = {
        requirement: tuple(case for case in raw["table9"]["columns"] if marks[case])
        for requirement, marks in raw["table9"]["rows"].items()
    }
    use_cases = {
        entry["id"]: UseCase(
            id=entry["id"],
            title=entry["title"],
            paraphrase=entry["paraphrase"],
            requirements=tuple(requirement for requirement, cases in table9.items() if entry["id"] in cases),
        )
        for entry in raw["use_cases"]
    }
    return Catalogue(requirements=requirements, use_cases=use_cases, table9=table9)


@lru_cache(maxsize=1)
def capabilities() -> dict[str, Capability]:
    """Every capability of the model by name; names ending in `.*` stand for a family."""
    return {
        entry["name"]: Capability(
            name=entry["name"],
            static=entry["variability"] == "static",
            run_time=entry["attestable"] == "run_time",
            max_assurance=assurance(entry["max_assurance"]),
            evidence=entry["evidence"],
            clauses=tuple(entry["gr"]),
        )
        for entry in data("capabilities.json")["capabilities"]
    }
