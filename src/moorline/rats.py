"""The words of RFC 9334 (RATS), draft-ietf-rats-ar4si and SEC009: verdicts are values, and these are their types.

Nothing here decides anything. A `Finding` says what one rule saw; an `AttestationResult` is all findings about one
Attester, how far it can be trusted, what that rests on, and until when it holds. What was not appraised is a finding
too: silence is never a yes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum

from moorline.clock import Instant


class Assurance(IntEnum):
    """How good the ground of an assertion is (SEC009 5.0.4 leaves its worth to the relying party)."""

    NONE = 0
    DECLARED = 1
    ASSERTED = 2
    MEASURED = 3
    HW_ATTESTED = 4

    @property
    def word(self) -> str:
        """The level as written in documents: `declared`, `asserted`, `measured`, `hw_attested`, `none`."""
        return self.name.lower()


class EvidenceRoot(StrEnum):
    """What evidence rests on in the end. `test` is every simulated anchor."""

    NONE = "none"
    TEST = "test"
    SOFTWARE = "software"
    VIRTUAL = "virtual"
    HARDWARE = "hardware"


ROOT_CAP: dict[EvidenceRoot, Assurance] = {
    EvidenceRoot.NONE: Assurance.DECLARED,
    EvidenceRoot.TEST: Assurance.DECLARED,
    EvidenceRoot.SOFTWARE: Assurance.ASSERTED,
    EvidenceRoot.VIRTUAL: Assurance.ASSERTED,
    EvidenceRoot.HARDWARE: Assurance.HW_ATTESTED,
}
"""The highest level each root can carry. A ledger whose genesis says `simulated_allowed` lifts the cap of TEST."""


def capped(level: Assurance, root: EvidenceRoot, *, simulated_allowed: bool) -> Assurance:
    """The effective level: `min(level, cap(root))`. `simulated_allowed` comes from the ledger's genesis only."""
    if root is EvidenceRoot.TEST and simulated_allowed:
        return level
    return min(level, ROOT_CAP[root])


class Tier(Enum):
    """AR4SI trustworthiness tiers, by the value EAR puts in the token (draft-ietf-rats-ar4si 2.3.2)."""

    NONE = 0
    AFFIRMING = 2
    WARNING = 32
    CONTRAINDICATED = 96

    @property
    def word(self) -> str:
        """The tier as EAR spells it: `none`, `affirming`, `warning`, `contraindicated`."""
        return self.name.lower()


class Outcome(StrEnum):
    """What one rule saw."""

    MET = "met"
    NOT_MET = "not_met"
    NOT_APPRAISED = "not_appraised"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule, one outcome. `claim` names the AR4SI claim it bears on. Never holds a secret."""

    code: str
    outcome: Outcome
    claim: str
    says: str
    expected: str | None = None
    got: str | None = None
    remedy: str | None = None


AR4SI_CLAIMS = (
    "instance-identity",
    "configuration",
    "executables",
    "file-system",
    "hardware",
    "runtime-opaque",
    "storage-opaque",
    "sourced-data",
)


def worst(vector: dict[str, Tier]) -> Tier:
    """The status that a vector comes to: its worst tier, or NONE when nothing affirmed."""
    found = vector.values()
    return next((tier for tier in _WORST_FIRST if tier in found), Tier.NONE)


_WORST_FIRST = (Tier.CONTRAINDICATED, Tier.WARNING, Tier.AFFIRMING)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityLevel:
    """A SEC009 capability and the assurance with which it was shown (after the cap)."""

    capability: str
    level: Assurance
    value: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submodule:
    """A part of a verdict, such as a clause group of SEC009, with a vector of its own.

    `doubts` are chains over which doubt came to claims of this part, from elsewhere: who is doubted, and because of whom.
    """

    name: str
    vector: dict[str, Tier]
    doubts: tuple[str, ...] = ()

    @property
    def status(self) -> Tier:
        """The worst of the vector, or NONE when nothing affirmed."""
        return worst(self.vector)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationResult:
    """The verdict about one Attester (RFC 9334 8.4).

    `subject` is `host/<id>` or `function/<instance>`. `vector` holds a tier for every AR4SI claim; a claim nobody
    appraised is `NONE`. `status` is the worst of the vector, or NONE when nothing affirmed. `expires` ends it: a result
    is a lease. `bound` are identifiers proven in the same appraisal (ak, chip, measurement ...), hex or text.
    """

    subject: str
    verifier: str
    issued: Instant
    expires: Instant
    root: EvidenceRoot
    simulated_allowed: bool
    vector: dict[str, Tier]
    findings: tuple[Finding, ...]
    policy_digest: bytes
    nonce: bytes
    capabilities: tuple[CapabilityLevel, ...] = ()
    bound: dict[str, str] = field(default_factory=dict)
    submodules: tuple[Submodule, ...] = ()

    @property
    def status(self) -> Tier:
        """Contraindicated if any rule was not met, affirming only if something affirmed and nothing warned."""
        return worst(self.vector)

    def first_refusal(self) -> Finding | None:
        """The first rule that was not met, or None."""
        return next((finding for finding in self.findings if finding.outcome is Outcome.NOT_MET), None)
