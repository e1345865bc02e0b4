"""What a host and the attestation authority say to each other: enrolment, challenge, evidence, verdict (PROTOCOLS.md 8).

Deterministic CBOR over HTTPS. None of it is authenticated by the connection: the host proves itself by its TPM.
`HostEvidence` is also the evidence of role `host` in the attested session; there the challenge is
`session_qualifying_data(binding)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from moorline.digest import tagged_hash
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

MAX_EVIDENCE: Final = 3 << 20
MAX_IMA_DELTA: Final = 2 << 20
MAX_PCRS: Final = 24

Structure = Annotated[bytes, Size(at_most=2048)]
"""A marshalled TPM structure."""

Der = Annotated[bytes, Size(at_most=20 * 1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolRequest:
    """A host shows its TPM: endorsement key and certificate (then any intermediates), and its attestation key."""

    ek_public: Structure
    ek_certificates: Annotated[tuple[Der, ...], Size(at_most=8)]
    ak_public: Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolChallenge:
    """A secret that only the TPM with both keys can open: arguments of TPM2_ActivateCredential."""

    enrolment: Bytes32
    credential_blob: Structure
    secret: Structure
    expires: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolProof:
    """The opened secret."""

    enrolment: Bytes32
    activated: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """From now on the attestation key is the host's; another TPM cannot take the name."""

    host: str
    ak_name: Annotated[bytes, Size(at_most=80)]
    ek_digest: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class ChallengeRequest:
    """Ask for a challenge."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostChallenge:
    """What to quote, and from where to report. `ima_from` entries are held already, if `reset_count` is still the boot's.

    `event_log_digest` is SHA-256 of the boot log the verifier holds for that boot; if it is the host's log, the log need not
    be sent again. `location` asks for the certified tag too. `expires` is by the verifier's clock; `good_s` is how many
    seconds that is from when it was given.
    """

    nonce: Bytes32
    expires: int
    good_s: int
    bank: int
    selection: Annotated[tuple[int, ...], Size(at_most=MAX_PCRS)]
    reset_count: int
    ima_from: int
    event_log_digest: Bytes32 | None
    location: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AskWait:
    """A host waits to be asked something it does not know yet (`known` is the number it was last told), for `wait_s`."""

    host: str
    known: int
    wait_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The newest question; the number that was known already if nobody asked."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PcrValue:
    """One PCR as the TPM read it out; only the quote proves it."""

    index: int
    digest: Annotated[bytes, Size(at_most=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocationEvidence:
    """The location tag (COSE, purpose `location-tag`) and the AK's certification of the NV index that holds its digest."""

    tag: Annotated[bytes, Size(at_most=8192)]
    certified: Structure
    signature: Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEvidence:
    """A quote and the logs behind it. `event_log` is null if unchanged; `ima` holds lines from entry number `ima_from`.

    `ima_more` says that the list goes on behind `ima`: the lines are a piece, and nothing is judged before the last one.
    """

    quoted: Structure
    signature: Structure
    bank: int
    pcrs: Annotated[tuple[PcrValue, ...], Size(at_most=MAX_PCRS)]
    event_log: Annotated[bytes, Size(at_most=1 << 20)] | None
    ima_from: int
    ima: Annotated[bytes, Size(at_most=MAX_IMA_DELTA)]
    location: LocationEvidence | None
    ima_more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostVerdict:
    """The result (EAR, JWT), its status in a word, and the code of the first rule that was not met, if any.

    `next` is the challenge for the next attestation, good until it expires; null where the host has to ask for one. `ear` is
    null where the evidence was a piece of an IMA list (`ima_more`): there is no verdict yet, and `next` asks for the rest.
    """

    ear: Annotated[str, Size(at_most=1 << 17)] | None
    status: str
    code: str | None
    next: HostChallenge | None


def session_qualifying_data(binding: bytes) -> bytes:
    """QualifyingData of a quote inside the attested session: 32 bytes over the session binding (PROTOCOLS.md 4)."""
    return tagged_hash("tpm-qualifying-data", binding)


def pcr_map(evidence: HostEvidence) -> dict[int, bytes]:
    """The PCR values by index. A repeated index is refused by the verification of the quote, whose digest has each once."""
    return {value.index: value.digest for value in evidence.pcrs}


def encode(message: object) -> bytes:
    """Deterministic CBOR of a message of this module."""
    return schema.encode(message)


def decode_evidence(data: bytes) -> HostEvidence:
    """`HostEvidence` from untrusted bytes; raises only Malformed."""
    return schema.decode(HostEvidence, data, max_bytes=MAX_EVIDENCE)
