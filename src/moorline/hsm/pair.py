"""The pair key of two HSMs (PROTOCOLS.md 6): agreed inside both tokens, kept in both as a non-extractable HMAC key.

1. each end makes a fresh P-256 key pair in its token for this pair epoch; an end that crashed finds it there again
2. both tokens agree (ECDH) and keep the x coordinate as an HMAC key; nothing of it ever leaves a token
3. both HSM keys sign one statement: ledger, providers, HSMs, pair epoch, both points; MACs under the new key show that both
   have the same one
4. the ephemeral private keys are destroyed when both signatures are kept; of the keys, the newest epoch and the one
   before stay

Of two HSMs that begin at once, the one whose (provider, HSM) comes first wins; the other answers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Final, ParamSpec, TypeVar, cast

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Conflict, NotAuthentic, Refused
from moorline.hsm.calendar import Rotation
from moorline.hsm.exchange import Party
from moorline.hsm.token import Token
from moorline.storage.broker_pairs import Pair, PairState, PairStore
from moorline.wire import cose, keys, pair, schema
from moorline.wire.pair import PairConfirm, PairOffer, PairReply, PairStatement

KEEP_EPOCHS: Final = 2
_TAKE_OVER: Final = 2
"""An end that does not come first begins by itself only when a pair key is this many times as old as it may be."""
_SIGNED_CAP: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The two ends as one HSM sees them; `peer_key` is the one in the ledger's record of the peer now."""

    ledger_id: bytes
    own: Party
    peer: Party
    peer_key: keys.PublicKey

    @property
    def first(self) -> bool:
        """Whether this end wins when both begin."""
        return (self.own.provider, self.own.hsm) < (self.peer.provider, self.peer.hsm)


P = ParamSpec("P")
R = TypeVar("R")


def _in_turn(method: Callable[Concatenate[PairKeys, P], R]) -> Callable[Concatenate[PairKeys, P], R]:
    @functools.wraps(method)
    def one_at_a_time(self: PairKeys, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn:
            return method(self, *args, **kwargs)

    return cast("Callable[Concatenate[PairKeys, P], R]", one_at_a_time)


class PairKeys:
    """The pair keys of one token."""

    def __init__(self, token: Token, store: PairStore, signer: Callable[[], keys.Signer]) -> None:
        """`signer` gives the HSM key of now."""
        self._token, self._store, self._signer = token, store, signer
        self._turn = threading.RLock()  # two sessions with one peer must not make and destroy the same key at once

    # -- initiator -----------------------------------------------------------------------------------------------------

    @_in_turn
    def offer(self, ends: Ends, *, theirs: int, at: Instant) -> tuple[Pair, PairOffer]:
        """Begin an epoch above the peer's newest, or go on with the one this end left unfinished."""
        newest = self._store.newest(ends.peer.provider, ends.peer.hsm)
        if newest is not None and newest.pending and newest.epoch >= theirs:
            row = newest
        else:
            if newest is not None and newest.pending:
                self.give_up(ends, newest)
            above = max(theirs, 0 if newest is None else newest.epoch)
            row = _row(ends, above + 1, initiator=True, state=PairState.OFFERED, peer_point=None, at=at)
            self._store.intend(row)
        return row, PairOffer(epoch=row.epoch, point=self._ephemeral(ends, row.epoch))

    @_in_turn
    def give_up(self, ends: Ends, row: Pair) -> None:
        """Forget an offer nobody took, with its ephemeral key."""
        self._store.drop(row)
        self._token.destroy_key(_ephemeral(ends.peer, row.epoch))

    @_in_turn
    def agree(self, ends: Ends, row: Pair, reply: PairReply) -> tuple[Pair, PairConfirm]:
        """Take the responder's answer; the key is in the token afterwards.

        Raises Malformed, NotAuthentic (`cose.*`, `signature.*`, "pair.mac") or Refused("pair.statement") and keeps
        nothing then.
        """
        own = self._ephemeral(ends, row.epoch)
        statement = _opened(reply.statement, ends.peer_key)
        wanted = _statement(ends, row.epoch, own, statement.responder_point, initiator=True)
        _require(statement, wanted)
        if row.peer_point is not None and row.peer_point != statement.responder_point:
            raise Refused("pair.statement", "the peer answered this epoch before with another point", got=row.epoch)
        agreed = pair.transcript(statement)
        label = self._derive(ends, row.epoch, statement.responder_point)
        self._require_mac(label, reply.mac, agreed, initiator=False)
        signed = row.own_signed or self._signed(statement)
        row = self._store.agreed(
            row, peer_point=statement.responder_point, own_signed=signed, peer_signed=reply.statement, transcript=agreed
        )
        return row, PairConfirm(statement=signed, mac=self._token.mac(label, pair.confirmation(agreed, initiator=True)))

    # -- responder -----------------------------------------------------------------------------------------------------

    def newest_epoch(self, ends: Ends) -> int:
        """The newest epoch that counts against an offer: this end's own unanswered offer does not."""
        newest = self._store.newest(ends.peer.provider, ends.peer.hsm)
        if newest is None:
            return 0
        return newest.epoch - 1 if newest.state is PairState.OFFERED and not ends.first else newest.epoch

    @_in_turn
    def answer(self, ends: Ends, offer: PairOffer, *, at: Instant) -> PairReply:
        """Sign the statement for an offer; the same offer again gets the same statement.

        Raises Conflict("pair.epoch_taken" | "pair.crossed").
        """
        row = self._store.newest(ends.peer.provider, ends.peer.hsm)
        row = self._again(ends, row, offer) if row is not None and row.epoch >= offer.epoch else None
        if row is None:
            row = _row(ends, offer.epoch, initiator=False, state=PairState.ANSWERING, peer_point=offer.point, at=at)
            self._store.intend(row)
        label = _label(ends.peer, offer.epoch)
        if row.own_signed is None:
            own = self._ephemeral(ends, offer.epoch)
            statement = _statement(ends, offer.epoch, own, offer.point, initiator=False)
            self._derive(ends, offer.epoch, offer.point)
            row = self._store.answered(row, own_signed=self._signed(statement), transcript=pair.transcript(statement))
        assert row.own_signed is not None
        assert row.transcript is not None
        mac = self._token.mac(label, pair.confirmation(row.transcript, initiator=False))
        return PairReply(statement=row.own_signed, mac=mac)

    @_in_turn
    def confirm(self, ends: Ends, confirm: PairConfirm, *, at: Instant) -> Pair:
        """Take the initiator's signature; the epoch is active then. Raises as `agree`, Conflict("pair.not_answered")."""
        statement = _opened(confirm.statement, ends.peer_key)
        row = self._store.newest(ends.peer.provider, ends.peer.hsm)
        agreed = pair.transcript(statement)
        if row is None or row.initiator or row.transcript != agreed:
            raise Conflict("pair.not_answered", "this statement is not the one answered last", got=statement.epoch)
        self._require_mac(_label(ends.peer, row.epoch), confirm.mac, agreed, initiator=True)
        return self.activate(ends, row, peer_signed=confirm.statement, at=at)

    # -- both ----------------------------------------------------------------------------------------------------------

    @_in_turn
    def activate(self, ends: Ends, row: Pair, *, peer_signed: bytes, at: Instant) -> Pair:
        """4. Both signatures are kept; ephemeral keys and old epochs go."""
        made = self._store.activate(row, peer_signed=peer_signed, at=at)
        self._token.destroy_key(_ephemeral(ends.peer, row.epoch))
        for old in self._store.all():
            mine = (old.provider, old.hsm) == (ends.peer.provider, ends.peer.hsm)
            if mine and old.state is PairState.ACTIVE and old.epoch <= row.epoch - KEEP_EPOCHS:
                self._token.destroy_secret(_label(ends.peer, old.epoch))
                self._store.retire(old, at=at)
        return made

    @_in_turn
    def tidy(self) -> None:
        """Destroy ephemeral keys that a crash left behind; for the start of a broker."""
        for row in self._store.all():
            if row.state is PairState.ACTIVE:
                self._token.destroy_key(_ephemeral(Party(provider=row.provider, hsm=row.hsm), row.epoch))

    def due(self, own: Party, policy: Rotation, now: Instant) -> tuple[Party, ...]:
        """Peers with whom a pair key is to be agreed anew: too old, used too often, or not in this token any more.

        Of two ends the one that comes first begins; the other one when the first seems to be away for good. A token that
        was restored has no pair keys, and then whoever finds that begins.
        """
        newest: dict[Party, Pair] = {}
        for row in self._store.all():
            newest.setdefault(Party(provider=row.provider, hsm=row.hsm), row)
        # What was begun is finished by itself, and needs no other beginning.
        newest = {peer: row for peer, row in newest.items() if row.state is PairState.ACTIVE}
        return tuple(peer for peer, row in newest.items() if self._due(own, peer, row, policy, now))

    def _due(self, own: Party, peer: Party, row: Pair, policy: Rotation, now: Instant) -> bool:
        if not self._token.has_secret(_label(peer, row.epoch)):
            return True
        first = (own.provider, own.hsm) < (peer.provider, peer.hsm)
        factor = 1 if first else _TAKE_OVER
        old = policy.pair_s is not None and now >= row.at + factor * policy.pair_s
        return old or (policy.pair_keys is not None and row.uses >= policy.pair_keys)

    def mac(self, peer: Party, epoch: int, message: bytes) -> bytes:
        """HMAC-SHA-256 under the pair key of an active epoch; 32 bytes. Raises Refused("pair.none")."""
        self._store.active(peer.provider, peer.hsm, epoch)
        return self._token.mac(_label(peer, epoch), message)

    def _again(self, ends: Ends, row: Pair, offer: PairOffer) -> Pair | None:
        if row.epoch == offer.epoch and not row.initiator and row.peer_point == offer.point:
            return row
        if row.state is PairState.OFFERED and not ends.first:
            self.give_up(ends, row)  # both began; the peer comes first
            return None
        if row.state is PairState.OFFERED:
            raise Conflict("pair.crossed", "both ends began a pair epoch; this one goes on with its own", got=offer.epoch)
        raise Conflict("pair.epoch_taken", "this pair epoch is taken", expected=f"> {row.epoch}", got=offer.epoch)

    def _ephemeral(self, ends: Ends, epoch: int) -> bytes:
        label = _ephemeral(ends.peer, epoch)
        return self._token.ec_point(label) if self._token.has_key(label) else self._token.generate_ec_key(label, derive=True)

    def _derive(self, ends: Ends, epoch: int, point: bytes) -> str:
        label = _label(ends.peer, epoch)
        # A key that is there already came of this very point: the row bound it before (storage.broker_pairs), or no
        # statement was ever signed over it and what is left of a crash goes.
        if self._token.has_secret(label):
            self._token.destroy_secret(label)
        self._token.agree(_ephemeral(ends.peer, epoch), point, label)
        return label

    def _signed(self, statement: PairStatement) -> bytes:
        return cose.sign(pair.PAIR_PURPOSE, schema.encode(statement), self._signer())

    def _require_mac(self, label: str, mac: bytes, agreed: bytes, *, initiator: bool) -> None:
        if not same(self._token.mac(label, pair.confirmation(agreed, initiator=initiator)), mac):
            raise NotAuthentic("pair.mac", "the peer's token does not hold the same key")


def _opened(signed: bytes, key: keys.PublicKey) -> PairStatement:
    payload = cose.verify(cose.parse(pair.PAIR_PURPOSE, signed, max_bytes=_SIGNED_CAP), key)
    return schema.decode(PairStatement, payload, max_bytes=_SIGNED_CAP)


def _require(found: PairStatement, wanted: PairStatement) -> None:
    if found != wanted:
        raise Refused(
            "pair.statement",
            "the peer signed another statement: another ledger, pair, epoch or point",
            expected=f"{wanted.initiator_provider} to {wanted.responder_provider}, epoch {wanted.epoch}",
            got=f"{found.initiator_provider} to {found.responder_provider}, epoch {found.epoch}",
        )


def _statement(ends: Ends, epoch: int, own: bytes, theirs: bytes, *, initiator: bool) -> PairStatement:
    first, second = (ends.own, ends.peer) if initiator else (ends.peer, ends.own)
    return PairStatement(
        ledger_id=ends.ledger_id,
        initiator_provider=first.provider,
        initiator_hsm=first.hsm,
        responder_provider=second.provider,
        responder_hsm=second.hsm,
        epoch=epoch,
        initiator_point=own if initiator else theirs,
        responder_point=theirs if initiator else own,
    )


def _row(ends: Ends, epoch: int, *, initiator: bool, state: PairState, peer_point: bytes | None, at: Instant) -> Pair:
    return Pair(
        provider=ends.peer.provider,
        hsm=ends.peer.hsm,
        epoch=epoch,
        initiator=initiator,
        state=state,
        peer_point=peer_point,
        own_signed=None,
        peer_signed=None,
        transcript=None,
        at=at,
        height=None,
    )


def _label(peer: Party, epoch: int) -> str:
    return f"pair/{peer.provider}/{peer.hsm}/{epoch}"


def _ephemeral(peer: Party, epoch: int) -> str:
    return f"pair-ephemeral/{peer.provider}/{peer.hsm}/{epoch}"
