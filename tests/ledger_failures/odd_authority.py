"""`moor`, run by somebody who lies: the first argument says how, the rest is a command line of `moor`."""

import asyncio
import contextlib
import sys
from dataclasses import replace

DAY_MS = 86_400_000


def clock_off():
    """The clock that its blocks and signatures are timed by is a day late."""
    from moorline.services import authority

    right = authority._now_ms
    authority._now_ms = lambda: right() - DAY_MS


def two_blocks():
    """As sequencer: shows one block to the first of the others, and another of the same attempt to the rest."""
    from moorline.ledger import blocks
    from moorline.ledger.engines import embedded

    honest = embedded.Sequencer._collect

    async def collect(self, candidate):
        if candidate.block.transactions:
            header = candidate.block.header
            other, _, _ = blocks.make(self.node.head, [], time_ms=header.time_ms + 1)
            seal = self.node.seal(other.header, term=self.term, attempt=candidate.seal.attempt)
            proposal = embedded.Proposal(
                block=blocks.encode(other), previous=self._previous(), cosignatures=(), seal=seal, first=None,
                certificate=self._term.certificate,
            )  # fmt: skip
            victim = next(iter(self._peers))
            with contextlib.suppress(embedded.MoorlineError):
                await self._peers[victim].cosign(embedded.schema.encode(proposal))
        return await honest(self, candidate)

    embedded.Sequencer._collect = collect


def invalid():
    """As sequencer: puts what is no transaction into its blocks."""
    from moorline.ledger import blocks

    honest = blocks.make

    def make(head, batch, *, time_ms, verified=None):
        block, after, outcomes = honest(head, batch, time_ms=time_ms, verified=verified)
        if batch:
            bad = (*block.transactions, b"no transaction")
            root = blocks.merkle.root([blocks.merkle.leaf_hash(data) for data in bad])
            header = replace(block.header, transactions_root=root, transactions_count=len(bad))
            block = blocks.Block(header=header, transactions=bad)
        return block, after, outcomes

    blocks.make = make


def misstated():
    """As sequencer: the state root of its blocks is none that the rules give."""
    from moorline.ledger import blocks

    honest = blocks.make

    def make(head, batch, *, time_ms, verified=None):
        block, after, outcomes = honest(head, batch, time_ms=time_ms, verified=verified)
        if batch:
            block = replace(block, header=replace(block.header, state_root=bytes(32)))
        return block, after, outcomes

    blocks.make = make


def backwards():
    """As sequencer: its blocks are of a time before the block they follow."""
    from moorline.ledger import blocks

    honest = blocks.make

    def make(head, batch, *, time_ms, verified=None):
        return honest(head, batch, time_ms=head.state.time_ms - 1000 if batch else time_ms, verified=verified)

    blocks.make = make


def censor():
    """As sequencer: never hears authority-3."""
    from moorline.ledger.engines import embedded, intake

    honest = embedded.Sequencer.submit

    async def submit(self, transaction):
        if intake.waiting(transaction).sender == "authority authority-3":
            await asyncio.sleep(3600)
        return await honest(self, transaction)

    embedded.Sequencer.submit = submit


def two_heads():
    """As cosigner: signs a second head at every height and hands it around."""
    from moorline.ledger.checkpoint import Note
    from moorline.ledger.engines import cosigner
    from moorline.ledger.engines.node import Committed
    from moorline.wire import schema

    honest = cosigner.Cosigner.announce

    async def announce(self, data):
        await honest(self, data)
        found = replace(self.node.head.checkpoint(), state_root=bytes(32))
        note = Note(checkpoint=found, signatures=(self.node.cosign(found, at=self.node.now()),)).encode()
        lie = schema.encode(Committed(block=schema.decode(Committed, data, max_bytes=1 << 24).block, note=note))
        for peer in (self._sequencer, *self._others.values()):
            try:
                await peer.announce(lie)
            except cosigner.MoorlineError:
                continue

    cosigner.Cosigner.announce = announce


if __name__ == "__main__":
    {one.__name__: one for one in (clock_off, two_blocks, invalid, misstated, backwards, censor, two_heads)}[sys.argv[1]]()
    from moorline.cli import run

    sys.exit(run(sys.argv[2:]))
