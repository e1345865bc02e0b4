"""Is a machine behind a TPM quote acceptable? For quotes appraised by themselves, without the verifier's enrolment.

Input is verified: the quote, and a boot log and an IMA list that replay to it. There are no defaults: a field that is None
or of another kind refuses. The AK's own worth is `root`: a key that somebody handed over rests on software, one of a
cloud's certificate on `virtual`, one bound by hardware evidence on that.

    rule                     AR4SI claim          what goes wrong without it
    tpm.root                 instance-identity    a key that anybody could hold counts as a TPM's
    tpm.bank                 hardware             a bank (SHA-1) whose values can be made
    tpm.selection            executables          a quote over PCRs that say nothing
    tpm.firmware_version     hardware             a TPM with a known hole
    tpm.pcr0 ... pcr23       executables          another boot; a PCR outside the quote has no value and meets nothing
    host.*                   see `policy.host`    boot log and IMA list; without them their demands are not met
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Refused
from moorline.evidence.tpm_structures import HASH_NAMES
from moorline.policy import host, rules
from moorline.policy.host import FileStanding, HostPolicy
from moorline.policy.match import Match
from moorline.rats import EvidenceRoot, Finding
from moorline.verification.eventlog import BootState
from moorline.verification.verified import Verified
from moorline.verification.vtpm import VerifiedQuote

CODE_PREFIX: Final = "tpm."
PCRS: Final = range(24)


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmPolicy:
    """What the machine must be. Every field must be given; see the table above. `selection` has bit n for PCR n."""

    root: Match[EvidenceRoot]
    bank: Match[str]
    selection: Match[int]
    firmware_version: Match[int]
    pcr0: Match[bytes]
    pcr1: Match[bytes]
    pcr2: Match[bytes]
    pcr3: Match[bytes]
    pcr4: Match[bytes]
    pcr5: Match[bytes]
    pcr6: Match[bytes]
    pcr7: Match[bytes]
    pcr8: Match[bytes]
    pcr9: Match[bytes]
    pcr10: Match[bytes]
    pcr11: Match[bytes]
    pcr12: Match[bytes]
    pcr13: Match[bytes]
    pcr14: Match[bytes]
    pcr15: Match[bytes]
    pcr16: Match[bytes]
    pcr17: Match[bytes]
    pcr18: Match[bytes]
    pcr19: Match[bytes]
    pcr20: Match[bytes]
    pcr21: Match[bytes]
    pcr22: Match[bytes]
    pcr23: Match[bytes]
    host: HostPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmFacts:
    """One verified quote, and what replays to it; None where there was no such evidence."""

    quote: Verified[VerifiedQuote]
    boot: BootState | None
    files: FileStanding | None


_CLAIMS: Final = {"bank": "hardware", "selection": "executables", "firmware_version": "hardware"}
_REMEDIES: Final = {
    "bank": "quote a bank that is accepted",
    "selection": "quote at least the PCRs that the policy names",
}


def appraise_tpm(facts: TpmFacts, policy: TpmPolicy, *, simulated_allowed: bool) -> tuple[Finding, ...]:
    """One finding a rule: the root, the quote, every PCR, then what `policy.host` judges. Never raises.

    A simulated root never counts without `simulated_allowed`, which comes from the ledger's genesis.
    """
    root = facts.quote.root
    found = [_root(root, policy.root, simulated_allowed=simulated_allowed)]
    values = _values(facts.quote.value)
    for name, claim in _CLAIMS.items():
        demand = getattr(policy, name)
        found.append(rules.judged(CODE_PREFIX + name, values[name], demand, claim=claim, remedy=_REMEDIES.get(name)))
    for index in PCRS:
        name = f"pcr{index}"
        value, demand = facts.quote.value.pcrs.get(index), getattr(policy, name)
        found.append(
            rules.judged(
                CODE_PREFIX + name, value, demand, claim="executables", remedy="boot what is in the reference values"
            )
        )
    if not isinstance(policy.host, HostPolicy):
        return (*found, rules.judged("tpm.host", None, None, claim="executables", remedy="say what may be booted"))
    clock_safe = facts.quote.value.quote.clock.safe
    return (*found, *host.appraise_measurements(facts.boot, facts.files, policy.host, clock_safe=clock_safe))


def require_tpm(findings: tuple[Finding, ...]) -> None:
    """Raises Refused("tpm.policy_not_met"), naming the first rule that was not met. No findings at all refuse too."""
    first = rules.first_refusal(findings)
    if first is None:
        return
    raise Refused(
        "tpm.policy_not_met", first.says, expected=first.expected, got=f"{first.code}: {first.got}", remedy=first.remedy
    )


def policy_digest(policy: TpmPolicy) -> bytes:
    """SHA-256 that names this policy, for results and logs."""
    parts = [
        f"{prefix}{field.name}={rules.shown(getattr(holder, field.name))}".encode()
        for prefix, holder in (("", policy), ("host.", policy.host))
        for field in dataclasses.fields(holder)
        if field.name != "host"
    ]
    return digest.tagged_hash("tpm-policy", *parts)


def _root(root: EvidenceRoot, demand: object, *, simulated_allowed: bool) -> Finding:
    if root is EvidenceRoot.TEST and not simulated_allowed:  # whatever the policy says, or leaves open
        return rules.judged_root("tpm.root", root, simulated_allowed=False)
    return rules.judged(
        "tpm.root",
        root,
        demand,
        claim="instance-identity",
        remedy="give the endorsement of the key, or say what it is worth",
    )


def _values(quote: VerifiedQuote) -> dict[str, object]:
    return {
        "bank": HASH_NAMES.get(quote.bank),
        "selection": sum(1 << index for index in quote.selection),
        "firmware_version": quote.quote.firmware_version,
    }
