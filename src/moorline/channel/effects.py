"""What the machines of a session ask of their drivers, what a claim is, and where a machine can stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from moorline.digest import Digest256, Digest512
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Challenge, EvidenceFormat, SessionRole


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send this frame body."""

    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeBroker:
    """Attester: judge TLS certificates and `challenge.bundle`, then `judged()`; make the proof over `digest`; `proven()`.

    In the HPKE-only profile there is no TLS certificate of the broker: the bundle says its HSM key.
    """

    challenge: Challenge
    digest: Digest256


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Broker, HPKE-only profile: sign `payload` for `purpose` with the HSM key; then `signed()`."""

    purpose: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Attester: collect evidence over `binding`; then `collected()`."""

    binding: Digest512


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeChallenge:
    """Broker: draw a nonce, fetch a ledger proof; then `challenged()`."""

    role: SessionRole


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraise:
    """Broker: appraise the claim; then `accepted()`, or end the session with the reason."""

    claim: Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """Broker: the attester confirmed. Make what it gets; then `activated()`. The claim is `judged()`."""

    claim: Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Active:
    """The session carries records from now on."""


Effect = Send | JudgeBroker | Sign | Collect | MakeChallenge | Appraise | Activate | Active


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What an attester claims, all of it untrusted, and what its evidence must be bound to.

    `binding` (64 bytes), `challenge_digest` (H(message 2), 32 bytes) and `nonce` were computed here. For functions the proof
    must be `wire.launch.token_proof(token, challenge_digest)`; for a TPM the qualifying data is H(binding).
    """

    role: SessionRole
    profile: ChannelProfile
    fields: bytes
    kem_public: bytes
    signing_public: bytes
    format: EvidenceFormat
    evidence: bytes
    endorsements: bytes
    proof: bytes | None
    binding: bytes
    nonce: bytes
    challenge_digest: bytes
    peer_address: str

    def judged(self) -> Claim:
        """The same without what was only there to be appraised: a session keeps this for as long as it is open."""
        return replace(self, evidence=b"", endorsements=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFacts:
    """Who the broker is; stands in every challenge."""

    ledger_id: bytes
    provider: str
    hsm: str


class State(Enum):
    """What a machine awaits: a message of the peer, or a word of its own driver. ENDED is final."""

    START = "start"  # attester: start()
    HELLO = "hello"  # broker: message 1
    MAKE_CHALLENGE = "make-challenge"  # broker: challenged()
    SIGN_CHALLENGE = "sign-challenge"  # broker, HPKE-only: signed()
    CHALLENGE = "challenge"  # attester: message 2
    JUDGE_BROKER = "judge-broker"  # attester: judged()
    PROVE = "prove"  # attester: proven()
    COLLECT = "collect"  # attester: collected()
    EVIDENCE = "evidence"  # broker: message 3
    APPRAISE = "appraise"  # broker: accepted()
    SIGN_ANSWER = "sign-answer"  # broker, HPKE-only: signed()
    ANSWER = "answer"  # attester: message 4
    CONFIRM = "confirm"  # broker: message 5
    ACTIVATE = "activate"  # broker: activated()
    ACTIVATION = "activation"  # attester: message 6
    ACTIVE = "active"
    ENDED = "ended"
