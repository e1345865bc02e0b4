"""What authorities of the embedded engine say to one another, and what a sequencer shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

from moorline.ledger import seals
from moorline.ledger.batch import Outcome
from moorline.ledger.blocks import Block
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.seals import Seal
from moorline.wire.schema import Size

MAX_SKEW_MS: Final = 5000
"""How far block time may be from a cosigner's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a sequencer shows. `previous` lets a cosigner commit the block before, should it have missed that.

    `cosignatures` are lines of others on this very block, for who sees it late. `seal` is the proposer's; `first` its
    maker's, where that was the sequencer of an earlier term. `certificate` is that of the seal's term; term 0 has none.
    """

    block: bytes
    previous: Committed | None
    cosignatures: tuple[Annotated[str, Size(at_most=512)], ...]
    seal: Seal
    first: Seal | None
    certificate: Annotated[bytes, Size(at_most=64 * 1024)] | None


class Peer(Protocol):
    """Another authority, wherever it runs. Every method raises MoorlineError when there is no answer or a refusal."""

    async def cosign(self, proposal: bytes) -> str:
        """Its signature line for an encoded `Proposal`."""
        ...

    async def announce(self, committed: bytes) -> None:
        """Tell it of a committed block."""
        ...

    async def block(self, height: int) -> bytes:
        """Its encoded `Committed` at a height."""
        ...

    async def note(self) -> bytes:
        """The note of its head."""
        ...

    async def submit(self, transaction: bytes) -> bytes:
        """Hand it a transaction; the receipt."""
        ...

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool) -> list[Outcome]:
        """Hand it several; what came of each."""
        ...

    async def manifest(self) -> bytes:
        """The encoded `snapshot.Manifest` of its head."""
        ...

    async def chunk(self, first: int) -> bytes:
        """An encoded `snapshot.Chunk` from a subtree on."""
        ...

    async def standing(self) -> bytes:
        """Its encoded `terms.Standing`."""
        ...

    async def promise(self, request: bytes) -> bytes:
        """Its encoded `terms.Promise` for an encoded `terms.Request`, if its operator gave that word."""
        ...


def verified_seal(proposal: Proposal, block: Block, node: Node) -> str:
    """The name of the block's maker, once both seals are known to hold. Raises NotAuthentic("ledger.seal_invalid")."""
    for one in (proposal.seal, proposal.first):
        if one is not None:
            seals.verify(one, block.header, ledger_id=node.genesis.ledger_id, authorities=node.authorities())
    return (proposal.first or proposal.seal).name
