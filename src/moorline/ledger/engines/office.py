"""The part an authority plays now, and how that changes: on the word of operators only (ledger.terms, docs/adr/0010).

An authority sequences, cosigns, or, between its operator's word and a quorum's, gathers words for itself:

  1. the operator's word is durable before anything else; from then on nothing of an earlier term is cosigned here;
  2. the authority it names asks all others for their word and what they hold, again and again, until a quorum has answered;
  3. it takes over the highest head among them, and of the blocks signed above it the one that most of them signed: no block
     that a quorum signed can be missed, since two quorums have f+1 authorities in common, one of them honest at least;
  4. that block is recorded as proposed under a seal of the new term, byte for byte as it was, before the certificate is;
  5. it sequences; whoever sees a proposal or asks sees the certificate too, and follows. So does the old sequencer.

Killed anywhere, an authority goes on from what is durable: at 2 if the certificate is not there, at 5 if it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Final

from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.ledger import blocks, checkpoint, seals, terms
from moorline.ledger.batch import Outcome
from moorline.ledger.checkpoint import Note, quorum_of
from moorline.ledger.engines.cosigner import MAX_COMMITTED_BYTES, SNAPSHOT_AFTER, Cosigner
from moorline.ledger.engines.embedded import Sequencer
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.engines.proposal import Peer, Proposal
from moorline.ledger.engines.verifiers import Verifiers
from moorline.ledger.seals import Seal
from moorline.ledger.terms import Promise
from moorline.storage.steps import reached
from moorline.wire import schema

GATHER_S: Final = 0.5


class Candidate:
    """The part between: gathers words until it may sequence."""

    def __init__(self, node: Node, peers: Mapping[str, Peer]) -> None:
        self.node, self._peers = node, peers
        self._word = node.conduct.word

    async def run(self) -> None:
        """Ask until a quorum has given its word; `conduct.changed` is set then."""
        while self.node.conduct.following.term < self._word.term:
            try:
                await self._gather()
            except MoorlineError as error:
                self.on_trouble(error)
            await asyncio.sleep(GATHER_S)
        await asyncio.Event().wait()  # the office puts a sequencer in this one's place

    def on_trouble(self, error: MoorlineError) -> None:
        """Called when not enough have given their word yet. Does nothing; a service logs it."""

    async def submit(self, transaction: bytes) -> bytes:
        """Nobody sequences now."""
        del transaction
        raise Unavailable("ledger.no_sequencer", "no quorum has said yet who sequences", remedy="send it again later")

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool = True) -> list[Outcome]:
        """Nobody sequences now."""
        del transactions, wait
        raise Unavailable("ledger.no_sequencer", "no quorum has said yet who sequences", remedy="send them again later")

    async def cosign(self, data: bytes) -> str:
        """A proposal of a later term, with its certificate, ends this part; all others are over."""
        _learn_from(self.node, schema.decode(Proposal, data, max_bytes=2 * blocks.MAX_BLOCK_BYTES))
        raise Unavailable("ledger.part_changed", "this authority changes its part", remedy="show it again")

    async def announce(self, data: bytes) -> None:
        """A committed block is one, whoever sequences."""
        self.node.adopt(schema.decode(Committed, data, max_bytes=MAX_COMMITTED_BYTES))

    async def _gather(self) -> None:
        request = schema.encode(terms.Request(term=self._word.term, sequencer=self._word.sequencer))  # 2
        promises = {self.node.name: schema.decode(Promise, self.node.promise(request), max_bytes=terms.MAX_PROMISE_BYTES)}
        authorities = self.node.authorities()
        for name in self._peers:
            with contextlib.suppress(MoorlineError):
                promises[name] = self._promise(await self._peers[name].promise(request), name, authorities)
        if len(promises) < quorum_of(len(authorities)):
            raise Unavailable(
                "ledger.words_missing",
                "too few authorities have been told to follow this one",
                expected=f"{quorum_of(len(authorities))} of {len(authorities)}",
                got=", ".join(sorted(promises)),
                remedy=f"moor ledger promote {self.node.name}, at the other authorities",
            )
        if await self._behind(promises):
            return  # the promises are asked again: what is held above the head depends on the head
        self._take_over(promises)

    def _promise(self, data: bytes, name: str, authorities: Mapping[str, bytes]) -> Promise:
        found = schema.decode(Promise, data, max_bytes=terms.MAX_PROMISE_BYTES)
        terms.verify_word(found.word, ledger_id=self.node.genesis.ledger_id, authorities=authorities)
        if (found.word.name, found.word.term, found.word.sequencer) != (name, self._word.term, self._word.sequencer):
            raise Refused("ledger.word_invalid", "the word is another than was asked for", got=name)
        return found

    async def _behind(self, promises: Mapping[str, Promise]) -> bool:
        """Fetch what others have committed; True if there was something."""
        moved = False
        for name, promise in promises.items():
            while promise.word.height > self.node.head.state.height:
                data = await self._peers[name].block(self.node.head.state.height + 1)
                self.node.adopt(schema.decode(Committed, data, max_bytes=MAX_COMMITTED_BYTES))
                moved = True
        return moved

    def _take_over(self, promises: Mapping[str, Promise]) -> None:  # 3
        height = self.node.head.state.height + 1
        held: dict[bytes, dict[str, str]] = {}
        first: dict[bytes, Seal] = {}
        for name, promise in promises.items():
            if promise.word.height == height - 1 and promise.block is not None and promise.line is not None:
                with contextlib.suppress(MoorlineError):
                    made = self._held(promise, name)
                    held.setdefault(promise.block, {})[name] = promise.line
                    if made is not None:
                        first.setdefault(promise.block, made)
        if held:
            body = max(held, key=lambda one: (len(held[one]), one))
            header = blocks.parse(body).header
            seal = self.node.seal(header, term=self._word.term, attempt=0)
            maker = first.get(body)
            self.node.store.propose(  # 4
                height,
                body,
                seal=schema.encode(seal),
                first_seal=None if maker is None or maker.name == self.node.name else schema.encode(maker),
            )
            lines = {name: line for name, line in held[body].items() if name != self.node.name}
            if lines:
                self.node.store.keep_cosignatures(height, lines)
            reached("sequencer.block.taken_over")
        certificate = terms.certify([promise.word for promise in promises.values()])
        self.node.conduct.learn(certificate, self.node.authorities())  # 5

    def _held(self, promise: Promise, name: str) -> Seal | None:
        """The maker's seal on the block in a promise, once the block executes and `name` really signed it."""
        block = blocks.parse(promise.block or b"")
        head, _ = blocks.execute_again(self.node.head, block)
        signature = checkpoint.parse_signature_line(promise.line or "")
        authorities = self.node.authorities()
        checkpoint.verify_note(Note(checkpoint=head.checkpoint(), signatures=(signature,)), {name: authorities[name]}, 1)
        if promise.seal is None:
            return None
        seal = schema.decode(Seal, promise.seal)
        seals.verify(seal, block.header, ledger_id=self.node.genesis.ledger_id, authorities=authorities)
        return seal


class Office:
    """What an authority's process talks to: it hands everything to the part that is played now."""

    def __init__(
        self,
        node: Node,
        peers: Mapping[str, Peer],
        *,
        snapshot_after: int = SNAPSHOT_AFTER,
        verifiers: Verifiers | None = None,
    ) -> None:
        self.node, self._peers, self._snapshot_after, self._verifiers = node, peers, snapshot_after, verifiers
        self.part: Sequencer | Cosigner | Candidate = self._now()

    async def run(self) -> None:
        """Play the part of now, until it is another; for ever."""
        await self._ask_around()
        while True:
            self._play()
            playing = asyncio.ensure_future(self.part.run())
            changed = asyncio.ensure_future(self.node.conduct.changed.wait())
            try:
                await asyncio.wait({playing, changed}, return_when=asyncio.FIRST_COMPLETED)
                if playing.done():
                    playing.result()
            finally:
                for task in (playing, changed):
                    task.cancel()
                await asyncio.gather(playing, changed, return_exceptions=True)

    def _play(self) -> None:
        """Take the part of now, and keep it if it is the one that is played: what was submitted waits in it."""
        self.node.conduct.changed.clear()
        now = self._now()
        if isinstance(self.part, Sequencer):
            if isinstance(now, Sequencer) and now.term == self.part.term:
                return
            self.part.close()
        self.part = now

    async def submit(self, transaction: bytes, *, forwarded: bool = False) -> bytes:
        """The receipt; handed on to the sequencer once, and not by two who take each other for it."""
        if forwarded and not isinstance(self.part, Sequencer):
            raise Unavailable("ledger.no_sequencer", "this authority does not sequence", remedy="send it again later")
        return await self.part.submit(transaction)

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool, forwarded: bool = False) -> list[Outcome]:
        """As `submit` of each; all of them are handed on together."""
        if forwarded and not isinstance(self.part, Sequencer):
            raise Unavailable("ledger.no_sequencer", "this authority does not sequence", remedy="send them again later")
        return await self.part.submit_all(transactions, wait=wait)

    async def cosign(self, proposal: bytes) -> str:
        """A signature line for an encoded `Proposal`."""
        if isinstance(self.part, Sequencer):
            _learn_from(self.node, schema.decode(Proposal, proposal, max_bytes=2 * blocks.MAX_BLOCK_BYTES))
            raise Unavailable("ledger.part_changed", "this authority changes its part", remedy="show it again")
        return await self.part.cosign(proposal)

    async def announce(self, committed: bytes) -> None:
        """Take note of a committed block."""
        if not isinstance(self.part, Sequencer):
            await self.part.announce(committed)
            return
        self.node.adopt(schema.decode(Committed, committed, max_bytes=MAX_COMMITTED_BYTES))
        await self._ask_around()  # somebody else commits blocks: then somebody else sequences

    async def promote(self, name: str, *, again: bool = False) -> int:
        """The operator's word that `name` sequences; the term it is for. Raises Refused("ledger.authority_unknown").

        Of who sequences already it says nothing new, unless `again`: it lost its disk, and begins a new term.
        """
        if name not in self.node.authorities():
            raise Refused("ledger.authority_unknown", "this is no authority in force", got=name)
        word = self.node.conduct.word
        highest = (word.term, word.sequencer)
        for peer in self._peers.values():
            with contextlib.suppress(MoorlineError):
                found = schema.decode(terms.Standing, await peer.standing())
                if found.certificate is not None:
                    self.node.conduct.learn(found.certificate, self.node.authorities())
                highest = max(highest, (found.word_term, found.word_sequencer))
        following = self.node.conduct.following
        if name == following.sequencer and following.term >= highest[0] and not again:
            return following.term
        term = highest[0] if highest[1] == name and highest[0] > following.term else highest[0] + 1
        word = self.node.conduct.word
        if term <= word.term and word.sequencer != name:
            term = word.term + 1
        self.node.conduct.give_word(term, name)
        return term

    def _now(self) -> Sequencer | Cosigner | Candidate:
        following, word = self.node.conduct.following, self.node.conduct.word
        if word.term > following.term:
            return self._candidate() if word.sequencer == self.node.name else self._cosigner(word.sequencer)
        if following.sequencer != self.node.name:
            return self._cosigner(following.sequencer)
        if not self.node.conduct.remembers_term():
            # It lost its disk: what it proposed is forgotten, and only the others' words can tell what that was.
            return self._cosigner(next(iter(self._peers)))
        return self._sequencer()

    def _sequencer(self) -> Sequencer:
        return Sequencer(self.node, self._peers, verifiers=self._verifiers)

    def _cosigner(self, sequencer: str) -> Cosigner:
        others = {name: self._peers[name] for name in self._peers if name != sequencer}
        return Cosigner(
            self.node,
            self._peers[sequencer],
            others=others,
            snapshot_after=self._snapshot_after,
            verifiers=self._verifiers,
        )

    def _candidate(self) -> Candidate:
        return Candidate(self.node, self._peers)

    async def _ask_around(self) -> None:
        """Learn of a term that began while this authority was away, and whether an empty database was always empty."""
        empty = self.node.blank()
        asked = [asyncio.ensure_future(self._ask(name)) for name in self._peers]
        if asked:
            await asyncio.wait(asked, timeout=3.0)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        if empty:
            self.node.conduct.forget_terms()

    async def _ask(self, name: str) -> None:
        with contextlib.suppress(MoorlineError):
            self.node.conduct.learn_standing(await self._peers[name].standing(), self.node.authorities())
        with contextlib.suppress(MoorlineError):
            if self.node.blank():
                height = checkpoint.parse_note(await self._peers[name].note()).checkpoint.height
                self.node.conduct.forget_signatures_up_to(height + 1)


def _learn_from(node: Node, proposal: Proposal) -> None:
    """Raises Refused("ledger.term_over") unless the proposal is of a later term than this authority knew."""
    if proposal.certificate is not None and proposal.seal.term > node.conduct.following.term:
        node.conduct.learn(proposal.certificate, node.authorities())
        return
    raise Refused(
        "ledger.term_over",
        "this authority sequences in this term, or gathers words for a later one",
        expected=node.conduct.following.term,
        got=proposal.seal.term,
    )
