"""Is this the other side's word about this very connection, and does it still count? (PROTOCOLS.md 7) Pure.

1. it is signed by the HSM key that the ledger has for the side it speaks for;
2. it is of this ledger, by that side's provider, and about this connection: same ends, contract, profile and TLS keys;
3. it is not older than `max_age_s`, nor past its own end;
4. a function's HSM answers the very statement of the home HSM that was sent.

A statement that passes can still be a no: `require_allowed` says so, and whose rule it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import NotAuthentic, Refused
from moorline.ledger import standing
from moorline.ledger.light_client import ProvenState
from moorline.nfv import parse_name
from moorline.wire import keys
from moorline.wire.access import (
    AccessStatement,
    Connection,
    Side,
    parse_statement,
    statement_digest,
    verify_statement,
)

CLOCKS_APART_S: Final = 30
"""How far in the future, by the reader's clock, a statement may have been made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a statement must be: of which side, by which provider, about what. `answers` is the home's statement."""

    side: Side
    connection: Connection
    max_age_s: int
    answers: bytes | None = None

    @property
    def provider(self) -> str:
        """Whose HSM has to speak for the side."""
        home = self.side is Side.HOME
        return self.connection.device_provider if home else self.connection.function_provider


def statement_keys(data: bytes) -> tuple[str, ...]:
    """What `require_about` needs proven: provider and HSM that the statement claims to be by. Raises Malformed."""
    claimed = parse_statement(data)
    return standing.hsm_keys(parse_name(claimed.provider, "provider"), parse_name(claimed.hsm, "HSM"))


def require_about(state: ProvenState, data: bytes, expected: Expected, *, now: Instant) -> AccessStatement:
    """Numbers 1 to 4.

    Raises Malformed, NotAuthentic("access.*" | `cose.*` | `signature.*`), Refused("access.stale" | `ledger.*`).
    """
    claimed = parse_statement(data)
    record = standing.active_hsm(state, expected.provider, claimed.hsm)
    found = verify_statement(data, keys.parse_public(record.signing_public))  # 1
    speaker = (found.ledger_id, found.side, found.provider)
    if speaker != (state.checkpoint.ledger_id, expected.side, expected.provider):  # 2
        raise NotAuthentic(
            "access.other_speaker",
            "the statement is by somebody else than it should be, or of another ledger",
            expected=f"{expected.side} HSM of {expected.provider}",
            got=f"{found.side} HSM of {found.provider}",
        )
    if found.connection != expected.connection:
        raise NotAuthentic(
            "access.other_connection",
            "the statement is about another connection",
            got=", ".join(_differences(found.connection, expected.connection)),
        )
    if not (found.issued - CLOCKS_APART_S <= now <= min(found.not_after, found.issued + expected.max_age_s)):  # 3
        raise Refused(
            "access.stale",
            "the statement is too old, or its time has not come",
            expected=f"within {expected.max_age_s} s",
            got=now - found.issued,
            remedy="ask the HSM again",
        )
    answers = b"" if expected.answers is None else statement_digest(expected.answers)
    if not same(found.answers, answers):  # 4
        raise NotAuthentic("access.answers_another", "the statement answers another one than was sent")
    return found


def require_allowed(found: AccessStatement) -> None:
    """Raises Refused("access.refused_by_home" | "access.refused_by_function"), with the rule that decided as `got`."""
    if found.allowed:
        return
    says = f"the HSM of {found.provider} does not let this device use this service"
    expected = f"contract {found.connection.contract} to allow it"
    remedy = "moor ledger contract test says what the contract asks for"
    if found.side is Side.HOME:
        raise Refused("access.refused_by_home", says, expected=expected, got=found.rule, remedy=remedy)
    raise Refused("access.refused_by_function", says, expected=expected, got=found.rule, remedy=remedy)


def _differences(found: Connection, expected: Connection) -> list[str]:
    return [name for name in Connection.__dataclass_fields__ if getattr(found, name) != getattr(expected, name)]
