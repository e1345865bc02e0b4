"""Is this host acceptable? All rules run, each leaves a finding, and what was not asked for is a finding too.

`HostPolicy` has no defaults: every field is a demand or `NotRequired(reason)`, and a field that is missing refuses.
Reference values fill the demands (`strict_policy`). The input is verified: quote, boot log and IMA list replayed, tag
certified.

What an affirming result does not establish: that nothing was changed in memory after it was measured, that measured software
has no flaw, or where the host stands (a tag moves with its machine; location is `asserted` at most).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.clock import Instant
from moorline.digest import same, tagged_hash
from moorline.evidence.ima import ImaEntry
from moorline.policy import doubt
from moorline.policy.distance import Judgement, Standing
from moorline.policy.match import Exact, Match, NotRequired, OneOf, meets, shown
from moorline.policy.reference_values import LocationTag, Reference
from moorline.rats import (
    AR4SI_CLAIMS,
    Assurance,
    AttestationResult,
    CapabilityLevel,
    EvidenceRoot,
    Finding,
    Outcome,
    Tier,
    capped,
)
from moorline.verification.eventlog import BootState, Component
from moorline.verification.tpm_quote import QuotedPcrs
from moorline.verification.verified import Verified
from moorline.wire.schema import Size

BOOT_AGGREGATE: Final = b"boot_aggregate"
UNLISTED_KEPT: Final = 32

_CODES: Final = {
    Component.FIRMWARE: ("host.firmware_not_in_reference_values", "host.firmware_not_measured", "executables"),
    Component.CONFIGURATION: (
        "host.configuration_not_in_reference_values",
        "host.configuration_not_measured",
        "configuration",
    ),
    Component.BOOTLOADER: ("host.bootloader_not_in_reference_values", "host.bootloader_not_measured", "executables"),
    Component.KERNEL: ("host.kernel_not_in_reference_values", "host.kernel_not_measured", "executables"),
    Component.COMMAND_LINE: (
        "host.command_line_not_in_reference_values",
        "host.command_line_not_measured",
        "configuration",
    ),
    Component.INITRD: ("host.initrd_not_in_reference_values", "host.initrd_not_measured", "executables"),
    Component.OTHER: ("host.boot_event_not_in_reference_values", "", "executables"),
}
"""Component: code when a measurement is not listed, code when nothing was measured (OTHER may be empty), AR4SI claim."""

_FROM_COMMAND_LINE: Final = (
    ("lockdown=", "kernel.lockdown", Assurance.ASSERTED),
    ("module.sig_enforce=1", "kernel.module_signing", Assurance.MEASURED),
    ("ima_appraise=enforce", "ima.appraisal.enforced", Assurance.MEASURED),
    ("roothash=", "fs.root.readonly", Assurance.MEASURED),
)
"""SEC009 capabilities that an argument on the measured, listed kernel command line shows (sec009/capabilities.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPolicy:
    """The Appraisal Policy for Evidence of hosts.

    Component fields are demands on every digest measured as that component.
    """

    firmware: Match[bytes]
    configuration: Match[bytes]
    bootloader: Match[bytes]
    kernel: Match[bytes]
    command_line: Match[bytes]
    initrd: Match[bytes]
    other: Match[bytes]
    secure_boot: Match[bool]
    boot_anomalies: Match[int]
    unlisted_files: Match[int]
    ima_violations: Match[int]
    clock_safe: Match[bool]
    location: Match[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlistedFile:
    """A measured file that no reference value allows; `path` as the list says, cleaned for people."""

    path: Annotated[str, Size(at_most=512)]
    digest: Annotated[bytes, Size(at_most=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStanding:
    """What was found in all IMA entries of one boot so far; kept by the verifier, since entries are read once."""

    entries: int
    unlisted: int
    violations: int
    first_unlisted: tuple[UnlistedFile, ...]


NO_FILES: Final = FileStanding(entries=0, unlisted=0, violations=0, first_unlisted=())


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenLocation:
    """A location tag whose digest the host's TPM certified, and what the registered platform record says about it."""

    tag: LocationTag
    digest: bytes
    registered_digest: bytes
    registered_location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Everything verified about one host at one time. `boot`, `files`, `location` are None where there was no evidence.

    `distance` is what landmarks say about the place in the tag; None where none are known here, or the tag names no point.

    `chip_id` is what the platform record says stands in the same box; nothing measured shows it (PROTOCOLS.md 8).
    """

    host: str
    ek_digest: bytes
    chip_id: bytes
    quote: Verified[QuotedPcrs]
    boot: BootState | None
    boot_digest: bytes
    files: FileStanding | None
    location: ProvenLocation | None
    distance: Judgement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """Who appraises, when, for how long, in answer to what, and whether the ledger's genesis allows simulated roots."""

    verifier: str
    issued: Instant
    expires: Instant
    nonce: bytes
    simulated_allowed: bool


def strict_policy(reference: Reference, *, not_required: Mapping[str, str]) -> HostPolicy:
    """Every demand made from `reference`, except the fields `not_required` names, each with its reason.

    Raises TypeError for an unknown field name, as any constructor would.
    """
    demands: dict[str, Match[object]] = {
        component.value: OneOf(frozenset(reference.components[component])) for component in Component
    }
    demands |= {
        "secure_boot": Exact(True),  # noqa: FBT003 - the value demanded
        "boot_anomalies": Exact(0),
        "unlisted_files": Exact(0),
        "ima_violations": Exact(0),
        "clock_safe": Exact(True),  # noqa: FBT003 - the value demanded
        "location": Exact(True),  # noqa: FBT003 - the value demanded
    }
    demands |= {name: NotRequired(reason) for name, reason in not_required.items()}
    return HostPolicy(**demands)  # type: ignore[arg-type] # keyed by the field names just above


def policy_digest(policy: HostPolicy, reference: Reference) -> bytes:
    """Names exactly this policy with these reference values."""
    fields = [f"{field.name}={shown(getattr(policy, field.name))}" for field in dataclasses.fields(policy)]
    return tagged_hash("host-policy", reference.digest, *(field.encode() for field in fields))


def appraise_files(
    before: FileStanding, entries: Iterable[ImaEntry], *, reference: Reference, aggregate: bytes, allowed: int = 0
) -> FileStanding:
    """The standing after `entries`. `aggregate` is what the first entry, boot_aggregate, must hold: it ties list to boot.

    `allowed` further entries were lines that `reference` allows (verification.ima.AllowedLines of these very values).
    """
    count, unlisted, violations = before.entries + allowed, before.unlisted, before.violations
    kept = list(before.first_unlisted)
    accepted = reference.files
    for entry in entries:
        count += 1
        if entry.violation:
            violations += 1
            continue
        listed = accepted.get(entry.path)
        if listed is not None and entry.digest in listed:
            continue
        if entry.path == BOOT_AGGREGATE and same(entry.digest, aggregate):
            continue
        unlisted += 1
        if len(kept) < UNLISTED_KEPT:
            kept.append(UnlistedFile(path=entry.path[:256].decode("utf-8", "backslashreplace")[:512], digest=entry.digest))
    return FileStanding(entries=count, unlisted=unlisted, violations=violations, first_unlisted=tuple(kept))


def appraise_host(facts: HostFacts, policy: HostPolicy, *, reference: Reference, appraisal: Appraisal) -> AttestationResult:
    """The verdict about one host. Never raises for a host that is not acceptable: that is a verdict.

    Whoever judges many hosts once a period asks policy.host_alike, which comes to the same.
    """
    findings = (
        finding_of_identity(facts),
        *findings_of_measurements(facts.boot, facts.files, policy, clock_safe=facts.quote.value.clock.safe),
        *findings_of_place(facts, policy, appraisal.issued),
    )
    result = AttestationResult(
        subject=f"host/{facts.host}",
        verifier=appraisal.verifier,
        issued=appraisal.issued,
        expires=appraisal.expires,
        root=facts.quote.root,
        simulated_allowed=appraisal.simulated_allowed,
        vector=trust_vector(findings),
        findings=findings,
        policy_digest=policy_digest(policy, reference),
        nonce=appraisal.nonce,
        capabilities=_capabilities(facts, findings, simulated_allowed=appraisal.simulated_allowed),
        bound=bound(facts),
    )
    return doubt.lowered(result, doubt.shipped())


def appraise_measurements(
    boot: BootState | None, files: FileStanding | None, policy: HostPolicy, *, clock_safe: bool
) -> tuple[Finding, ...]:
    """What of `policy` can be judged from a quote, its boot log and its IMA list alone, without an enrolment.

    A location cannot: a demand on it is not met. `None` is evidence that was not sent.
    """
    return (*findings_of_measurements(boot, files, policy, clock_safe=clock_safe), *_unlocated(policy))


def findings_of_measurements(
    boot: BootState | None, files: FileStanding | None, policy: HostPolicy, *, clock_safe: bool
) -> tuple[Finding, ...]:
    """What the rules about clock, boot and files find. It depends on nothing but these arguments: on no name and no key."""
    return (
        *_clock(policy, safe=clock_safe),
        *_boot(boot, policy),
        *_secure_boot(boot, policy),
        *_anomalies(boot, policy),
        *_files(files, policy),
    )


def findings_of_place(facts: HostFacts, policy: HostPolicy, now: Instant) -> tuple[Finding, ...]:
    """What the rules about the place find, which is each host's own."""
    return (*_location(facts, policy, now), *_distance(facts, policy))


def finding_of_identity(facts: HostFacts) -> Finding:
    """That the quote was verified: without that there are no facts."""
    return Finding(
        code="host.tpm_enrolled",
        outcome=Outcome.MET,
        claim="instance-identity",
        says="the quote is by the attestation key enrolled for this host, and answers this challenge",
        got=facts.quote.value.ak_name.hex(),
    )


def _clock(policy: HostPolicy, *, safe: bool) -> Iterable[Finding]:
    if isinstance(policy.clock_safe, NotRequired):
        yield _not_asked("host.clock_unsafe", "instance-identity", policy.clock_safe)
    elif meets(safe, policy.clock_safe):
        yield _met("host.clock_safe", "instance-identity", "the TPM's clock has not gone back")
    else:
        # Said by the TPM itself after power loss without shutdown; its counters were compared in verification.
        yield Finding(
            code="host.clock_unsafe",
            outcome=Outcome.NOT_MET,
            claim="instance-identity",
            says="the TPM lost power without shutdown: its clock may repeat times it has shown before",
            expected=shown(policy.clock_safe),
            got=shown(safe),
            remedy="it becomes safe again by itself",
        )


def _boot(boot: BootState | None, policy: HostPolicy) -> Iterable[Finding]:
    for component in Component:
        unlisted, unmeasured, claim = _CODES[component]
        demand = getattr(policy, component.value)
        if isinstance(demand, NotRequired):
            yield _not_asked(unlisted, claim, demand)
            continue
        measured = () if boot is None else boot.of(component)
        asked = isinstance(demand, OneOf | Exact)
        if not asked or (not measured and (boot is None or unmeasured)):
            yield Finding(
                code=unmeasured or unlisted,
                outcome=Outcome.NOT_MET,
                claim=claim,
                says=f"nothing was measured as {component.value}"
                if asked
                else f"the policy says nothing about {component.value}",
                expected="at least one measurement" if asked else "a demand",
                remedy="boot with measured boot, and send the boot log",
            )
            continue
        bad = next((one for one in measured if not meets(one.digest, demand)), None)
        if bad is None:
            yield _met(f"host.{component.value}_in_reference_values", claim, f"{len(measured)} measurements are all listed")
        else:
            yield Finding(
                code=unlisted,
                outcome=Outcome.NOT_MET,
                claim=claim,
                says=f"the {component.value} that was booted is not in the reference values",
                expected="a digest in the reference values",
                got=f"{bad.digest.hex()} (PCR {bad.pcr}, described as {bad.described!r})",
                remedy="boot what is listed, or have it listed",
            )


def _secure_boot(boot: BootState | None, policy: HostPolicy) -> Iterable[Finding]:
    if isinstance(policy.secure_boot, NotRequired):
        yield _not_asked("host.secure_boot_off", "configuration", policy.secure_boot)
        return
    found = None if boot is None else boot.secure_boot
    if meets(found, policy.secure_boot):
        yield _met("host.secure_boot_on", "configuration", "the measured variable says Secure Boot is enforced")
    else:
        yield Finding(
            code="host.secure_boot_off",
            outcome=Outcome.NOT_MET,
            claim="configuration",
            says="Secure Boot is not shown to be as demanded",
            expected=shown(policy.secure_boot),
            got="not measured" if found is None else shown(found),
            remedy="enable Secure Boot in the firmware",
        )


def _anomalies(boot: BootState | None, policy: HostPolicy) -> Iterable[Finding]:
    if isinstance(policy.boot_anomalies, NotRequired):
        yield _not_asked("host.boot_log_anomaly", "executables", policy.boot_anomalies)
    elif boot is not None and meets(len(boot.anomalies), policy.boot_anomalies):
        yield _met("host.boot_log_regular", "executables", "separators stand where they must")
    else:
        yield Finding(
            code="host.boot_log_anomaly",
            outcome=Outcome.NOT_MET,
            claim="executables",
            says="the boot log replays but does not look like a boot",
            expected=shown(policy.boot_anomalies),
            got="no boot log" if boot is None else "; ".join(boot.anomalies),
        )


def _files(files: FileStanding | None, policy: HostPolicy) -> Iterable[Finding]:
    rules = (
        (policy.unlisted_files, "host.file_not_in_reference_values", "measured files are not in the reference values"),
        (policy.ima_violations, "host.ima_violation", "files were open for writing while they were measured"),
    )
    for demand, code, says in rules:
        if isinstance(demand, NotRequired):
            yield _not_asked(code, "executables", demand)
            continue
        if files is None or _nothing_measured(files):
            yield Finding(
                code="host.ima_missing",
                outcome=Outcome.NOT_MET,
                claim="executables",
                says="there is no IMA list, or one that measured no file: no IMA policy was active",
                expected="boot_aggregate and at least one file",
                got="no list" if files is None else f"{files.entries} entries",
                remedy="boot with ima_policy=tcb",
            )
            return
        is_unlisted = code == "host.file_not_in_reference_values"
        count = files.unlisted if is_unlisted else files.violations
        if meets(count, demand):
            yield _met(
                code.replace("_not_in_", "_in_").replace("_violation", "_regular"), "executables", f"{files.entries} entries"
            )
        else:
            first = files.first_unlisted[0] if is_unlisted and files.first_unlisted else None
            yield Finding(
                code=code,
                outcome=Outcome.NOT_MET,
                claim="executables",
                says=says,
                expected=shown(demand),
                got=f"{count}" if first is None else f"{count}, first {first.path} {first.digest.hex()}",
                remedy="list the file, or reboot the host without it" if is_unlisted else "reboot the host",
            )


def _nothing_measured(files: FileStanding) -> bool:
    """A kernel writes boot_aggregate by itself; whatever policy measures files measures the first program it starts."""
    return files.entries <= 1 and not files.unlisted and not files.violations


def _location(facts: HostFacts, policy: HostPolicy, now: Instant) -> Iterable[Finding]:
    shown_tag = facts.location
    if shown_tag is None or isinstance(policy.location, NotRequired):
        yield from _unlocated(policy)
        return
    tag = shown_tag.tag
    code, got = "", ""
    if tag.host != facts.host or not same(tag.ek_digest, facts.ek_digest):
        code, got = "host.location_other_host", tag.host
    elif tag.not_after < now:
        code, got = "host.location_expired", str(tag.not_after)
    elif not meets(_is_registered(shown_tag), policy.location):
        code, got = "host.location_not_registered", tag.location
    if code:
        yield Finding(
            code=code,
            outcome=Outcome.NOT_MET,
            claim="configuration",
            says="the location tag is not the registered tag of this host, or no longer",
            expected=f"{facts.host} at {shown_tag.registered_location}",
            got=got,
            remedy="register the platform again with its present tag",
        )
    elif facts.distance is not None and facts.distance.standing is Standing.REFUTED:
        yield _refuted(facts.distance, tag)
    else:
        yield Finding(
            code="host.location_proven",
            outcome=Outcome.MET,
            claim="configuration",
            says="the TPM certifies the registered location tag; a machine can still move with its tag",
            got=tag.location,
        )


def _refuted(found: Judgement, tag: LocationTag) -> Finding:
    bounds = (one for one in found.bounds if one.refutes)
    said = (f"{one.landmark}: at most {one.at_most_m / 1000:.0f} km, not {one.claimed_m / 1000:.0f}" for one in bounds)
    return Finding(
        code="host.location_refuted",
        outcome=Outcome.NOT_MET,
        claim="configuration",
        says="the host answered a landmark faster than light could from the place in its tag",
        expected=tag.geographical,
        got="; ".join(said),
        remedy="find out where the machine is; sign a tag for that place",
    )


def _distance(facts: HostFacts, policy: HostPolicy) -> Iterable[Finding]:
    """What landmarks say, where they were asked: they refute a place and never prove one, so nothing here is ever met."""
    if facts.distance is None or isinstance(policy.location, NotRequired):
        return
    if facts.distance.standing is not Standing.REFUTED:
        compatible = facts.distance.standing is Standing.COMPATIBLE
        yield Finding(
            code="host.location_not_refuted",
            outcome=Outcome.NOT_APPRAISED,
            claim="configuration",
            says="no landmark refutes the place, which is no proof" if compatible else "no landmark has measured this host",
        )


def _unlocated(policy: HostPolicy) -> Iterable[Finding]:
    if isinstance(policy.location, NotRequired):
        yield _not_asked("host.location_missing", "configuration", policy.location)
        return
    yield Finding(
        code="host.location_missing",
        outcome=Outcome.NOT_MET,
        claim="configuration",
        says="the host showed no certified location tag",
        remedy="write the tag into the TPM and give it to the host agent",
    )


def _is_registered(shown_tag: ProvenLocation) -> bool:
    tag = shown_tag.tag
    return same(shown_tag.digest, shown_tag.registered_digest) and tag.location == shown_tag.registered_location


def _met(code: str, claim: str, says: str) -> Finding:
    return Finding(code=code, outcome=Outcome.MET, claim=claim, says=says)


def _not_asked(code: str, claim: str, demand: NotRequired) -> Finding:
    return Finding(code=code, outcome=Outcome.NOT_APPRAISED, claim=claim, says=f"not required: {demand.reason}")


def trust_vector(findings: tuple[Finding, ...]) -> dict[str, Tier]:
    """The AR4SI vector: contraindicated where a rule was not met, affirming where all that were asked were met."""
    vector = dict.fromkeys(AR4SI_CLAIMS, Tier.NONE)
    for finding in findings:
        if finding.outcome is Outcome.NOT_MET:
            vector[finding.claim] = Tier.CONTRAINDICATED
        elif finding.outcome is Outcome.MET and vector[finding.claim] is Tier.NONE:
            vector[finding.claim] = Tier.AFFIRMING
    return vector


def _capabilities(
    facts: HostFacts, findings: tuple[Finding, ...], *, simulated_allowed: bool
) -> tuple[CapabilityLevel, ...]:
    """SEC009 capabilities shown by rules that were met, capped by the root (capabilities.json, levels.rule)."""
    met = {finding.code for finding in findings if finding.outcome is Outcome.MET}
    root = facts.quote.root
    shown_levels: list[tuple[str, Assurance, str | None]] = []
    if root in (EvidenceRoot.HARDWARE, EvidenceRoot.TEST):
        shown_levels.append(("root.tpm20.hardware", Assurance.HW_ATTESTED, None))
    if root in (EvidenceRoot.VIRTUAL, EvidenceRoot.TEST):
        shown_levels.append(("root.tpm20.virtual", Assurance.ASSERTED, None))
    booted = {f"host.{component.value}_in_reference_values" for component in Component} | {"host.boot_log_regular"}
    if booted - {"host.initrd_in_reference_values", "host.other_in_reference_values"} <= met:
        shown_levels.append(("boot.measured", Assurance.MEASURED, None))
    if {"host.kernel_in_reference_values", "host.command_line_in_reference_values"} <= met:
        shown_levels.append(("boot.kernel.identity", Assurance.MEASURED, None))
        shown_levels.extend(_from_command_line(facts.boot))
    if "host.secure_boot_on" in met:
        shown_levels.append(("boot.secure.enforced", Assurance.MEASURED, None))
    if facts.files is not None and not _nothing_measured(facts.files):
        shown_levels.append(("ima.measurement", Assurance.MEASURED, None))
    if {"host.file_in_reference_values", "host.ima_regular"} <= met:
        shown_levels.append(("integrity.runtime", Assurance.MEASURED, None))
    if "host.location_proven" in met and facts.location is not None:
        tag = facts.location.tag
        # A tag without a point still says the country; a machine can move with its TPM, so never above asserted.
        shown_levels.append(("location.geo", Assurance.ASSERTED, tag.geographical or tag.location))
        shown_levels.append(("location.jurisdiction", Assurance.DECLARED, tag.location))
        if tag.logical is not None:
            shown_levels.append(("location.logical", Assurance.ASSERTED, tag.logical))
    return tuple(
        CapabilityLevel(capability=name, level=capped(level, root, simulated_allowed=simulated_allowed), value=value)
        for name, level, value in shown_levels
    )


def _from_command_line(boot: BootState | None) -> Iterable[tuple[str, Assurance, str | None]]:
    arguments = [] if boot is None or boot.command_line is None else boot.command_line.split()
    for prefix, capability, level in _FROM_COMMAND_LINE:
        found = next((argument for argument in arguments if argument.startswith(prefix)), None)
        if found is not None:
            yield capability, level, found.partition("=")[2]


def bound(facts: HostFacts) -> dict[str, str]:
    """The identifiers proven in this appraisal."""
    quote = facts.quote.value
    proven = {
        "ak": quote.ak_name.hex(),
        "ek": facts.ek_digest.hex(),
        "registered_chip": facts.chip_id.hex(),
        "reset_count": str(quote.clock.reset_count),
        "boot": facts.boot_digest.hex(),
    }
    if facts.location is not None:
        proven["location"] = facts.location.tag.location
    return proven
