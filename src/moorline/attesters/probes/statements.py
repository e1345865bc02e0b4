"""What people state about a host that no file can show: doors, people, law (SEC009 6.5, 6.6, 5.1.6).

    [[statement]]                       # /etc/moorline/statements.toml
    capability = "people.vetted"
    value = "administrators of hall 2 vetted, level 2"
    by = ["A. Ahn", "B. Berg"]          # two different people
    not_after = "2027-03-01T00:00:00Z"

A statement is never more than `declared`. One by fewer than two people, or past its end, counts as none, and says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from moorline.attesters.probes.saying import declared, not_met, unread
from moorline.attesters.probes.tree import State, Tree, cleaned
from moorline.policy.sec009.assessment import Observation

FILE: Final = "/etc/moorline/statements.toml"
CAPABILITIES: Final = ("people.vetted.*",)


def probe(tree: Tree, now: int) -> Iterator[Observation]:
    """People."""
    name = CAPABILITIES[0]
    yield stated(tree, name, now) or not_met(name, "nobody stated that administrators are vetted", tree.read(FILE).shown())


def stated(tree: Tree, capability: str, now: int) -> Observation | None:
    """What the file states about a capability, or None if it says nothing about it."""
    read = tree.read(FILE)
    if not read.ok:
        return None if read.state is State.ABSENT else unread(capability, read)
    try:
        entries = tomllib.loads(read.text).get("statement", [])
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        return not_met(capability, f"{FILE} cannot be read: {error}", read.shown())
    family = capability.removesuffix(".*")
    mine = [one for one in entries if isinstance(one, dict) and _about(one, family)] if isinstance(entries, list) else []
    if not mine:
        return None
    for one in mine:
        problem = _problem(one, now)
        if problem is not None:
            return not_met(capability, problem, f"{FILE}: {cleaned(str(one.get('value')))}")
    values = "; ".join(f"{one['value']} (until {one['not_after']})" for one in mine)
    people = sorted({str(name) for one in mine for name in one["by"]})
    return declared(capability, values, f"{FILE}: stated by {cleaned(', '.join(people))}")


def _about(entry: dict[str, Any], family: str) -> bool:
    named = entry.get("capability")
    return isinstance(named, str) and (named == family or named.startswith(f"{family}."))


def _problem(entry: dict[str, Any], now: int) -> str | None:
    by, value, until = entry.get("by"), entry.get("value"), entry.get("not_after")
    if not isinstance(value, str) or not isinstance(by, list) or len({str(one).strip().lower() for one in by}) < 2:
        return "a statement has a value and two different people in `by`"
    try:
        end = until if isinstance(until, datetime) else datetime.fromisoformat(str(until))
    except ValueError:
        return "a statement has an end: not_after, RFC 3339 with its zone"
    if end.tzinfo is None:
        return "a statement has an end: not_after, RFC 3339 with its zone"
    return "the statement is past its end" if end.timestamp() < now else None
