"""Evidence from a block that a cosigner refused, kept if its bytes, or executing it, show that its maker broke the rules.

One of a kind is kept a height: a maker that stands by its block seals it again with every attempt.
"""

from __future__ import annotations

from moorline.audit import merkle
from moorline.ledger import blocks, misconduct, re_execution
from moorline.ledger.blocks import Block, Header
from moorline.ledger.engines.node import Node
from moorline.ledger.finding import Kind, SealedHeader
from moorline.ledger.misconduct import BackwardsBlock, InvalidBlock
from moorline.ledger.seals import Seal
from moorline.wire import schema


def accuse(node: Node, block: Block, seal: Seal) -> None:
    """Keep as evidence what a refused block shows of its maker, if it shows anything. The seal was verified."""
    sealed = SealedHeader(header=schema.encode(block.header), seal=seal)
    if (found := _invalid(node, block, sealed)) is not None:
        node.accuse(Kind.INVALID, schema.encode(found), height=block.header.height)
    elif not node.accused(Kind.EXECUTION, block.header.height) and (shown := _executed(node, block, sealed)) is not None:
        node.accuse(Kind.EXECUTION, shown, height=block.header.height)
    if (early := _backwards(node, block, sealed)) is not None:
        node.accuse(Kind.BACKWARDS, schema.encode(early), height=block.header.height)


def _invalid(node: Node, block: Block, sealed: SealedHeader) -> InvalidBlock | None:
    """With the first transaction that can never stand, whatever the state is."""
    for index, data in enumerate(block.transactions):
        if misconduct.never_valid(data, ledger_id=node.genesis.ledger_id, height=block.header.height):
            leaves = [merkle.leaf_hash(one) for one in block.transactions]
            path = merkle.inclusion_proof(leaves, index)
            return InvalidBlock(sealed=sealed, transaction=data, index=index, path=path)
    return None


def _executed(node: Node, block: Block, sealed: SealedHeader) -> bytes | None:
    """With what the block touches of the own state, if it follows that."""
    previous = _before(node)
    if block.header.previous != blocks.digest(previous):
        return None
    return re_execution.show(node.head.state, previous, block, sealed)


def _before(node: Node) -> Header:
    """The header of the own head."""
    stored = node.store.head()
    return blocks.genesis_header(node.genesis) if stored is None else blocks.parse(stored.body).header


def _backwards(node: Node, block: Block, sealed: SealedHeader) -> BackwardsBlock | None:
    """With the header of the own head, if the block follows it and is not later."""
    previous = _before(node)
    if block.header.previous != blocks.digest(previous) or block.header.time_ms > previous.time_ms:
        return None
    return BackwardsBlock(sealed=sealed, previous=schema.encode(previous))
