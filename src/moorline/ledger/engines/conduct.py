"""What an authority owes the others and keeps to across restarts: whom it follows, its word, whether it may sign at all.

Everything here is in the database before it counts (ADR 0004). Terms are explained in ledger.terms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from moorline.errors import Conflict, Refused, Unavailable
from moorline.ledger import terms
from moorline.ledger.genesis import Genesis
from moorline.ledger.seals import Seal
from moorline.storage.ledger_store import LedgerStore, StoredTerm
from moorline.storage.steps import reached
from moorline.wire import schema

_HALTED = "halted"
_SIGNS_FROM = "signs_from"
_FORGOT_TERM = "forgot_term"


class Conduct:
    """One authority's. `changed` is set when it follows, or gave its word to, somebody else than before."""

    def __init__(self, store: LedgerStore, genesis: Genesis) -> None:
        self._store, self._genesis = store, genesis
        first = StoredTerm(term=0, sequencer=genesis.sequencer, certificate=None)
        self.following = store.certified_term() or first
        self.word = store.term() or first
        self._halted_at = store.mark(_HALTED) or 0
        self._signs_from = store.mark(_SIGNS_FROM) or 0
        self._forgot_term = store.mark(_FORGOT_TERM) or 0
        self.changed = asyncio.Event()

    # Terms -----------------------------------------------------------------------------------------------------------

    def standing(self) -> bytes:
        """The encoded `terms.Standing`."""
        return schema.encode(
            terms.Standing(
                term=self.following.term,
                sequencer=self.following.sequencer,
                certificate=self.following.certificate,
                word_term=self.word.term,
                word_sequencer=self.word.sequencer,
            )
        )

    def learn_standing(self, data: bytes, authorities: Mapping[str, bytes]) -> None:
        """Learn from what another authority tells; raises as `learn`."""
        found = schema.decode(terms.Standing, data)
        if found.certificate is not None:
            self.learn(found.certificate, authorities)

    def learn(self, certificate: bytes, authorities: Mapping[str, bytes]) -> None:
        """Follow the sequencer of a later term from now on; a certificate of an earlier one changes nothing.

        Raises Malformed, NotAuthentic, Refused as terms.verify_certificate.
        """
        term, sequencer = terms.verify_certificate(certificate, ledger_id=self._genesis.ledger_id, authorities=authorities)
        if term <= self.following.term:
            return
        found = StoredTerm(term=term, sequencer=sequencer, certificate=certificate)
        self._store.put_term(found)
        reached("authority.term.certified")
        self.following = found
        if term >= self.word.term:
            self.word = found
        self.changed.set()

    def give_word(self, term: int, sequencer: str) -> None:
        """Record the operator's word; the same again is fine. Raises Conflict("ledger.word_given") for another."""
        if term == self.word.term and sequencer == self.word.sequencer:
            return
        if term <= self.word.term:
            raise Conflict(
                "ledger.word_given",
                "this authority gave its word for this term, or a later one",
                expected=f"{self.word.sequencer} in term {self.word.term}",
                got=f"{sequencer} in term {term}",
            )
        found = StoredTerm(term=term, sequencer=sequencer, certificate=None)
        self._store.put_term(found)
        reached("authority.word.given")
        self.word = found
        self.changed.set()

    def judge_term(self, seal: Seal, certificate: bytes | None, authorities: Mapping[str, bytes]) -> None:
        """Raises Refused("ledger.term_over" | "ledger.not_sequencer") unless who sealed sequences in a term not over."""
        if seal.term > self.following.term and certificate is not None:
            self.learn(certificate, authorities)
        if seal.term < max(self.following.term, self.word.term):
            raise Refused(
                "ledger.term_over",
                "this authority has given its word for a later term",
                expected=f">= {max(self.following.term, self.word.term)}",
                got=seal.term,
                remedy="ask who sequences now",
            )
        if seal.term != self.following.term or seal.name != self.following.sequencer:
            raise Refused(
                "ledger.not_sequencer",
                "only the sequencer proposes blocks",
                expected=f"{self.following.sequencer} in term {self.following.term}",
                got=f"{seal.name} in term {seal.term}",
            )

    # Signing ---------------------------------------------------------------------------------------------------------

    def forget_signatures_up_to(self, height: int) -> None:
        """What was signed up to this height may be forgotten: nothing is signed there again."""
        if height >= self._signs_from:
            self._store.set_mark(_SIGNS_FROM, height + 1)
            self._signs_from = height + 1

    def forget_terms(self) -> None:
        """What was proposed in the term that is known, and in those before, may be forgotten."""
        if self._signs_from and self.following.term >= self._forgot_term:
            self._store.set_mark(_FORGOT_TERM, self.following.term + 1)
            self._forgot_term = self.following.term + 1

    def remembers_term(self) -> bool:
        """False in a term in which this authority may have sequenced before it lost its disk."""
        return self.following.term >= self._forgot_term

    def may_sign(self, height: int) -> None:
        """Raises Refused("ledger.signatures_forgotten") at a height that may have been signed before the disk was lost."""
        if height < self._signs_from:
            raise Refused(
                "ledger.signatures_forgotten",
                "this authority lost its database, and may have signed another block at this height",
                expected=f">= {self._signs_from}",
                got=height,
                remedy="the others sign this block; this authority joins in afterwards",
            )

    def halt(self, height: int) -> None:
        """A quorum signed two heads at this height: nothing is made or signed any more."""
        self._store.set_mark(_HALTED, height)
        self._halted_at = height

    def halted(self) -> int:
        """The height at which the ledger forked, or 0."""
        return self._halted_at

    def not_halted(self) -> None:
        """Raises Unavailable("ledger.halted")."""
        if self._halted_at:
            raise Unavailable(
                "ledger.halted",
                "a quorum signed two heads at one height: this ledger has forked and is halted",
                got=self._halted_at,
                remedy="see moor ledger evidence; the consortium decides",
                retry_after_s=60.0,
            )


def checked_request(data: bytes, conduct: Conduct) -> terms.Request:
    """A request for this authority's word, if its operator gave that word. Raises Refused("ledger.no_word")."""
    request = schema.decode(terms.Request, data)
    word = conduct.word
    if (request.term, request.sequencer) != (word.term, word.sequencer) or word.term == 0:
        raise Refused(
            "ledger.no_word",
            "this authority's operator has not said so",
            expected=f"{word.sequencer} in term {word.term}",
            got=f"{request.sequencer} in term {request.term}",
            remedy=f"moor ledger promote {request.sequencer}, at this authority",
        )
    return request
