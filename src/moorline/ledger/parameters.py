"""The numbers every authority agrees on: their names, bounds, and what they are at the genesis.

They change by SetParameter, by quorum, and count from the next transaction on. None of them can take away what the protocol
promises: approvals can be asked for beyond the protocol's number, never below it, and the quorum that signs a block follows
from the number of authorities alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from moorline.policy.conditions import MAX_BYTES

MIN_MAX_AGE_S: Final = 2
MAX_MAX_AGE_S: Final = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a parameter may be, both ends included, and what it is where nobody set it."""

    low: int
    high: int
    initial: int


PARAMETERS: Final[Mapping[str, Bounds]] = {
    # How old a proof may be, in seconds; an empty block is made at least every third of it. The genesis says it.
    "max_age_s": Bounds(low=MIN_MAX_AGE_S, high=MAX_MAX_AGE_S, initial=MIN_MAX_AGE_S),
    # For how long a proposal takes approvals, in seconds.
    "proposal_life_s": Bounds(low=60, high=90 * 86400, initial=7 * 86400),
    # How many proposals of one authority may be open at once.
    "open_proposals": Bounds(low=1, high=1000, initial=64),
    # How far ahead `valid_until` of a transaction may lie, in blocks; for so long nonces are remembered.
    "valid_blocks": Bounds(low=200, high=100_000, initial=1000),
    # Approvals asked for at least; what the protocol asks for counts if it is more, all authorities if they are fewer.
    "authority_approvals": Bounds(low=0, high=64, initial=0),
    "provider_approvals": Bounds(low=0, high=64, initial=0),
    # The longest text of a contract's conditions, in bytes.
    "conditions_bytes": Bounds(low=256, high=MAX_BYTES, initial=8 * 1024),
    # How many packages a service may list.
    "service_packages": Bounds(low=1, high=500, initial=100),
}
