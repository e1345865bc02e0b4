"""Receipts of the CometBFT engine: a transaction in its block, and the block under an anchored head.

`note` is the anchored head whose state is the one after the block, `header` an encoded `BlockSummary`, `block_proof`
leads to the block's `data_hash`; `log_proof` is empty, since the anchor's header names the hash of the block before it.
A block holds only transactions that applied: ProcessProposal refuses any other, on every honest authority.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moorline.audit import merkle
from moorline.errors import NotAuthentic
from moorline.ledger.engines.cometbft.header import Header, transaction_leaf
from moorline.wire import schema

if TYPE_CHECKING:
    from moorline.ledger.anchor import CometAnchor
    from moorline.ledger.blocks import Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSummary:
    """A block's header and how many transactions it holds."""

    header: Header
    transactions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CometBlock:
    """What GET /v1/blocks/{height} gives as `block`: header and transactions, in order."""

    header: Header
    transactions: tuple[bytes, ...]


def paths(transactions: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """The inclusion proof of each transaction of a block."""
    return merkle.every_inclusion_proof([transaction_leaf(one) for one in transactions])


def verify(found: Receipt, transaction: bytes, anchor: CometAnchor) -> None:
    """Returns if `transaction` stands in the block before the anchor's. The anchor was verified by the caller.

    Raises Malformed, NotAuthentic("ledger.proof_invalid" | "merkle.not_included").
    """
    summary = schema.decode(BlockSummary, found.header)
    block = summary.header
    before = anchor.signed.header
    if (found.height, found.time_ms) != (block.height, block.time_ns // 1_000_000) or before.height != block.height + 1:
        raise NotAuthentic("ledger.proof_invalid", "the receipt's header is of another height or time", got=found.height)
    if block.hash() != before.last_block_hash or block.chain_id != before.chain_id:
        raise NotAuthentic(
            "ledger.proof_invalid", "the receipt's header is not the signed one", expected=before.last_block_hash
        )
    if found.log_proof:
        raise NotAuthentic("ledger.proof_invalid", "the receipt carries a proof that nobody needs")
    merkle.verify_inclusion(
        transaction_leaf(transaction), found.index, summary.transactions, found.block_proof, block.data_hash
    )
