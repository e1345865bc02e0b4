"""A block on its way to a quorum, as its sequencer has it, and what the others answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moorline.ledger.blocks import Block, Head
from moorline.ledger.engines.intake import Waiting
from moorline.ledger.seals import Seal
from moorline.ledger.state import Applied
from moorline.storage.ledger_store import StoredProposal
from moorline.wire import schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A block, as it is and encoded, the head after it, its seals, who waits for it, and others' lines by name so far.

    `first` is its maker's seal where that was the sequencer of an earlier term; then, and after a restart, nobody waits.
    """

    block: Block
    body: bytes
    head: Head
    applied: tuple[Applied, ...]
    seal: Seal
    first: Seal | None
    batch: list[Waiting]
    lines: dict[str, str]

    @property
    def height(self) -> int:
        """Which one it is to be."""
        return self.block.header.height

    def stored(self) -> StoredProposal:
        """As it is recorded before anybody sees it."""
        first = None if self.first is None else schema.encode(self.first)
        return StoredProposal(height=self.height, body=self.body, seal=schema.encode(self.seal), first_seal=first)


@dataclass(frozen=True, slots=True)
class Round:
    """What the others answered: lines by name, and codes of refusals by name."""

    lines: Mapping[str, str]
    refusals: Mapping[str, str]

    @property
    def too_late(self) -> int:
        """How many have not signed the block, and will not any more."""
        return sum(code == "ledger.time_skew" for code in self.refusals.values())
