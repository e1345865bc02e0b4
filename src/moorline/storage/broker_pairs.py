"""Pair keys with other HSMs, durably: each step is intended here before the token or the peer is asked (PROTOCOLS.md 6).

A row's state: `offered` (initiator: before its ephemeral key exists), `answering` (responder: before it does anything),
`answered` (responder: statement signed), `agreed` (initiator: the key is in the token, not confirmed yet), `active` (both
signatures are kept), `retired` (the key is destroyed). The row names the peer's point before the token agrees with it,
so that a crash and a retry can never agree on another one under the same epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Conflict, Refused
from moorline.storage.broker_store import BrokerStore
from moorline.storage.steps import reached
from moorline.storage.transactions import retried

_PAIRS: Final = sa.table(
    "pairs",
    *(sa.column(name) for name in ("provider", "hsm", "epoch", "initiator", "state", "peer_point")),
    *(sa.column(name) for name in ("own_signed", "peer_signed", "transcript", "at", "height", "uses")),
)
_DEVICE_KEYS: Final = sa.table(
    "device_keys",
    *(sa.column(n) for n in ("key_id", "instance", "generation", "device", "contract", "first", "count", "at")),
)
_NEWS: Final = sa.table(
    "peer_news", *(sa.column(n) for n in ("provider", "hsm", "revoked_up_to", "revoked", "contracts", "at"))
)
_FORGET_S: Final = 24 * 3600


class PairState(StrEnum):
    """How far a pair epoch is."""

    OFFERED = "offered"
    ANSWERING = "answering"
    ANSWERED = "answered"
    AGREED = "agreed"
    ACTIVE = "active"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One pair epoch with one HSM. `height` is where its transcript is anchored on the ledger, None until it is.

    `uses` counts keys of devices that this end derived from it.
    """

    provider: str
    hsm: str
    epoch: int
    initiator: bool
    state: PairState
    peer_point: bytes | None
    own_signed: bytes | None
    peer_signed: bytes | None
    transcript: bytes | None
    at: Instant
    height: int | None
    uses: int = 0

    @property
    def pending(self) -> bool:
        """Whether this end began it and has to go on."""
        return self.initiator and self.state in (PairState.OFFERED, PairState.AGREED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A key of the no-PFS profile and the counters that one instance may use with it, once."""

    key_id: bytes
    instance: str
    generation: int
    device: str
    contract: str
    first: int
    count: int
    at: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class PairUse:
    """The pair epoch that a key of a device is derived from."""

    provider: str
    hsm: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a peer told, as far as the ledger confirmed it: revocations up to a height, and contracts."""

    provider: str
    hsm: str
    revoked_up_to: int
    revoked: int
    contracts: str
    at: Instant


@retried
class PairStore:
    """The broker's store, as far as pair keys go."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store

    def newest(self, provider: str, hsm: str) -> Pair | None:
        """The newest epoch with an HSM, whatever its state."""
        return next(iter(self._where(*_of(provider, hsm))), None)

    def active(self, provider: str, hsm: str, epoch: int | None = None) -> Pair:
        """The newest active epoch, or that one. Raises Refused("pair.none")."""
        wanted = (*_of(provider, hsm), _PAIRS.c.state == PairState.ACTIVE.value)
        found = self._where(*wanted, *(() if epoch is None else (_PAIRS.c.epoch == epoch,)))
        if not found:
            raise Refused(
                "pair.none",
                "no pair key is agreed with this HSM",
                expected=f"{provider}/{hsm}" if epoch is None else f"{provider}/{hsm} epoch {epoch}",
                remedy="moor hsm connect",
            )
        return found[0]

    def all(self) -> tuple[Pair, ...]:
        """Every epoch with everybody, newest first."""
        return self._where(sa.true())

    def pending(self) -> tuple[Pair, ...]:
        """What this end began and did not finish."""
        return tuple(one for one in self._where(_PAIRS.c.initiator == sa.true()) if one.pending)

    def not_anchored(self) -> tuple[Pair, ...]:
        """Active epochs whose transcript is not on the ledger, the newest of each peer only: an anchor never goes back."""
        newest: dict[tuple[str, str], Pair] = {}
        for one in self._where(_PAIRS.c.state == PairState.ACTIVE.value):
            newest.setdefault((one.provider, one.hsm), one)
        return tuple(one for one in newest.values() if one.height is None)

    def intend(self, pair: Pair) -> None:
        """Begin an epoch. Raises Conflict("pair.epoch_taken") if it is there."""
        with self._store.transaction() as c:
            if c.execute(sa.select(_PAIRS.c.state).where(*_is(pair))).first() is not None:
                raise Conflict("pair.epoch_taken", "this pair epoch is taken", got=pair.epoch)
            values = {name: getattr(pair, name) for name in Pair.__dataclass_fields__}
            c.execute(sa.insert(_PAIRS).values(**{**values, "state": pair.state.value}))
        reached("broker.pair.intended")

    def drop(self, pair: Pair) -> None:
        """Forget an epoch that this end offered and nobody took."""
        with self._store.transaction() as c:
            c.execute(sa.delete(_PAIRS).where(*_is(pair), _PAIRS.c.state == PairState.OFFERED.value))

    def answered(self, pair: Pair, *, own_signed: bytes, transcript: bytes) -> Pair:
        """The responder signed the statement."""
        made = replace(pair, state=PairState.ANSWERED, own_signed=own_signed, transcript=transcript)
        self._update(made)
        reached("broker.pair.answered")
        return made

    def agreed(self, pair: Pair, *, peer_point: bytes, own_signed: bytes, peer_signed: bytes, transcript: bytes) -> Pair:
        """The initiator has the key in its token, and the responder's signature."""
        made = replace(
            pair,
            state=PairState.AGREED,
            peer_point=peer_point,
            own_signed=own_signed,
            peer_signed=peer_signed,
            transcript=transcript,
        )
        self._update(made)
        reached("broker.pair.agreed")
        return made

    def activate(self, pair: Pair, *, peer_signed: bytes, at: Instant) -> Pair:
        """Both signatures are kept; the key may be used. The same again changes nothing."""
        made = replace(pair, state=PairState.ACTIVE, peer_signed=peer_signed, at=at)
        with self._store.transaction() as c:
            state = c.execute(sa.select(_PAIRS.c.state).where(*_is(pair))).scalar()
            if state not in (PairState.ACTIVE.value, PairState.RETIRED.value):
                c.execute(sa.update(_PAIRS).where(*_is(pair)).values(state=made.state.value, at=at, peer_signed=peer_signed))
                body = {"provider": pair.provider, "hsm": pair.hsm, "epoch": pair.epoch, "transcript": pair.transcript}
                self._store.append_in(c, at, "pair-agreed", body)
        reached("broker.pair.active")
        return made

    def retire(self, pair: Pair, *, at: Instant) -> None:
        """The key of an epoch is destroyed."""
        with self._store.transaction() as c:
            c.execute(sa.update(_PAIRS).where(*_is(pair)).values(state=PairState.RETIRED.value))
            body = {"provider": pair.provider, "hsm": pair.hsm, "epoch": pair.epoch}
            self._store.append_in(c, at, "pair-retired", body)

    def anchored(self, pair: Pair, *, height: int, at: Instant) -> None:
        """The transcript stands on the ledger, at this height or before."""
        with self._store.transaction() as c:
            c.execute(sa.update(_PAIRS).where(*_is(pair)).values(height=height))
            body = {"provider": pair.provider, "hsm": pair.hsm, "epoch": pair.epoch, "height": height}
            self._store.append_in(c, at, "pair-anchored", body)
        reached("broker.pair.anchored")

    # -- keys of devices -----------------------------------------------------------------------------------------------

    def claim(self, claim: Claim, *, of: PairUse | None = None) -> None:
        """Give a key and its counters to one instance, for good. Raises Conflict("nopfs.key_claimed") and an alarm."""
        taken = None
        with self._store.transaction() as c:
            c.execute(sa.delete(_DEVICE_KEYS).where(_DEVICE_KEYS.c.at < claim.at - _FORGET_S))
            taken = c.execute(sa.select(_DEVICE_KEYS).where(_DEVICE_KEYS.c.key_id == claim.key_id)).mappings().first()
            if taken is None:
                _count(c, of)
                c.execute(sa.insert(_DEVICE_KEYS).values(**{n: getattr(claim, n) for n in Claim.__dataclass_fields__}))
                body = {"device": claim.device, "instance": claim.instance, "key_id": claim.key_id}
                self._store.append_in(c, claim.at, "no-pfs-key-claimed", {**body, "contract": claim.contract})
            else:
                says = "a key of the no-PFS profile was asked for again: its counters may have been used"
                first, second = (f"{n['instance']}/{n['generation']}" for n in (taken, _mapping(claim)))
                self._store.alarm_in(c, claim.at, "nopfs.key_claimed", says, first, second)
        if taken is not None:
            raise Conflict(
                "nopfs.key_claimed",
                "this key was given to an instance before",
                got=taken["instance"],
                remedy="begin again with fresh nonces: a lost counter means a new key",
            )
        reached("broker.device_key.claimed")

    def sealed_for_device(self, *, device: str, of: PairUse, contract: str, key_id: bytes, at: Instant) -> None:
        """An audit entry of the home HSM, before the device gets the key."""
        peer = f"{of.provider}/{of.hsm}"
        body: dict[str, object] = {"device": device, "peer": peer, "contract": contract, "key_id": key_id}
        with self._store.transaction() as c:
            _count(c, of)
            self._store.append_in(c, at, "no-pfs-key-sealed", body)

    # -- news ----------------------------------------------------------------------------------------------------------

    def news(self, provider: str, hsm: str) -> News | None:
        """What was last learned from a peer."""
        with self._store.reading() as c:
            where = (_NEWS.c.provider == provider, _NEWS.c.hsm == hsm)
            row = c.execute(sa.select(_NEWS).where(*where)).mappings().one_or_none()
        return None if row is None else News(**row)

    def keep_news(self, news: News) -> None:
        """Replace what was last learned from a peer."""
        with self._store.transaction() as c:
            c.execute(sa.delete(_NEWS).where(_NEWS.c.provider == news.provider, _NEWS.c.hsm == news.hsm))
            c.execute(sa.insert(_NEWS).values(**{name: getattr(news, name) for name in News.__dataclass_fields__}))

    def _update(self, pair: Pair) -> None:
        values = {name: getattr(pair, name) for name in ("peer_point", "own_signed", "peer_signed", "transcript")}
        with self._store.transaction() as c:
            c.execute(sa.update(_PAIRS).where(*_is(pair)).values(state=pair.state.value, **values))

    def _where(self, *conditions: sa.ColumnElement[bool]) -> tuple[Pair, ...]:
        with self._store.reading() as c:
            rows = c.execute(sa.select(_PAIRS).where(*conditions).order_by(_PAIRS.c.epoch.desc())).mappings().all()
        return tuple(Pair(**{**row, "state": PairState(row["state"]), "initiator": bool(row["initiator"])}) for row in rows)


def _of(provider: str, hsm: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (_PAIRS.c.provider == provider, _PAIRS.c.hsm == hsm)


def _is(pair: Pair) -> tuple[sa.ColumnElement[bool], ...]:
    return (*_of(pair.provider, pair.hsm), _PAIRS.c.epoch == pair.epoch)


def _count(c: sa.Connection, of: PairUse | None) -> None:
    if of is not None:
        where = (*_of(of.provider, of.hsm), _PAIRS.c.epoch == of.epoch)
        c.execute(sa.update(_PAIRS).where(*where).values(uses=_PAIRS.c.uses + 1))


def _mapping(claim: Claim) -> dict[str, object]:
    return {"instance": claim.instance, "generation": claim.generation}
