"""Doubt spreads: what a contraindicated claim takes along (SEC009 5.0.4).

A claim about a host rests on others: an IMA list is what a kernel says, so it is worth what the kernel is worth, which is
loaded by a bootloader, which firmware measured. `policy/sec009/doubt.json` is that graph, as data: every claim names the
rules that make it (by the beginning of their codes), the clause group it belongs to, and the claims it rests on; every
capability names the claims that show it.

1. The graph is typed and acyclic, and every name in it is known, or it is not loaded.
2. A claim one of whose rules was not met is contraindicated. One that rests, over any number of steps, on a contraindicated
   claim is doubted, whatever its own rules saw: its chain says over which claims the doubt came.
3. A doubted claim that would affirm warns instead; a capability that rests on a contraindicated or doubted claim is
   `declared` at most: what is left of it is somebody's word.

What was not appraised casts no doubt, and takes none away.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from typing import Any

from moorline.errors import Misconfigured
from moorline.rats import (
    AR4SI_CLAIMS,
    Assurance,
    AttestationResult,
    CapabilityLevel,
    Finding,
    Outcome,
    Submodule,
    Tier,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim about a host: its clause group, the AR4SI claim it bears on, its rules by the beginnings of their codes."""

    id: str
    group: str
    ar4si: str
    codes: tuple[str, ...]
    rests_on: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Claims, each after those it rests on; capabilities by the claims that show them; clause groups in order."""

    claims: tuple[Claim, ...]
    capabilities: Mapping[str, tuple[str, ...]]
    groups: tuple[str, ...]

    def claim_of(self, code: str) -> Claim:
        """The claim a rule's code belongs to. Raises Misconfigured("doubt.code_unknown")."""
        for claim in self.claims:
            if code.startswith(claim.codes):
                return claim
        raise Misconfigured("doubt.code_unknown", "no claim of the graph of doubt has this rule", got=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What became of each claim: its tier by its own rules, and where it is doubted, the chain that begins with it.

    A chain is `files <- kernel: host.kernel_not_in_reference_values`: who is doubted, over whom, and the rule not met.
    """

    tiers: Mapping[str, Tier]
    chains: Mapping[str, str]


def parse(text: str) -> Graph:
    """The graph in `text` (JSON). Raises Misconfigured("doubt.graph" | "doubt.unknown" | "doubt.cycle")."""
    try:
        data = json.loads(text)
        claims = {item["id"]: _claim(item) for item in data["claims"]}
        capabilities = {str(name): tuple(map(str, shown)) for name, shown in data["capabilities"].items()}
        groups = tuple(map(str, data["groups"]))
        whole = data["version"] == 1 and len(claims) == len(data["claims"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Misconfigured("doubt.graph", "this is no graph of doubt", got=type(error).__name__) from None
    if not whole:
        raise Misconfigured("doubt.graph", "this is no graph of doubt", expected="version 1, each claim once")
    _require_known(claims, capabilities, groups)
    try:
        order = tuple(TopologicalSorter({name: claim.rests_on for name, claim in claims.items()}).static_order())
    except CycleError as error:
        raise Misconfigured("doubt.cycle", "a claim rests on itself", got=" <- ".join(error.args[1])) from None
    return Graph(claims=tuple(claims[name] for name in order), capabilities=capabilities, groups=groups)


@lru_cache(maxsize=1)
def shipped() -> Graph:
    """The graph that ships with the package."""
    return parse((files("moorline.policy.sec009") / "doubt.json").read_text("utf-8"))


def spread(findings: Iterable[Finding], graph: Graph) -> Spread:
    """Number 2 of the module. Raises Misconfigured("doubt.code_unknown") for a rule that is of no claim."""
    tiers = dict.fromkeys((claim.id for claim in graph.claims), Tier.NONE)
    broken: dict[str, str] = {}
    for finding in findings:
        claim = graph.claim_of(finding.code)
        if finding.outcome is Outcome.NOT_MET:
            tiers[claim.id] = Tier.CONTRAINDICATED
            broken.setdefault(claim.id, finding.code)
        elif finding.outcome is Outcome.MET and tiers[claim.id] is Tier.NONE:
            tiers[claim.id] = Tier.AFFIRMING
    chains: dict[str, str] = {}
    for claim in graph.claims:  # each after what it rests on
        for below in claim.rests_on:
            if below in broken:
                chains[claim.id] = f"{claim.id} <- {below}: {broken[below]}"
            elif below in chains:
                chains[claim.id] = f"{claim.id} <- {chains[below]}"
            if claim.id in chains:
                break
    return Spread(tiers=tiers, chains=chains)


def lowered(result: AttestationResult, graph: Graph) -> AttestationResult:
    """`result` once doubt has spread: vector and capabilities lowered, and a submodule for each clause group."""
    found = spread(result.findings, graph)
    vector = dict(result.vector)
    for claim in graph.claims:
        if claim.id in found.chains and vector[claim.ar4si] is Tier.AFFIRMING:
            vector[claim.ar4si] = Tier.WARNING
    capabilities = tuple(_capability(one, graph, found) for one in result.capabilities)
    submodules = tuple(_submodule(group, graph, found) for group in sorted(graph.groups))
    return dataclasses.replace(result, vector=vector, capabilities=capabilities, submodules=submodules)


def _capability(one: CapabilityLevel, graph: Graph, found: Spread) -> CapabilityLevel:
    shown_by = graph.capabilities.get(one.capability)
    if shown_by is None:
        raise Misconfigured(
            "doubt.capability_unknown", "the graph of doubt does not know this capability", got=one.capability
        )
    doubted = any(name in found.chains or found.tiers[name] is Tier.CONTRAINDICATED for name in shown_by)
    return dataclasses.replace(one, level=min(one.level, Assurance.DECLARED)) if doubted else one


def _submodule(group: str, graph: Graph, found: Spread) -> Submodule:
    vector = dict.fromkeys(AR4SI_CLAIMS, Tier.NONE)
    doubts = []
    for claim in (claim for claim in graph.claims if claim.group == group):
        tier = found.tiers[claim.id]
        if claim.id in found.chains:
            doubts.append(found.chains[claim.id])
            tier = Tier.WARNING if tier is Tier.AFFIRMING else tier
        if tier.value > vector[claim.ar4si].value:
            vector[claim.ar4si] = tier
    return Submodule(name=group, vector=vector, doubts=tuple(doubts))


def _claim(item: Mapping[str, Any]) -> Claim:
    if set(item) != {"id", "group", "claim", "codes", "rests_on"}:
        raise KeyError
    return Claim(
        id=str(item["id"]),
        group=str(item["group"]),
        ar4si=str(item["claim"]),
        codes=tuple(map(str, item["codes"])),
        rests_on=tuple(map(str, item["rests_on"])),
    )


def _require_known(
    claims: Mapping[str, Claim], capabilities: Mapping[str, tuple[str, ...]], groups: tuple[str, ...]
) -> None:
    named = {name for claim in claims.values() for name in claim.rests_on}
    named |= {name for shown_by in capabilities.values() for name in shown_by}
    unknown = named - set(claims)
    unknown |= {claim.group for claim in claims.values()} - set(groups)
    unknown |= {claim.ar4si for claim in claims.values()} - set(AR4SI_CLAIMS)
    empty = {name for name, claim in claims.items() if not claim.codes}
    empty |= {name for name, shown_by in capabilities.items() if not shown_by}
    if unknown or empty:
        raise Misconfigured("doubt.unknown", "the graph of doubt names what it does not define", got=sorted(unknown | empty))
