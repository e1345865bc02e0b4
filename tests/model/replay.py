"""Runs of the model, replayed on the embedded engine's own code: four nodes, each with a database and its keys.

Each step of a run is made by the real part: a proposal is a real block with its sequencer's seal; signing is `Cosigner`'s;
adopting is `Node.adopt` of a note with the lines that were really given; a word is `Conduct.give_word` and `Node.promise`;
taking over is what a `Candidate` does with the promises. After each, signatures, heads and what was taken over are
compared with the model's; and what the model forbids at that state is attempted, and must be refused.

Where both ends differ on purpose:
- an authority that hears of a new term by its certificate follows it without a word of its own; in the model it gives the
  word then, which says nothing any more. Such an attempt is not made;
- a sequencer signs its own block and commits it in one go (`Sequencer._commit`), so a run adopts right after it, alone or
  with its next proposal in the same transaction;
- which of two blocks that are held by equally many is proposed again depends on their bytes; such runs end there.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import blocks, checkpoint, seals, terms, transactions
from moorline.ledger.blocks import Head
from moorline.ledger.checkpoint import Note
from moorline.ledger.engines.cosigner import Cosigner
from moorline.ledger.engines.embedded import Proposal
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.engines.office import Candidate
from moorline.ledger.terms import Promise
from moorline.storage.ledger_store import StoredProposal
from moorline.wire import schema

from .quorum_model import GENESIS, Block, Rules, State, committed, lies, steps, taken_with

TERM = 1


class Mismatch(AssertionError):
    """Model and engine part."""


def walk(rules: Rules, seed: int, *, length: int) -> list[State]:
    """A run of the model; a sequencer's signature is followed by its adopting the block."""
    from .quorum_model import start

    chance, way = Random(seed), [start(rules)]
    while len(way) < length:
        after = [one for one in steps(rules, way[-1]) if not tied(rules, way[-1], one)]
        if not after:
            break
        kinds = sorted({kind(way[-1], one)[0] for one in after})
        wanted = chance.choice(kinds)
        chosen = chance.choice([one for one in after if kind(way[-1], one)[0] == wanted])
        what, who = kind(way[-1], chosen)
        way.append(chosen)
        if what == "sign":
            ((term, block),) = chosen.signed[who] - way[-2].signed[who]
            if who == term:
                way.append(chance.choice([one for one in steps(rules, chosen) if one.heads[who] == block]))
    return way


def tied(rules: Rules, before: State, after: State) -> bool:
    """Whether a promotion chose between two blocks that are held by equally many."""
    if after.taken == before.taken:
        return False
    held = [word[1] for word in before.words if word is not None and word[1] is not None]
    return len(set(held)) > 1 or (rules.byzantine >= 0 and bool(held) and after.taken != (held[0].parent, held[0]))


def kind(before: State, after: State) -> tuple[str, int]:
    """What happened between two states, and at whom (-1: everywhere)."""
    if after.taken != before.taken:
        return "take", 1
    for who in (0, 1):
        if after.proposed != before.proposed and after.heads[who] != before.heads[who]:
            return "go_on", who
    if after.proposed != before.proposed:
        return "propose", -1
    for name, what in (("words", "word"), ("signed", "sign"), ("heads", "adopt")):
        old, new = getattr(before, name), getattr(after, name)
        for who in range(len(old)):
            if old[who] != new[who]:
                return what, who
    raise AssertionError


@dataclass
class Made:
    """A block of the model, made real: its bytes, the head after it, and whose signature lines there are on it."""

    body: bytes
    header: blocks.Header
    head: Head
    lines: dict[int, str] = field(default_factory=dict)


class Silent:
    """A peer that cannot be reached, but for the promise and blocks it gave before."""

    def __init__(self, promise: bytes | None = None, chain: dict[int, bytes] | None = None) -> None:
        self._promise, self._chain = promise, chain or {}

    async def promise(self, _request: bytes) -> bytes:
        if self._promise is None:
            raise Unavailable("peer.unreachable", "away")
        return self._promise

    async def block(self, height: int) -> bytes:
        if height not in self._chain:
            raise Unavailable("peer.unreachable", "away")
        return self._chain[height]

    def __getattr__(self, name: str) -> object:
        async def away(*_: object) -> bytes:
            raise Unavailable("peer.unreachable", "away", got=name)

        return away


class Replay:
    """The four nodes, and everything that was sent. `now_ms` of all nodes is the same; blocks are within the skew of it."""

    def __init__(self, rules: Rules, nodes: list[Node], signers: dict[str, object], base_ms: int) -> None:
        self.rules, self.nodes, self._signers, self._base_ms = rules, nodes, signers, base_ms
        self.names = [node.name for node in nodes]
        self.made: dict[Block, Made] = {}
        self.words: dict[int, bytes] = {}
        self.notes: dict[int, dict[int, bytes]] = {who: {} for who in range(len(nodes))}
        self.attempts = 0
        self.cosigners = [Cosigner(node, Silent()) for node in nodes]

    async def run(self, way: list[State]) -> None:
        """Raises Mismatch at the first step that goes differently."""
        for before, after in pairwise(way):
            what, who = kind(before, after)
            try:
                await getattr(self, f"_{what}")(who, before, after)
            except MoorlineError as error:
                raise Mismatch(f"{what} by {who}: the model does it, the engine refuses: {error}") from error
            self._compare(after)
            await self._forbidden(after)
        self._finally(way[-1])

    def _finally(self, state: State) -> None:
        """What the model calls committed, every honest authority that stands right below it adopts."""
        for block in sorted({one for _, one in state.proposed}):
            for who in self._honest():
                if block.parent == state.heads[who] and committed(self.rules, state, block):
                    try:
                        self._adopted(who, block)
                    except MoorlineError as error:
                        raise Mismatch(f"committed in the model, refused by {who}: {error}") from error

    # Blocks --------------------------------------------------------------------------------------------------------------

    def block(self, wanted: Block) -> Made:
        if wanted not in self.made:
            parent = wanted.parent
            assert parent is not None
            head = self._genesis_head() if parent == GENESIS else self.block(parent).head
            time_ms = self._base_ms + 1000 * wanted.height + (100 if wanted.name == "y" else 0)
            batch = self._changing_the_set() if wanted.height == 1 and wanted.name == "x" else []
            found, after, _ = blocks.make(head, batch, time_ms=time_ms)
            assert len(found.transactions) == len(batch)
            self.made[wanted] = Made(body=blocks.encode(found), header=found.header, head=after)
            if self.rules.byzantine >= 0:
                self.made[wanted].lines[self.rules.byzantine] = self._byzantine_line(after)
        return self.made[wanted]

    def _genesis_head(self) -> Head:
        if not hasattr(self, "_first"):
            self._first = self.nodes[0].head
        return self._first

    def _changing_the_set(self) -> list[bytes]:
        """All approvals that the set after x needs, in the block."""
        gone = [self.names[who] for who in (3, 2) if who not in self.rules.after_x]
        batch = []
        for name in gone:
            proposed = self._payload(0, transactions.propose(transactions.RetireAuthority(name=name)))
            batch.append(transactions.sign(proposed, self._signers[self.names[0]]))
            for who in (1, 2):
                approval = self._payload(who, transactions.Approve(proposal=transactions.proposal_id(proposed)))
                batch.append(transactions.sign(approval, self._signers[self.names[who]]))
        return batch

    def _payload(self, who: int, body: object) -> transactions.Payload:
        sender = transactions.Sender(kind=transactions.SenderKind.AUTHORITY, name=self.names[who])
        ledger_id = self.nodes[0].genesis.ledger_id
        return transactions.make(body, sender=sender, ledger_id=ledger_id, nonce=secrets.token_bytes(32), valid_until=50)

    def _byzantine_line(self, head: Head) -> str:
        node = self.nodes[self.rules.byzantine]
        return checkpoint.cosign(head.checkpoint(), name=node.name, key=node._keys[0], now=node.now()).line()

    def _proposal(self, term: int, wanted: Block) -> bytes:
        made = self.block(wanted)
        seal = self._sealed(term, made)
        certificate = self.certificate if term == TERM else None
        return schema.encode(
            Proposal(block=made.body, previous=None, cosignatures=(), seal=seal, first=None, certificate=certificate)
        )

    def _sealed(self, term: int, made: Made) -> seals.Seal:
        node = self.nodes[term]
        self.attempts += 1
        return seals.seal(
            made.header,
            ledger_id=node.genesis.ledger_id,
            term=term,
            attempt=self.attempts,
            name=node.name,
            key=node._keys[0],
        )

    def _committed(self, wanted: Block, who: set[int] | None = None) -> Committed:
        made = self.block(wanted)
        lines = {name: line for name, line in made.lines.items() if who is None or name in who}
        signatures = tuple(checkpoint.parse_signature_line(lines[one]) for one in sorted(lines))
        note = Note(checkpoint=made.head.checkpoint(), signatures=signatures).encode()
        return Committed(block=made.body, note=note, edge=made.head.edge, seal=None)

    # Steps ---------------------------------------------------------------------------------------------------------------

    async def _propose(self, _who: int, before: State, after: State) -> None:
        ((term, block),) = after.proposed - before.proposed
        self.block(block)
        bound = before.taken is not None and block.parent == before.taken[0]
        if term == TERM and bound and not self.rules.false(TERM):
            stored = self.nodes[TERM].store.proposed()
            if stored is not None and stored.height == block.height and stored.body != self.block(block).body:
                raise Mismatch(f"the new sequencer has to propose another block than {block}")

    async def _go_on(self, who: int, before: State, after: State) -> None:
        """Commits and proposes the next in one transaction, as `Sequencer` does (docs/adr/0020)."""
        ((term, block),) = after.proposed - before.proposed
        node, done, made = self.nodes[who], after.heads[who], self.block(block)
        found = self._committed(done)
        head, applied = node.execute(blocks.parse(found.block), found.block)
        seal = schema.encode(self._sealed(term, made))
        proposal = StoredProposal(height=block.height, body=made.body, seal=seal, first_seal=None)
        node.begin_commit(found, head, applied, proposal=proposal)
        await node.settled()
        self.notes[who][done.height] = schema.encode(found)

    async def _sign(self, who: int, before: State, after: State) -> None:
        ((term, block),) = after.signed[who] - before.signed[who]
        node, made = self.nodes[who], self.block(block)
        if who == term:
            made.lines[who] = node.cosign(made.head.checkpoint(), at=node.now()).line()
        else:
            made.lines[who] = await self.cosigners[who].cosign(self._proposal(term, block))

    async def _adopt(self, who: int, _before: State, after: State) -> None:
        block = after.heads[who]
        self._adopted(who, block)

    def _adopted(self, who: int, block: Block) -> None:
        found = self._committed(block)
        self.nodes[who].adopt(found)
        self.notes[who][block.height] = schema.encode(found)

    async def _word(self, who: int, _before: State, _after: State) -> None:
        node = self.nodes[who]
        node.conduct.give_word(TERM, self.names[TERM])
        self.words[who] = node.promise(self._request())

    def _request(self) -> bytes:
        return schema.encode(terms.Request(term=TERM, sequencer=self.names[TERM]))

    async def _take(self, _who: int, before: State, after: State) -> None:
        lie = next(one for one in lies(self.rules, before) if after in list(taken_with(self.rules, before, one)))
        promises = dict(self.words)
        if lie is not None:
            promises[self.rules.byzantine] = self._false_promise(*lie)
        if self.rules.false(TERM):  # it has no need of the engine to take what it likes
            words = [schema.decode(Promise, one, max_bytes=terms.MAX_PROMISE_BYTES).word for one in promises.values()]
            self.certificate = terms.certify(words)
            return
        node = self.nodes[TERM]
        peers = {
            self.names[who]: Silent(promises.get(who), self.notes[who]) for who in range(len(self.nodes)) if who != TERM
        }
        for _ in range(3):
            if node.conduct.following.term < TERM:
                await Candidate(node, peers)._gather()
        self.certificate = node.conduct.following.certificate or b""
        head, above = after.taken or (GENESIS, None)
        for one in head.chain():
            if one != GENESIS:
                self.notes[TERM][one.height] = node.committed(one.height)
        stored = node.store.proposed()
        found = None if stored is None or stored.height != head.height + 1 else stored.body
        if found != (None if above is None else self.block(above).body):
            raise Mismatch(f"the model takes {above} over, the engine something else")

    def _false_promise(self, head: Block, held: Block | None) -> bytes:
        who = self.rules.byzantine
        node, made = self.nodes[who], None if held is None else self.block(held)
        word = terms.give(
            ledger_id=node.genesis.ledger_id,
            term=TERM,
            sequencer=self.names[TERM],
            name=node.name,
            height=head.height,
            held=terms.NOTHING_HELD if made is None else blocks.digest(made.header),
            key=node._keys[0],
        )
        line = None if made is None else made.lines[who]
        return schema.encode(Promise(word=word, block=None if made is None else made.body, seal=None, line=line))

    # Comparing -----------------------------------------------------------------------------------------------------------

    def _honest(self) -> Iterator[int]:
        return (who for who in range(len(self.nodes)) if not self.rules.false(who))

    def _compare(self, state: State) -> None:
        for who in self._honest():
            head = state.heads[who]
            wanted = self._genesis_head().digest if head == GENESIS else self.block(head).head.digest
            if self.nodes[who].head.digest != wanted:
                raise Mismatch(f"authority {who} is at another head than {head}")

    async def _forbidden(self, state: State) -> None:
        """What the rules do not allow in this state, the engine refuses: signatures, and blocks without a quorum."""
        for who in self._honest():
            term = 0 if state.words[who] is None else TERM
            for sent, block in sorted(state.proposed):
                beside = block.parent == state.heads[who]
                signed = {one for _, one in state.signed[who]}
                if beside and sent == term and who != term and block not in signed and self._may_not(state, who, block):
                    await self._refused(f"{who} signs {block}", self.cosigners[who].cosign(self._proposal(sent, block)))
                if beside and sent < term and block not in signed:
                    await self._refused(f"{who} signs in a term that is over", self._sign_again(who, sent, block))
                if beside and not committed(self.rules, state, block):
                    await self._refused(f"{who} adopts {block}", self._adopt_early(who, block))

    def _may_not(self, state: State, who: int, block: Block) -> bool:
        assert block.parent is not None
        return who not in self.rules.set_after(block.parent) or any(
            one.height == block.height for _, one in state.signed[who]
        )

    async def _sign_again(self, who: int, term: int, block: Block) -> None:
        await self.cosigners[who].cosign(self._proposal(term, block))

    async def _adopt_early(self, who: int, block: Block) -> None:
        self.nodes[who].adopt(self._committed(block))

    async def _refused(self, what: str, attempt: object) -> None:
        try:
            await attempt
        except MoorlineError:
            return
        raise Mismatch(f"the model forbids it, the engine does it: {what}")


def replayed(rules: Rules, way: list[State], nodes: list[Node], signers: dict[str, object], base_ms: int) -> None:
    """Raises Mismatch where model and engine part."""
    asyncio.run(Replay(rules, nodes, signers, base_ms).run(way))
