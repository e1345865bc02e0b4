"""The embedded engine: one authority sequences, the others execute again and cosign (PROTOCOLS.md 1).

A block's life, each step durable before the next begins:

  1. the sequencer records the block as proposed, then shows it to the others;
  2. a cosigner judges it, executes it again, records that it signs it and at what time, signs, answers;
  3. the sequencer keeps the answers; with its own the quorum is reached, and it signs LAST: the record of that is the
     commit, since its signature leaves this process only afterwards;
  4. it commits block, state and note in one transaction, and only then acknowledges any transaction in it;
  5. it tells the others, who commit likewise; who misses that catches up from the sequencer.

An authority signs one block a height: the height is a primary key of what it intends to sign. The sequencer signs last so
that a block nobody signed can be given up when its time has passed, and never has to be when somebody did. There is no
take-over: without the sequencer proofs serve until they are too old, and writing stops.

*Time.* A cosigner wants block time to rise, and to lie within MAX_SKEW_MS of its own clock. A block that is proposed again
later than that (a quorum was away) is taken only with max(1, f) cosignatures of others made in time: then either one of
them or the sequencer is honest and saw it when it was new.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Protocol

from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import blocks, checkpoint
from moorline.ledger.blocks import Block, Head
from moorline.ledger.checkpoint import Checkpoint, Note, NoteSignature, quorum_of, tolerated_faults
from moorline.ledger.engines.node import Committed, Node, transaction_id_of
from moorline.ledger.state import Applied, Rejected
from moorline.ledger.transactions import MAX_TRANSACTION_BYTES
from moorline.storage.steps import reached
from moorline.wire import schema
from moorline.wire.schema import Size

MAX_SKEW_MS: Final = 5000
FRESH_MS: Final = 3500
"""How long a block that nobody signed is proposed again before a new one takes its place; less than MAX_SKEW_MS."""
RETRY_S: Final = 0.25
SUBMIT_DEADLINE_S: Final = 15.0
MAX_QUEUE: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a sequencer shows. `previous` lets a cosigner commit the block before, should it have missed that.

    `cosignatures` are lines of others on this very block, for who sees it late.
    """

    block: bytes
    previous: Committed | None
    cosignatures: tuple[Annotated[str, Size(at_most=512)], ...]


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


@dataclass(slots=True)
class _Waiting:
    data: bytes
    id: bytes
    receipt: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


# The one who makes blocks ----------------------------------------------------------------------------------------------


class Sequencer:
    """Makes blocks of what is submitted and gets them signed. Run `run()` in a task for as long as it lives."""

    def __init__(self, node: Node, peers: Mapping[str, Peer]) -> None:
        self.node = node
        self._peers = peers
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(MAX_QUEUE)
        self._late: set[asyncio.Task[str]] = set()

    async def submit(self, transaction: bytes) -> bytes:
        """The receipt, once a quorum signed. The same transaction again gives its receipt again.

        Raises what the state machine says (`ledger.*`), or Unavailable("ledger.quorum_unreachable" | "ledger.busy"):
        then the transaction may still be applied later, and may be sent again as it is.
        """
        if len(transaction) > MAX_TRANSACTION_BYTES:
            raise Refused("ledger.transaction_too_large", "the transaction is too large", expected=MAX_TRANSACTION_BYTES)
        transaction_id = transaction_id_of(transaction)
        known = None if transaction_id is None else self.node.receipt(transaction_id)
        if known is not None:
            return known
        waiting = _Waiting(transaction, transaction_id or b"")
        try:
            self._queue.put_nowait(waiting)
            return await asyncio.wait_for(waiting.receipt, SUBMIT_DEADLINE_S)
        except asyncio.QueueFull:
            raise Unavailable("ledger.busy", "too many transactions are waiting", remedy="send it again later") from None
        except TimeoutError:
            raise Unavailable(
                "ledger.quorum_unreachable",
                "no quorum of authorities signed in time",
                expected=f"{self._quorum()} of {len(self.node.authorities())}",
                remedy="send the same transaction again when the authorities are back",
            ) from None

    async def run(self) -> None:
        """Make blocks for ever: of what waits, or an empty one when a third of max_age has passed."""
        await self._resume()
        while True:
            await self._make(await self._batch())

    async def _resume(self) -> None:
        """A block that was proposed before a crash is proposed again, byte for byte, as long as it may get signed."""
        proposed = self.node.store.proposed()
        if proposed is None or proposed.height != self.node.head.state.height + 1:
            return
        block = blocks.parse(proposed.body)
        head, applied = blocks.execute_again(self.node.head, block)
        await self._until_signed(block, head, applied)

    async def _batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._idle_s()):
                batch.append(await self._queue.get())
        size = sum(len(waiting.data) for waiting in batch)
        while not self._queue.empty() and len(batch) < blocks.MAX_TRANSACTIONS and size < blocks.MAX_BATCH_BYTES:
            batch.append(self._queue.get_nowait())
            size += len(batch[-1].data)
        return batch

    def _idle_s(self) -> float:
        if self.node.note is None:
            return 0.0  # the first block at once: without it nothing can be proven
        due_ms = self.node.head.state.time_ms + self.node.head.state.parameter("max_age_s") * 1000 // 3
        return max(0.0, (due_ms - self.node.now_ms()) / 1000)

    async def _make(self, batch: list[_Waiting]) -> None:
        while True:
            time_ms = max(self.node.now_ms(), self.node.head.state.time_ms + 1)
            block, head, outcomes = blocks.make(self.node.head, [waiting.data for waiting in batch], time_ms=time_ms)
            batch, applied = self._answer_rejected(batch, outcomes)
            self.node.store.propose(head.state.height, blocks.encode(block))  # 1
            reached("sequencer.block.proposed")
            if await self._until_signed(block, head, applied):
                break
        ids = [waiting.id for waiting in batch]
        receipts = blocks.receipts(head.log_proof, block, note=self.node.signed_note(), transaction_ids=ids)
        for waiting, receipt in zip(batch, receipts, strict=True):
            if not waiting.receipt.done():
                waiting.receipt.set_result(schema.encode(receipt))

    def _answer_rejected(
        self, batch: list[_Waiting], outcomes: tuple[Applied | Rejected, ...]
    ) -> tuple[list[_Waiting], tuple[Applied, ...]]:
        kept, applied = [], []
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Applied):
                kept.append(waiting)
                applied.append(outcome)
            elif not waiting.receipt.done():
                known = self.node.receipt(waiting.id) if outcome.code == "ledger.nonce_used" else None
                if known is not None:  # sent twice at once: the first has just been committed
                    waiting.receipt.set_result(known)
                else:
                    waiting.receipt.set_exception(outcome.error())
        return kept, tuple(applied)

    async def _until_signed(self, block: Block, head: Head, applied: tuple[Applied, ...]) -> bool:
        """True once the block is committed; False if nobody signed it while it was fresh."""
        found = head.checkpoint()
        while True:
            lines = await self._collect(block, found)
            if len(lines) + 1 >= self._quorum():
                break
            if not lines and self.node.now_ms() - block.header.time_ms > FRESH_MS:
                return False
            await asyncio.sleep(RETRY_S)
        await self._commit(block, head, applied, lines)
        return True

    async def _collect(self, block: Block, found: Checkpoint) -> dict[str, str]:
        """Lines of others on this block, as many as a quorum takes; each verified and kept."""
        height = block.header.height
        lines = self.node.store.cosignatures(height)
        proposal = schema.encode(
            Proposal(block=blocks.encode(block), previous=self._previous(), cosignatures=tuple(lines.values()))
        )
        names = [name for name in self.node.authorities() if name != self.node.name and name not in lines]
        asked = {asyncio.ensure_future(self._peers[name].cosign(proposal)): name for name in names if name in self._peers}
        new: dict[str, str] = {}
        while asked and len(lines) + 1 < self._quorum():
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                name = asked.pop(task)
                line = self._line(task, name, found)
                if line is not None:
                    new[name] = lines[name] = line
        if len(lines) + 1 < self._quorum() and new:  # else they are kept with the commit, as part of the note
            self.node.store.keep_cosignatures(height, new)
        for task in asked:  # they sign too, in their own time; nobody waits for it
            self._late.add(task)
            task.add_done_callback(self._ended)
        return lines

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it as forgotten

    def _line(self, task: asyncio.Task[str], name: str, found: Checkpoint) -> str | None:
        """The answer of one authority if it is its signature on this block; a refusal or a lie counts for nothing."""
        try:
            signature = checkpoint.parse_signature_line(task.result())
            checkpoint.verify_note(Note(checkpoint=found, signatures=(signature,)), {name: self.node.authorities()[name]}, 1)
        except MoorlineError as error:
            self.on_refusal(name, error)
            return None
        return signature.line()

    def on_refusal(self, name: str, error: MoorlineError) -> None:
        """Called when an authority does not sign. Does nothing; a service logs it."""

    def _previous(self) -> Committed | None:
        stored = self.node.store.head()
        return None if stored is None else Committed(block=stored.body, note=stored.note)

    async def _commit(self, block: Block, head: Head, applied: tuple[Applied, ...], lines: Mapping[str, str]) -> None:
        found, body = head.checkpoint(), blocks.encode(block)
        own = self.node.cosign(found, at=self.node.now())  # 3
        others = [checkpoint.parse_signature_line(lines[name]) for name in sorted(lines)]
        signatures = (self.node.sign_as_maker(found), *sorted((own, *others), key=lambda one: one.name))
        note = Note(checkpoint=found, signatures=_quorum_only(signatures, self._quorum())).encode()
        committed = Committed(block=body, note=note)
        self.node.commit(committed, head, applied)  # 4
        reached("sequencer.block.committed")
        await self._announce(schema.encode(committed))

    async def _announce(self, committed: bytes) -> None:  # 5
        told = [asyncio.ensure_future(peer.announce(committed)) for peer in self._peers.values()]
        if not told:
            return
        # Whoever answers slowly catches up on its own; the next block does not wait for it.
        _, late = await asyncio.wait(told, timeout=RETRY_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*told, return_exceptions=True)

    def _quorum(self) -> int:
        return quorum_of(len(self.node.authorities()))


def _quorum_only(signatures: tuple[NoteSignature, ...], quorum: int) -> tuple[NoteSignature, ...]:
    """The maker's line and a quorum of cosignatures: more would only make proofs longer."""
    return (signatures[0], *signatures[1 : 1 + quorum])


# The others ------------------------------------------------------------------------------------------------------------


class Cosigner:
    """Judges what the sequencer proposes and follows the chain. Run `run()` in a task for as long as it lives."""

    def __init__(self, node: Node, sequencer: Peer) -> None:
        self.node = node
        self._sequencer = sequencer
        self._lock = asyncio.Lock()

    async def cosign(self, data: bytes) -> str:
        """The signature line for an encoded `Proposal`, or a refusal (`ledger.*`)."""
        proposal = schema.decode(Proposal, data, max_bytes=2 * blocks.MAX_BLOCK_BYTES)
        block = blocks.parse(proposal.block)
        async with self._lock:
            if proposal.previous is not None and block.header.height == self.node.head.state.height + 2:
                self._adopt(proposal.previous)
            if block.header.height > self.node.head.state.height + 1:
                await self._catch_up(block.header.height - 1)
            return self._sign(block, proposal)

    async def announce(self, data: bytes) -> None:
        """Take note of a committed block; one that is not the next is fetched with those before it."""
        committed = schema.decode(Committed, data, max_bytes=blocks.MAX_BLOCK_BYTES + (1 << 20))
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
        """Catch up with the sequencer's head. Raises Unavailable if it cannot be reached."""
        note = checkpoint.parse_note(await self._sequencer.note())
        async with self._lock:
            await self._catch_up(note.checkpoint.height)

    async def submit(self, transaction: bytes) -> bytes:
        """Hand a transaction on to the sequencer."""
        return await self._sequencer.submit(transaction)

    async def _catch_up(self, height: int) -> None:
        while self.node.head.state.height < height:
            data = await self._sequencer.block(self.node.head.state.height + 1)
            self._adopt(schema.decode(Committed, data, max_bytes=blocks.MAX_BLOCK_BYTES + (1 << 20)))

    def _adopt(self, committed: Committed) -> None:
        self.node.adopt(committed)
        reached("cosigner.block.committed")

    def _sign(self, block: Block, proposal: Proposal) -> str:
        height = block.header.height
        signed = self.node.store.signed()
        if signed is not None and signed.height >= height:
            if signed.height > height or signed.body != proposal.block:
                raise NotAuthentic(
                    "ledger.fork",
                    "this authority signed another block at this height",
                    expected=height,
                    got=signed.height,
                    remedy="compare the two blocks: the sequencer made both",
                )
            at = self.node.now() if signed.time_s is None else Instant(signed.time_s)
        if height <= self.node.head.state.height:
            if signed is not None and signed.height == height:
                return self.node.cosign(self.node.head.checkpoint(), at=at).line()
            raise Conflict("ledger.height_passed", "this height is committed already", got=height)
        head, _ = blocks.execute_again(self.node.head, block)
        found = head.checkpoint()
        if signed is None or signed.height < height:
            self._judge_time(found, proposal.cosignatures)
            at = self.node.now()
            self.node.store.intend_signature(height, proposal.block, time_s=at)  # 2
            reached("cosigner.signature.intended")
        return self.node.cosign(found, at=at).line()

    def _judge_time(self, found: Checkpoint, lines: tuple[str, ...]) -> None:
        off = self.node.now_ms() - found.time_ms
        if abs(off) <= MAX_SKEW_MS:
            return
        if off > 0 and self._seen_in_time(found, lines):
            return
        raise Refused(
            "ledger.time_skew",
            "block time is too far from this authority's clock",
            expected=f"within {MAX_SKEW_MS} ms",
            got=f"{off} ms",
            remedy="synchronise clocks",
        )

    def _seen_in_time(self, found: Checkpoint, lines: tuple[str, ...]) -> bool:
        authorities = self.node.authorities()
        signatures = tuple(checkpoint.parse_signature_line(line) for line in lines)
        times = checkpoint.signers(Note(checkpoint=found, signatures=signatures), authorities)
        times.pop(self.node.genesis.sequencer, None)
        timely = sum(abs(at * 1000 - found.time_ms) <= MAX_SKEW_MS for at in times.values())
        return timely >= max(1, tolerated_faults(len(authorities)))
