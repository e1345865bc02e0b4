"""May this device use this service now? The conditions of a contract, in Cedar, evaluated over facts the broker knows.

The contract's text is data of another party, accepted on the ledger by both: it can only grant what the contract is
about, since principal, action and resource are ours. Anything but a clean "allow" is a no: no decision, a policy that
the ledger would not take (policy.conditions), one that the engine's own validator refuses under the one schema there is,
and an error while evaluating any rule. Both parties' HSMs come to the same answer from the same facts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import cedarpy

from moorline.clock import Instant
from moorline.errors import Malformed
from moorline.policy import conditions as contract_conditions
from moorline.policy.conditions import ACTION, NAMESPACE

CONNECT: Final = f'{NAMESPACE}::Action::"{ACTION}"'
_DAY_S: Final = 86400
_EPOCH_WEEKDAY: Final = 4  # 1970-01-01 was a Thursday


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessFacts:
    """Who asks for what. All of it was proven before: identity by chain, the rest by the ledger.

    `profile` is the channel profile of the session and `post_quantum` whether its keys were agreed with ML-KEM too;
    `profiles` are those the service is registered with.
    """

    device: str
    device_provider: str
    device_trust_domain: str
    device_name: str
    provider: str
    service: str
    use_case: str
    profiles: tuple[str, ...] = ()
    contract: str
    profile: str
    post_quantum: bool
    now: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessDecision:
    """Allowed or not, and why: `rule` for people, `policies` the ids of the contract's rules that decided, in order.

    No policy decides where none permits, or where the text cannot be judged.
    """

    allowed: bool
    rule: str
    policies: tuple[str, ...] = ()


def decide_access(conditions: str, facts: AccessFacts) -> AccessDecision:
    """Evaluate a contract's conditions. Never raises: whatever goes wrong denies."""
    try:
        contract_conditions.require_valid(conditions, max_bytes=contract_conditions.MAX_BYTES)
    except Malformed as error:  # the ledger never took this; it came from elsewhere
        return AccessDecision(allowed=False, rule=f"not evaluated: {error.code}")
    try:
        require_engine_takes(conditions)
        result = cedarpy.is_authorized(_request(facts), conditions, _entities(facts), _schema())
    except Malformed as error:
        return AccessDecision(allowed=False, rule=f"not evaluated: {error.code}")
    except Exception as error:  # the engine raises several kinds on odd policies; none of them grants anything
        return AccessDecision(allowed=False, rule=f"not evaluated: {type(error).__name__}")
    if result.diagnostics.errors:
        return AccessDecision(allowed=False, rule="error in the conditions")
    named = result.diagnostics.id_annotations_by_reason
    policies = tuple(sorted(named.get(reason, reason) for reason in result.diagnostics.reasons))
    allowed = result.decision is cedarpy.Decision.Allow
    return AccessDecision(allowed=allowed, rule=", ".join(policies) or "no rule permits", policies=policies)


def require_engine_takes(conditions: str) -> None:
    """Raises Malformed("conditions.engine") unless the Cedar engine validates the conditions under our schema.

    Everything that the ledger takes should pass here: if it does not, engine and ledger disagree and nobody is let in.
    """
    found = cedarpy.validate_policies(conditions, _schema())
    if not found.validation_passed:
        raise Malformed(
            "conditions.engine",
            "the Cedar engine does not validate the conditions",
            got="; ".join(str(error) for error in found.errors),
            remedy="docs/spec/contract-conditions.md lists attributes and their types",
        )


def _request(facts: AccessFacts) -> dict[str, object]:
    context = {
        "contract": facts.contract,
        "profile": facts.profile,
        "post_quantum": facts.post_quantum,
        "now": facts.now,
        "hour": facts.now % _DAY_S // 3600,
        "weekday": (facts.now // _DAY_S + _EPOCH_WEEKDAY - 1) % 7 + 1,
    }
    principal, resource = _principal(facts), _resource(facts)
    return {"principal": _reference(principal), "action": CONNECT, "resource": _reference(resource), "context": context}


def _entities(facts: AccessFacts) -> list[dict[str, object]]:
    device = {
        "provider": facts.device_provider,
        "trust_domain": facts.device_trust_domain,
        "device": facts.device_name,
    }
    service = {
        "provider": facts.provider,
        "service": facts.service,
        "use_case": facts.use_case,
        "profiles": list(facts.profiles),
    }
    return [
        {"uid": {"__entity": _principal(facts)}, "attrs": device, "parents": []},
        {"uid": {"__entity": _resource(facts)}, "attrs": service, "parents": []},
    ]


def _principal(facts: AccessFacts) -> dict[str, str]:
    return {"type": f"{NAMESPACE}::Device", "id": facts.device}


def _resource(facts: AccessFacts) -> dict[str, str]:
    return {"type": f"{NAMESPACE}::Service", "id": f"{facts.provider}/{facts.service}"}


@lru_cache(maxsize=1)
def _schema() -> str:
    return json.dumps(contract_conditions.cedar_schema())


def _reference(entity: dict[str, str]) -> str:
    escaped = entity["id"].replace("\\", "\\\\").replace('"', '\\"')
    return f'{entity["type"]}::"{escaped}"'
