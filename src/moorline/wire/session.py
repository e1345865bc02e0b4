"""Messages of the attested session (PROTOCOLS.md 4; docs/spec/attested-session.md) and what each role puts into them.

One frame (wire.frames) a message; each is hashed exactly as sent. Message 1 is `Hello`, 2 `Challenge`, 3 `Evidence`,
4 `Answer`, 5 `Confirm`, 6 `Activation`. After that both ends send `Record`s. At any point either end may send `Problem` and
close. A frame body is `CBOR([kind, message])` with kind one of the names in `KINDS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from moorline.digest import tagged
from moorline.wire.access import Connection, SignedStatement
from moorline.wire.launch import ChannelProfile
from moorline.wire.schema import Bytes32, Size

Der = Annotated[bytes, Size(at_most=20 * 1024)]


class SessionRole(StrEnum):
    """Who may open a session, and with what proof (table in PROTOCOLS.md 4)."""

    LAUNCHER = "launcher"
    FUNCTION = "function"
    RESUME = "resume"
    HOST = "host"
    PEER_HSM = "peer-hsm"


def resume_message(challenge_digest: bytes) -> bytes:
    """What a function signs with its identity key to resume its session: H(message 2) of this very attempt."""
    return tagged("session-resume", challenge_digest)


class EvidenceFormat(StrEnum):
    """What `Evidence.evidence` holds."""

    SNP = "snp"  # outblob of configfs-tsm; endorsements = auxblob (GHCB certificate table)
    TPM = "tpm"  # HostEvidence (wire.host)
    NONE = "none"  # peer HSM: the proof is everything


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Message 1. `kem_public` is the raw HPKE public key, `signing_public` DER SubjectPublicKeyInfo, `fields` by role."""

    version: int
    role: SessionRole
    formats: tuple[EvidenceFormat, ...]
    kem_public: Annotated[bytes, Size(at_most=2048)]
    signing_public: Annotated[bytes, Size(at_most=256)]
    profile: ChannelProfile
    fields: Annotated[bytes, Size(at_most=65536)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """Message 2. `bundle` is a ledger proof bundle that shows the broker's provider and HSM active (ledger.proof)."""

    nonce: Bytes32
    expires: int
    ledger_id: Bytes32
    provider: str
    hsm: str
    bundle: Annotated[bytes, Size(at_most=65536)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Message 3. `proof` by role: HMAC(token, H(message 2)), a signature, or null."""

    format: EvidenceFormat
    evidence: Annotated[bytes, Size(at_most=1 << 20)]
    endorsements: Annotated[bytes, Size(at_most=65536)]
    proof: Annotated[bytes, Size(at_most=256)] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Message 4. `sealed` is HPKE to the attester's KEM key, info = H(messages 1..3), of `Sealed`."""

    sealed: Annotated[bytes, Size(at_most=65536)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """Messages 2 and 4 of the HPKE-only profile: a COSE_Sign1 by the HSM key around the message (channel.signed)."""

    cose: Annotated[bytes, Size(at_most=192 * 1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """Plaintext of message 4: K, and the role's secrets (`FunctionSecrets`, `LauncherSecrets`, or empty)."""

    key: Bytes32
    secrets: Annotated[bytes, Size(at_most=32768)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirm:
    """Message 5: MAC under HKDF(K, "confirm", H(messages 1..4))."""

    mac: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Message 6. The certificate is for the pool key (function) or for the session's signing key (launcher, host).

    `chain` is the issuing CA, provider and authority certificates, DER; `roots` the consortium roots. `now` is the
    broker's time; the identity must be renewed after `renew_after_s`. Empty for a peer HSM.
    """

    spiffe_id: str
    certificate: Der
    chain: tuple[Der, ...]
    now: int
    renew_after_s: int
    body: Annotated[bytes, Size(at_most=65536)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """After message 6: AEAD-sealed, one key a direction, `counter` from 0 without gaps. Plaintext is `Call` or `Reply`."""

    counter: int
    sealed: Annotated[bytes, Size(at_most=1 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request inside the session; `id` is chosen by the caller and returned in `Reply`."""

    id: int
    operation: str
    body: Annotated[bytes, Size(at_most=1 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a `Call`: `body`, or `problem` (errors.as_problem, CBOR) and an empty body."""

    id: int
    body: Annotated[bytes, Size(at_most=1 << 20)]
    problem: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why the session ends: `errors.MoorlineError.as_problem()` as CBOR."""

    problem: Annotated[bytes, Size(at_most=4096)]


KINDS = {
    kind.__name__.lower(): kind
    for kind in (Hello, Challenge, Evidence, Answer, Signed, Confirm, Activation, Record, Problem)
}


# What each role puts into Hello.fields, and finds in Sealed.secrets ---------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionFields:
    """Hello.fields of a function, and of one that resumes: the launch fields exactly as hashed (wire.launch)."""

    launch_fields: Annotated[bytes, Size(at_most=4096)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSecrets:
    """Sealed.secrets of a function: its pre-generated key pair (PKCS#8 DER) and its sealed-storage key."""

    private_key: Annotated[bytes, Size(at_most=4096)]
    storage_key: Bytes32
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherFields:
    """Hello.fields of a launcher: its one-time ticket, a COSE_Sign1 by the provider key over `LauncherTicket`."""

    ticket: Annotated[bytes, Size(at_most=8192)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherTicket:
    """Payload of a ticket (purpose `launcher-ticket`)."""

    ledger_id: Bytes32
    provider: str
    ticket: Bytes32
    measurement: Annotated[bytes, Size(48)]
    chip: Annotated[bytes, Size(at_most=64)]
    not_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSecrets:
    """Sealed.secrets of a launcher: the launch key of the epoch and a lease of sequence numbers."""

    launch_key: Bytes32
    epoch: int
    epoch_not_after: int
    lease_first: int
    lease_count: int
    lease_not_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFields:
    """Hello.fields of a host: its name and the attestation key the verifier enrolled (TPMT_PUBLIC)."""

    host: str
    ak_public: Annotated[bytes, Size(at_most=1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFields:
    """Hello.fields of a peer HSM: who it is and a ledger proof bundle of its provider and HSM records."""

    provider: str
    hsm: str
    bundle: Annotated[bytes, Size(at_most=65536)]


# Operations inside an active session ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ProveCall:
    """operation "ledger.prove": a proof bundle for these keys, with this minimum freshness. Reply body: the bundle."""

    keys: tuple[str, ...]


class KeyKind(StrEnum):
    """Kinds of key pairs that are made ahead, as a `rekey` names them."""

    P256 = "p-256"
    P384 = "p-384"
    ED25519 = "ed25519"
    RSA2048 = "rsa-2048"
    ML_DSA_65 = "ml-dsa-65"
    """Experimental (FIPS 204, RFC 9881): key and certificate are delivered, no TLS end of ours takes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RekeyCall:
    """operation "rekey": a fresh key pair of this kind with a certificate in the function's name. Reply: `RekeyReply`."""

    kind: KeyKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RekeyReply:
    """The private key (PKCS#8 DER) and its activation. The key of the launch stays what a session is resumed by."""

    private_key: Annotated[bytes, Size(at_most=4096)]
    activation: Activation


ENTROPY_MAX: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyCall:
    """operation "entropy": 1 to ENTROPY_MAX random bytes of the HSM's generator. Reply body: `EntropyReply`."""

    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyReply:
    """What was asked for; to be mixed with the function's own."""

    random: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageKeyReply:
    """operation "storage.key", empty body: the sealed-storage key of the function's own generation, as at its launch.

    Withheld (`renewal.*`) from the moment on at which the function would not be renewed.
    """

    storage_key: Bytes32
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCall:
    """operation "log": a line of the function's in the HSM's secure log, in the name of its session. Reply body: empty."""

    event: Annotated[str, Size(at_most=64)]
    says: Annotated[str, Size(at_most=1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthoriseDeviceCall:
    """operation "device.authorise": may this device use this service now? Reply body: `AuthoriseDeviceReply`.

    `home` is the statement of the device's home HSM about the connection, as the device sent it.
    """

    connection: Connection
    home: SignedStatement


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthoriseDeviceReply:
    """The decision: `statement` is the HSM's, for the device; `bundle` proves what it rests on.

    `refused_by` is empty if both HSMs say yes; else which of them refuses (`wire.access.Side`), by which `rule`.
    """

    allowed: bool
    refused_by: str
    rule: str
    statement: SignedStatement
    bundle: Annotated[bytes, Size(at_most=65536)]
