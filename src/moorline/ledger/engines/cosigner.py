"""The embedded engine's other part: judge what the sequencer proposes, sign it once, follow the chain.

cosign, in this order:
  1. whatever lies between this authority's head and the proposal is fetched, and believed by quorum and execution;
  2. the proposal is sealed by the sequencer of a term that is not over (engines.conduct);
  3. this authority signed no other block at that height; if it signed this one, the same signature is the answer;
  4. executing it again gives what it says, and its time is right;
  5. that it signs, and when, is durable; then it signs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, NotAuthentic, Refused
from moorline.ledger import blocks, checkpoint
from moorline.ledger.batch import Outcome
from moorline.ledger.blocks import Block, Head
from moorline.ledger.checkpoint import Checkpoint, Note, tolerated_faults
from moorline.ledger.engines import accusing, taking_over
from moorline.ledger.engines.lookahead import FEW, verify_beside
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.engines.proposal import MAX_SKEW_MS, Peer, Proposal, verified_seal
from moorline.ledger.engines.verifiers import Verifiers
from moorline.storage.ledger_store import StoredSignature
from moorline.storage.steps import reached
from moorline.wire import schema

MAX_COMMITTED_BYTES: Final = blocks.MAX_BLOCK_BYTES + (1 << 20)
SNAPSHOT_AFTER: Final = 2000
"""How many blocks an empty database may be behind before it takes a snapshot instead of executing them all."""


class Cosigner:
    """Judges what the sequencer proposes and follows the chain. Run `run()` in a task for as long as it lives."""

    def __init__(
        self,
        node: Node,
        sequencer: Peer,
        *,
        others: Mapping[str, Peer] | None = None,
        snapshot_after: int = SNAPSHOT_AFTER,
        verifiers: Verifiers | None = None,
    ) -> None:
        self.node, self._verifiers = node, verifiers
        self._sequencer = sequencer
        self._others = others or {}
        self._snapshot_after = snapshot_after
        self._lock = asyncio.Lock()

    async def cosign(self, data: bytes) -> str:
        """The signature line for an encoded `Proposal`, or a refusal (`ledger.*`). Numbers are those of the module."""
        proposal = schema.decode(Proposal, data, max_bytes=2 * blocks.MAX_BLOCK_BYTES)
        block = blocks.parse(proposal.block)
        async with self._lock:
            self.node.conduct.not_halted()
            self._remember_nothing(block.header.height - 1)
            if proposal.previous is not None and block.header.height == self.node.head.state.height + 2:  # 1
                self._adopt(proposal.previous)
            if block.header.height > self.node.head.state.height + 1:
                await self._catch_up(block.header.height - 1)
            if self._verifiers is not None and len(block.transactions) >= FEW:
                await verify_beside(self.node.head.state, block.transactions, self.node.verified, self._verifiers)
            return self._sign(block, proposal)

    async def announce(self, data: bytes) -> None:
        """Take note of a committed block; one that is not the next is fetched with those before it."""
        committed = schema.decode(Committed, data, max_bytes=MAX_COMMITTED_BYTES)
        height = checkpoint.parse_note(committed.note).checkpoint.height
        async with self._lock:
            if height > self.node.head.state.height + 1:
                await self._catch_up(height - 1)
            self._adopt(committed)

    async def run(self) -> None:
        """Follow the sequencer: now, and whenever nothing was heard for a sixth of max_age."""
        while True:
            try:
                await self.follow()
            except MoorlineError as error:
                # Neither silence nor a lie of the sequencer keeps this authority from serving what it knows.
                self.on_trouble(error)
            await asyncio.sleep(max(1.0, self.node.head.state.parameter("max_age_s") / 6))

    def on_trouble(self, error: MoorlineError) -> None:
        """Called when the sequencer cannot be followed. Does nothing; a service logs it."""

    async def follow(self) -> None:
        """Catch up with the head of the sequencer, or of another that can be reached. Raises Unavailable if none can."""
        note = checkpoint.parse_note(await self._asked(lambda peer: peer.note()))
        async with self._lock:
            self._remember_nothing(note.checkpoint.height)
            await self._catch_up(note.checkpoint.height)

    async def submit(self, transaction: bytes) -> bytes:
        """Hand a transaction on to the sequencer."""
        return await self._sequencer.submit(transaction)

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool = True) -> list[Outcome]:
        """Hand several on to the sequencer, together."""
        return await self._sequencer.submit_all(transactions, wait=wait)

    async def _catch_up(self, height: int) -> None:
        if self.node.note is None and height > self._snapshot_after:
            await taking_over.take_over(self.node, [self._sequencer, *self._others.values()])
        while self.node.head.state.height < height:
            wanted = self.node.head.state.height + 1
            data = await self._asked(partial(_block, wanted))
            self._adopt(schema.decode(Committed, data, max_bytes=MAX_COMMITTED_BYTES))

    async def _asked(self, ask: Callable[[Peer], Awaitable[bytes]]) -> bytes:
        """The answer of the sequencer, or of the first other that has one; what is answered is verified in any case."""
        refusal: MoorlineError | None = None
        for peer in (self._sequencer, *self._others.values()):
            try:
                return await ask(peer)
            except MoorlineError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _remember_nothing(self, height: int) -> None:
        """An empty database in a ledger that has blocks: what this authority signed is forgotten, so it waits (ADR 0010)."""
        if self.node.blank() and height >= 1:
            self.node.conduct.forget_signatures_up_to(height + 1)

    def _adopt(self, committed: Committed) -> None:
        self.node.adopt(committed)
        reached("cosigner.block.committed")

    def _sign(self, block: Block, proposal: Proposal) -> str:
        height = block.header.height
        maker = verified_seal(proposal, block, self.node)  # 2
        self.node.conduct.judge_term(proposal.seal, proposal.certificate, self.node.authorities())
        signed = self.node.store.signed()
        again = self._signed_before(signed, height, proposal, block)  # 3
        if height <= self.node.head.state.height:
            if again is not None and height == self.node.head.state.height:
                return self.node.cosign(self.node.head.checkpoint(), at=again).line()
            raise Conflict("ledger.height_passed", "this height is committed already", got=height)
        head = self._executed(block, proposal)  # 4
        found = head.checkpoint()
        if again is None:
            self.node.conduct.may_sign(height)
            self._judge_time(found, proposal.cosignatures, maker)
            again = self.node.now()
            self.node.store.intend_signature(height, proposal.block, time_s=again, seal=schema.encode(proposal.seal))  # 5
            reached("cosigner.signature.intended")
        return self.node.cosign(found, at=again).line()

    def _executed(self, block: Block, proposal: Proposal) -> Head:
        try:
            return self.node.execute(block, proposal.block)[0]
        except Refused:
            accusing.accuse(self.node, block, proposal.seal)
            raise

    def _signed_before(
        self, signed: StoredSignature | None, height: int, proposal: Proposal, block: Block
    ) -> Instant | None:
        """When this authority signed this very block, or None if it signed none at this height."""
        if signed is None or signed.height < height:
            return None
        if signed.height == height and signed.body == proposal.block:
            return self.node.now() if signed.time_s is None else Instant(signed.time_s)
        if signed.height == height:
            self.node.accuse_proposals(signed, block.header, proposal.seal)
        raise NotAuthentic(
            "ledger.fork",
            "this authority signed another block at this height",
            expected=height,
            got=signed.height,
            remedy="see moor ledger evidence; the sequencer made both",
        )

    def _judge_time(self, found: Checkpoint, lines: tuple[str, ...], maker: str) -> None:
        off = self.node.now_ms() - found.time_ms
        if abs(off) <= MAX_SKEW_MS:
            return
        if off > 0 and self._seen_in_time(found, lines, maker):
            return
        raise Refused(
            "ledger.time_skew",
            "block time is too far from this authority's clock",
            expected=f"within {MAX_SKEW_MS} ms",
            got=f"{off} ms",
            remedy="synchronise clocks",
        )

    def _seen_in_time(self, found: Checkpoint, lines: tuple[str, ...], maker: str) -> bool:
        authorities = self.node.authorities()
        signatures = tuple(checkpoint.parse_signature_line(line) for line in lines)
        times = checkpoint.signers(Note(checkpoint=found, signatures=signatures), authorities)
        times.pop(maker, None)
        timely = sum(abs(at * 1000 - found.time_ms) <= MAX_SKEW_MS for at in times.values())
        return timely >= max(1, tolerated_faults(len(authorities)))


async def _block(height: int, peer: Peer) -> bytes:
    return await peer.block(height)
