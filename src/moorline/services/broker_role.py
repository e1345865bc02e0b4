"""What every role of the session port has in common: its shape, names for people, and identities for session keys."""

from __future__ import annotations

import hashlib
from typing import Protocol

from moorline.channel.session import Claim
from moorline.errors import Refused
from moorline.hsm.issuing import Leaf, key_digest
from moorline.ledger import standing
from moorline.ledger.light_client import ProvenState
from moorline.ledger.records import RevocationKind
from moorline.nfv import SpiffeId
from moorline.services.broker import Broker
from moorline.storage.broker_certificates import Issued
from moorline.wire import keys
from moorline.wire.session import Activation

Revocable = tuple[RevocationKind, str, str]
"""Kind, registrant and id of something that may have been revoked."""


class SessionOfRole(Protocol):
    """One session, from its claim to its end."""

    claim: Claim

    async def appraise(self) -> bytes:
        """Decide; the secrets of message 4. Raises to refuse."""
        ...

    async def activate(self) -> Activation:
        """Message 6, after the peer confirmed."""
        ...

    async def call(self, operation: str, body: bytes, /) -> bytes:
        """Answer a request of the active session."""
        ...


def session_name(claim: Claim) -> str:
    """A session as alarms and the audit log name it."""
    kem, signing = (hashlib.sha256(key).hexdigest()[:16] for key in (claim.kem_public, claim.signing_public))
    return f"{claim.role} from {claim.peer_address}, kem {kem}, key {signing}"


def issued(leaf: Leaf, spiffe_id: SpiffeId, public: bytes) -> Issued:
    """The record of a certificate for a key (SubjectPublicKeyInfo, DER)."""
    return Issued(
        serial=f"{leaf.serial:x}",
        spiffe_id=str(spiffe_id),
        key_digest=key_digest(public),
        not_after=leaf.not_after,
        der=leaf.der,
    )


def activation(broker: Broker, der: bytes, spiffe_id: str, body: bytes = b"") -> Activation:
    """Message 6 around a certificate of the issuing CA."""
    return Activation(
        spiffe_id=spiffe_id,
        certificate=der,
        chain=broker.ca.chain_of(der),
        now=broker.clock.now(),
        renew_after_s=broker.settings.renew_after_s,
        body=body,
    )


def issue_for_session(broker: Broker, claim: Claim, spiffe_id: SpiffeId, kind: str) -> Activation:
    """A certificate for the session's signing key, recorded before it is handed out."""
    public = keys.public_bytes(keys.parse_public(claim.signing_public))
    now = broker.clock.now()
    leaf = broker.ca.issue(public, spiffe_id, now)
    broker.store.record_certificate(issued(leaf, spiffe_id, public), kind=kind, at=now)
    return activation(broker, leaf.der, str(spiffe_id))


def revocable_keys(things: tuple[Revocable, ...]) -> tuple[str, ...]:
    """What `require_not_revoked` needs proven."""
    return tuple(key for kind, registrant, name in things for key in standing.revocation_keys(kind, registrant, name))


def require_not_revoked(state: ProvenState, things: tuple[Revocable, ...]) -> None:
    """Raises Refused("ledger.revoked" | "ledger.not_proven")."""
    for kind, registrant, name in things:
        standing.not_revoked(state, kind, registrant, name)


def no_such_operation(operation: str) -> Refused:
    """For a `call` this role does not have."""
    return Refused("broker.no_such_operation", "this session has no such operation", got=operation)
