"""What a broker must not forget: leases, consumed launches, the pool, certificates, peers, alarms and its audit log.

Every method is one durable transaction (ADR 0004); what is done in it stands in the modules of the nouns (broker_launches,
broker_epochs, broker_pool, broker_certificates, broker_bundles, broker_facts). `consume` is the heart: it marks the launch,
both key digests, takes the pool entry and writes the audit entry before anybody is answered, so that a crash at any point
loses a key pair at worst and never hands one out twice. SQLite transactions begin IMMEDIATE: two processes that race for one
launch are put in a row by the database, and the second finds what the first wrote. On PostgreSQL the same transactions run
SERIALIZABLE.

A refusal here is a fact about stored state (used, not leased, not there); whether a launch is acceptable otherwise was
decided before (hsm.release).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import sqlalchemy as sa

from moorline.audit.log import LogCheckpoint
from moorline.clock import Instant
from moorline.errors import Refused
from moorline.storage import audit_store, checkpoint_store
from moorline.storage import broker_bundles as bundles
from moorline.storage import broker_certificates as certificates
from moorline.storage import broker_consumption as consumption
from moorline.storage import broker_epochs as epochs
from moorline.storage import broker_facts as facts
from moorline.storage import broker_launches as launches
from moorline.storage import broker_pool as pool
from moorline.storage.broker_bundles import Peer
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_consumption import Confirmation, Consumption
from moorline.storage.broker_epochs import Epoch, Launcher, Lease
from moorline.storage.broker_facts import Alarm
from moorline.storage.broker_launches import Advance, Fresh, Launch, LaunchRow
from moorline.storage.broker_pool import PoolEntry, Taken
from moorline.storage.checkpoint_store import SignedCheckpoint
from moorline.storage.database import open_database
from moorline.storage.group import GroupCommit, Together
from moorline.storage.steps import reached
from moorline.storage.transactions import Kept, reading, retried, writing

T = TypeVar("T")

_ANCHOR_ACCEPTED: Final = "anchor-accepted"


@retried
class BrokerStore:
    """The broker's durable state. Safe for threads and, on one database, for several processes."""

    # For who writes in one transaction with others; each takes the connection of `transaction` or `write`.
    append_in = staticmethod(facts.append)
    append_all_in = staticmethod(facts.append_all)
    alarm_in = staticmethod(facts.alarm)
    fact_in = staticmethod(facts.fact)
    set_fact_in = staticmethod(facts.set_fact)
    insert_certificate_in = staticmethod(certificates.insert)
    forget_function_key_in = staticmethod(launches.forget_key)
    open_epoch_in = staticmethod(epochs.open_epoch)
    newest_epoch_in = staticmethod(epochs.newest)
    grant_lease_in = staticmethod(epochs.grant_lease)

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._kept = Kept(engine)
        self._group = GroupCommit(self._kept)
        self._consuming = Together(one=consumption.consume, many=consumption.consume_plain)
        self._confirming = Together(one=consumption.confirm, many=consumption.confirm_plain)

    @classmethod
    def open(cls, url: str) -> BrokerStore:
        """The store at `url`, migrated to its newest schema."""
        return cls(open_database(url, "broker"))

    def close(self) -> None:
        """Give the connections back."""
        self._kept.close()
        self._engine.dispose()

    # -- transactions, also for the stores beside this one -----------------------------------------------------------

    def transaction(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A writing transaction that saw everything before it. Commits at the end, rolls back on any exception."""
        return writing(self._engine)

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """As `transaction`, together with whoever else writes now (storage.group): one wait for the disk for all of them."""
        return self._group.write(work)

    def reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """A connection to read with, on one snapshot."""
        return reading(self._engine)

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
        with self.reading() as c:
            return facts.fact(c, name)

    def mark_time(self, at: Instant) -> Instant:
        """Time never goes back behind this mark, over restarts and for every process; the mark, raised to `at`."""
        mark = Instant(self.fact(facts.TIME_MARK))
        return mark if at <= mark else self._group.write(lambda c: facts.risen(c, at))

    def reset_time(self, at: Instant) -> None:
        """The operator says that the mark is wrong: nothing leased or opened before is worth anything, and time is `at`."""
        with self.transaction() as c:
            epochs.close_all(c)
            epochs.void_leases(c)
            facts.set_fact(c, facts.TIME_MARK, at)
            facts.append(c, at, "clock-reset", {"time": at})
        reached("broker.clock.reset")

    def document(self, name: str) -> bytes | None:
        """Stored bytes, or None."""
        with self.reading() as c:
            return facts.document(c, name)

    def set_document(self, name: str, value: bytes) -> None:
        """Store bytes under a name."""
        with self.transaction() as c:
            facts.set_document(c, name, value)

    def discard(self, *, counter: int, anchored: int, says: str, at: Instant) -> None:
        """After a database was restored: no pool, no epoch, no lease is worth anything, and a person must look.

        `counter` is what the token's counter says, `anchored` the size of the log the ledger knows: both are taken as they
        are from now on, so that one restoration is noticed once.
        """
        with self.transaction() as c:
            pool.empty(c)
            epochs.close_all(c)
            epochs.void_leases(c)
            facts.set_fact(c, facts.COUNTER, counter)
            facts.set_fact(c, _ANCHOR_ACCEPTED, anchored)
            facts.set_fact(c, facts.HALTED, 1)
            first, second = f"token's counter {counter}", f"anchored log {anchored}"
            facts.alarm(c, at, "broker.database_restored", says, first, second)
            facts.append(c, at, "database-restored", {"counter": counter, "anchored": anchored})
        reached("broker.database.discarded")

    # -- epochs, launchers, leases ----------------------------------------------------------------------------------

    def open_epoch(self, *, epoch: int, opened: Instant, not_after: Instant, grace_s: int, wrapped: bytes) -> list[int]:
        """Open an epoch and close the others with grace; the token's counter stood at `epoch`. Ends a halt.

        The epochs whose keys can be destroyed, because nothing of them is accepted any more, are returned.
        """
        with self.transaction() as c:
            return epochs.open_epoch(c, epoch=epoch, opened=opened, not_after=not_after, grace_s=grace_s, wrapped=wrapped)

    def epoch(self, number: int) -> Epoch | None:
        """An epoch by number."""
        with self.reading() as c:
            return epochs.find(c, number)

    def newest_epoch(self) -> Epoch | None:
        """The epoch opened last, open or not."""
        with self.reading() as c:
            return epochs.newest(c)

    def admit_launcher(
        self, *, launcher: bytes, ticket: bytes, measurement: bytes, chip: bytes, session: str, at: Instant
    ) -> None:
        """Use a ticket for a launcher, once. The same launcher may show it again; another raises Refused and an alarm."""
        with self.transaction() as c:
            admitted = epochs.admit_launcher(
                c, launcher=launcher, ticket=ticket, measurement=measurement, chip=chip, session=session, at=at
            )
        if not admitted:
            raise Refused(
                "launcher.ticket_used",
                "this launcher ticket was used before",
                remedy="ask the provider for another ticket; look at the alarms of the broker",
            )

    def launcher_active(self, launcher: bytes) -> bool:
        """Whether this launcher was admitted and not revoked."""
        with self.reading() as c:
            return epochs.launcher_active(c, launcher)

    def leasing_launchers(self, *, at: Instant) -> tuple[Launcher, ...]:
        """Launchers, not revoked, whose numbers count at `at`."""
        with self.reading() as c:
            return epochs.leasing(c, at)

    def revoke_launcher(self, launcher: bytes, *, at: Instant) -> None:
        """Revoke a launcher and close every epoch at once, without grace. Raises Refused("launcher.unknown")."""
        with self.transaction() as c:
            epochs.revoke_launcher(c, launcher, at)
        reached("broker.launcher.revoked")

    def grant_lease(
        self, *, launcher: bytes, epoch: int, count: int, not_after: Instant, counter: int, at: Instant
    ) -> Lease:
        """The next `count` sequence numbers of a launcher; the token's counter was advanced to `counter` before."""
        with self.transaction() as c:
            return epochs.grant_lease(
                c, launcher=launcher, epoch=epoch, count=count, not_after=not_after, counter=counter, at=at
            )

    def leases(self, launcher: bytes, epoch: int) -> tuple[Lease, ...]:
        """All leases of a launcher in an epoch."""
        with self.reading() as c:
            return epochs.leases(c, launcher, epoch)

    def epoch_and_leases(self, launcher: bytes, epoch: int) -> tuple[Epoch | None, tuple[Lease, ...]]:
        """An epoch by number, and all leases of a launcher in it, as of one moment."""
        with self.reading() as c:
            return epochs.find(c, epoch), epochs.leases(c, launcher, epoch)

    # -- pool and launches ------------------------------------------------------------------------------------------

    def add_to_pool(self, service: str, profile: str, entries: list[PoolEntry]) -> None:
        """Store pre-generated key pairs."""
        if not entries:
            return
        with self.transaction() as c:
            pool.add(c, service, profile, entries)
        reached("broker.pool.refilled")

    def pool_size(self, service: str, profile: str) -> int:
        """How many key pairs wait for a service and profile."""
        with self.reading() as c:
            return pool.size(c, service, profile)

    def take_from_pool(self, service: str, profile: str, *, count: int, at: Instant) -> tuple[Taken, ...]:
        """Up to `count` entries, gone from here: who dies with them loses them, and nobody has them twice."""
        taken = self._group.write(lambda c: pool.take(c, service, profile, count=count, at=at))
        if taken:
            reached("broker.pool.taken")
        return taken

    def pools(self) -> dict[tuple[str, str], int]:
        """The fill of every pool."""
        return self._kept.read(pool.sizes)

    def consume(  # noqa: PLR0913 - a consumption is these things, and each must be said
        self,
        launch: Launch,
        *,
        advance: Advance,
        not_after: Instant,
        at: Instant,
        storage: bytes = b"",
        commitment: bytes = b"",
        verdicts_seen: int = 0,
        host_result: bytes = b"",
        nonce: bytes = b"",
    ) -> Taken:
        """Use a launch up, in one transaction, before any answer (PROTOCOLS.md 3, Consumption).

        Until confirmation the same two keys get the same result again; other keys are refused and raise an alarm that
        names both sessions. `advance` is called for a generation change, `not_after` is the launch's own end, judged by a
        time that never goes back; `storage` is the generation's new storage key, wrapped. `verdicts_seen` is how far the
        verifier's events were acted on before the host's standing was looked at: a loss after that refuses, so that no
        launch slips between look and consumption. `host_result` is the digest of the result the host stood by: the log says
        on which verdict the function stands. `nonce` names the session, which is the instance's newest from then on.
        Earlier generations that are still live end with this.
        Raises Refused (`launch.token_consumed`, `launch.key_reused`, `launch.expired`, `launch.sequence_not_leased`,
        `launch.host_not_standing`, `launch.generation_behind`, `renewal.*`) or Unavailable("launch.pool_empty").
        """
        fresh = Fresh(
            storage=storage,
            commitment=commitment,
            verdicts_seen=verdicts_seen,
            not_after=not_after,
            advance=advance,
            host_result=host_result,
            nonce=nonce,
        )
        return self.consumed(Consumption(launch, at, fresh))

    def consumed(self, asked: Consumption) -> Taken:
        """As `consume`."""
        (outcome,) = self.consume_all([asked])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def consume_all(self, asked: Sequence[Consumption]) -> list[Taken | Exception]:
        """As `consume` for each of these, in order: what it took, or the exception it would have raised."""
        outcomes: list[Taken | Exception] = [*self._group.together_all(self._consuming, asked)]
        if any(isinstance(one, Taken) for one in outcomes):
            reached("broker.launch.consumed")
        return outcomes

    def confirm(self, launch: Launch, issued: Issued, *, at: Instant) -> Issued:
        """Record that the attester confirmed, and its certificate; the wrapped key is forgotten. Repeatable.

        Raises Conflict("launch.not_consumed") if this session does not hold the launch, Refused (`renewal.*`) if the
        generation was ended meanwhile.
        """
        (kept,) = self.confirm_all([Confirmation(launch, issued, at)])
        if isinstance(kept, Exception):
            raise kept
        return kept

    def confirm_all(self, asked: Sequence[Confirmation]) -> list[Issued | Exception]:
        """As `confirm` for each of these, in order: its certificate, or the exception it would have raised."""
        outcomes = self._group.together_all(self._confirming, asked)
        if any(isinstance(one, Issued) for one in outcomes):
            reached("broker.launch.confirmed")
        return outcomes

    def launch_facts(self, cursor: str, launcher: bytes, epoch: int) -> tuple[int, Epoch | None, tuple[Lease, ...]]:
        """A stored number, an epoch, and all leases of a launcher in it, as of one moment."""
        return self._kept.read(lambda c: (facts.fact(c, cursor), epochs.find(c, epoch), epochs.leases(c, launcher, epoch)))

    def launches(self, *, limit: int = 1000) -> tuple[LaunchRow, ...]:
        """The latest launches."""
        with self.reading() as c:
            return launches.latest(c, limit)

    def launches_where(self, *, launcher: bytes, epoch: int, sequence: int) -> tuple[LaunchRow, ...]:
        """The launch of one sequence number, if there was one."""
        with self.reading() as c:
            return launches.numbered(c, launcher=launcher, epoch=epoch, sequence=sequence)

    def generation(self, instance: str) -> int | None:
        """The newest generation of an instance that was launched, or None."""
        with self.reading() as c:
            return launches.newest_generation(c, instance)

    # -- certificates -----------------------------------------------------------------------------------------------

    def record_certificate(self, issued: Issued, *, kind: str, at: Instant) -> None:
        """Remember a certificate before it is handed out."""

        def work(c: sa.Connection) -> None:
            certificates.insert(c, issued)
            facts.append(c, at, kind, issued.entry())

        self._group.write(work)
        reached("broker.certificate.recorded")

    def certificates(self, *, valid_at: Instant, limit: int = 1000) -> tuple[Issued, ...]:
        """Certificates that have not expired."""
        with self.reading() as c:
            return certificates.valid(c, valid_at, limit)

    # -- peers, alarms, audit ---------------------------------------------------------------------------------------

    def record_peer(self, peer: Peer) -> None:
        """Keep a peer's bundle. Raises Refused("exchange.rollback") if its sequence is below the one kept."""
        with self.transaction() as c:
            bundles.record(c, peer)
        reached("broker.peer.recorded")

    def peers(self) -> tuple[Peer, ...]:
        """All peers."""
        with self.reading() as c:
            return bundles.all_of(c)

    def raise_alarm(self, *, code: str, says: str, first: str, second: str, at: Instant) -> None:
        """Record an alarm that no other transaction records."""
        with self.transaction() as c:
            facts.alarm(c, at, code, says, first, second)

    def alarms(self, *, limit: int = 1000) -> tuple[Alarm, ...]:
        """The latest alarms, newest first."""
        with self.reading() as c:
            return facts.alarms(c, limit)

    def append(self, kind: str, body: dict[str, object], *, at: Instant) -> None:
        """One audit entry of its own."""
        self._group.write(lambda c: facts.append(c, at, kind, body))

    def audit(self, *, first: int = 0, limit: int = 1000) -> tuple[bytes, ...]:
        """Encoded entries of the secure log (moorline.audit.log, domain AUDIT_DOMAIN), in order."""
        return tuple(data for _, data in self.audit_rows(first=first, limit=limit))

    def audit_rows(self, *, first: int, limit: int) -> tuple[tuple[int, bytes], ...]:
        """The same with the numbers they are kept under."""
        with self.reading() as c:
            return audit_store.rows(c, first=first, limit=limit)

    def newest_checkpoint(self, log: str) -> SignedCheckpoint | None:
        """The checkpoint signed last for a secure log, or None."""
        with self.reading() as c:
            return checkpoint_store.newest(c, log)

    def record_checkpoint(self, made: SignedCheckpoint, *, after: LogCheckpoint | None, foreign: bool) -> None:
        """Keep a checkpoint that continues `after`; of a foreign log, as an entry of this one too."""
        with self.transaction() as c:
            checkpoint_store.record(c, made, after=after, domain=facts.AUDIT_DOMAIN, foreign=foreign)

    def covered_checkpoints(self, *, size: int, limit: int) -> dict[str, tuple[SignedCheckpoint, ...]]:
        """By log, the newest checkpoints that the first `size` entries of this log cover."""
        with self.reading() as c:
            return checkpoint_store.covered(c, size=size, limit=limit)
