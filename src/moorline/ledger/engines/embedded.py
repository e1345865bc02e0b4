"""The embedded engine: one authority sequences, the others execute again and cosign (PROTOCOLS.md 1).

A block's life, each step durable before the next begins:

  1. the sequencer records the block with its seal as proposed, then shows it to the others;
  2. a cosigner judges it, executes it again, records that it signs it and at what time, signs, answers (engines.cosigner);
  3. the sequencer collects the answers; with its own the quorum is reached, and it signs LAST: the record of that is the
     commit, since its signature leaves this process only afterwards;
  4. it commits block, state and note in one transaction, and only then acknowledges any transaction in it; if more waits
     already, the next block is recorded as proposed (1) by that very transaction, so that under load the disk is waited for
     once a block (docs/adr/0020);
  5. it tells the others, who commit likewise; who misses that catches up.

An authority signs one block a height, for good: the height is a primary key of what it intends to sign. The sequencer signs
last so that a block nobody signed can be given up when its time has passed, and never has to be when somebody did. It gives
up a block only when so many others have answered that they did not sign it as can make the next one with it. There is no
take-over by itself: without the sequencer proofs serve until they are too old, and writing stops, until people say who is
next (engines.office, docs/adr/0010).

*Time.* A cosigner wants block time to rise, and to lie within MAX_SKEW_MS of its own clock. A block that is proposed again
later than that (a quorum was away) is taken only with max(1, f) cosignatures made in time by others than its maker: then
either one of them or the maker is honest and saw it when it was new.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Final

from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.ledger import blocks, checkpoint
from moorline.ledger.batch import Outcome
from moorline.ledger.blocks import Head
from moorline.ledger.checkpoint import Checkpoint, Note, NoteSignature, quorum_of
from moorline.ledger.engines import intake
from moorline.ledger.engines.candidate import Candidate, Round
from moorline.ledger.engines.intake import Deadlines, Intake, Waiting
from moorline.ledger.engines.lookahead import Lookahead
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.engines.proposal import Peer, Proposal
from moorline.ledger.engines.verifiers import Verifiers
from moorline.ledger.seals import Seal
from moorline.ledger.state import Applied, Rejected
from moorline.ledger.transactions import MAX_TRANSACTION_BYTES
from moorline.storage.steps import reached
from moorline.wire import schema

FRESH_MS: Final = 3500
"""How long a block that nobody signed is proposed again before a new one takes its place; less than proposal.MAX_SKEW_MS."""
RETRY_S: Final = 0.25
SUBMIT_DEADLINE_S: Final = 15.0


class Sequencer:
    """Makes blocks of what is submitted and gets them signed. Run `run()` in a task for as long as it is its term."""

    def __init__(self, node: Node, peers: Mapping[str, Peer], *, verifiers: Verifiers | None = None) -> None:
        self.node = node
        self._peers = peers
        self._term = node.conduct.following
        self._intake = Intake(lambda: node.head.state, node.verified)
        self._idle = True
        self._unproposed = 0
        """The height at which this one knows that it proposed nothing yet; 0 if it does not know."""
        self._lookahead = Lookahead(
            self._intake,
            verifiers,
            state=lambda: node.head.state,
            verified=node.verified,
            idle=lambda: self._idle and self._intake.empty,
        )
        self._deadlines = Deadlines(self._unreachable)
        self._late: set[asyncio.Task[str]] = set()
        self._telling: set[asyncio.Task[None]] = set()

    def accept(self, transaction: bytes) -> asyncio.Future[bytes]:
        """Take a transaction. The receipt comes once a quorum signed; the same transaction again gives its receipt again.

        Here, or there, is raised what the state machine says (`ledger.*`), or Unavailable("ledger.quorum_unreachable" |
        "ledger.busy" | "ledger.sender_busy" | "ledger.halted"): then the transaction may still be applied later, and may be
        sent again.
        """
        if len(transaction) > MAX_TRANSACTION_BYTES:
            raise Refused("ledger.transaction_too_large", "the transaction is too large", expected=MAX_TRANSACTION_BYTES)
        self.node.conduct.not_halted()
        waiting = intake.waiting(transaction, self.node.verified)
        known = self.node.receipt(waiting.id, waiting.valid_until) if waiting.may_stand(self.node.head.state) else None
        if known is not None:
            waiting.receipt.set_result(known)
            return waiting.receipt
        if not self._lookahead.takes(waiting):
            self._intake.put(waiting)
        self._deadlines.ends(waiting.receipt, SUBMIT_DEADLINE_S)
        return waiting.receipt

    async def submit(self, transaction: bytes) -> bytes:
        """As `accept`, and waits."""
        return await self.accept(transaction)

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool = True) -> list[Outcome]:
        """As `submit` of each, in order: what came of them, once that is known of all; of taken ones None without `wait`."""
        taken: list[asyncio.Future[bytes] | MoorlineError] = []
        for one in transactions:
            try:
                taken.append(self.accept(one))
            except MoorlineError as error:
                taken.append(error)
        if not wait:
            await asyncio.sleep(0)  # what is told at once is told
        try:
            return [await _outcome(one, wait=wait) for one in taken]
        finally:  # who asked may be gone: then nobody wants the rest
            for waited in taken:
                if wait and isinstance(waited, asyncio.Future):
                    waited.cancel()

    def _unreachable(self) -> Unavailable:
        return Unavailable(
            "ledger.quorum_unreachable",
            "no quorum of authorities signed in time",
            expected=f"{self._quorum()} of {len(self.node.authorities())}",
            remedy="send the same transaction again when the authorities are back",
        )

    async def run(self) -> None:
        """Make blocks for ever: of what waits, or an empty one when a third of max_age has passed."""
        try:
            candidate = self._resumed()
            while True:
                candidate = await self._through(candidate or self._propose(await self._batch()))
        finally:
            self.close()

    @property
    def term(self) -> int:
        """The term this one sequences in."""
        return self._term.term

    def close(self) -> None:
        """Tell everybody who waits for a receipt that nothing will come of it here."""
        self._lookahead.close()
        self._intake.close()

    # Making a block --------------------------------------------------------------------------------------------------

    def _resumed(self) -> Candidate | None:
        """A block that was proposed before a crash is proposed again, byte for byte, as long as it may get signed."""
        proposed = self.node.store.proposed()
        if proposed is None or proposed.height != self.node.head.state.height + 1 or proposed.seal is None:
            return None
        block = blocks.parse(proposed.body)
        seal = schema.decode(Seal, proposed.seal)
        first = None if proposed.first_seal is None else schema.decode(Seal, proposed.first_seal)
        if seal.term != self._term.term:  # of another term, and not taken over into this one: nobody here signed it
            return None
        head, applied = blocks.execute_again(self.node.head, block)
        lines = self.node.store.cosignatures(proposed.height)
        return Candidate(
            block=block, body=proposed.body, head=head, applied=applied, seal=seal, first=first, batch=[], lines=lines
        )

    async def _batch(self) -> list[Waiting]:
        self._idle = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._idle_s()):
                await self._intake.something()
        self._idle = False
        return self._intake.take(blocks.MAX_TRANSACTIONS, blocks.MAX_BATCH_BYTES)

    def _idle_s(self) -> float:
        if self.node.note is None:
            return 0.0  # the first block at once: without it nothing can be proven
        due_ms = self.node.head.state.time_ms + self.node.head.state.parameter("max_age_s") * 1000 // 3
        return max(0.0, (due_ms - self.node.now_ms()) / 1000)

    def _propose(self, batch: list[Waiting]) -> Candidate:
        """The next block, recorded as proposed."""
        candidate = self._made(self.node.head, batch, frozenset(), attempt=self._attempt(self.node.head.state.height + 1))
        self.node.store.propose(candidate.height, candidate.body, seal=schema.encode(candidate.seal))  # 1
        reached("sequencer.block.proposed")
        return candidate

    def _following(self, before: Candidate) -> Candidate | None:
        """What is to be proposed in the transaction that commits the block before it, if anything waits.

        Nothing where another set of authorities, or another key of this one, signs from then on.
        """
        if self._intake.empty or before.head.state.authority_set() != self.node.authorities():
            return None
        batch = self._intake.take(blocks.MAX_TRANSACTIONS, blocks.MAX_BATCH_BYTES)
        made = self._made(before.head, batch, frozenset(one.id for one in before.applied), attempt=0)
        return made if made.applied else None

    def _made(self, head: Head, batch: list[Waiting], under_way: frozenset[bytes], *, attempt: int) -> Candidate:
        time_ms = max(self.node.now_ms(), head.state.time_ms + 1)
        block, after, outcomes = blocks.make(
            head, [waiting.data for waiting in batch], time_ms=time_ms, verified=self.node.verified
        )
        kept, applied = self._answer_rejected(batch, outcomes, under_way)
        seal = self.node.seal(block.header, term=self._term.term, attempt=attempt)
        return Candidate(
            block=block,
            body=blocks.encode(block),
            head=after,
            applied=applied,
            seal=seal,
            first=None,
            batch=kept,
            lines={},
        )

    def _attempt(self, height: int) -> int:
        """One more than the last at this height and in this term; counted in the database."""
        if self._unproposed == height:
            self._unproposed = 0
            return 0
        proposed = self.node.store.proposed()
        if proposed is None or proposed.height != height or proposed.seal is None:
            return 0
        last = schema.decode(Seal, proposed.seal)
        return last.attempt + 1 if last.term == self._term.term else 0

    def _answer_rejected(
        self, batch: list[Waiting], outcomes: tuple[Applied | Rejected, ...], under_way: frozenset[bytes]
    ) -> tuple[list[Waiting], tuple[Applied, ...]]:
        kept, applied = [], []
        here: dict[bytes, Waiting] = {}
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Applied):
                kept.append(waiting)
                applied.append(outcome)
                here[waiting.id] = waiting
            elif not waiting.receipt.done():
                used = outcome.code == "ledger.nonce_used"
                known = self.node.receipt(waiting.id, waiting.valid_until) if used else None
                if known is not None:  # sent twice at once: the first has just been committed
                    waiting.receipt.set_result(known)
                elif used and waiting.id in under_way:  # it is in the block that is committed now; afterwards it is known
                    self._intake.put_back(waiting)
                elif used and waiting.id in here:  # sent twice at once, and both are in this batch
                    _follow(here[waiting.id].receipt, waiting.receipt)
                else:
                    waiting.receipt.set_exception(outcome.error())
        return kept, tuple(applied)

    # Getting it signed -----------------------------------------------------------------------------------------------

    async def _through(self, candidate: Candidate) -> Candidate | None:
        """Have a block signed and commit it. The next one, where that is proposed already."""
        if await self._signed(candidate):
            return await self._commit(candidate)
        stored = self.node.store.block(candidate.height)
        if stored is None:  # given up
            return self._propose(candidate.batch)
        if stored.body == candidate.body:  # the others had it from somewhere else
            self._answer(candidate, self._receipts(candidate, stored.note))
        else:  # another block took its place: try again with the next
            for waiting in candidate.batch:
                self._intake.put_back(waiting)
        return None

    async def _signed(self, candidate: Candidate) -> bool:
        """True once the others' part of a quorum has signed; False if the block was given up, or one is committed there.

        It is given up if so many did not sign it as can sign another.
        """
        while True:
            self.node.conduct.not_halted()
            round_ = await self._collect(candidate)
            if self.node.head.state.height >= candidate.height:
                return False
            if len(round_.lines) + 1 >= self._quorum():
                return True
            stale = self.node.now_ms() - candidate.block.header.time_ms > FRESH_MS
            if stale and not round_.lines and round_.too_late + 1 >= self._quorum() and self._may_give_up(candidate):
                return False
            await self._heed(round_, candidate.height)
            await asyncio.sleep(RETRY_S)

    def _may_give_up(self, candidate: Candidate) -> bool:
        """Not a block this authority cosigned itself, before it became the sequencer: it signs no other at that height."""
        signed = self.node.store.signed()
        return signed is None or signed.height < candidate.height

    async def _collect(self, candidate: Candidate) -> Round:
        """Lines of others on this block, as many as a quorum takes; each verified, and kept if they are too few yet."""
        lines, found = candidate.lines, candidate.head.checkpoint()
        proposal = schema.encode(
            Proposal(
                block=candidate.body,
                previous=self._previous(),
                cosignatures=tuple(lines.values()),
                seal=candidate.seal,
                first=candidate.first,
                certificate=self._term.certificate,
            )
        )
        names = [name for name in self.node.authorities() if name != self.node.name and name not in lines]
        asked = {asyncio.ensure_future(self._peers[name].cosign(proposal)): name for name in names if name in self._peers}
        new: dict[str, str] = {}
        refusals: dict[str, str] = {}
        while asked and len(lines) + 1 < self._quorum():
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if len(lines) + 1 >= self._quorum():
                    break  # more would not be kept
                name = asked.pop(task)
                answer = self._line(task, name, found)
                if isinstance(answer, str):
                    new[name] = lines[name] = answer
                else:
                    refusals[name] = answer.code
        if len(lines) + 1 < self._quorum() and new:  # else they are kept with the commit, as part of the note
            self.node.store.keep_cosignatures(candidate.height, new)
        for task in asked:  # they sign too, in their own time; nobody waits for it
            self._late.add(task)
            task.add_done_callback(self._ended)
        return Round(lines, refusals)

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report it as forgotten

    def _line(self, task: asyncio.Task[str], name: str, found: Checkpoint) -> str | MoorlineError:
        """The answer of one authority if it is its signature on this block; a refusal or a lie counts for nothing."""
        try:
            signature = checkpoint.parse_signature_line(task.result())
            checkpoint.verify_note(Note(checkpoint=found, signatures=(signature,)), {name: self.node.authorities()[name]}, 1)
        except MoorlineError as error:
            self.on_refusal(name, error)
            return error
        return signature.line()

    async def _heed(self, round_: Round, height: int) -> None:
        """What refusals tell of: a term that is over, a block that others have committed."""
        for name, code in round_.refusals.items():
            with contextlib.suppress(MoorlineError):
                if code == "ledger.term_over":
                    self.node.conduct.learn_standing(await self._peers[name].standing(), self.node.authorities())
                elif code == "ledger.height_passed":
                    self.node.adopt(schema.decode(Committed, await self._peers[name].block(height), max_bytes=16 << 20))

    def on_refusal(self, name: str, error: MoorlineError) -> None:
        """Called when an authority does not sign. Does nothing; a service logs it."""

    def _previous(self) -> Committed | None:
        return self.node.last()

    # Committing it ---------------------------------------------------------------------------------------------------

    async def _commit(self, candidate: Candidate) -> Candidate | None:
        found = candidate.head.checkpoint()
        own = self.node.cosign(found, at=self.node.now())  # 3
        others = [checkpoint.parse_signature_line(candidate.lines[name]) for name in sorted(candidate.lines)]
        signatures = (self.node.sign_as_maker(found), *sorted((own, *others), key=lambda one: one.name))
        note = Note(checkpoint=found, signatures=_quorum_only(signatures, self._quorum())).encode()
        committed = Committed(block=candidate.body, note=note, edge=candidate.head.edge, seal=schema.encode(candidate.seal))
        following = self._following(candidate)
        self.node.begin_commit(  # 4
            committed,
            candidate.head,
            candidate.applied,
            proposal=None if following is None else following.stored(),
        )
        receipts = self._receipts(candidate, note)  # while the disk works
        await self.node.settled()
        reached("sequencer.block.committed")
        self._unproposed = candidate.height + 1 if following is None else 0
        telling = asyncio.ensure_future(self._tell(schema.encode(committed), candidate, receipts))
        if following is None:
            await telling
        else:
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)
        return following

    async def _tell(self, committed: bytes, candidate: Candidate, receipts: list[bytes]) -> None:  # 5
        try:
            await self._announce(committed)
        finally:  # it is committed, whoever knows of it
            self._answer(candidate, receipts)

    async def _announce(self, committed: bytes) -> None:
        told = [asyncio.ensure_future(peer.announce(committed)) for peer in self._peers.values()]
        if not told:
            return
        # Whoever answers slowly catches up on its own; the next block does not wait for it.
        _, late = await asyncio.wait(told, timeout=RETRY_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*told, return_exceptions=True)

    def _receipts(self, candidate: Candidate, note: bytes) -> list[bytes]:
        ids = [waiting.id for waiting in candidate.batch]
        if not ids:
            return []
        return blocks.encoded_receipts(candidate.head.log_proof, candidate.block, note=note, transaction_ids=ids)

    def _answer(self, candidate: Candidate, receipts: list[bytes]) -> None:
        for waiting, receipt in zip(candidate.batch, receipts, strict=True):
            if not waiting.receipt.done():
                waiting.receipt.set_result(receipt)

    def _quorum(self) -> int:
        return quorum_of(len(self.node.authorities()))


async def _outcome(taken: asyncio.Future[bytes] | MoorlineError, *, wait: bool) -> Outcome:
    if isinstance(taken, MoorlineError):
        return taken
    if not wait and not taken.done():
        taken.add_done_callback(_looked_at)
        return None
    try:
        return await taken
    except MoorlineError as error:
        return error


def _looked_at(receipt: asyncio.Future[bytes]) -> None:
    """Nobody waits for it; asyncio need not report what became of it as forgotten."""
    if not receipt.cancelled():
        receipt.exception()


def _follow(first: asyncio.Future[bytes], again: asyncio.Future[bytes]) -> None:
    """Answer `again` as `first` is answered. Where `first` gave up waiting, the deadline of `again` says so."""

    def told(done: asyncio.Future[bytes]) -> None:
        if not done.cancelled() and done.exception() is None and not again.done():
            again.set_result(done.result())

    first.add_done_callback(told)


def _quorum_only(signatures: tuple[NoteSignature, ...], quorum: int) -> tuple[NoteSignature, ...]:
    """The maker's line and a quorum of cosignatures: more would only make proofs longer."""
    return (signatures[0], *signatures[1 : 1 + quorum])
