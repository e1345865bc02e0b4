"""Is an authentic PSA device acceptable? The Appraisal Policy for Evidence, one field a demand, and its appraisal.

Input is `Verified[PsaClaims]`, so authenticity and freshness are settled. Every field of `PsaPolicy` is demanded: no
defaults, a field that is None or of another kind refuses, and what is not asked is `NotRequired(reason)`. All rules run.

    rule                          AR4SI claim        what goes wrong without it
    psa.root                      instance-identity  a shared secret, or a key nobody vouches for, counts as a device's
    psa.profile                   configuration      claims of a generation nobody examined
    psa.implementation_id         hardware           any implementation is as good as the one examined
    psa.instance_id               instance-identity  any device is as good as the registered one
    psa.lifecycle                 hardware           a device in assembly, or with its root of trust under debug
    psa.software_components       executables        other firmware, or a token that says it measured none
    psa.caller                    configuration      the non-secure side asked for the token, and chose what it attests
    psa.certification_reference   hardware           hardware that nobody certified
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Refused
from moorline.evidence.psa import Lifecycle, PsaClaims, SoftwareComponent
from moorline.policy import rules
from moorline.policy.match import Match
from moorline.rats import Finding
from moorline.verification.verified import Verified

CODE_PREFIX: Final = "psa."


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentReference:
    """A reference value of a software component; None where it has no type."""

    measurement_type: str | None
    measurement: bytes
    signer_id: bytes

    def __str__(self) -> str:
        return f"{self.measurement_type or '-'} {self.measurement.hex()} signed by {self.signer_id.hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PsaPolicy:
    """What a device must be. Every field must be given; see the table above for what each prevents.

    `software_components` compares whole sets: a component too many is as bad as one that is missing. `caller` is the client
    id, negative for the non-secure side.
    """

    profile: Match[str]
    implementation_id: Match[bytes]
    instance_id: Match[bytes]
    lifecycle: Match[Lifecycle]
    software_components: Match[frozenset[ComponentReference]]
    caller: Match[int]
    certification_reference: Match[str]


_CLAIMS: Final = {
    "profile": "configuration",
    "implementation_id": "hardware",
    "instance_id": "instance-identity",
    "lifecycle": "hardware",
    "software_components": "executables",
    "caller": "configuration",
    "certification_reference": "hardware",
}
_REMEDIES: Final = {
    "instance_id": "register this device",
    "lifecycle": "use a device in the secured state",
    "software_components": "update the firmware, or the reference values",
}


def reference_of(component: SoftwareComponent) -> ComponentReference:
    """The reference value that this component meets."""
    return ComponentReference(
        measurement_type=component.measurement_type, measurement=component.measurement, signer_id=component.signer_id
    )


def appraise_psa(verified: Verified[PsaClaims], policy: PsaPolicy, *, simulated_allowed: bool) -> tuple[Finding, ...]:
    """One finding a rule, the root first. `simulated_allowed` comes from the ledger's genesis. Never raises."""
    values = _values(verified.value)
    findings = [rules.judged_root("psa.root", verified.root, simulated_allowed=simulated_allowed)]
    findings += [
        rules.judged(CODE_PREFIX + name, values[name], getattr(policy, name), claim=claim, remedy=_REMEDIES.get(name))
        for name, claim in _CLAIMS.items()
    ]
    return tuple(findings)


def require_psa(findings: tuple[Finding, ...]) -> None:
    """Raises Refused("psa.policy_not_met"), naming the first rule that was not met. No findings at all refuse too."""
    first = rules.first_refusal(findings)
    if first is None:
        return
    raise Refused(
        "psa.policy_not_met",
        first.says,
        expected=first.expected,
        got=f"{first.code}: {first.got}",
        remedy=first.remedy,
    )


def policy_digest(policy: PsaPolicy) -> bytes:
    """SHA-256 that names this policy, for results and logs."""
    fields = [f"{field.name}={rules.shown(getattr(policy, field.name))}".encode() for field in dataclasses.fields(policy)]
    return digest.tagged_hash("psa-policy", *fields)


def _values(claims: PsaClaims) -> dict[str, object]:
    return {
        "profile": claims.profile,
        "implementation_id": claims.implementation_id,
        "instance_id": claims.instance_id,
        "lifecycle": claims.state,
        # No components means that the token says it has none: that is nothing to compare with, so only NotRequired takes it.
        "software_components": frozenset(map(reference_of, claims.components)) if claims.components else None,
        "caller": claims.client_id,
        "certification_reference": claims.certification_reference,
    }
