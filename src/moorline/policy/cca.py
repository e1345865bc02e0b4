"""Is an authentic CCA realm acceptable? The Appraisal Policy for Evidence, one field a demand, and its appraisal.

Input is `Verified[CcaClaims]`, so authenticity, freshness and binding are settled. Every field of `CcaPolicy` is demanded:
no defaults, a field that is None or of another kind refuses, and what is not asked is `NotRequired(reason)` and shows up in
the result as not appraised. All rules run.

    rule                          AR4SI claim        what goes wrong without it
    cca.root                      instance-identity  a key nobody vouches for counts as an Arm platform's
    cca.platform_profile          configuration      claims of the deprecated profile are taken for the current ones
    cca.implementation_id         hardware           any implementation of CCA is as good as the one examined
    cca.instance_id               instance-identity  any machine is as good as the registered one
    cca.lifecycle                 hardware           a machine in assembly, or with its root of trust under debug
    cca.platform_config           configuration      firmware options that open the platform
    cca.platform_components       executables        other firmware: the monitor (RMM) sees every realm
    cca.initial_measurement       executables        other code in the realm
    cca.extensible_measurements   executables        what the realm loaded afterwards
    cca.personalization           configuration      a realm of another owner or launch
    cca.realm_profile             configuration      claims of another generation
    cca.realm_key                 instance-identity  another realm than the one already known
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Refused
from moorline.evidence.cca import Lifecycle, PlatformClaims, SoftwareComponent
from moorline.policy import rules
from moorline.policy.match import Match
from moorline.rats import Finding
from moorline.verification.cca import CcaClaims
from moorline.verification.verified import Verified

CODE_PREFIX: Final = "cca."


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentReference:
    """A reference value of a software component; None where it has no type. Versions prove nothing."""

    component_type: str | None
    measurement: bytes
    signer_id: bytes

    def __str__(self) -> str:
        return f"{self.component_type or '-'} {self.measurement.hex()} signed by {self.signer_id.hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CcaPolicy:
    """What a realm and its platform must be. Every field must be given; see the table above for what each prevents.

    `platform_components` compares whole sets: a component too many is as bad as one that is missing.
    """

    platform_profile: Match[str]
    implementation_id: Match[bytes]
    instance_id: Match[bytes]
    lifecycle: Match[Lifecycle]
    platform_config: Match[bytes]
    platform_components: Match[frozenset[ComponentReference]]
    initial_measurement: Match[bytes]
    extensible_measurements: Match[tuple[bytes, ...]]
    personalization: Match[bytes]
    realm_profile: Match[str]
    realm_key: Match[bytes]


_CLAIMS: Final = {
    "platform_profile": "configuration",
    "implementation_id": "hardware",
    "instance_id": "instance-identity",
    "lifecycle": "hardware",
    "platform_config": "configuration",
    "platform_components": "executables",
    "initial_measurement": "executables",
    "extensible_measurements": "executables",
    "personalization": "configuration",
    "realm_profile": "configuration",
    "realm_key": "instance-identity",
}
_REMEDIES: Final = {
    "instance_id": "register this platform, or start the realm on a registered one",
    "lifecycle": "use a platform in the secured state",
    "platform_profile": "update the platform's firmware: the legacy profile is deprecated",
    "platform_components": "update the firmware, or the reference values",
    "initial_measurement": "start the registered image, or register this measurement",
}


def reference_of(component: SoftwareComponent) -> ComponentReference:
    """The reference value that this component meets."""
    return ComponentReference(
        component_type=component.component_type, measurement=component.measurement, signer_id=component.signer_id
    )


def appraise_cca(verified: Verified[CcaClaims], policy: CcaPolicy, *, simulated_allowed: bool) -> tuple[Finding, ...]:
    """One finding a rule, the root first. `simulated_allowed` comes from the ledger's genesis. Never raises."""
    values = _values(verified.value)
    findings = [rules.judged_root("cca.root", verified.root, simulated_allowed=simulated_allowed)]
    findings += [
        rules.judged(CODE_PREFIX + name, values[name], getattr(policy, name), claim=claim, remedy=_REMEDIES.get(name))
        for name, claim in _CLAIMS.items()
    ]
    return tuple(findings)


def require_cca(findings: tuple[Finding, ...]) -> None:
    """Raises Refused("cca.policy_not_met"), naming the first rule that was not met. No findings at all refuse too."""
    first = rules.first_refusal(findings)
    if first is None:
        return
    raise Refused(
        "cca.policy_not_met",
        first.says,
        expected=first.expected,
        got=f"{first.code}: {first.got}",
        remedy=first.remedy,
    )


def policy_digest(policy: CcaPolicy) -> bytes:
    """SHA-256 that names this policy, for results and logs."""
    fields = [f"{field.name}={rules.shown(getattr(policy, field.name))}".encode() for field in dataclasses.fields(policy)]
    return digest.tagged_hash("cca-policy", *fields)


def _values(claims: CcaClaims) -> dict[str, object]:
    platform, realm = claims.platform, claims.realm
    return {
        **_platform_values(platform),
        "initial_measurement": realm.initial_measurement,
        "extensible_measurements": realm.extensible_measurements,
        "personalization": realm.personalization,
        "realm_profile": realm.profile,
        "realm_key": realm.point,
    }


def _platform_values(platform: PlatformClaims) -> dict[str, object]:
    return {
        "platform_profile": platform.profile,
        "implementation_id": platform.implementation_id,
        "instance_id": platform.instance_id,
        "lifecycle": platform.state,
        "platform_config": platform.config,
        "platform_components": frozenset(reference_of(component) for component in platform.components),
    }
