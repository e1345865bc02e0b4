"""What ends an instance, durably: a host that lost its verdict, a retirement, and the revocations that follow.

Intent before effect (ADR 0004): a generation is ended, its key deleted and its revocation intended in one transaction; only
then is a session closed or the ledger asked. A broker that dies in between finds the intention at its next start. The
verifier's cursor moves in the transaction that acted on the event, so no event is lost and none acted on twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.storage import broker_generations as generations
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_generations import GENERATIONS, HOST_LOSSES, LIVE, RETIRED, REVOCATIONS, Generation
from moorline.storage.broker_launches import CONFIRMED, Launch
from moorline.storage.broker_store import BrokerStore
from moorline.storage.steps import reached
from moorline.storage.transactions import retried
from moorline.storage.verifier_events import VerdictEvent

CURSOR: Final = "verifier-cursor"
STORAGE_KEY: Final = "storage-key"
FUNCTION_KEY: Final = "function-key"
_ASKED_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """An identity to be revoked on the ledger; `data` is the signed transaction that was, or is to be, submitted.

    `height` is where the revocation stands, None until it does.
    """

    id: str
    instance: str
    generation: int
    code: str
    at: Instant
    data: bytes | None
    height: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """A launch whose function confirmed: its public key, and what its evidence is bound to."""

    launch: Launch
    public: bytes
    commitment: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """A certificate made for a generation, to be recorded before it is handed out."""

    instance: str
    generation: int
    issued: Issued


@retried
class InstanceStore:
    """The broker's store, as far as the life of instances goes."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store

    # -- the verifier's events --------------------------------------------------------------------------------------

    def cursor(self) -> int:
        """How far the verifier's events were acted on."""
        return self._store.fact(CURSOR)

    def act_on_loss(self, event: VerdictEvent, *, at: Instant) -> tuple[Generation, ...]:
        """A host lost its verdict: everything live on it ends. What ended."""
        with self._store.transaction() as c:
            ended = generations.live_on(c, event.host)
            _lose(self._store, c, event.host, event.code, event.cursor, ended, at)
            self._store.set_fact_in(c, CURSOR, event.cursor)
        reached("broker.loss.recorded")
        return ended

    def act_on_absence(self, host: str, code: str, *, cursor: int, at: Instant) -> tuple[Generation, ...]:
        """As `act_on_loss`, found by looking and not by an event; the cursor stays."""
        with self._store.transaction() as c:
            ended = generations.live_on(c, host)
            _lose(self._store, c, host, code, cursor, ended, at)
        reached("broker.absence.recorded")
        return ended

    def move_cursor(self, cursor: int) -> None:
        """Events up to here need nothing more."""
        with self._store.transaction() as c:
            self._store.set_fact_in(c, CURSOR, cursor)
        reached("broker.cursor.moved")

    def forget_losses(self) -> None:
        """The verifier's cursors begin anew; nothing is known to be lost under the new ones.

        The old cursor stays, for as long as it is unknown to the verifier there is somebody who has to look around.
        """
        with self._store.transaction() as c:
            c.execute(sa.delete(HOST_LOSSES))
        reached("broker.cursor.forgotten")

    def hosts_in_use(self) -> tuple[str, ...]:
        """The hosts of everything live."""
        with self._store.reading() as c:
            query = sa.select(GENERATIONS.c.host).where(GENERATIONS.c.state == LIVE).distinct().order_by(GENERATIONS.c.host)
            return tuple(row.host for row in c.execute(query))

    def ended_of(self, names: tuple[tuple[str, int], ...]) -> tuple[Generation, ...]:
        """Those of these instances and generations that are not live any more, whichever broker process ended them."""
        found: list[Generation] = []
        with self._store.reading() as c:
            for first in range(0, len(names), _ASKED_AT_ONCE):
                some = names[first : first + _ASKED_AT_ONCE]
                query = sa.select(GENERATIONS).where(
                    GENERATIONS.c.state != LIVE, GENERATIONS.c.instance.in_([instance for instance, _ in some])
                )
                found += [Generation(**row) for row in c.execute(query).mappings()]
        wanted = set(names)
        return tuple(one for one in found if (one.instance, one.generation) in wanted)

    def hold(self, instance: str, generation: int, nonce: bytes) -> None:
        """The session of this nonce is the newest of a generation: whichever process holds another one closes it."""
        self._store.write(lambda c: generations.hold(c, instance, generation, nonce))
        reached("broker.session.held")

    def held_elsewhere(self, held: Mapping[tuple[str, int], bytes]) -> tuple[tuple[str, int], ...]:
        """Those of these sessions (nonce by instance and generation) that another broker process superseded."""
        names = tuple(held)
        with self._store.reading() as c:
            return tuple(
                name
                for first in range(0, len(names), _ASKED_AT_ONCE)
                for name in generations.held_elsewhere(
                    c, {name: held[name] for name in names[first : first + _ASKED_AT_ONCE]}
                )
            )

    # -- renewal ----------------------------------------------------------------------------------------------------

    def require_live(self, instance: str, generation: int) -> Generation:
        """Raises Refused (`renewal.*`) unless this is the newest generation and live."""
        with self._store.reading() as c:
            return generations.require_live(c, instance, generation)

    def renew(self, instance: str, generation: int, issued: Issued, *, kind: str, at: Instant) -> None:
        """Record a certificate before it is handed out, if the generation still lives. Raises Refused (`renewal.*`)."""
        (refused,) = self.renew_all([Renewal(instance=instance, generation=generation, issued=issued)], kind=kind, at=at)
        if refused is not None:
            raise refused

    def renew_all(self, renewals: Sequence[Renewal], *, kind: str, at: Instant) -> list[Refused | None]:
        """As `renew` for many in one transaction: for each None, or why nothing of it was recorded."""

        def work(c: sa.Connection) -> list[Refused | None]:
            said = generations.ended(c, [(one.instance, one.generation) for one in renewals])
            issued = [one.issued for one, why in zip(renewals, said, strict=True) if why is None]
            if issued:
                self._store.insert_certificate_in(c, *issued)
                self._store.append_all_in(c, at, [(kind, one.entry()) for one in issued])
            return said

        said = self._store.write(work)
        reached("broker.renewal.recorded")
        return said

    def refused(self, instance: str, generation: int, code: str, *, at: Instant) -> None:
        """An audit entry: a function of this broker asked and was not renewed."""
        self._store.append("renewal-refused", {"instance": instance, "generation": generation, "code": code}, at=at)

    def storage_key(self, instance: str, generation: int) -> bytes:
        """The wrapped sealed-storage key of a live generation. Raises Refused("renewal.storage_destroyed")."""
        with self._store.reading() as c:
            wrapped = generations.storage_key(c, instance, generation)
        if wrapped is None:
            raise Refused("renewal.storage_destroyed", "the generation is not live, or its storage key was destroyed")
        return wrapped

    def confirmed(self, launcher: bytes, epoch: int, sequence: int) -> Confirmed:
        """A launch that was confirmed. Raises Refused("renewal.not_known")."""
        for row in self._store.launches_where(launcher=launcher, epoch=epoch, sequence=sequence):
            with self._store.reading() as c:
                known = generations.find(c, row.launch.instance, row.launch.generation)
            if row.state == CONFIRMED and known is not None and known.commitment:
                return Confirmed(launch=row.launch, public=row.public, commitment=known.commitment)
        raise Refused(
            "renewal.not_known",
            "this broker confirmed no such launch",
            got=f"sequence {sequence} of epoch {epoch}",
            remedy="launch the function again",
        )

    # -- retirement -------------------------------------------------------------------------------------------------

    def retire(self, instance: str, generation: int, *, by: str, reason: str, at: Instant) -> Generation:
        """End a generation and destroy its keys, also one that was never launched. Repeatable, with the same answer.

        The keys are unrecoverable from this database's files once `erase` came back.
        """
        with self._store.transaction() as c:
            known = generations.find(c, instance, generation)
            if known is None:
                known = _never_launched(instance, generation, at)
                generations.begin(c, known, storage=b"")
            if known.state != RETIRED:
                destroyed = self._destroy(c, known)
                c.execute(sa.update(GENERATIONS).where(*_is(known)).values(destroyed=",".join(destroyed)))
                for what in destroyed:
                    body = {"instance": instance, "generation": generation, "what": what}
                    self._store.append_in(c, at, "key-destroyed", body)
                self._store.append_in(
                    c,
                    at,
                    "instance-retired",
                    {"instance": instance, "generation": generation, "by": by, "reason": reason},
                )
                if generations.end(c, known, state=RETIRED, code=reason, at=at):
                    _intended(self._store, c, known, "retired", at)
            found = generations.find(c, instance, generation)
        reached("broker.instance.retired")
        assert found is not None
        return found

    def erase(self) -> bool:
        """Write the write-ahead log back and truncate it: deleted keys are then in none of this database's files.

        False if a reader keeps the log, or the database has none and answers for itself.
        """
        return self._store.truncate_log()

    def _destroy(self, c: sa.Connection, known: Generation) -> list[str]:
        destroyed = []
        if generations.destroy_storage_key(c, known.instance, known.generation):
            destroyed.append(STORAGE_KEY)
        if self._store.forget_function_key_in(c, known.instance, known.generation):
            destroyed.append(FUNCTION_KEY)
        return destroyed

    # -- revocations ------------------------------------------------------------------------------------------------

    def pending(self) -> tuple[Revocation, ...]:
        """Revocations the ledger does not have yet, oldest first."""
        with self._store.reading() as c:
            query = sa.select(REVOCATIONS).where(REVOCATIONS.c.height.is_(None)).order_by(REVOCATIONS.c.at)
            return tuple(Revocation(**row) for row in c.execute(query).mappings())

    def revocation(self, identity: str) -> Revocation | None:
        """A revocation by the name it revokes."""
        with self._store.reading() as c:
            row = c.execute(sa.select(REVOCATIONS).where(REVOCATIONS.c.id == identity)).mappings().one_or_none()
        return None if row is None else Revocation(**row)

    def sign_revocation(self, identity: str, data: bytes | None) -> None:
        """Keep the transaction that is going to be submitted, or drop one that can be no more."""
        with self._store.transaction() as c:
            c.execute(sa.update(REVOCATIONS).where(REVOCATIONS.c.id == identity).values(data=data))
        reached("broker.revocation.signed")

    def revoked(self, revocation: Revocation, *, height: int, at: Instant) -> None:
        """The ledger has it, at this height or before."""
        with self._store.transaction() as c:
            c.execute(sa.update(REVOCATIONS).where(REVOCATIONS.c.id == revocation.id).values(height=height, data=None))
            body = {"instance": revocation.instance, "generation": revocation.generation, "id": revocation.id}
            self._store.append_in(c, at, "identity-revoked", {**body, "height": height})
        reached("broker.revocation.committed")

    # -- reading ----------------------------------------------------------------------------------------------------

    def rows(self, *, limit: int = 1000) -> tuple[tuple[Generation, Revocation | None], ...]:
        """The latest generations with what became of their revocation."""
        with self._store.reading() as c:
            query = sa.select(GENERATIONS).order_by(GENERATIONS.c.at.desc(), GENERATIONS.c.generation.desc()).limit(limit)
            found = [Generation(**row) for row in c.execute(query).mappings()]
            named = {row["id"]: Revocation(**row) for row in c.execute(sa.select(REVOCATIONS)).mappings()}
        return tuple((one, named.get(one.identity)) for one in found)


def _lose(
    store: BrokerStore,
    c: sa.Connection,
    host: str,
    code: str,
    cursor: int,
    ended: tuple[Generation, ...],
    at: Instant,
) -> None:
    c.execute(sa.delete(HOST_LOSSES).where(HOST_LOSSES.c.host == host))
    c.execute(sa.insert(HOST_LOSSES).values(host=host, cursor=cursor, code=code, at=at))
    fresh = {one.identity for one in generations.end_on(c, host, ended, code=code, at=at)}
    happened: list[tuple[str, dict[str, object]]] = [
        ("verdict-consumed", {"host": host, "kind": "verdict_lost", "code": code, "cursor": cursor})
    ]
    for one in ended:
        body = {"instance": one.instance, "generation": one.generation, "code": code}
        happened.append(("instance-halted", {**body, "host": host}))
        if one.identity in fresh:
            happened.append(("revocation-intended", {"id": one.identity, **body}))
    store.append_all_in(c, at, happened)


def _intended(store: BrokerStore, c: sa.Connection, one: Generation, code: str, at: Instant) -> None:
    body = {"id": one.identity, "instance": one.instance, "generation": one.generation, "code": code}
    store.append_in(c, at, "revocation-intended", body)


def _never_launched(instance: str, generation: int, at: Instant) -> Generation:
    return Generation(
        instance=instance,
        generation=generation,
        service="",
        host="",
        state=LIVE,  # for the rest of this transaction
        code="",
        commitment=b"",
        destroyed="",
        at=at,
    )


def _is(known: Generation) -> tuple[Any, ...]:
    return (GENERATIONS.c.instance == known.instance, GENERATIONS.c.generation == known.generation)
