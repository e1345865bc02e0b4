"""What evidence shows, whatever it is made of. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from moorline.ledger.seals import Seal
from moorline.wire.schema import Size


class Kind(StrEnum):
    """What was done: something twice (ledger.evidence), or something that is wrong by itself (ledger.misconduct)."""

    HEADS = "heads"
    PROPOSALS = "proposals"
    INVALID = "invalid-block"
    BACKWARDS = "time-runs-back"
    EXECUTION = "wrong-execution"
    VOTES = "duplicate-vote"
    ATTACK = "light-client-attack"
    CLOCK = "clock-off"


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedHeader:
    """The encoded header of a block that was proposed, and its maker's seal."""

    header: Annotated[bytes, Size(at_most=1024)]
    seal: Seal


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What evidence shows: who did what, at which height, and whether a quorum signed both (then the ledger has forked).

    `fault` is the code of the rule that a block broke, where the rules had to be applied to see it; else None.
    """

    kind: Kind
    height: int
    offenders: tuple[str, ...]
    forked: bool
    fault: str | None = None
