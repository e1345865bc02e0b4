"""How two HSMs agree on a pair key (PROTOCOLS.md 6; docs/spec/pair-key.md), inside their attested session.

    initiator -> responder   call "peer.pair_epoch"     which pair epoch the responder has
    initiator -> responder   call "peer.pair"           PairOffer: epoch and the initiator's ephemeral point
    responder -> initiator   reply                      PairReply: the statement signed by its HSM key, and its MAC
    initiator -> responder   call "peer.pair_confirm"   PairConfirm: the statement signed by its HSM key, and its MAC

Both sign the same `PairStatement`. The MACs are under the key agreed, so each knows that the other's token has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from moorline.digest import Digest256, tagged, tagged_hash
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

Point = Annotated[bytes, Size(65)]
Signed = Annotated[bytes, Size(at_most=4096)]
PAIR_PURPOSE: Final = "pair-key"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairStatement:
    """What both HSM keys sign: the ledger, both ends, the pair epoch, both ephemeral P-256 points (uncompressed)."""

    ledger_id: Bytes32
    initiator_provider: str
    initiator_hsm: str
    responder_provider: str
    responder_hsm: str
    epoch: int
    initiator_point: Point
    responder_point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class PairEpoch:
    """Reply to "peer.pair_epoch": the newest pair epoch the responder knows with this peer, 0 for none."""

    newest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOffer:
    """Body of "peer.pair"."""

    epoch: int
    point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReply:
    """COSE_Sign1 of the statement by the responder's HSM key, and its MAC under the new key."""

    statement: Signed
    mac: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfirm:
    """COSE_Sign1 of the statement by the initiator's HSM key, and its MAC under the new key."""

    statement: Signed
    mac: Bytes32


def transcript(statement: PairStatement) -> Digest256:
    """The hash that goes on the ledger."""
    return tagged_hash("pair-transcript", schema.encode(statement))


def confirmation(agreed: bytes, *, initiator: bool) -> bytes:
    """What each end's MAC is over; the two differ, so neither can be sent back to its maker."""
    return tagged("pair-confirm", agreed, b"initiator" if initiator else b"responder")


def anchor_name(own: tuple[str, str], peer: tuple[str, str]) -> str:
    """The name under which an HSM anchors transcripts with a peer on the ledger: its size is the pair epoch."""
    parts = tuple(part.encode("ascii") for part in (*own, *peer))
    return f"pair-{tagged_hash('pair-anchor', *parts).hex()[:32]}"


# Revocations and grants, in the same session ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationsCall:
    """Body of "peer.revocations": certificates revoked at ledger heights above `since`, and those at it above `after`.

    `after` is a serial number in hex, empty for all: hundreds can be revoked at one height, more than an answer holds.
    """

    since: int
    after: Annotated[str, Size(at_most=48)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokedSerial:
    """A certificate of the sender that is revoked on the ledger: serial number in hex, and whom it names."""

    serial: Annotated[str, Size(at_most=48)]
    spiffe_id: Annotated[str, Size(at_most=512)]
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationsReply:
    """At most 32, by height and then by serial number; `more` if there are others after the last."""

    revoked: Annotated[tuple[RevokedSerial, ...], Size(at_most=32)]
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantsReply:
    """Reply to "peer.grants": ids of contracts between the two providers that the sender works with."""

    contracts: Annotated[tuple[str, ...], Size(at_most=64)]
