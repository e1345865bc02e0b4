"""The provider's own policy for releasing keys: Cedar over request, verdict about the host, and the service's record.

`hsm.release` is the floor: what the protocol demands is demanded whatever a policy says. On top of it the policy must permit
each action, and anything but a clean "allow" is a no: no policy that permits, one that forbids, an error while evaluating.
So a policy can narrow and cannot widen. It is checked against the schema below when the broker starts; a policy that names
an attribute that does not exist, or compares what cannot be compared, stops the broker (`release.policy_invalid`).

Every rule should carry `@id("...")`: that is the name under which `moor hsm explain` and refusals show it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import cedarpy

from moorline.errors import Misconfigured, Refused
from moorline.hsm.policy_reads import Path, reads
from moorline.hsm.release import ReleaseDecision, ReleaseRequest
from moorline.rats import Outcome

SCHEMA: Final = """
namespace Moorline {
  entity Function = {
    tenant: String, service: String, instance: String, generation: Long, host: String, package: String, measurement: String,
  };
  entity Key;
  type Enclave = { root: String, chip_shown: Bool };
  type Verdict = { status: String, root: String, code: String, age_s: Long, left_s: Long, gaps: Set<String> };
  type Registered = { use_case: String, profiles: Set<String>, callers: Set<String> };
  type Facts = { now: Long, channel: String, met: Set<String>, enclave: Enclave, verdict: Verdict, record: Registered };
  action release, resume, renew appliesTo { principal: Function, resource: Key, context: Facts };
}
"""

_SAID_MAX: Final = 256
_SAID_CHARS: Final = 16_384
_LONG_END: Final = 1 << 63


class ReleaseAction(StrEnum):
    """What a function asks for."""

    RELEASE = "release"  # its identity and sealed-storage key, at its launch
    RESUME = "resume"  # its session, with an identity it has
    RENEW = "renew"  # a certificate, or a fresh key


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFacts:
    """What the ledger's record of the service says."""

    use_case: str
    profiles: tuple[str, ...]
    callers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyDecision:
    """Allowed or not, and the rules of the policy that decided."""

    allowed: bool
    rules: tuple[str, ...]

    def require(self) -> None:
        """Raises Refused("release.policy_denied")."""
        if not self.allowed:
            raise Refused(
                "release.policy_denied",
                "the provider's release policy does not permit this",
                got=", ".join(self.rules),
                remedy="ask the provider, who can ask: moor hsm explain",
            )


class ReleasePolicy:
    """A checked policy."""

    def __init__(self, text: str, *, name: str) -> None:
        """Raises Misconfigured("release.policy_invalid")."""
        try:
            checked = cedarpy.validate_policies(text, SCHEMA)
            problems = [str(error) for error in checked.errors]
        except Exception as error:  # the engine raises several kinds on what is no policy at all
            problems = [str(error)]
        if problems:
            raise Misconfigured(
                "release.policy_invalid",
                "the release policy does not fit its schema",
                expected="Cedar rules over the facts in docs/spec/release.md",
                got=f"{name}: {'; '.join(problems)}",
                remedy="correct the file named release_policy in broker.toml",
            )
        self.text = text
        self._policies = cedarpy.PolicySet.from_str(text)
        self._schema = cedarpy.Schema.from_str(SCHEMA)
        self._said: OrderedDict[str, PolicyDecision] = OrderedDict()
        self._turn = threading.Lock()
        rendered = json.loads(cedarpy.policies_to_json_str(text)).get("staticPolicies", {})
        self._reads = sorted(reads(cedarpy.policies_to_json_str(text)))
        self._names = {key: one.get("annotations", {}).get("id") or key for key, one in rendered.items()}

    def decide_known(self, facts: dict[str, Any]) -> PolicyDecision:
        """As `decide`, of facts that `facts_of` made: each there and of its type, so that nothing can be odd about them.

        Of the same facts among those it reads, a policy always says the same: the last few are remembered.
        """
        try:
            read = [facts["action"], *(_fact(facts, path) for path in self._reads)]
            key = json.dumps(read, sort_keys=True) if _are_longs(facts) else None
        except Exception:  # whatever it is, the engine is asked, and denies
            key = None
        said = None if key is None else self._said.get(key)
        if said is None:
            said = self.decide(facts)
            self._remember(key, said)
        return said

    def _remember(self, key: str | None, said: PolicyDecision) -> None:
        if key is None or len(key) > _SAID_CHARS:
            return
        with self._turn:
            self._said[key] = said
            while len(self._said) > _SAID_MAX:
                self._said.popitem(last=False)

    def decide(self, facts: dict[str, Any]) -> PolicyDecision:
        """Decide about facts in the shape of `facts_of`, whoever wrote them. Never raises: whatever goes wrong denies."""
        try:
            principal = _reference("Function", facts["principal"]["instance"])
            entities = [
                {
                    "uid": {"type": "Moorline::Function", "id": facts["principal"]["instance"]},
                    "attrs": facts["principal"],
                    "parents": [],
                },
                {"uid": {"type": "Moorline::Key", "id": facts["principal"]["service"]}, "attrs": {}, "parents": []},
            ]
            request = {
                "principal": principal,
                "action": _reference("Action", facts["action"]),
                "resource": _reference("Key", facts["principal"]["service"]),
                "context": facts["context"],
            }
            result = cedarpy.is_authorized(request, self._policies, entities, schema=self._schema)
        except Exception as error:  # odd facts must deny, whatever the engine thinks of them
            return PolicyDecision(allowed=False, rules=(f"not evaluated: {type(error).__name__}",))
        if result.diagnostics.errors:
            return PolicyDecision(allowed=False, rules=("error while evaluating",))
        named = tuple(sorted(self._names.get(one, one) for one in result.diagnostics.reasons))
        if result.decision is not cedarpy.Decision.Allow:
            return PolicyDecision(allowed=False, rules=named or ("no rule permits",))
        return PolicyDecision(allowed=True, rules=named)


def facts_of(action: ReleaseAction, request: ReleaseRequest, floor: ReleaseDecision, record: RecordFacts) -> dict[str, Any]:
    """The facts a policy sees, as JSON: what `moor hsm explain FILE` takes too. Nothing in them is secret."""
    fields, result = request.fields, request.host.result
    return {
        "action": action.value,
        "principal": {
            "tenant": fields.tenant,
            "service": fields.service,
            "instance": fields.instance,
            "generation": fields.generation,
            "host": fields.host,
            "package": fields.package_digest.hex(),
            "measurement": fields.measurement.hex(),
        },
        "context": {
            "now": request.now,
            "channel": request.profile.value,
            "met": sorted(one.code for one in floor.findings if one.outcome is Outcome.MET),
            "enclave": {"root": request.enclave.root.value, "chip_shown": request.enclave.chip is not None},
            "verdict": {
                "status": "none" if result is None else result.status.word,
                "root": "none" if result is None else result.root.value,
                "code": request.host.problem or "",
                "age_s": 0 if result is None else request.now - result.issued,
                "left_s": 0 if result is None else result.expires - request.now,
                "gaps": list(request.host.gaps),
            },
            "record": {
                "use_case": record.use_case,
                "profiles": list(record.profiles),
                "callers": list(record.callers),
            },
        },
    }


def _fact(facts: dict[str, Any], path: Path) -> Any:  # noqa: ANN401 - a fact is text, a number, a truth or a set
    found: Any = facts
    for name in path:
        found = found[name]
    return found


def _are_longs(facts: Mapping[str, Any]) -> bool:
    """Whether the engine takes all numbers: it refuses larger ones, also those that no policy reads."""
    verdict = facts["context"]["verdict"]
    numbers: list[int] = [facts["principal"]["generation"], facts["context"]["now"], verdict["age_s"], verdict["left_s"]]
    return min(numbers) >= -_LONG_END and max(numbers) < _LONG_END


def _reference(kind: str, name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'Moorline::{kind}::"{escaped}"'
