"""M-of-N approval: what destroys or lets out a key is done only when a quorum of named custodians signed for exactly that.

A request names one operation on one target of one HSM, and ends by itself. An approval is a custodian's signature over the
digest of the request, so it is good for nothing else.

1. The request is known, not expired and not used.
2. The approval is signed by a custodian of the circle in force, over this request's digest; each custodian counts once.
3. With a quorum of them the request can be used, once. Using is recorded before the effect (ADR 0004): a crash in between
   loses the approval, never doubles it.

Pure: time is an argument, keeping is storage.key_store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from moorline.clock import Instant
from moorline.digest import same, tagged_hash
from moorline.errors import Conflict, NotAuthentic, Refused
from moorline.hsm.custody import Circle
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size

PURPOSE: Final = "custodian-approval"
LIFE_S: Final = 24 * 3600
_CAP: Final = 4096
_GRANT_CAP: Final = 64 * 1024


class Operation(StrEnum):
    """What needs approval."""

    KEY_DESTROY = "key-destroy"
    TENANT_DESTROY = "tenant-destroy"
    KEY_EXPORT = "key-export"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Somebody wants `operation` done to `target`. `id` is random."""

    id: Annotated[bytes, Size(16)]
    provider: str
    hsm: str
    operation: Operation
    target: Annotated[str, Size(at_most=128)]
    created: int
    not_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a custodian signs."""

    request: Bytes32
    custodian: Annotated[str, Size(at_most=63)]
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A signature that was accepted."""

    custodian: str
    at: int
    signed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A request with the signatures of those who approved it, for whoever verifies it again without a database."""

    request: Request
    signed: tuple[Annotated[bytes, Size(at_most=_CAP)], ...]


def verify_grant(data: bytes, circle: Circle, *, provider: str, hsm: str, target: str, now: Instant) -> None:
    """Raises Malformed, Refused or NotAuthentic (`approval.*`) unless a quorum granted the destruction of this key here.

    It does not establish that the grant is used for the first time: labels of keys are never used again.
    """
    grant = schema.decode(Grant, data, max_bytes=_GRANT_CAP)
    asked = grant.request
    if (asked.provider, asked.hsm) != (provider, hsm):
        raise Refused("approval.other_hsm", "the request is about another HSM", expected=hsm, got=asked.hsm)
    given = [Approval(custodian="", at=0, signed=each) for each in grant.signed]
    require_granted(asked, given, circle, operation=Operation.KEY_DESTROY, target=target, now=now)


def request(
    *, provider: str, hsm: str, operation: Operation, target: str, now: Instant, random: bytes, life_s: int = LIFE_S
) -> Request:
    """A new request; `random` is 16 bytes."""
    return Request(
        id=random, provider=provider, hsm=hsm, operation=operation, target=target, created=now, not_after=now + life_s
    )


def digest(asked: Request) -> bytes:
    """What approvals are over."""
    return tagged_hash("approval-request", schema.encode(asked))


def approve(asked: Request, custodian: str, signer: keys.Signer, now: Instant) -> bytes:
    """A custodian's signature (COSE_Sign1) for a request."""
    return cose.sign(PURPOSE, schema.encode(Statement(request=digest(asked), custodian=custodian, at=now)), signer)


def verify(asked: Request, data: bytes, circle: Circle, now: Instant) -> Approval:
    """An approval of this request by a custodian of this circle. Raises `approval.*` and `cose.*`."""
    require_open(asked, now)
    signed = cose.parse(PURPOSE, data, max_bytes=_CAP)
    known = {cose.key_id(keys.parse_public(each.signing_public)): each for each in circle.custodians}
    custodian = next((each for key_id, each in known.items() if same(key_id, signed.key_id)), None)
    if custodian is None:
        raise NotAuthentic("approval.stranger", "this is not signed by a custodian of this HSM", got=signed.key_id)
    payload = cose.verify(signed, keys.parse_public(custodian.signing_public))
    statement = schema.decode(Statement, payload, max_bytes=_CAP)
    if statement.custodian != custodian.name:
        raise NotAuthentic(
            "approval.other_name", "the signer gives another's name", expected=custodian.name, got=statement.custodian
        )
    if not same(statement.request, digest(asked)):
        raise Refused(
            "approval.other_request",
            "this approves another request",
            expected=digest(asked),
            got=statement.request,
            remedy="read the request again, and approve what it says: moor hsm approve",
        )
    return Approval(custodian=custodian.name, at=statement.at, signed=data)


def require_open(asked: Request, now: Instant) -> None:
    """Raises Refused("approval.expired")."""
    if now > asked.not_after:
        raise Refused(
            "approval.expired",
            "the request has expired",
            expected=f"<= {asked.not_after}",
            got=now,
            remedy="ask anew, and have it approved anew",
        )


def require_granted(
    asked: Request, approvals: Sequence[Approval], circle: Circle, *, operation: Operation, target: str, now: Instant
) -> None:
    """Raises Refused (`approval.*`) unless this request is for exactly this, still open, and approved by a quorum.

    Signatures are verified again: what a database says about them is not enough to destroy a key.
    """
    if (asked.operation, asked.target) != (operation, target):
        raise Refused(
            "approval.other_request",
            "the request is for something else",
            expected=f"{operation} {target}",
            got=f"{asked.operation} {asked.target}",
        )
    names: set[str] = set()
    for each in approvals:
        name = verify(asked, each.signed, circle, now).custodian
        if name in names:
            raise Conflict("approval.twice", "one custodian counts once", got=name)
        names.add(name)
    require_open(asked, now)
    if len(names) < circle.quorum:
        raise Refused(
            "approval.missing",
            "not enough custodians approved this yet",
            expected=f"{circle.quorum} of {', '.join(each.name for each in circle.custodians)}",
            got=", ".join(sorted(names)) or "none",
            remedy=f"each custodian: moor hsm approve {asked.id.hex()}",
        )
