"""Is an authentic SNP guest acceptable? The Appraisal Policy for Evidence, one field a demand, and its appraisal.

Input is `Verified[SnpClaims]`, so authenticity, freshness and binding are settled. Every field of `SnpPolicy` is demanded:
there are no defaults, a field that is None or of another kind refuses, and what is not asked is `NotRequired(reason)` and
shows up in the result as not appraised. All rules run; nothing stops at the first.

    rule                        AR4SI claim           what goes wrong without it
    snp.root                    instance-identity     a simulated chip counts as real
    snp.product .signer         hardware              a product or key kind nobody examined
    snp.chip_id                 instance-identity     any AMD chip in the world is as good as the registered one
    snp.measurement             executables           other code
    snp.host_data               configuration         other launch: another package, instance or token
    snp.debug                   runtime-opaque        the host decrypts the guest's memory
    snp.migration_agent         runtime-opaque        an agent of the host's choice receives the guest's memory
    snp.smt_allowed .platform_smt  runtime-opaque     a sibling thread observes the guest
    snp.single_socket           hardware              memory crosses a link between sockets
    snp.abi                     configuration         the guest accepts firmware with an interface known to be weak
    snp.vmpl                    configuration         code at another privilege level asked for the report
    snp.reported_tcb .committed_tcb .launch_tcb  hardware   old firmware now, firmware that can be rolled back to, or that
                                                      launched the guest
    snp.guest_svn .family_id .image_id .id_key_digest .author_key_digest  executables   an ID block of another owner
    snp.platform_info           hardware              aliased memory (BadRAM), no ciphertext hiding, no TSME
    snp.launch_mitigations .current_mitigations  hardware   a firmware fix that is there but was not applied
    snp.revocation              instance-identity     a revoked CA
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.errors import Refused
from moorline.evidence.snp import Product, SigningKey, TcbVersion
from moorline.policy import rules
from moorline.policy.match import AtLeast, Exact, Match, NotRequired, shown
from moorline.rats import EvidenceRoot, Finding, Outcome
from moorline.verification.snp import SnpClaims
from moorline.verification.verified import Verified

CODE_PREFIX: Final = "snp."

ALIAS_CHECK_COMPLETE: Final = 1 << 5
"""PLATFORM_INFO bit that shows that the firmware looked for aliased memory (56860 table 24)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpPolicy:
    """What a guest must be. Every field must be given; see the table above for what each prevents."""

    product: Match[Product]
    signer: Match[SigningKey]
    chip_id: Match[bytes]
    measurement: Match[bytes]
    host_data: Match[bytes]
    debug: Match[bool]
    migration_agent: Match[bool]
    smt_allowed: Match[bool]
    platform_smt: Match[bool]
    single_socket: Match[bool]
    abi: Match[tuple[int, int]]
    vmpl: Match[int]
    reported_tcb: Match[TcbVersion]
    committed_tcb: Match[TcbVersion]
    launch_tcb: Match[TcbVersion]
    guest_svn: Match[int]
    family_id: Match[bytes]
    image_id: Match[bytes]
    id_key_digest: Match[bytes]
    author_key_digest: Match[bytes]
    platform_info: Match[int]
    launch_mitigations: Match[int]
    current_mitigations: Match[int]
    revocation: Match[bool]


_CLAIMS: Final = {
    "product": "hardware",
    "signer": "hardware",
    "chip_id": "instance-identity",
    "measurement": "executables",
    "host_data": "configuration",
    "debug": "runtime-opaque",
    "migration_agent": "runtime-opaque",
    "smt_allowed": "runtime-opaque",
    "platform_smt": "runtime-opaque",
    "single_socket": "hardware",
    "abi": "configuration",
    "vmpl": "configuration",
    "reported_tcb": "hardware",
    "committed_tcb": "hardware",
    "launch_tcb": "hardware",
    "guest_svn": "executables",
    "family_id": "executables",
    "image_id": "executables",
    "id_key_digest": "executables",
    "author_key_digest": "executables",
    "platform_info": "hardware",
    "launch_mitigations": "hardware",
    "current_mitigations": "hardware",
    "revocation": "instance-identity",
}


def strict_policy(
    *,
    measurement: Match[bytes],
    host_data: Match[bytes],
    chip_id: Match[bytes],
    product: Match[Product],
    minimum_tcb: Match[TcbVersion],
) -> SnpPolicy:
    """The policy for a guest that we launched ourselves: everything pinned, what is not asked said with its reason.

    Debug and migration agent are off, the report was asked for at VMPL 0 with a VCEK, and `minimum_tcb` holds for the
    reported, committed and launch TCB. SMT is left to the placement, which knows the host.
    """
    owner = NotRequired("guests are identified by measurement and HOST_DATA, not by an ID block")
    return SnpPolicy(
        product=product,
        signer=Exact(SigningKey.VCEK),
        chip_id=chip_id,
        measurement=measurement,
        host_data=host_data,
        debug=Exact(value=False),
        migration_agent=Exact(value=False),
        smt_allowed=NotRequired("the host's own profile decides about SMT"),
        platform_smt=NotRequired("the host's own profile decides about SMT"),
        single_socket=NotRequired("no guest of ours spans sockets by itself"),
        abi=AtLeast((0, 0)),
        vmpl=Exact(0),
        reported_tcb=minimum_tcb,
        committed_tcb=minimum_tcb,
        launch_tcb=minimum_tcb,
        guest_svn=owner,
        family_id=owner,
        image_id=owner,
        id_key_digest=owner,
        author_key_digest=owner,
        platform_info=NotRequired("version 2 reports cannot show the alias check; the minimum TCB contains the fix"),
        launch_mitigations=NotRequired("mitigation vectors exist from report version 5 on only"),
        current_mitigations=NotRequired("mitigation vectors exist from report version 5 on only"),
        revocation=NotRequired("AMD's CRL is judged when the anchors are provisioned"),
    )


def appraise_snp(verified: Verified[SnpClaims], policy: SnpPolicy, *, simulated_allowed: bool) -> tuple[Finding, ...]:
    """One finding a rule, in the order of the fields, the root first. `simulated_allowed` comes from the ledger's genesis.

    Never raises: "no" is a finding. A field of the policy that is missing is NOT_MET.
    """
    values = _values(verified.value)
    findings = [_root_finding(verified.root, simulated_allowed=simulated_allowed)]
    findings += [_finding(name, values[name], getattr(policy, name)) for name in _CLAIMS]
    return tuple(findings)


def require_snp(findings: tuple[Finding, ...]) -> None:
    """Raises Refused("snp.policy_not_met"), naming the first rule that was not met; `got` starts with its code.

    No findings at all is a refusal too: nothing was appraised.
    """
    first = rules.first_refusal(findings)
    if first is not None:
        raise Refused(
            "snp.policy_not_met",
            first.says,
            expected=first.expected,
            got=f"{first.code}: {first.got}",
            remedy=first.remedy,
        )


def policy_digest(policy: SnpPolicy) -> bytes:
    """SHA-256 that names this policy, for results and logs."""
    fields = [f"{field.name}={shown(getattr(policy, field.name))}".encode() for field in dataclasses.fields(policy)]
    return digest.tagged_hash("snp-policy", *fields)


def _values(claims: SnpClaims) -> dict[str, object]:
    report, guest = claims.report, claims.report.policy
    return {
        "product": claims.product,
        "signer": claims.signer,
        "chip_id": claims.chip_id,
        "measurement": report.measurement,
        "host_data": report.host_data,
        "debug": guest.debug,
        "migration_agent": guest.migrate_ma,
        "smt_allowed": guest.smt,
        "platform_smt": report.smt_en,
        "single_socket": guest.single_socket,
        "abi": guest.abi,
        "vmpl": report.vmpl,
        "reported_tcb": claims.reported_tcb,
        "committed_tcb": claims.committed_tcb,
        "launch_tcb": claims.launch_tcb,
        "guest_svn": report.guest_svn,
        "family_id": report.family_id,
        "image_id": report.image_id,
        "id_key_digest": report.id_key_digest,
        "author_key_digest": report.author_key_digest if report.author_key_en else None,
        "platform_info": report.platform_info,
        "launch_mitigations": report.launch_mit_vector,
        "current_mitigations": report.current_mit_vector,
        "revocation": claims.revocation_checked,
    }


def _finding(name: str, value: object, demand: object) -> Finding:
    remedy = _REMEDIES.get(name)
    return rules.judged(CODE_PREFIX + name, value, demand, claim=_CLAIMS[name], remedy=remedy, words=shown)


def _root_finding(root: EvidenceRoot, *, simulated_allowed: bool) -> Finding:
    real = root is EvidenceRoot.HARDWARE
    allowed = real or (root is EvidenceRoot.TEST and simulated_allowed)
    return Finding(
        code="snp.root",
        outcome=Outcome.MET if allowed else Outcome.NOT_MET,
        claim="instance-identity",
        says="the chip is of the vendor" if real else "the chip is SIMULATED",
        expected="hardware, or test where the genesis says simulated_allowed",
        got=root.value,
        remedy=None if allowed else "use real hardware, or a ledger whose genesis says simulated_allowed",
    )


_REMEDIES: Final = {
    "chip_id": "register this platform, or start the guest on a registered one",
    "measurement": "start the registered package, or register this measurement",
    "host_data": "start the guest with the commitment of its launch fields",
    "debug": "launch without debug",
    "reported_tcb": "update the platform's firmware",
    "committed_tcb": "commit the firmware update (SNP_COMMIT), so that it cannot be rolled back",
    "launch_tcb": "launch the guest again under the current firmware",
    "revocation": "give the verifier AMD's current CRL",
}
