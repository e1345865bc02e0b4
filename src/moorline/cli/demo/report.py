"""What the demo tells: steps and attacks, in a fixed order, whether they were reached or not, as JSON and as tables.

An attack counts as refused only if the process under attack answered with the code registered here, over its real interface,
and the same request without the single malicious change succeeded in the same run (`control`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

VERSION: Final = 1

STEPS: Final = {
    "ledger": "Four authorities agree on a ledger and admit two providers",
    "hsms": "Two HSMs that never met authenticate each other from the ledger alone",
    "hosts": "Three hosts prove how they booted; one changed its kernel, one is elsewhere",
    "launcher": "The launcher enclave attests and gets the launch key",
    "package": "A signed function package is onboarded",
    "placement": "Use case 4.7 finds the one host that may run it, and says why not the others",
    "launch": "The function starts in a sandbox, proves its launch token, gets its identity",
    "contract": "alpha offers beta's devices access; beta accepts",
    "device": "A device of beta stores a record at alpha's function and reads it back",
    "drift": "h1 runs something nobody allowed: the function is halted, keys first, and comes back on h4",
    "revocation": "beta is suspended: its device is cut off within the bound; reinstated, it connects",
    "audit": "The log of the whole run verifies offline from one file, and a changed byte is found",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """An attack, which process must refuse it, and with which code."""

    by: str
    code: str
    tries: str


ATTACKS: Final = {
    "rogue_vnf_without_token": Registered(
        by="broker alpha", code="launch.token_mismatch", tries="start the genuine function with a token nobody minted"
    ),
    "token_replayed": Registered(
        by="broker alpha", code="launch.token_consumed", tries="start a second function with the same token"
    ),
    "package_tampered": Registered(
        by="orchestrator", code="package.digest_mismatch", tries="onboard the package with one file changed"
    ),
    "package_signed_by_stranger": Registered(
        by="orchestrator", code="package.signer_untrusted", tries="onboard the package under a stranger's signature"
    ),
    "host_kernel_changed": Registered(
        by="verifier", code="host.kernel_not_in_reference_values", tries="attest a host that booted another kernel"
    ),
    "quote_replayed": Registered(by="verifier", code="tpm.nonce_mismatch", tries="answer a new challenge with an old quote"),
    "provider_not_admitted": Registered(
        by="authority-1", code="ledger.provider_unknown", tries="register an HSM for a provider nobody admitted"
    ),
    "device_of_ungranted_provider": Registered(
        by="function", code="workload.device_not_authorised", tries="connect a device whose provider was granted nothing"
    ),
    "simulated_root_in_production": Registered(
        by="verifier production", code="snp.anchor_unknown", tries="show simulated silicon to a production verifier"
    ),
    "oversized_message": Registered(
        by="broker alpha", code="frame.too_large", tries="announce a message larger than the broker takes"
    ),
    "token_for_other_package": Registered(
        by="broker alpha", code="launch.token_mismatch", tries="launch another package with a token minted for this one"
    ),
    "token_expired": Registered(by="broker alpha", code="launch.expired", tries="use a launch after its time"),
    "evidence_relayed_from_other_session": Registered(
        by="broker alpha", code="tpm.nonce_mismatch", tries="show in one session the evidence made for another"
    ),
    "evidence_reflected": Registered(
        by="broker alpha", code="exchange.proof_invalid", tries="show a broker the proof it gave itself"
    ),
    "chip_not_registered": Registered(
        by="launcher enclave", code="launch.chip_not_registered", tries="intend a launch on a chip nobody registered"
    ),
    "debug_guest": Registered(
        by="broker alpha", code="snp.policy_not_met", tries="start the function so that its memory can be read"
    ),
    "launcher_wrong_measurement": Registered(
        by="broker alpha", code="launcher.measurement_mismatch", tries="show a launcher's ticket with evidence of other code"
    ),
    "launcher_without_ticket": Registered(
        by="broker alpha", code="launcher.ticket_not_authentic", tries="start a launcher with a ticket its host wrote"
    ),
    "configuration_swapped_by_host": Registered(
        by="function", code="workload.configuration_mismatch", tries="hand the function another configuration"
    ),
    "launch_on_other_host": Registered(
        by="broker alpha", code="launch.chip_mismatch", tries="start a launch on another host than it was placed on"
    ),
    "ledger_head_without_quorum": Registered(
        by="function", code="ledger.quorum_missing", tries="prove a device's standing by a head two authorities signed"
    ),
    "ledger_proof_stale": Registered(by="function", code="ledger.proof_stale", tries="show a proof again after max_age"),
    "ledger_rollback": Registered(by="device", code="ledger.rollback", tries="give a device an older head than it has seen"),
    "instance_revoked": Registered(by="device", code="ledger.revoked", tries="serve devices as a revoked instance"),
    "certificate_outside_name_constraint": Registered(
        by="function", code="chain.name_constraint", tries="certify a device of alpha under a CA of beta"
    ),
    "issuing_ca_not_registered": Registered(
        by="function", code="ledger.issuing_ca_not_active", tries="certify a device under a CA that is not on the ledger"
    ),
    "broker_database_restored": Registered(
        by="broker beta", code="launch.halted", tries="give a broker back the database of before its last lease"
    ),
    "audit_entry_removed": Registered(
        by="moor log verify", code="audit.entry_removed", tries="take the entry of a launch out of the exported log"
    ),
}


@dataclass(slots=True, kw_only=True)
class Step:
    """One step as it went; `ms` is None until it was reached."""

    id: str
    ok: bool = False
    ms: int | None = None
    says: str = "not reached"


@dataclass(slots=True, kw_only=True)
class Attack:
    """One attack as it went. `code` is what the attacked process answered, None if it did not refuse."""

    id: str
    by: str
    code: str | None = None
    control: bool = False
    says: str = "not reached"

    @property
    def refused(self) -> bool:
        """True only for the registered code, and only if the same request without the change succeeded."""
        return self.code == ATTACKS[self.id].code and self.control


class Report:
    """All steps and attacks of one run."""

    def __init__(self, engine: str = "embedded") -> None:
        self.engine = engine
        self.steps = {name: Step(id=name) for name in STEPS}
        self.attacks = {name: Attack(id=name, by=ATTACKS[name].by) for name in ATTACKS}

    @property
    def ok(self) -> bool:
        """True if every step succeeded and every attack was refused."""
        return all(step.ok for step in self.steps.values()) and all(attack.refused for attack in self.attacks.values())

    def as_json(self) -> dict[str, object]:
        """The report as `--report` writes it."""
        return {
            "version": VERSION,
            "engine": self.engine,
            "steps": [{"id": s.id, "ok": s.ok, "ms": s.ms, "says": s.says} for s in self.steps.values()],
            "attacks": [
                {"id": a.id, "refused": a.refused, "by": a.by, "code": a.code, "control": a.control, "says": a.says}
                for a in self.attacks.values()
            ],
            "ok": self.ok,
        }

    def write(self, path: Path) -> None:
        """Write the JSON report."""
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n", "utf-8")
