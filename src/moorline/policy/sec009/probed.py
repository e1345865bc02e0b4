"""What `moor host probe` saw, as it is carried to `moor host assess`: one observation, where and when it was made.

A report is the machine's own word like everything it says of itself, so its level is `asserted` at most, and it is of one
host and one day: another host's, or one older than LIFE_S, is refused.
"""

from __future__ import annotations

import json
from typing import Any, Final

from moorline.clock import Instant
from moorline.errors import Malformed, Refused
from moorline.policy.sec009.assessment import Observation, Status
from moorline.rats import Assurance, EvidenceRoot

LIFE_S: Final = 86400
CAPABILITIES: Final = frozenset(
    (
        *("net.capture.ratio", "conceal.cpu", "conceal.ram", "conceal.storage", "conceal.net", "entropy.health"),
        *("cleanup.network", "cleanup.memory", "cleanup.storage.method.*", "cleanup.keys"),
    )
)
_KIND: Final = "moorline-probe"
_FIELDS: Final = {"kind", "host", "at", "capability", "status", "value", "reason", "evidence"}


def as_document(seen: Observation, *, host: str, at: Instant) -> dict[str, Any]:
    """The report of one observation."""
    return {
        "kind": _KIND,
        "host": host,
        "at": int(at),
        "capability": seen.capability,
        "status": seen.status.value,
        "value": seen.value,
        "reason": seen.reason,
        "evidence": list(seen.evidence),
    }


def parse_probed(data: bytes, *, host: str, now: Instant) -> Observation:
    """The observation of a report about `host`. Raises `probe.report`, `probe.other_host`, `probe.old`."""
    try:
        document = json.loads(data)
        assert set(document) == _FIELDS
        assert document["kind"] == _KIND
        status, at = Status(document["status"]), document["at"]
        assert isinstance(at, int)
        assert document["capability"] in CAPABILITIES
        assert status in {Status.MET, Status.NOT_MET, Status.NOT_PROBED}
        assert all(isinstance(one, str) for one in document["evidence"])
        assert all(document[name] is None or isinstance(document[name], str) for name in ("value", "reason"))
    except (ValueError, TypeError, KeyError, AssertionError):
        raise Malformed(
            "probe.report",
            "this is no report of a probe",
            expected="what moor host probe --report wrote",
            remedy="probe again, with --report FILE",
        ) from None
    if document["host"] != host:
        raise Refused(
            "probe.other_host", "the report is about another host", expected=host, got=document["host"], remedy="probe here"
        )
    if not now - LIFE_S <= at <= now + 60:
        raise Refused(
            "probe.old", "the report is not of this day", expected=f"<= {LIFE_S} s old", got=now - at, remedy="probe again"
        )
    return Observation(
        capability=document["capability"],
        status=status,
        value=document["value"],
        seen=Assurance.ASSERTED if status is Status.MET else Assurance.NONE,
        root=EvidenceRoot.SOFTWARE,
        evidence=tuple(document["evidence"]),
        reason=document["reason"],
    )
