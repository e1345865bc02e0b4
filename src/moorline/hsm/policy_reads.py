"""Which facts a Cedar policy can read at all: its decision is a function of these and of the action, and of nothing else.

A policy is looked at in its JSON form (Cedar, "Policy JSON format"). Attributes read one after the other from a variable
(`context.verdict.status`) are that one fact; a variable in any other place (`principal == ...`, `context has x`, the scope)
is all of its facts. The whole tree is walked, so every variable is found whatever expression it is in: of a form that is
not known here, more is thought to be read than is, never less.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

_RESOURCE: Final = ("principal", "service")
_SECTION: Final = {"principal": ("principal",), "action": ("action",), "resource": _RESOURCE, "context": ("context",)}
"""Where in the facts a variable's are; of a resource there is a name only, its service's."""
_ALL: Final = ()

Path = tuple[str, ...]


def reads(policies: str) -> frozenset[Path]:
    """The facts, as ways into what `release_policy.facts_of` makes, that this policy set (JSON) reads."""
    return frozenset(_read(json.loads(policies)))


def _read(node: Any) -> Iterator[Path]:  # noqa: ANN401 - JSON
    path = _path(node)
    if path is not None:
        yield path
        return
    if isinstance(node, list):
        for each in node:
            yield from _read(each)
    if isinstance(node, dict):
        for name, each in node.items():
            if name in _SECTION and isinstance(each, dict) and each.get("op", "All") != "All":
                yield _SECTION[name]  # the scope names one
            yield from _read(each)


def _path(node: Any) -> Path | None:  # noqa: ANN401 - as above
    """The one fact that a chain of attributes from a variable is, or the variable itself; None for anything else."""
    match node:
        case {"Var": str(name), **others} if not others:
            return _SECTION.get(name, _ALL)
        case {".": {"left": left, "attr": str(attribute), **more}, **others} if not more and not others:
            before = _path(left)
            return before if before in (None, _ALL, _RESOURCE) else (*before, attribute)
    return None
