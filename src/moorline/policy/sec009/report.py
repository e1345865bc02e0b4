"""An assessment as JSON, read back, and what changed between two of them.

The form is version 1 and stable: ids are those of the catalogue, in its order. A report that is read is untrusted: every id
has to be one of the catalogue, once, and every status and level a word of the model; unknown members are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from moorline.clock import rendered
from moorline.errors import Malformed
from moorline.policy.sec009.assessment import Assessment, Status, measure_rules
from moorline.policy.sec009.catalogue import assurance, capabilities, catalogue
from moorline.rats import Assurance

VERSION: Final = 1
MAX_BYTES: Final = 4 << 20
_TOP: Final = frozenset({"version", "host", "at", "privileged", "capabilities", "measures", "approach", "use_cases"})
_ORDER: Final = {Status.NOT_PROBED: 0, Status.NOT_MET: 0, Status.DECLARED: 1, Status.SERVICE: 1, Status.MET: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as it was. `better` is None where it is only another value."""

    kind: str
    id: str
    before: str
    after: str
    better: bool | None


def as_json(found: Assessment) -> dict[str, Any]:
    """The report, as `moor host assess --json` prints it."""
    return {
        "version": VERSION,
        "host": found.host,
        "at": rendered(found.at),
        "privileged": found.privileged,
        "capabilities": [
            {
                "id": one.id,
                "status": one.status.value,
                "value": one.value,
                "variability": one.variability,
                "attestable": one.attestable,
                "assurance": one.assurance.word,
                "root": one.root.value,
                "evidence": list(one.evidence),
                "reason": one.reason,
                "improve": one.improve,
            }
            for one in found.capabilities
        ],
        "measures": [{"id": one.id, "status": one.status.value, "by": list(one.by)} for one in found.measures],
        "approach": found.approach,
        "use_cases": [
            {
                "id": one.id,
                "may_host": one.may_host,
                "missing": list(one.missing),
                "roadmap": [
                    {"id": change.id, "says": change.says, "how": change.how, "effort": change.effort}
                    for change in one.roadmap
                ],
            }
            for one in found.use_cases
        ],
    }


def parse_report(data: bytes) -> dict[str, Any]:
    """A report of this version. Raises only Malformed("assessment.report" | "assessment.version")."""
    if len(data) > MAX_BYTES:
        raise _malformed(f"larger than {MAX_BYTES} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise _malformed("not JSON") from None
    if not isinstance(found, dict) or set(found) != _TOP:
        raise _malformed("not the members of a report")
    if found["version"] != VERSION or type(found["version"]) is not int:
        raise Malformed("assessment.version", "the report is of another version", expected=VERSION, got=found["version"])
    _rows(found["capabilities"], list(capabilities()), "capabilities")
    _rows(found["measures"], list(measure_rules()), "measures")
    _rows(found["use_cases"], list(catalogue().use_cases), "use_cases")
    try:
        for one in found["capabilities"]:
            Status(one["status"])
            assurance(one["assurance"])
        for one in found["measures"]:
            Status(one["status"])
        if not all(type(one["may_host"]) is bool for one in found["use_cases"]) or not isinstance(found["approach"], str):
            raise _malformed("may_host is no truth value, or approach no text")
    except (KeyError, ValueError, TypeError, AttributeError):
        raise _malformed("a status or level that the model does not have") from None
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[Difference, ...]:
    """What is not as it was, in the order of the catalogue; both are from `parse_report` or `as_json`."""
    found: list[Difference] = []
    for old, new in zip(before["capabilities"], after["capabilities"], strict=True):
        was, now = _standing(old), _standing(new)
        if was != now or old["value"] != new["value"]:
            better = None if was == now else now > was
            found.append(Difference(kind="capability", id=new["id"], before=_words(old), after=_words(new), better=better))
    for old, new in zip(before["measures"], after["measures"], strict=True):
        if old["status"] != new["status"]:
            better = _ORDER[Status(new["status"])] > _ORDER[Status(old["status"])]
            same = _ORDER[Status(new["status"])] == _ORDER[Status(old["status"])]
            found.append(
                Difference(
                    kind="measure", id=new["id"], before=old["status"], after=new["status"], better=None if same else better
                )
            )
    if before["approach"] != after["approach"]:
        found.append(
            Difference(
                kind="approach",
                id="approach",
                before=before["approach"],
                after=after["approach"],
                better=_rank(after["approach"]) > _rank(before["approach"]),
            )
        )
    for old, new in zip(before["use_cases"], after["use_cases"], strict=True):
        if old["may_host"] != new["may_host"]:
            found.append(
                Difference(
                    kind="use case",
                    id=new["id"],
                    before="may host" if old["may_host"] else "may not host",
                    after="may host" if new["may_host"] else "may not host",
                    better=new["may_host"],
                )
            )
    return tuple(found)


def _rank(approach: str) -> int:
    order = ("none", "7.2.1", "7.2.2.1", "7.2.2.2", "7.2.3")
    return order.index(approach) if approach in order else 0


def _standing(one: dict[str, Any]) -> tuple[int, Assurance]:
    return _ORDER[Status(one["status"])], assurance(one["assurance"])


def _words(one: dict[str, Any]) -> str:
    value = "" if one["value"] is None else f": {one['value']}"
    level = "" if one["assurance"] == "none" else f" ({one['assurance']})"
    return f"{one['status']}{level}{value}"


def _rows(rows: object, ids: list[str], name: str) -> None:
    if not isinstance(rows, list) or not all(isinstance(one, dict) for one in rows):
        raise _malformed(f"{name} is no list of objects")
    if [one.get("id") for one in rows] != ids:
        raise _malformed(f"{name} are not those of the catalogue, once each and in its order")
    if name == "capabilities" and not all(isinstance(one.get("value"), str | None) for one in rows):
        raise _malformed("a value is no text")


def _malformed(got: str) -> Malformed:
    return Malformed(
        "assessment.report",
        "this is not an assessment report",
        expected="what moor host assess --json printed",
        got=got,
        remedy="make it again",
    )
