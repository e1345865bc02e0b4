"""What a broker must not forget: leases, consumed launches, the pool, enrolments, certificates, alarms and its audit log.

Every method is one durable transaction (ADR 0004). `consume` is the heart: it marks the launch, both key digests, takes the
pool entry and writes the audit entry before anybody is answered, so that a crash at any point loses a key pair at worst and
never hands one out twice. SQLite transactions begin IMMEDIATE: two processes that race for one launch are put in a row by
the database, and the second finds what the first wrote. On PostgreSQL the same transactions run SERIALIZABLE.

A refusal here is a fact about stored state (used, not leased, not there); whether a launch is acceptable otherwise was
decided before (hsm.release).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from moorline.audit.log import LogCheckpoint
from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, Refused, Unavailable
from moorline.storage import audit_store, checkpoint_store
from moorline.storage import broker_generations as generations
from moorline.storage.broker_generations import Generation
from moorline.storage.checkpoint_store import SignedCheckpoint
from moorline.storage.database import open_database
from moorline.storage.group import GroupCommit
from moorline.storage.steps import reached
from moorline.storage.transactions import reading, retried, writing

T = TypeVar("T")

CONSUMED: Final = "consumed"
CONFIRMED: Final = "confirmed"
AUDIT_DOMAIN: Final = "broker"
COUNTER: Final = "counter"
TIME_MARK: Final = "time-mark"

Advance = Callable[[sa.Connection], object]
"""Moves the token's counter and this database's record of it, in the transaction it is given."""


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


_FACTS = _table("facts", "name", "value")
_DOCUMENTS = _table("documents", "name", "value")
_EPOCHS = _table("epochs", "epoch", "opened", "not_after", "accept_until", "wrapped")
_LAUNCHERS = _table("launchers", "launcher", "ticket", "session", "measurement", "chip", "admitted", "revoked")
_LEASES = _table("leases", "launcher", "epoch", "first", "count", "not_after", "void")
_POOL = _table("pool", "entry", "service", "profile", "public", "wrapped")
_LAUNCHES = _table(
    "launches",
    *("launcher", "epoch", "sequence", "kem_digest", "signing_digest", "session", "service", "profile", "tenant"),
    *("instance", "generation", "host", "public", "wrapped", "state", "at"),
)
_INSTANCES = _table("instances", "instance", "service", "generation")
_ALARMS = _table("alarms", "alarm", "at", "code", "says", "first", "second")
_CODES = _table("enrolment_codes", "device", "code_digest", "not_after", "key_digest")
_DEVICES = _table("devices", "device", "key_digest", "enrolled")
_CERTIFICATES = _table("certificates", "serial", "spiffe_id", "key_digest", "not_after", "der")
_PEERS = _table("peers", "provider", "hsm", "at", "sequence", "transcript", "bundle")

# The statements of what is asked for many times a second, made once: building one anew costs several times its execution.
_FACT: Final = sa.select(_FACTS.c.value).where(_FACTS.c.name == sa.bindparam("of"))
_FORGET_FACT: Final = sa.delete(_FACTS).where(_FACTS.c.name == sa.bindparam("of"))
_KEEP_FACT: Final = sa.insert(_FACTS)
_KEEP_CERTIFICATE: Final = sa.insert(_CERTIFICATES)
_OF_SERVICE: Final = (_POOL.c.service == sa.bindparam("of"), _POOL.c.profile == sa.bindparam("for"))
_FIRST_READY: Final = sa.select(_POOL).where(*_OF_SERVICE).order_by(_POOL.c.entry).limit(1)
_POOL_SIZE: Final = sa.select(sa.func.count().label("n")).select_from(_POOL).where(*_OF_SERVICE)
_TAKE: Final = sa.delete(_POOL).where(_POOL.c.entry == sa.bindparam("one"))
_SAME_LAUNCH: Final = (
    _LAUNCHES.c.launcher == sa.bindparam("by"),
    _LAUNCHES.c.epoch == sa.bindparam("in"),
    _LAUNCHES.c.sequence == sa.bindparam("number"),
)
_FIND_LAUNCH: Final = sa.select(_LAUNCHES).where(*_SAME_LAUNCH)
_OF_KEYS: Final = sa.select(_LAUNCHES.c.session).where(
    sa.or_(_LAUNCHES.c.kem_digest == sa.bindparam("kem"), _LAUNCHES.c.signing_digest == sa.bindparam("signing"))
)
_KEEP_LAUNCH: Final = sa.insert(_LAUNCHES)
_FIND_INSTANCE: Final = sa.select(_INSTANCES).where(_INSTANCES.c.instance == sa.bindparam("of"))
_FORGET_INSTANCE: Final = sa.delete(_INSTANCES).where(_INSTANCES.c.instance == sa.bindparam("of"))
_KEEP_INSTANCE: Final = sa.insert(_INSTANCES)
_LEASED: Final = (
    sa.select(sa.func.count())
    .select_from(_LEASES.join(_EPOCHS, _EPOCHS.c.epoch == _LEASES.c.epoch))
    .join(_LAUNCHERS, _LAUNCHERS.c.launcher == _LEASES.c.launcher)
    .where(
        _LEASES.c.launcher == sa.bindparam("by"),
        _LEASES.c.epoch == sa.bindparam("in"),
        _LEASES.c.first <= sa.bindparam("number"),
        _LEASES.c.first + _LEASES.c.count > sa.bindparam("number"),
        _LEASES.c.not_after >= sa.bindparam("now"),
        _LEASES.c.void == sa.false(),
        _EPOCHS.c.accept_until >= sa.bindparam("now"),
        _LAUNCHERS.c.revoked.is_(None),
    )
)
_LIVE_OF: Final = sa.select(generations.GENERATIONS).where(
    generations.GENERATIONS.c.instance == sa.bindparam("of"), generations.GENERATIONS.c.state == generations.LIVE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """A launch epoch. Tokens of it are accepted until `accept_until`; `wrapped` is its key under the token, or gone."""

    epoch: int
    opened: Instant
    not_after: Instant
    accept_until: Instant
    wrapped: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Sequence numbers `first` to `first + count - 1` of one launcher in one epoch."""

    launcher: bytes
    epoch: int
    first: int
    count: int
    not_after: Instant
    void: bool

    def covers(self, sequence: int, now: Instant) -> bool:
        """Whether `sequence` is leased at `now`."""
        return not self.void and self.first <= sequence < self.first + self.count and now <= self.not_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch that asks to be consumed. The digests are SHA-256 of the session keys; `session` names it for people."""

    launcher: bytes
    epoch: int
    sequence: int
    kem_digest: bytes
    signing_digest: bytes
    session: str
    service: str
    profile: str
    tenant: str
    instance: str
    generation: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The pool entry a launch got, and its storage key. `again` if this is a retry that got the same ones."""

    public: bytes
    wrapped: bytes
    again: bool
    storage: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRow:
    """A launch as recorded."""

    launch: Launch
    public: bytes
    state: str
    at: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEntry:
    """A pre-generated key pair: SubjectPublicKeyInfo, and the private key wrapped under the token."""

    public: bytes
    wrapped: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate this broker signed."""

    serial: str
    spiffe_id: str
    key_digest: bytes
    not_after: Instant
    der: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something a person must look at; `first` and `second` name what collided."""

    alarm: int
    at: Instant
    code: str
    says: str
    first: str
    second: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer HSM whose trust bundle was accepted, and the transcript both signed."""

    provider: str
    hsm: str
    at: Instant
    sequence: int
    transcript: bytes
    bundle: bytes


@retried
class BrokerStore:
    """The broker's durable state. Safe for threads and, on one database, for several processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._group = GroupCommit(engine)

    @classmethod
    def open(cls, url: str) -> BrokerStore:
        """The store at `url`, migrated to its newest schema."""
        return cls(open_database(url, "broker"))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def _transaction(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A writing transaction that saw everything before it. Commits at the end, rolls back on any exception."""
        return writing(self._engine)

    def _rows(self, query: sa.Select[Any]) -> list[Any]:
        with self._reading() as connection:
            return [row._mapping for row in connection.execute(query)]  # noqa: SLF001 - SQLAlchemy's public name for it

    def _reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        return reading(self._engine)

    # -- for the stores beside this one (broker_instances) that write in one transaction with it ---------------------

    def transaction(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A writing transaction; `*_in` methods take its connection."""
        return self._transaction()

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """As `transaction`, together with whoever else writes now (storage.group): one wait for the disk for all of them."""
        return self._group.write(work)

    def reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A connection to read with, on one snapshot."""
        return self._reading()

    @staticmethod
    def append_in(c: sa.Connection, at: Instant, event: str, body: Mapping[str, object]) -> None:
        """An audit entry; the first of its details is its subject."""
        _append(c, at, event, body)

    @staticmethod
    def alarm_in(c: sa.Connection, at: Instant, code: str, says: str, first: str, second: str) -> None:
        """An alarm, with its audit entry."""
        _alarm(c, at, code, says, first, second)

    @staticmethod
    def set_fact_in(c: sa.Connection, name: str, value: int) -> None:
        """Store a number."""
        _set_fact(c, name, value)

    @staticmethod
    def insert_certificate_in(c: sa.Connection, issued: Issued) -> None:
        """Remember a certificate."""
        _insert_certificate(c, issued)

    @staticmethod
    def forget_function_key_in(c: sa.Connection, instance: str, generation: int) -> bool:
        """Drop the private key of a launch that was never confirmed; True if there was one."""
        where = (_LAUNCHES.c.instance == instance, _LAUNCHES.c.generation == generation, _LAUNCHES.c.wrapped.is_not(None))
        return c.execute(sa.update(_LAUNCHES).where(*where).values(wrapped=None)).rowcount > 0

    def truncate_log(self) -> bool:
        """Checkpoint and truncate SQLite's write-ahead log; False if a reader holds it, or on another database."""
        if self._engine.dialect.name != "sqlite":
            return False
        with self._engine.connect() as connection:
            busy, _, _ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
        return int(busy) == 0

    # -- facts and restored databases -------------------------------------------------------------------------------

    def fact(self, name: str) -> int:
        """A stored number; 0 if it was never set."""
        with self._reading() as c:
            return _fact(c, name)

    def mark_time(self, at: Instant) -> Instant:
        """Time never goes back behind this mark, over restarts and for every process; the mark, raised to `at`."""
        mark = Instant(self.fact(TIME_MARK))
        return mark if at <= mark else self._group.write(lambda c: _risen(c, at))

    def reset_time(self, at: Instant) -> None:
        """The operator says that the mark is wrong: nothing leased or opened before is worth anything, and time is `at`."""
        with self._transaction() as c:
            c.execute(sa.update(_EPOCHS).values(accept_until=0, wrapped=None))
            c.execute(sa.update(_LEASES).values(void=True))
            _set_fact(c, TIME_MARK, at)
            _append(c, at, "clock-reset", {"time": at})
        reached("broker.clock.reset")

    def document(self, name: str) -> bytes | None:
        """Stored bytes, or None."""
        rows = self._rows(sa.select(_DOCUMENTS.c.value).where(_DOCUMENTS.c.name == name))
        return bytes(rows[0]["value"]) if rows else None

    def set_document(self, name: str, value: bytes) -> None:
        """Store bytes under a name."""
        with self._transaction() as c:
            c.execute(sa.delete(_DOCUMENTS).where(_DOCUMENTS.c.name == name))
            c.execute(sa.insert(_DOCUMENTS).values(name=name, value=value))

    def discard(self, *, counter: int, anchored: int, says: str, at: Instant) -> None:
        """After a database was restored: no pool, no epoch, no lease is worth anything, and a person must look.

        `counter` is what the token's counter says, `anchored` the size of the log the ledger knows: both are taken as they
        are from now on, so that one restoration is noticed once.
        """
        with self._transaction() as c:
            c.execute(sa.delete(_POOL))
            c.execute(sa.update(_EPOCHS).values(accept_until=0, wrapped=None))
            c.execute(sa.update(_LEASES).values(void=True))
            _set_fact(c, COUNTER, counter)
            _set_fact(c, "anchor-accepted", anchored)
            _set_fact(c, "halted", 1)
            _alarm(c, at, "broker.database_restored", says, f"token's counter {counter}", f"anchored log {anchored}")
            _append(c, at, "database-restored", {"counter": counter, "anchored": anchored})
        reached("broker.database.discarded")

    # -- epochs, launchers, leases ----------------------------------------------------------------------------------

    def open_epoch(self, *, epoch: int, opened: Instant, not_after: Instant, grace_s: int, wrapped: bytes) -> list[int]:
        """Open an epoch and close the others with grace; the token's counter stood at `epoch`. Ends a halt.

        The epochs whose keys can be destroyed, because nothing of them is accepted any more, are returned.
        """
        with self._transaction() as c:
            return self.open_epoch_in(c, epoch=epoch, opened=opened, not_after=not_after, grace_s=grace_s, wrapped=wrapped)

    @staticmethod
    def open_epoch_in(
        c: sa.Connection, *, epoch: int, opened: Instant, not_after: Instant, grace_s: int, wrapped: bytes
    ) -> list[int]:
        """As `open_epoch`, in a transaction of the caller's."""
        until = opened + grace_s
        c.execute(sa.update(_EPOCHS).where(_EPOCHS.c.accept_until > until).values(accept_until=until))
        c.execute(sa.update(_EPOCHS).values(wrapped=None))
        c.execute(
            sa.insert(_EPOCHS).values(
                epoch=epoch, opened=opened, not_after=not_after, accept_until=not_after + grace_s, wrapped=wrapped
            )
        )
        _set_fact(c, COUNTER, epoch)
        _set_fact(c, "halted", 0)
        _append(c, opened, "epoch-opened", {"epoch": epoch, "not_after": not_after})
        return [int(row.epoch) for row in c.execute(sa.select(_EPOCHS.c.epoch).where(_EPOCHS.c.accept_until < opened))]

    @staticmethod
    def fact_in(c: sa.Connection, name: str) -> int:
        """A stored number; 0 if it was never set."""
        return _fact(c, name)

    @staticmethod
    def newest_epoch_in(c: sa.Connection) -> Epoch | None:
        """The epoch opened last, open or not."""
        row = c.execute(sa.select(_EPOCHS).order_by(_EPOCHS.c.epoch.desc()).limit(1)).mappings().one_or_none()
        return None if row is None else Epoch(**row)

    def epoch(self, number: int) -> Epoch | None:
        """An epoch by number."""
        rows = self._rows(sa.select(_EPOCHS).where(_EPOCHS.c.epoch == number))
        return Epoch(**rows[0]) if rows else None

    def newest_epoch(self) -> Epoch | None:
        """The epoch opened last, open or not."""
        rows = self._rows(sa.select(_EPOCHS).order_by(_EPOCHS.c.epoch.desc()).limit(1))
        return Epoch(**rows[0]) if rows else None

    def admit_launcher(
        self, *, launcher: bytes, ticket: bytes, measurement: bytes, chip: bytes, session: str, at: Instant
    ) -> None:
        """Use a ticket for a launcher, once. The same launcher may show it again; another raises Refused and an alarm."""
        with self._transaction() as c:
            row = c.execute(sa.select(_LAUNCHERS).where(_LAUNCHERS.c.ticket == ticket)).one_or_none()
            if row is None:
                values = {"launcher": launcher, "ticket": ticket, "measurement": measurement, "chip": chip}
                c.execute(sa.insert(_LAUNCHERS).values(**values, session=session, admitted=at))
                _append(c, at, "launcher-admitted", {"launcher": launcher, "ticket": ticket, "chip": chip})
                return
            if row.launcher == launcher and row.revoked is None:
                return
            says = "a launcher ticket was shown again by another launcher, or by a revoked one"
            _alarm(c, at, "launcher.ticket_used", says, row.session, session)
        raise Refused(
            "launcher.ticket_used",
            "this launcher ticket was used before",
            remedy="ask the provider for another ticket; look at the alarms of the broker",
        )

    def launcher_active(self, launcher: bytes) -> bool:
        """Whether this launcher was admitted and not revoked."""
        rows = self._rows(sa.select(_LAUNCHERS.c.revoked).where(_LAUNCHERS.c.launcher == launcher))
        return bool(rows) and rows[0]["revoked"] is None

    def revoke_launcher(self, launcher: bytes, *, at: Instant) -> None:
        """Revoke a launcher and close every epoch at once, without grace: they share one key (PROTOCOLS.md 3)."""
        with self._transaction() as c:
            done = c.execute(sa.update(_LAUNCHERS).where(_LAUNCHERS.c.launcher == launcher).values(revoked=at))
            if done.rowcount != 1:
                raise Refused("launcher.unknown", "no launcher of this id was admitted", got=launcher)
            c.execute(sa.update(_LEASES).where(_LEASES.c.launcher == launcher).values(void=True))
            c.execute(sa.update(_EPOCHS).values(accept_until=0, wrapped=None))
            _append(c, at, "launcher-revoked", {"launcher": launcher})
        reached("broker.launcher.revoked")

    def grant_lease(
        self, *, launcher: bytes, epoch: int, count: int, not_after: Instant, counter: int, at: Instant
    ) -> Lease:
        """The next `count` sequence numbers of a launcher; the token's counter was advanced to `counter` before."""
        with self._transaction() as c:
            return self.grant_lease_in(
                c, launcher=launcher, epoch=epoch, count=count, not_after=not_after, counter=counter, at=at
            )

    @staticmethod
    def grant_lease_in(
        c: sa.Connection, *, launcher: bytes, epoch: int, count: int, not_after: Instant, counter: int, at: Instant
    ) -> Lease:
        """As `grant_lease`, in a transaction of the caller's."""
        query = sa.select(sa.func.max(_LEASES.c.first + _LEASES.c.count)).where(
            _LEASES.c.launcher == launcher, _LEASES.c.epoch == epoch
        )
        first = int(c.execute(query).scalar() or 0)
        values = {"launcher": launcher, "epoch": epoch, "first": first, "count": count, "not_after": not_after}
        c.execute(sa.insert(_LEASES).values(**values, void=False))
        _set_fact(c, COUNTER, counter)
        _append(c, at, "lease-granted", {"launcher": launcher, "epoch": epoch, "first": first, "count": count})
        return Lease(launcher=launcher, epoch=epoch, first=first, count=count, not_after=not_after, void=False)

    def leases(self, launcher: bytes, epoch: int) -> tuple[Lease, ...]:
        """All leases of a launcher in an epoch."""
        rows = self._rows(sa.select(_LEASES).where(_LEASES.c.launcher == launcher, _LEASES.c.epoch == epoch))
        return tuple(Lease(**{**row, "void": bool(row["void"])}) for row in rows)

    # -- pool and launches ------------------------------------------------------------------------------------------

    def add_to_pool(self, service: str, profile: str, entries: list[PoolEntry]) -> None:
        """Store pre-generated key pairs."""
        if not entries:
            return
        with self._transaction() as c:
            rows = [{"service": service, "profile": profile, "public": e.public, "wrapped": e.wrapped} for e in entries]
            c.execute(sa.insert(_POOL), rows)
        reached("broker.pool.refilled")

    def pool_size(self, service: str, profile: str) -> int:
        """How many key pairs wait for a service and profile."""
        with self._reading() as c:
            return int(c.execute(_POOL_SIZE, {"of": service, "for": profile}).scalar_one())

    def take_from_pool(self, service: str, profile: str, *, count: int, at: Instant) -> tuple[Taken, ...]:
        """Up to `count` entries, gone from here: who dies with them loses them, and nobody has them twice."""

        def work(c: sa.Connection) -> tuple[Taken, ...]:
            where = (_POOL.c.service == service, _POOL.c.profile == profile)
            rows = c.execute(sa.select(_POOL).where(*where).order_by(_POOL.c.entry).limit(count)).all()
            if rows:
                c.execute(sa.delete(_POOL).where(*where, _POOL.c.entry <= rows[-1].entry))
                _append(c, at, "pool-taken", {"service": service, "profile": profile, "count": len(rows)})
            return tuple(Taken(public=row.public, wrapped=row.wrapped, again=False) for row in rows)

        taken = self._group.write(work)
        if taken:
            reached("broker.pool.taken")
        return taken

    def pools(self) -> dict[tuple[str, str], int]:
        """The fill of every pool."""
        query = sa.select(_POOL.c.service, _POOL.c.profile, sa.func.count().label("n"))
        return {
            (row["service"], row["profile"]): int(row["n"])
            for row in self._rows(query.group_by(_POOL.c.service, _POOL.c.profile))
        }

    def consume(
        self,
        launch: Launch,
        *,
        advance: Advance,
        not_after: Instant,
        at: Instant,
        storage: bytes = b"",
        commitment: bytes = b"",
        verdicts_seen: int = 0,
    ) -> Taken:
        """Use a launch up, in one transaction, before any answer (PROTOCOLS.md 3, Consumption).

        Until confirmation the same two keys get the same result again; other keys are refused and raise an alarm that
        names both sessions. `advance` is called for a generation change, `not_after` is the launch's own end, judged by a
        time that never goes back; `storage` is the generation's new storage key, wrapped. `verdicts_seen` is how far the
        verifier's events were acted on before the host's standing was looked at: a loss after that refuses, so that no
        launch slips between look and consumption.
        Earlier generations that are still live end with this.
        Raises Refused (`launch.token_consumed`, `launch.key_reused`, `launch.expired`, `launch.sequence_not_leased`,
        `launch.host_not_standing`, `launch.generation_behind`, `renewal.*`) or Unavailable("launch.pool_empty").
        """

        def work(c: sa.Connection) -> Taken | MoorlineError:
            return _consume(c, launch, at, _Fresh(storage, commitment, verdicts_seen, not_after, advance))

        outcome = self._group.write(work)
        if isinstance(outcome, MoorlineError):
            raise outcome
        reached("broker.launch.consumed")
        return outcome

    def confirm(self, launch: Launch, issued: Issued, *, at: Instant) -> Issued:
        """Record that the attester confirmed, and its certificate; the wrapped key is forgotten. Repeatable.

        Raises Conflict("launch.not_consumed") if this session does not hold the launch, Refused (`renewal.*`) if the
        generation was ended meanwhile.
        """
        kept = self._group.write(lambda c: _confirm(c, launch, issued, at))
        reached("broker.launch.confirmed")
        return kept

    def launches(self, *, limit: int = 1000) -> tuple[LaunchRow, ...]:
        """The latest launches."""
        return tuple(
            _launch_row(row) for row in self._rows(sa.select(_LAUNCHES).order_by(_LAUNCHES.c.at.desc()).limit(limit))
        )

    def launches_where(self, *, launcher: bytes, epoch: int, sequence: int) -> tuple[LaunchRow, ...]:
        """The launch of one sequence number, if there was one."""
        where = (_LAUNCHES.c.launcher == launcher, _LAUNCHES.c.epoch == epoch, _LAUNCHES.c.sequence == sequence)
        return tuple(_launch_row(row) for row in self._rows(sa.select(_LAUNCHES).where(*where)))

    def generation(self, instance: str) -> int | None:
        """The newest generation of an instance that was launched, or None."""
        rows = self._rows(sa.select(_INSTANCES.c.generation).where(_INSTANCES.c.instance == instance))
        return int(rows[0]["generation"]) if rows else None

    # -- certificates and devices -----------------------------------------------------------------------------------

    def record_certificate(self, issued: Issued, *, kind: str, at: Instant) -> None:
        """Remember a certificate before it is handed out."""

        def work(c: sa.Connection) -> None:
            _insert_certificate(c, issued)
            _append(c, at, kind, {"spiffe_id": issued.spiffe_id, "serial": issued.serial, "not_after": issued.not_after})

        self._group.write(work)
        reached("broker.certificate.recorded")

    def certificates(self, *, valid_at: Instant, limit: int = 1000) -> tuple[Issued, ...]:
        """Certificates that have not expired."""
        query = sa.select(_CERTIFICATES).where(_CERTIFICATES.c.not_after >= valid_at).limit(limit)
        return tuple(Issued(**row) for row in self._rows(query))

    def set_enrolment_code(self, *, device: str, code_digest: bytes, not_after: Instant, at: Instant) -> None:
        """Give a device one enrolment; an older code of it is void."""
        with self._transaction() as c:
            c.execute(sa.delete(_CODES).where(_CODES.c.device == device))
            c.execute(sa.insert(_CODES).values(device=device, code_digest=code_digest, not_after=not_after))
            _append(c, at, "enrolment-code", {"device": device, "not_after": not_after})
        reached("broker.code.made")

    # -- peers, alarms, audit ---------------------------------------------------------------------------------------

    def record_peer(self, peer: Peer) -> None:
        """Keep a peer's bundle. Raises Refused("exchange.rollback") if its sequence is below the one kept."""
        with self._transaction() as c:
            where = (_PEERS.c.provider == peer.provider, _PEERS.c.hsm == peer.hsm)
            known = c.execute(sa.select(_PEERS.c.sequence).where(*where)).scalar()
            if known is not None and peer.sequence < known:
                raise Refused(
                    "exchange.rollback",
                    "the peer's trust bundle is older than the one kept",
                    expected=f">= {known}",
                    got=peer.sequence,
                )
            c.execute(sa.delete(_PEERS).where(*where))
            values = {name: getattr(peer, name) for name in Peer.__dataclass_fields__}
            c.execute(sa.insert(_PEERS).values(**values))
            fields = {"provider": peer.provider, "hsm": peer.hsm, "transcript": peer.transcript}
            _append(c, peer.at, "bundle-exchanged", fields)
        reached("broker.peer.recorded")

    def peers(self) -> tuple[Peer, ...]:
        """All peers."""
        return tuple(Peer(**row) for row in self._rows(sa.select(_PEERS)))

    def raise_alarm(self, *, code: str, says: str, first: str, second: str, at: Instant) -> None:
        """Record an alarm that no other transaction records."""
        with self._transaction() as c:
            _alarm(c, at, code, says, first, second)

    def alarms(self, *, limit: int = 1000) -> tuple[Alarm, ...]:
        """The latest alarms, newest first."""
        return tuple(Alarm(**row) for row in self._rows(sa.select(_ALARMS).order_by(_ALARMS.c.alarm.desc()).limit(limit)))

    def append(self, kind: str, body: dict[str, object], *, at: Instant) -> None:
        """One audit entry of its own."""
        self._group.write(lambda c: _append(c, at, kind, body))

    def audit(self, *, first: int = 0, limit: int = 1000) -> tuple[bytes, ...]:
        """Encoded entries of the secure log (moorline.audit.log, domain AUDIT_DOMAIN), in order."""
        return tuple(data for _, data in self.audit_rows(first=first, limit=limit))

    def audit_rows(self, *, first: int, limit: int) -> tuple[tuple[int, bytes], ...]:
        """The same with the numbers they are kept under."""
        with self._reading() as c:
            return audit_store.rows(c, first=first, limit=limit)

    def newest_checkpoint(self, log: str) -> SignedCheckpoint | None:
        """The checkpoint signed last for a secure log, or None."""
        with self._reading() as c:
            return checkpoint_store.newest(c, log)

    def record_checkpoint(self, made: SignedCheckpoint, *, after: LogCheckpoint | None, foreign: bool) -> None:
        """Keep a checkpoint that continues `after`; of a foreign log, as an entry of this one too."""
        with self._transaction() as c:
            checkpoint_store.record(c, made, after=after, domain=AUDIT_DOMAIN, foreign=foreign)

    def covered_checkpoints(self, *, size: int, limit: int) -> dict[str, tuple[SignedCheckpoint, ...]]:
        """By log, the newest checkpoints that the first `size` entries of this log cover."""
        with self._reading() as c:
            return checkpoint_store.covered(c, size=size, limit=limit)


# Steps inside a transaction ---------------------------------------------------------------------------------------------


def _launch_row(row: Any) -> LaunchRow:  # noqa: ANN401 - a row of `launches`
    launch = Launch(**{name: row[name] for name in Launch.__dataclass_fields__})
    return LaunchRow(launch=launch, public=row["public"], state=row["state"], at=row["at"])


def _named(launch: Launch) -> dict[str, object]:
    """The parameters of _SAME_LAUNCH."""
    return {"by": launch.launcher, "in": launch.epoch, "number": launch.sequence}


def _is(launch: Launch) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _LAUNCHES.c.launcher == launch.launcher,
        _LAUNCHES.c.epoch == launch.epoch,
        _LAUNCHES.c.sequence == launch.sequence,
    )


@dataclass(frozen=True, slots=True)
class _Fresh:
    """What a launch brings with it that only a new consumption uses."""

    storage: bytes
    commitment: bytes
    verdicts_seen: int
    not_after: Instant
    advance: Advance


def _consume(c: sa.Connection, launch: Launch, at: Instant, fresh: _Fresh) -> Taken | MoorlineError:
    # 1. The same launch again: the same result for the same keys until confirmed, an alarm for anybody else.
    row = c.execute(_FIND_LAUNCH, _named(launch)).one_or_none()
    if row is not None:
        return _again(c, launch, row, at)
    # 2. The keys of another launch: one attester, one launch.
    other = c.execute(_OF_KEYS, {"kem": launch.kem_digest, "signing": launch.signing_digest}).first()
    if other is not None:
        _alarm(c, at, "launch.key_reused", "session keys of one launch came with another", other.session, launch.session)
        return Refused("launch.key_reused", "these session keys belong to another launch")
    # 3. Lease, epoch and expiry as they stand now, not as they stood when the release was decided. 4. The host may have lost
    # its verdict since it was looked at. 5. Every relaunch raises the generation (PROTOCOLS.md 9).
    overtaken = _over(c, launch, at, fresh.not_after) or _overtaken(c, launch, fresh.verdicts_seen)
    if overtaken is not None:
        return overtaken
    # 6. Take, mark, log.
    entry = c.execute(_FIRST_READY, {"of": launch.service, "for": launch.profile}).one_or_none()
    if entry is None:
        return Unavailable("launch.pool_empty", "no key pair is ready for this service", remedy="ask again shortly")
    if _launched_before(c, launch.instance):
        fresh.advance(c)  # a generation change: a database from before it is behind the token's counter
    c.execute(_TAKE, {"one": entry.entry})
    values = {name: getattr(launch, name) for name in Launch.__dataclass_fields__}
    c.execute(_KEEP_LAUNCH, {**values, "public": entry.public, "wrapped": entry.wrapped, "state": CONSUMED, "at": at})
    c.execute(_FORGET_INSTANCE, {"of": launch.instance})
    standing = {"instance": launch.instance, "service": launch.service, "generation": launch.generation}
    c.execute(_KEEP_INSTANCE, standing)
    body: dict[str, object] = {
        "launcher": launch.launcher,
        "epoch": launch.epoch,
        "sequence": launch.sequence,
        "instance": launch.instance,
    }
    _append(c, at, "launch-consumed", {**body, "host": launch.host, "session": launch.session, "channel": launch.profile})
    _begin_generation(c, launch, at, fresh)
    return Taken(public=entry.public, wrapped=entry.wrapped, again=False, storage=fresh.storage)


def _over(c: sa.Connection, launch: Launch, at: Instant, not_after: Instant) -> Refused | None:
    """By a time that no clock set back makes earlier, of this process or of another one."""
    now = _risen(c, at)
    if now > not_after:
        return Refused(
            "launch.expired", "the launch has expired", expected=f"<= {not_after}", got=now, remedy="launch again"
        )
    if _leased(c, launch, now):
        return None
    return Refused(
        "launch.sequence_not_leased",
        "no standing lease covers this sequence number",
        got=launch.sequence,
        remedy="let the launcher ask for a new lease and launch again",
    )


def _launched_before(c: sa.Connection, instance: str) -> bool:
    return c.execute(_FIND_INSTANCE, {"of": instance}).first() is not None


def _overtaken(c: sa.Connection, launch: Launch, verdicts_seen: int) -> Refused | None:
    if generations.lost_since(c, launch.host, verdicts_seen):
        return Refused("launch.host_not_standing", "the host lost its verdict just now", got=launch.host)
    standing = c.execute(_FIND_INSTANCE, {"of": launch.instance}).one_or_none()
    newest = generations.newest(c, launch.instance)
    other = standing is not None and standing.service != launch.service
    if not other and (newest is None or launch.generation > newest):
        return None
    return Refused(
        "launch.generation_behind",
        "the instance was launched or retired in this generation or a later one, or is of another service",
        expected=f"{launch.service if standing is None else standing.service} > {newest}",
        got=f"{launch.service} {launch.generation}",
        remedy="launch it again in the next generation",
    )


def _begin_generation(c: sa.Connection, launch: Launch, at: Instant, fresh: _Fresh) -> None:
    for row in c.execute(_LIVE_OF, {"of": launch.instance}).mappings().all():
        earlier = Generation(**row)
        generations.end(c, earlier, state=generations.SUPERSEDED, code="renewal.generation_behind", at=at)
        body = {"instance": earlier.instance, "generation": earlier.generation, "code": "renewal.generation_behind"}
        _append(c, at, "instance-halted", {**body, "host": earlier.host})
    made = Generation(
        instance=launch.instance,
        generation=launch.generation,
        service=launch.service,
        host=launch.host,
        state=generations.LIVE,
        code="",
        commitment=fresh.commitment,
        destroyed="",
        at=at,
    )
    generations.begin(c, made, storage=fresh.storage)


def _confirm(c: sa.Connection, launch: Launch, issued: Issued, at: Instant) -> Issued:
    where = (*_is(launch), _LAUNCHES.c.signing_digest == launch.signing_digest)
    row = c.execute(sa.select(_LAUNCHES).where(*where)).one_or_none()
    if row is None:
        raise Conflict("launch.not_consumed", "this session holds no launch that could be confirmed")
    generations.require_live(c, launch.instance, launch.generation)
    if row.state == CONFIRMED:
        return _newest_certificate(c, issued.spiffe_id) or issued
    c.execute(sa.update(_LAUNCHES).where(*where).values(state=CONFIRMED, wrapped=None))
    _insert_certificate(c, issued)
    _append(c, at, "launch-confirmed", {"instance": launch.instance, "serial": issued.serial})
    return issued


def _again(c: sa.Connection, launch: Launch, row: Any, at: Instant) -> Taken | MoorlineError:  # noqa: ANN401 - a row
    same = row.kem_digest == launch.kem_digest and row.signing_digest == launch.signing_digest
    if same and row.state == CONSUMED and row.wrapped is not None:
        try:
            generations.require_live(c, launch.instance, launch.generation)
        except Refused as ended:
            return ended
        storage = generations.storage_key(c, launch.instance, launch.generation)
        return Taken(public=row.public, wrapped=row.wrapped, again=True, storage=storage or b"")
    says = "a launch token was shown again" if same else "a launch token was shown by two sessions: a clone, or a theft"
    _alarm(c, at, "launch.token_consumed", says, row.session, launch.session)
    return Refused(
        "launch.token_consumed",
        "this launch token was used before",
        got=f"sequence {launch.sequence} of epoch {launch.epoch}",
        remedy="launch again; look at the alarms of the broker",
    )


def _leased(c: sa.Connection, launch: Launch, at: Instant) -> bool:
    return int(c.execute(_LEASED, {**_named(launch), "now": at}).scalar() or 0) > 0


def _fact(c: sa.Connection, name: str) -> int:
    return int(c.execute(_FACT, {"of": name}).scalar() or 0)


def _risen(c: sa.Connection, at: Instant) -> Instant:
    mark = Instant(_fact(c, TIME_MARK))
    if at <= mark:
        return mark
    _set_fact(c, TIME_MARK, at)
    return at


def _set_fact(c: sa.Connection, name: str, value: int) -> None:
    c.execute(_FORGET_FACT, {"of": name})
    c.execute(_KEEP_FACT, {"name": name, "value": value})


def _alarm(c: sa.Connection, at: Instant, code: str, says: str, first: str, second: str) -> None:
    c.execute(sa.insert(_ALARMS).values(at=at, code=code, says=says, first=first, second=second))
    _append(c, at, "alarm", {"code": code, "first": first, "second": second})


def _append(c: sa.Connection, at: Instant, event: str, body: Mapping[str, object]) -> None:
    """One entry of the secure log; the first of its details is its subject."""
    audit_store.append(c, AUDIT_DOMAIN, at=at, event=event, body=body)


def _insert_certificate(c: sa.Connection, issued: Issued) -> None:
    c.execute(_KEEP_CERTIFICATE, {name: getattr(issued, name) for name in Issued.__dataclass_fields__})


def _newest_certificate(c: sa.Connection, spiffe_id: str) -> Issued | None:
    query = sa.select(_CERTIFICATES).where(_CERTIFICATES.c.spiffe_id == spiffe_id)
    row = c.execute(query.order_by(_CERTIFICATES.c.not_after.desc()).limit(1)).one_or_none()
    return None if row is None else Issued(**row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
