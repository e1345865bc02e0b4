"""May somebody look into the memory of a function? Only as two others approved, for what they approved, until it ends.

Inspection (SEC009 6.1.2) is an enabler for lawful interception and for analysis after an incident; granted silently it is
the attack of 6.1.1. A request names everything that is approved: host, function, process (with its start, since numbers of
processes return), who looks, why, from when to when, how often and how much. An approval is a COSE_Sign1 (purpose
`inspection-approval`) over the digest of exactly this request.

1. The request is for this host, and in force; its window is no longer than MAX_WINDOW_S.
2. Two approvals hold, each under the key that this host's configuration names for its approver, over this very request.
3. The approvers are two people with two keys, and neither is the one who looks.
4. What was used of it is counted from the log, not from memory: a restart gives nobody another look.

It does not keep the host's root from looking without asking: only the guest's own hardware does that
(`mem.inspection.host_blocked`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.clock import Instant, rendered
from moorline.digest import same, tagged_hash
from moorline.errors import NotAuthentic, Refused
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size

PURPOSE: Final = "inspection-approval"
MAX_WINDOW_S: Final = 8 * 3600
MAX_BYTES: Final = 64 << 20
APPROVALS: Final = 2

Name = Annotated[str, Size(at_most=128)]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionRequest:
    """What is asked. `started` is the process's start in clock ticks since boot (`/proc/PID/stat`); `looks` is how often."""

    host: Name
    function: Name
    process: int
    started: int
    inspector: Name
    reason: Annotated[str, Size(at_most=1024)]
    not_before: int
    not_after: int
    looks: int
    most_bytes: int
    nonce: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """What an approver signs: the digest of the request, and the approver's own name."""

    request: Bytes32
    approver: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """A request that may be used now, once more. `approvers` are in the order of their names."""

    request: InspectionRequest
    digest: bytes
    approvers: tuple[str, ...]


def request_digest(request: bytes) -> bytes:
    """What approvals are over: the encoded request, under a name of its own."""
    return tagged_hash("inspection-request", request)


def parse_request(data: bytes) -> InspectionRequest:
    """A request from untrusted bytes. Raises only Malformed (`message.*`)."""
    return schema.decode(InspectionRequest, data)


def approve(request: bytes, approver: str, signer: keys.Signer) -> bytes:
    """An approval of exactly these bytes."""
    return cose.sign(PURPOSE, schema.encode(Approval(request=request_digest(request), approver=approver)), signer)


def authorise(
    data: bytes,
    approvals: Iterable[bytes],
    *,
    approvers: Mapping[str, keys.PublicKey],
    host: str,
    used: int,
    now: Instant,
) -> Granted:
    """The right to one look. `used` is how many looks the log holds under this request.

    Raises Malformed (`cose.*`, `message.*`), NotAuthentic("inspection.approver_unknown" | "inspection.other_request" |
    `signature.*`) and Refused with the codes below.
    """
    request = parse_request(data)
    digest = request_digest(data)
    _in_force(request, host, now)
    names = sorted({_approver(one, digest, approvers) for one in approvals})
    distinct = {keys.public_bytes(approvers[name]) for name in names}
    if len(names) < APPROVALS or len(distinct) < APPROVALS:
        raise Refused(
            "inspection.approvals",
            "two people have to approve, each with a key of their own",
            expected=APPROVALS,
            got=", ".join(names) or "none",
            remedy="have another approver sign the same request",
        )
    if request.inspector in names:
        raise Refused("inspection.own_approval", "whoever looks does not approve it", got=request.inspector)
    if used >= request.looks:
        raise Refused(
            "inspection.used_up", "every look that was approved is used", expected=f"< {request.looks}", got=used,
            remedy="make another request",
        )  # fmt: skip
    return Granted(request=request, digest=digest, approvers=tuple(names))


def _in_force(request: InspectionRequest, host: str, now: Instant) -> None:
    if request.host != host:
        raise Refused("inspection.other_host", "the request is for another host", expected=host, got=request.host)
    if not 0 < request.not_after - request.not_before <= MAX_WINDOW_S:
        raise Refused(
            "inspection.window",
            "an inspection is for hours, not for days",
            expected=f"<= {MAX_WINDOW_S} s",
            got=request.not_after - request.not_before,
        )
    if not request.not_before <= now <= request.not_after:
        raise Refused(
            "inspection.not_in_force",
            "the inspection is not approved for this time",
            expected=f"{rendered(Instant(request.not_before))} to {rendered(Instant(request.not_after))}",
            got=rendered(now),
            remedy="make another request",
        )
    if request.looks < 1 or not 0 < request.most_bytes <= MAX_BYTES or request.process < 1 or not request.reason.strip():
        raise Refused("inspection.request", "a request names a process, a reason, a number of looks and of bytes")


def _approver(data: bytes, digest: bytes, approvers: Mapping[str, keys.PublicKey]) -> str:
    signed = cose.parse(PURPOSE, data)
    for name, key in approvers.items():
        if cose.key_id(key) != signed.key_id:
            continue
        approval = schema.decode(Approval, cose.verify(signed, key))
        if approval.approver != name:
            continue
        if not same(approval.request, digest):
            raise NotAuthentic("inspection.other_request", "the approval is of another request", expected=digest)
        return name
    raise NotAuthentic(
        "inspection.approver_unknown", "signed by nobody who may approve here", got=signed.key_id,
        remedy="name the approver in the host's configuration, if they may",
    )  # fmt: skip
