"""Is an authentic Nitro enclave acceptable? The Appraisal Policy for Evidence, one field a demand, and its appraisal.

Input is `Verified[NitroClaims]`, so authenticity and freshness are settled. Every field of `NitroPolicy` is demanded: no
defaults, a field that is None or of another kind refuses, and what is not asked is `NotRequired(reason)`. All rules run.

    rule               AR4SI claim        what goes wrong without it
    nitro.root         instance-identity  another root than AWS's counts as AWS's
    nitro.debug        runtime-opaque     the parent instance reads the enclave's console; PCRs are all zero and say nothing
    nitro.pcr0         executables        another image
    nitro.pcr1         executables        another kernel or boot ramdisk
    nitro.pcr2         executables        another application
    nitro.pcr3         instance-identity  an instance with another IAM role
    nitro.pcr4         instance-identity  another parent instance
    nitro.pcr8         executables        an image signed by another
    nitro.other_pcrs   executables        what the enclave itself extended (PCR 5 to 7, 9 to 31)
    nitro.module_id    instance-identity  another enclave than the one already known
    nitro.user_data    sourced-data       a document made for another purpose or key
    nitro.public_key   sourced-data       data encrypted to a key of another
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Refused
from moorline.policy import rules
from moorline.policy.match import Match
from moorline.rats import Finding
from moorline.verification.nitro import NitroClaims
from moorline.verification.verified import Verified

CODE_PREFIX: Final = "nitro."
NAMED_PCRS: Final = (0, 1, 2, 3, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroPolicy:
    """What an enclave must be. Every field must be given; see the table above for what each prevents.

    `other_pcrs` compares all PCRs that have no field of their own and are not zero, as pairs of index and value.
    """

    debug: Match[bool]
    pcr0: Match[bytes]
    pcr1: Match[bytes]
    pcr2: Match[bytes]
    pcr3: Match[bytes]
    pcr4: Match[bytes]
    pcr8: Match[bytes]
    other_pcrs: Match[frozenset[tuple[int, bytes]]]
    module_id: Match[str]
    user_data: Match[bytes]
    public_key: Match[bytes]


_CLAIMS: Final = {
    "debug": "runtime-opaque",
    "pcr0": "executables",
    "pcr1": "executables",
    "pcr2": "executables",
    "pcr3": "instance-identity",
    "pcr4": "instance-identity",
    "pcr8": "executables",
    "other_pcrs": "executables",
    "module_id": "instance-identity",
    "user_data": "sourced-data",
    "public_key": "sourced-data",
}
_REMEDIES: Final = {
    "debug": "start the enclave without --debug-mode",
    "pcr0": "start the registered image, or register this one",
}


def appraise_nitro(verified: Verified[NitroClaims], policy: NitroPolicy, *, simulated_allowed: bool) -> tuple[Finding, ...]:
    """One finding a rule, the root first. `simulated_allowed` comes from the ledger's genesis. Never raises."""
    values = _values(verified.value)
    findings = [rules.judged_root("nitro.root", verified.root, simulated_allowed=simulated_allowed)]
    findings += [
        rules.judged(CODE_PREFIX + name, values[name], getattr(policy, name), claim=claim, remedy=_REMEDIES.get(name))
        for name, claim in _CLAIMS.items()
    ]
    return tuple(findings)


def require_nitro(findings: tuple[Finding, ...]) -> None:
    """Raises Refused("nitro.policy_not_met"), naming the first rule that was not met. No findings at all refuse too."""
    first = rules.first_refusal(findings)
    if first is None:
        return
    raise Refused(
        "nitro.policy_not_met",
        first.says,
        expected=first.expected,
        got=f"{first.code}: {first.got}",
        remedy=first.remedy,
    )


def policy_digest(policy: NitroPolicy) -> bytes:
    """SHA-256 that names this policy, for results and logs."""
    fields = [f"{field.name}={rules.shown(getattr(policy, field.name))}".encode() for field in dataclasses.fields(policy)]
    return digest.tagged_hash("nitro-policy", *fields)


def _values(claims: NitroClaims) -> dict[str, object]:
    document = claims.document
    others = frozenset((index, value) for index, value in document.pcrs.items() if index not in NAMED_PCRS and any(value))
    return {
        "debug": document.debug,
        **{f"pcr{index}": document.pcrs.get(index) for index in NAMED_PCRS},
        "other_pcrs": others,
        "module_id": document.module_id,
        "user_data": document.user_data,
        "public_key": document.public_key,
    }
