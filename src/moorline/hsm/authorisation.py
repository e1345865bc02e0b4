"""May this device use this service now? The conditions of a contract, in Cedar, evaluated over facts the broker knows.

The contract's text is data of another party, accepted on the ledger by both: it can only grant what the contract is
about, since principal, action and resource are ours. Anything but a clean "allow" is a no: no decision, a policy that
does not parse, and an error while evaluating any rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cedarpy

from moorline.clock import Instant

NAMESPACE: Final = "Moorline"
CONNECT: Final = f'{NAMESPACE}::Action::"connect"'


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessFacts:
    """Who asks for what. All of it was proven before: identity by chain, the rest by the ledger."""

    device: str
    device_provider: str
    device_trust_domain: str
    device_name: str
    provider: str
    service: str
    use_case: str
    contract: str
    now: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessDecision:
    """Allowed or not, and the rule that decided: a policy of the contract, or the reason why none did."""

    allowed: bool
    rule: str


def decide_access(conditions: str, facts: AccessFacts) -> AccessDecision:
    """Evaluate a contract's conditions. Never raises: whatever goes wrong denies."""
    principal = {"type": f"{NAMESPACE}::Device", "id": facts.device}
    resource = {"type": f"{NAMESPACE}::Service", "id": f"{facts.provider}/{facts.service}"}
    request = {
        "principal": _reference(principal),
        "action": CONNECT,
        "resource": _reference(resource),
        "context": {"now": facts.now, "contract": facts.contract},
    }
    device = {
        "provider": facts.device_provider,
        "trust_domain": facts.device_trust_domain,
        "device": facts.device_name,
    }
    service = {"provider": facts.provider, "service": facts.service, "use_case": facts.use_case}
    entities = [
        {"uid": {"__entity": principal}, "attrs": device, "parents": []},
        {"uid": {"__entity": resource}, "attrs": service, "parents": []},
    ]
    try:
        result = cedarpy.is_authorized(request, conditions, entities)
    except Exception as error:  # the engine raises several kinds on odd policies; none of them grants anything
        return AccessDecision(allowed=False, rule=f"not evaluated: {type(error).__name__}")
    if result.diagnostics.errors:
        return AccessDecision(allowed=False, rule="error in the conditions")
    if result.decision is not cedarpy.Decision.Allow:
        return AccessDecision(allowed=False, rule=", ".join(result.diagnostics.reasons) or "no rule permits")
    return AccessDecision(allowed=True, rule=", ".join(result.diagnostics.reasons))


def _reference(entity: dict[str, str]) -> str:
    escaped = entity["id"].replace("\\", "\\\\").replace('"', '\\"')
    return f'{entity["type"]}::"{escaped}"'
