"""An assessment as SARIF 2.1.0 (OASIS), for tools that collect findings: a rule a capability, a result for each not met.

`not_met` is a warning, `not_probed` a note, `declared` a note of kind `review`. The fingerprint of a result is the id of its
capability and the name of the host, so that a finding is the same finding in the next run.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any, Final

from moorline import __version__
from moorline.clock import rendered
from moorline.policy.sec009.assessment import AssessedCapability, Assessment, Status
from moorline.policy.sec009.catalogue import capabilities

SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
_PATH: Final = re.compile(r"^(/[A-Za-z0-9_./@+-]+): ")
_KINDS: Final = {
    Status.NOT_MET: ("fail", "warning"),
    Status.NOT_PROBED: ("open", "none"),
    Status.DECLARED: ("review", "none"),
}


def render(found: Assessment) -> dict[str, Any]:
    """The log, one run."""
    names = [one.id for one in found.capabilities]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "moor host assess",
                        "version": __version__,
                        "rules": [
                            {
                                "id": name,
                                "shortDescription": {"text": f"SEC009 {', '.join(model.clauses)}: {name}"},
                                "fullDescription": {"text": model.evidence},
                                "defaultConfiguration": {"level": "warning"},
                            }
                            for name, model in capabilities().items()
                        ],
                    }
                },
                "automationDetails": {"id": f"sec009/{sha256(found.host.encode()).hexdigest()[:16]}/"},
                "invocations": [{"executionSuccessful": True, "endTimeUtc": rendered(found.at)}],
                "properties": {"host": found.host, "approach": found.approach, "privileged": found.privileged},
                "results": [
                    _result(one, names.index(one.id), found.host) for one in found.capabilities if one.status in _KINDS
                ],
            }
        ],
    }


def _result(one: AssessedCapability, index: int, host: str) -> dict[str, Any]:
    kind, level = _KINDS[one.status]
    text = f"{one.id} is {one.status.value}"
    text += f": {one.reason or one.value}" if one.reason or one.value else ""
    text += f". Improve: {one.improve}" if one.improve else ""
    result: dict[str, Any] = {
        "ruleId": one.id,
        "ruleIndex": index,
        "kind": kind,
        "level": level,
        "message": {"text": text},
        "partialFingerprints": {"capability/v1": sha256(f"{host}\x00{one.id}".encode()).hexdigest()},
        "properties": {"assurance": one.assurance.word, "root": one.root.value, "evidence": list(one.evidence)},
    }
    paths = [match[1] for line in one.evidence if (match := _PATH.match(line))]
    if paths:
        result["locations"] = [{"physicalLocation": {"artifactLocation": {"uri": f"file://{paths[0]}"}}}]
    return result
