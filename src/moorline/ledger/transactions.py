"""Transactions: what may be asked of the ledger, and how it is signed (docs/spec/ledger-transactions.md).

A transaction is a COSE_Sign1 for purpose `ledger-transaction` over a `Payload`. The payload names the ledger, a nonce that
is never applied twice for its sender, the last block it may stand in, the sender, and one body. Parsing establishes
nothing: `ledger.state.apply` finds the sender's key on the ledger and verifies.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from moorline.digest import tagged_hash
from moorline.errors import Malformed
from moorline.ledger.records import Der, PackageRule, RevocationKind, Spki, Text
from moorline.wire import cose, schema
from moorline.wire.keys import Signer
from moorline.wire.schema import Bytes32, Size

PURPOSE: Final = "ledger-transaction"
MAX_TRANSACTION_BYTES: Final = 64 * 1024


class SenderKind(StrEnum):
    """Whose key signs: an authority's transaction key, a provider's CA key, or an HSM's signing key."""

    AUTHORITY = "authority"
    PROVIDER = "provider"
    HSM = "hsm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """`name` is the authority's or provider's name, or `<provider>/<hsm id>`."""

    kind: SenderKind
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What is signed. `body` is the deterministic CBOR of the body that `kind` names."""

    ledger_id: Bytes32
    nonce: Bytes32
    valid_until: int
    sender: Sender
    kind: str
    body: Annotated[bytes, Size(at_most=48 * 1024)]


# Bodies: by authorities together ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Opens a proposal for the action, with the proposer's approval. `kind` is one of `ACTIONS`."""

    kind: str
    action: Annotated[bytes, Size(at_most=32 * 1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Approve:
    """Adds the sender's approval to a proposal; the one that completes the threshold executes it."""

    proposal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmitAuthority:
    """Action, quorum. The certificate is issued by the consortium root."""

    name: str
    certificate: Der
    transaction_key: Spki
    checkpoint_key: Bytes32
    address: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class RetireAuthority:
    """Action, quorum."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateAuthorityKey:
    """Action, quorum: certificate, keys and address of an authority in force, all at once and without overlap.

    The block that holds it is signed by the old checkpoint key, the next by the new one. No key that an authority gave up
    comes back. Keys that stay are named again.
    """

    name: str
    certificate: Der
    transaction_key: Spki
    checkpoint_key: Bytes32
    address: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class SetParameter:
    """Action, quorum; see `ledger.parameters` for names and bounds."""

    name: str
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeGlobally:
    """Action, quorum: a measurement, a chip or a vendor root, for everybody."""

    kind: RevocationKind
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmitProvider:
    """Action, max(2, f+1) authorities. The CA certificate is issued by an authority, constrained to the trust domain."""

    name: str
    trust_domain: str
    certificate: Der


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendProvider:
    """Action, max(2, f+1) authorities: nothing under the provider counts until it is reinstated."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinstateProvider:
    """Action, max(2, f+1) authorities."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveProvider:
    """Action, max(2, f+1) authorities. Its name and trust domain stay taken for good."""

    name: str


# Bodies: by a provider -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateProviderKey:
    """A new CA certificate; the old ones count until `retire_at` (seconds since the epoch)."""

    certificate: Der
    retire_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterIssuingCa:
    """An issuing CA certified by the provider."""

    id: str
    certificate: Der


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeIssuingCa:
    """For good."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterHsm:
    """An HSM; see `records.HsmRecord` for the fields."""

    id: str
    certificate: Der
    address: Text
    est_url: Text
    kem_public: Annotated[bytes, Size(at_most=2048)]
    signing_public: Spki
    bundle_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateHsm:
    """New facts of a registered HSM; `bundle_sequence` rises."""

    id: str
    certificate: Der
    address: Text
    est_url: Text
    kem_public: Annotated[bytes, Size(at_most=2048)]
    signing_public: Spki
    bundle_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeHsm:
    """For good."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterOrchestrator:
    """The key (SPKI) that signs launch intents."""

    id: str
    public_key: Spki


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeOrchestrator:
    """For good."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterService:
    """A new service; see `records.ServiceRecord`."""

    name: str
    use_case: Text
    packages: tuple[PackageRule, ...]
    profiles: tuple[str, ...]
    callers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateService:
    """New facts of an active service."""

    name: str
    use_case: Text
    packages: tuple[PackageRule, ...]
    profiles: tuple[str, ...]
    callers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveService:
    """For good: the name is not given again."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterPlatform:
    """A machine; see `records.PlatformRecord`."""

    id: str
    chip_id: Annotated[bytes, Size(at_most=64)]
    product: Text
    ek_digest: Bytes32
    location: Text
    tag_digest: Bytes32
    simulated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokePlatform:
    """For good."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterReferenceValues:
    """The digest of a signed document of reference values; a later one under the same id replaces it."""

    id: str
    kind: Text
    digest: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferAccess:
    """Devices of `grantee` may use `service` of the sender under `conditions` (Cedar), once accepted."""

    contract: str
    service: str
    grantee: str
    conditions: Annotated[str, Size(at_most=16 * 1024)]
    profiles: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptAccess:
    """By the grantee. An offer never changes under its id, so the id says what is accepted."""

    contract: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawAccess:
    """By either side, for good."""

    contract: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """Something of the sender's own, for good. An HSM may revoke instances, devices, launchers, hosts and certificates."""

    kind: RevocationKind
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorLog:
    """A checkpoint of a secure log, by the provider or the HSM whose log it is."""

    log: str
    size: int
    root: Bytes32


Action = (
    AdmitAuthority
    | RetireAuthority
    | RotateAuthorityKey
    | SetParameter
    | RevokeGlobally
    | AdmitProvider
    | SuspendProvider
    | ReinstateProvider
    | RemoveProvider
)
ProviderBody = (
    RotateProviderKey
    | RegisterIssuingCa
    | RevokeIssuingCa
    | RegisterHsm
    | RotateHsm
    | RevokeHsm
    | RegisterOrchestrator
    | RevokeOrchestrator
    | RegisterService
    | UpdateService
    | RemoveService
    | RegisterPlatform
    | RevokePlatform
    | RegisterReferenceValues
    | OfferAccess
    | AcceptAccess
    | WithdrawAccess
    | Revoke
    | AnchorLog
)
Body = Propose | Approve | ProviderBody

ACTIONS: Final[dict[str, type[Action]]] = {
    kind.__name__: kind
    for kind in (
        AdmitAuthority,
        RetireAuthority,
        RotateAuthorityKey,
        SetParameter,
        RevokeGlobally,
        AdmitProvider,
        SuspendProvider,
        ReinstateProvider,
        RemoveProvider,
    )
}
AUTHORITY_BODIES: Final[dict[str, type[Propose | Approve]]] = {"Propose": Propose, "Approve": Approve}
PROVIDER_BODIES: Final[dict[str, type[ProviderBody]]] = {
    kind.__name__: kind
    for kind in (
        RotateProviderKey,
        RegisterIssuingCa,
        RevokeIssuingCa,
        RegisterHsm,
        RotateHsm,
        RevokeHsm,
        RegisterOrchestrator,
        RevokeOrchestrator,
        RegisterService,
        UpdateService,
        RemoveService,
        RegisterPlatform,
        RevokePlatform,
        RegisterReferenceValues,
        OfferAccess,
        AcceptAccess,
        WithdrawAccess,
        Revoke,
        AnchorLog,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    """A parsed transaction: well-formed and nothing more.

    `id` identifies it: 32 bytes over the payload only, since ECDSA signatures of one payload differ. `nonce_id` is what is
    remembered of its nonce.
    """

    payload: Payload
    body: Body
    sign1: cose.Sign1
    id: bytes
    nonce_id: bytes


def transaction_id(payload: bytes) -> bytes:
    """The id of a transaction with this encoded payload."""
    return tagged_hash("ledger-transaction-id", payload)


def nonce_id_of(payload: Payload) -> bytes:
    """What is remembered of a nonce: it is the sender's, so nobody can use up another's."""
    return tagged_hash("ledger-nonce", payload.sender.kind.encode(), payload.sender.name.encode(), payload.nonce)


def make(body: Body, *, sender: Sender, ledger_id: bytes, nonce: bytes, valid_until: int) -> Payload:
    """A payload around `body`. `nonce` is 32 random bytes."""
    return Payload(
        ledger_id=ledger_id,
        nonce=nonce,
        valid_until=valid_until,
        sender=sender,
        kind=type(body).__name__,
        body=schema.encode(body),
    )


def propose(action: Action) -> Propose:
    """The body that proposes `action`."""
    return Propose(kind=type(action).__name__, action=schema.encode(action))


def proposal_id(payload: Payload) -> str:
    """The id of the proposal that a `Propose` payload opens, 64 hex digits."""
    return tagged_hash("ledger-proposal", schema.encode(payload)).hex()


def sign(payload: Payload, signer: Signer) -> bytes:
    """The transaction as it travels."""
    return cose.sign(PURPOSE, schema.encode(payload), signer)


def parse(data: bytes) -> Transaction:
    """A transaction from its bytes; untrusted. Raises only Malformed (`ledger.transaction_malformed`, `cose.*`, ...)."""
    sign1 = cose.parse(PURPOSE, data, max_bytes=MAX_TRANSACTION_BYTES)
    if sign1.x5chain:
        raise Malformed("ledger.transaction_malformed", "a transaction carries no certificates; keys are on the ledger")
    payload = schema.decode(Payload, sign1.payload, max_bytes=MAX_TRANSACTION_BYTES)
    kinds: dict[str, type[Propose | Approve]] | dict[str, type[ProviderBody]] = (
        AUTHORITY_BODIES if payload.sender.kind is SenderKind.AUTHORITY else PROVIDER_BODIES
    )
    kind = kinds.get(payload.kind)
    if kind is None:
        raise Malformed(
            "ledger.kind_unknown", "this sender has no such transaction", expected=sorted(kinds), got=payload.kind
        )
    body: Body = schema.decode(kind, payload.body, max_bytes=MAX_TRANSACTION_BYTES)
    return Transaction(
        payload=payload, body=body, sign1=sign1, id=transaction_id(sign1.payload), nonce_id=nonce_id_of(payload)
    )


def parse_action(kind: str, action: bytes) -> Action:
    """The action of a proposal; raises only Malformed."""
    chosen = ACTIONS.get(kind)
    if chosen is None:
        raise Malformed("ledger.kind_unknown", "there is no such action", expected=sorted(ACTIONS), got=kind)
    return schema.decode(chosen, action, max_bytes=MAX_TRANSACTION_BYTES)
