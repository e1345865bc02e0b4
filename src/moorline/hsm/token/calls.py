"""What an owner process is asked over its socket, and which keys each operation may name.

A call is a frame with deterministic CBOR, an answer too. Keys are named by role, never by handle: a label that belongs to no
role below is unknown, whoever asks, and a role offers only what Moorline does with it. A long-lived key that is there stays:
through the door a next generation of its role (`<role>@<number>`) can be made, never one of its name, and none is destroyed
without the word of a quorum of custodians, which the owner verifies itself (`destroy_granted`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.errors import Refused
from moorline.hsm.token.port import KeyFacts
from moorline.wire.schema import Size

FRAME_CAP: Final = 256 * 1024
RANDOM_CAP: Final = 4096
DESTROY: Final = "destroy_granted"
"""Destroy a long-lived key; `data` is the grant of a quorum (hsm.approvals.Grant)."""
_Data = Annotated[bytes, Size(at_most=FRAME_CAP - 4096)]
_Label = Annotated[str, Size(at_most=128)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operation of the port. `data` and `bound_to` are byte arguments, `number` a count, `into` the other label."""

    operation: Annotated[str, Size(at_most=32)]
    label: _Label = ""
    data: _Data = b""
    bound_to: Annotated[bytes, Size(at_most=4096)] = b""
    number: int = 0
    into: _Label = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came out: bytes, a number or facts, or the problem (RFC 9457 members, JSON) why nothing did."""

    data: bytes = b""
    number: int = 0
    facts: tuple[KeyFacts, ...] = ()
    problem: str | None = None


_SIGN: Final = frozenset({"ec_point", "ecdsa"})
_AGREE: Final = frozenset({"ec_point", "agree"})
_SEAL: Final = frozenset({"seal", "unseal"})
_MAC: Final = frozenset({"import_mac_key", "mac", "has_secret", "destroy_secret"})
_COUNT: Final = frozenset({"counter", "advance"})
_LASTING: Final = frozenset({"has_key", "has_secret", DESTROY})
_NEXT_PAIR: Final = frozenset({"generate_ec_key"})
_NEXT_SECRET: Final = frozenset({"generate_wrapping_key"})
_EPHEMERAL: Final = frozenset({"generate_ec_key", "ec_point", "agree", "has_key", "destroy_key"})

# Roles of a provider's HSM by the shape of their labels. A generation of a rotated key is `<role>@<number>`.
BROKER_ROLES: Final[tuple[tuple[re.Pattern[str], frozenset[str]], ...]] = tuple(
    (re.compile(pattern), operations)
    for pattern, operations in (
        (r"(hsm-identity|issuing-ca|verifier)(@\d+)?", _SIGN | _LASTING),
        (r"hsm-kem(@\d+)?", _AGREE | _LASTING),
        (r"(hsm-identity|issuing-ca|verifier|hsm-kem)@\d+", _NEXT_PAIR),
        (r"wrapping(@\d+)?", _SEAL | _LASTING),
        (r"wrapping@\d+", _NEXT_SECRET),
        (r"launch-key-\d+", _MAC),
        (r"pair/[a-z0-9-]+/[a-z0-9-]+/\d+", _MAC),
        (r"pair-ephemeral/[a-z0-9-]+/[a-z0-9-]+/\d+", _EPHEMERAL),
        (r"[a-z-]+-counter", _COUNT),
    )
)
TENANT_ROLES: Final[tuple[tuple[re.Pattern[str], frozenset[str]], ...]] = (
    (
        re.compile(r"[a-z0-9][a-z0-9.@-]{0,63}"),
        _SIGN | _AGREE | _SEAL | _MAC | _COUNT | _EPHEMERAL | {"generate_wrapping_key"},
    ),
)
"""A tenant has a token of its own: every label in it is the tenant's, and it makes and destroys its keys itself."""

Roles = tuple[tuple[re.Pattern[str], frozenset[str]], ...]
NAMELESS: Final = frozenset({"random", "inspect"})
MAKES_KEYS: Final = frozenset({"generate_ec_key", "generate_wrapping_key", "import_mac_key", "agree"})


def require_allowed(call: Call, roles: Roles) -> None:
    """Raises Refused("token.not_offered") unless a role of this door has the operation."""
    if call.operation in NAMELESS and not call.label:
        return
    labels = (call.label, *((call.into,) if call.operation == "agree" else ()))
    for number, label in enumerate(labels):
        wanted = call.operation if number == 0 else "mac"
        if not any(shape.fullmatch(label) and wanted in operations for shape, operations in roles):
            raise Refused(
                "token.not_offered",
                "the owner of the token does not offer this operation under this name",
                got=f"{call.operation} {label}",
                remedy="ask for a key by its role; what is not offered is done at the owner",
            )
