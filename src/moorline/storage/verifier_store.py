"""What an attestation authority must not forget: who is enrolled, open challenges, how far each host was read, results.

Every method is one transaction. A challenge and an enrolment are taken once: taking deletes the row, and only who deleted it
has it. A name, once enrolled, keeps its endorsement key for good, and an endorsement key its name (unique in both
directions). A result is a lease: reading one that ended, or was withdrawn, raises. What a round of appraisals reads and
writes is in storage.verifier_rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Conflict, NotAuthentic, Refused
from moorline.rats import EvidenceRoot
from moorline.storage import audit_store, verifier_asks, verifier_chains, verifier_events, verifier_rounds
from moorline.storage.database import open_database
from moorline.storage.steps import reached
from moorline.storage.transactions import reading, retried, writing
from moorline.storage.verifier_asks import Ask
from moorline.storage.verifier_chains import EnrolledChain
from moorline.storage.verifier_deliveries import Deliveries
from moorline.storage.verifier_events import VerdictEvent
from moorline.storage.verifier_rounds import (
    HOSTS,
    PROGRESS,
    RESULTS,
    Change,
    EnrolledHost,
    Held,
    Progress,
    StoredResult,
    enrolled_of,
    progress_of,
    table,
    withdrawal,
)
from moorline.storage.verifier_watch import Watchers

_NEVER: Final = Instant((1 << 63) - 1)
MAX_OPEN: Final = 64
"""Challenges or enrolments open for one host at a time; more push out the oldest."""


_ENROLMENTS = table("enrolments", "enrolment", "host", "ek_digest", "ak_public", "root", "secret_digest", "expires", "chain")
_SERIALS = table("reference_serials", "name", "serial")
_FACTS = table("facts", "name", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEnrolment:
    """An enrolment that waits for its activated credential. Only the digest of the secret is kept.

    `chain` is the endorsement certificate and what came with it (verifier_chains.packed).
    """

    enrolment: bytes
    host: str
    ek_digest: bytes
    ak_public: bytes
    root: EvidenceRoot
    secret_digest: bytes
    expires: Instant
    chain: bytes = b""


@retried
class VerifierStore:
    """The verifier's database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, where: Path | str) -> VerifierStore:
        """The store in an SQLite file, or at a database's URL, made or migrated if need be.

        Raises Unavailable or Misconfigured (`storage.*`).
        """
        return cls(open_database(f"sqlite:///{where.absolute()}" if isinstance(where, Path) else where, "verifier"))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # Enrolment ------------------------------------------------------------------------------------------------------

    def host(self, host: str) -> EnrolledHost:
        """An enrolled host; raises Refused("host.not_enrolled")."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(HOSTS).where(HOSTS.c.host == host)).one_or_none()
        if row is None:
            raise Refused("host.not_enrolled", "no such host is enrolled", got=host, remedy="enrol the host first")
        return enrolled_of(row)

    def hosts(self) -> tuple[EnrolledHost, ...]:
        """All enrolled hosts, by name."""
        with reading(self._engine) as connection:
            return tuple(enrolled_of(row) for row in connection.execute(sa.select(HOSTS).order_by(HOSTS.c.host)))

    def require_free(self, host: str, ek_digest: bytes) -> None:
        """Raises Conflict("enrol.other_tpm" | "enrol.other_host") if name or endorsement key belong to another."""
        with reading(self._engine) as connection:
            self._require_free(connection, host, ek_digest)

    def open_enrolment(self, enrolment: OpenEnrolment) -> None:
        """Remember an enrolment until it is taken, expires, or too many follow."""
        values = {
            "enrolment": enrolment.enrolment,
            "host": enrolment.host,
            "ek_digest": enrolment.ek_digest,
            "ak_public": enrolment.ak_public,
            "root": enrolment.root.value,
            "secret_digest": enrolment.secret_digest,
            "expires": enrolment.expires,
            "chain": enrolment.chain,
        }
        with writing(self._engine) as connection:
            self._prune(connection, _ENROLMENTS, _ENROLMENTS.c.enrolment, enrolment.host)
            connection.execute(sa.insert(_ENROLMENTS).values(values))
        reached("verifier.enrolment.opened")

    def take_enrolment(self, enrolment: bytes, *, now: Instant) -> OpenEnrolment:
        """The open enrolment, which is open no more.

        Raises NotAuthentic("enrol.unknown") for a used, expired or unknown one.
        """
        with writing(self._engine) as connection:
            found = connection.execute(sa.select(_ENROLMENTS).where(_ENROLMENTS.c.enrolment == enrolment))
            row = found.mappings().one_or_none()
            taken = connection.execute(sa.delete(_ENROLMENTS).where(_ENROLMENTS.c.enrolment == enrolment)).rowcount
        reached("verifier.enrolment.taken")
        if row is None or taken != 1 or row["expires"] < now:
            raise NotAuthentic("enrol.unknown", "no such enrolment is open", remedy="begin the enrolment again")
        return OpenEnrolment(**{**row, "root": EvidenceRoot(row["root"])})

    def enrol(self, host: EnrolledHost, *, chain: bytes = b"") -> EnrolledHost:
        """Bind name and keys for good. The same TPM may come again, also with a new attestation key; another TPM may not.

        `chain`, if any, is what its maker's lists are held against from now on.

        Raises Conflict("enrol.other_tpm" | "enrol.other_host").
        """
        values = {
            "host": host.host,
            "ek_digest": host.ek_digest,
            "ak_public": host.ak_public,
            "root": host.root.value,
            "enrolled": host.enrolled,
        }
        with writing(self._engine) as connection:
            row = self._require_free(connection, host.host, host.ek_digest)
            if row is None:
                connection.execute(sa.insert(HOSTS).values(values))
            else:
                connection.execute(sa.update(HOSTS).where(HOSTS.c.host == host.host).values(values))
            if chain:
                verifier_chains.keep(connection, host.host, chain)
            body = {"host": host.host, "ek_digest": host.ek_digest, "root": host.root.value}
            audit_store.append(connection, verifier_events.AUDIT_DOMAIN, at=host.enrolled, event="host-enrolled", body=body)
        reached("verifier.host.enrolled")
        return host

    def ek_chains(self, *, since: Instant = Instant(0)) -> dict[str, EnrolledChain]:  # noqa: B008 - a number
        """The certificates that hosts enrolled with at `since` or later, by host."""
        with reading(self._engine) as connection:
            return verifier_chains.chains(connection, since=since)

    def judge_makers(self, found: Mapping[str, bool], *, at: Instant) -> tuple[str, ...]:
        """Write down whose TPM is revoked, and withdraw what stood; the hosts of which that is new."""
        with reading(self._engine) as connection:
            before = verifier_chains.refused(connection)
        news = {host: revoked for host, revoked in found.items() if revoked != (host in before)}
        if not news:
            return ()  # the ordinary case, and no writer needs to wait for it
        with writing(self._engine) as connection:
            changed = verifier_chains.judge(connection, news, at=at)
        if any(news[host] for host in changed):
            reached("verifier.verdict.withdrawn")
        return changed

    # Challenges -----------------------------------------------------------------------------------------------------

    def open_challenges(self, nonces: Mapping[str, bytes], expires: Instant) -> dict[str, Held]:
        """Open a challenge for each enrolled host of `nonces`, in one durable transaction; what is known of these hosts."""
        with writing(self._engine) as connection:
            held = verifier_rounds.open_challenges(connection, nonces, expires, most=MAX_OPEN)
        reached("verifier.challenge.opened")
        return held

    # Questions ------------------------------------------------------------------------------------------------------

    def ask(self, ask: Ask) -> int:
        """Ask a host to show at once what it is; the question's number (storage.verifier_asks).

        Raises Unavailable("host.asked_too_often").
        """
        with writing(self._engine) as connection:
            number = verifier_asks.put(connection, ask)
        reached("verifier.host.asked")
        return number

    def asked(self) -> dict[str, int]:
        """The newest open question to each host that has one."""
        with reading(self._engine) as connection:
            return verifier_asks.newest(connection)

    def ask_open(self, number: int) -> bool:
        """Whether a question still waits for its answer."""
        with reading(self._engine) as connection:
            return verifier_asks.is_open(connection, number)

    def ask_due(self, *, at: Instant, older_than: Instant, until: Instant, watched: Callable[[str], bool]) -> int:
        """Ask the hosts, of those to watch, whose last result is older than that and who are not asked yet; how many."""
        due = sa.select(HOSTS.c.host).outerjoin(RESULTS, RESULTS.c.host == HOSTS.c.host)
        due = due.where(sa.func.coalesce(RESULTS.c.issued, 0) <= older_than).order_by(HOSTS.c.host)
        with reading(self._engine) as connection:
            asked = verifier_asks.newest(connection)
            names = [row.host for row in connection.execute(due) if row.host not in asked and watched(row.host)]
        if not names:
            return 0
        with writing(self._engine) as connection:
            asked = verifier_asks.newest(connection, names)
            for host in names:
                if host not in asked:
                    why = verifier_asks.Reason.PERIOD
                    verifier_asks.put(connection, Ask(host=host, reason=why, says="", asked_by="", at=at, until=until))
        reached("verifier.host.asked")
        return len(names)

    # Progress and results -------------------------------------------------------------------------------------------

    def progress(self, host: str) -> Progress | None:
        """How far a host was read; None before its first appraisal."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(PROGRESS).where(PROGRESS.c.host == host)).one_or_none()
        return None if row is None else progress_of(row)

    def withdraw(self, host: str, code: str, *, at: Instant) -> None:
        """End the standing result of a host because of the problem `code`, and say so."""
        with writing(self._engine) as connection:
            connection.execute(withdrawal(host, code))
            verifier_events.lost(connection, host, code, at=at)
        reached("verifier.verdict.withdrawn")

    def put_result(self, result: StoredResult, *, patience_until: Instant) -> None:
        """The host's result from now on; the host stands by it if it affirms."""
        with writing(self._engine) as connection:
            verifier_rounds.store_results(connection, [result], patience_until=patience_until)
        reached("verifier.verdict.stored")

    def look(self, asked: Mapping[str, bytes]) -> dict[str, Held]:
        """What is known of hosts whose evidence came, each with the nonce it answers (storage.verifier_rounds.look)."""
        with reading(self._engine) as connection:
            return verifier_rounds.look(connection, asked)

    def settle(
        self, changes: Sequence[Change], *, at: Instant, next_expires: Instant, patience_until: Instant
    ) -> frozenset[str]:
        """A round of appraisals, in one durable transaction; the hosts of which it is true (verifier_rounds.settle)."""
        with writing(self._engine) as connection:
            settled = verifier_rounds.settle(
                connection, changes, at=at, next_expires=next_expires, patience_until=patience_until
            )
        reached("verifier.challenge.taken")
        reached("verifier.progress.kept")
        reached("verifier.verdict.stored")
        if any(one.withdraw is not None and one.host in settled for one in changes):
            reached("verifier.verdict.withdrawn")
        return settled

    def boot_log(self, digest: bytes) -> bytes | None:
        """A boot log by its digest, while a host stands on it."""
        with reading(self._engine) as connection:
            return verifier_rounds.boot_log(connection, digest)

    def results(self) -> dict[str, StoredResult]:
        """The last result of each host, also ended ones."""
        with reading(self._engine) as connection:
            return {row["host"]: StoredResult(**row) for row in connection.execute(sa.select(RESULTS)).mappings()}

    # Events ---------------------------------------------------------------------------------------------------------

    def deliveries(self) -> Deliveries:
        """How far each receiver of pushed events has been told."""
        return Deliveries(self._engine)

    def watchers(self) -> Watchers:
        """Which processes of this verifier live, and what each watches."""
        return Watchers(self._engine)

    def events(self, *, after: int, limit: int) -> tuple[tuple[VerdictEvent, ...], int]:
        """Verdicts gained and lost after a cursor, and the newest cursor. Raises Conflict("events.cursor_unknown")."""
        with reading(self._engine) as connection:
            return verifier_events.page(connection, after=after, limit=limit)

    def newest_event(self) -> int:
        """The newest cursor, 0 if there was no event yet."""
        with reading(self._engine) as connection:
            return verifier_events.newest_cursor(connection)

    def sweep(
        self, *, now: Instant, latest: Instant = _NEVER, watched: Callable[[str], bool] = lambda _: True
    ) -> tuple[str, ...]:
        """Tell of the hosts whose lease ran out, or who did not answer a question, each once; their names.

        `watched` says which hosts are this process's to watch; no lease of today ends after `latest`.
        """
        with reading(self._engine) as connection:
            found = (*verifier_events.ran_out(connection, at=now, latest=latest), *verifier_asks.overdue(connection, at=now))
            if not any(map(watched, found)):
                return ()  # the ordinary case, and no writer needs to wait for it
        with writing(self._engine) as connection:
            silent = tuple(filter(watched, verifier_events.ran_out(connection, at=now, latest=latest)))
            for host in silent:
                verifier_events.lost(connection, host, verifier_events.RAN_OUT, at=now)
            hiding = tuple(filter(watched, verifier_asks.overdue(connection, at=now)))
            for host in hiding:
                connection.execute(withdrawal(host, verifier_asks.UNANSWERED))
                verifier_events.lost(connection, host, verifier_asks.UNANSWERED, at=now)
                verifier_asks.give_up(connection, host, at=now)
        reached("verifier.silence.told")
        return (*silent, *hiding)

    def audit_rows(self, *, first: int, limit: int) -> tuple[tuple[int, bytes], ...]:
        """Numbers and encoded entries of the secure log (audit.log, domain verifier_events.AUDIT_DOMAIN), in order."""
        with reading(self._engine) as connection:
            return audit_store.rows(connection, first=first, limit=limit)

    def standing_result(self, host: str, *, now: Instant) -> StoredResult:
        """The result that holds now. Raises Refused("result.none" | "result.withdrawn" | "result.expired")."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(RESULTS).where(RESULTS.c.host == host)).mappings().one_or_none()
        if row is None:
            raise Refused("result.none", "there is no attestation result about this host", got=host, remedy="let it attest")
        if row["withdrawn"] is not None:
            raise Refused(
                "result.withdrawn",
                "the last result about this host was withdrawn",
                got=row["withdrawn"],
                remedy="let it attest",
            )
        if now >= row["expires"]:
            raise Refused(
                "result.expired",
                "the last result about this host has expired",
                expected=f"< {row['expires']}",
                got=now,
                remedy="find out why the host stopped attesting",
            )
        return StoredResult(**row)

    # Reference values and facts --------------------------------------------------------------------------------------

    def accept_serial(self, name: str, serial: int) -> None:
        """Remember the highest serial seen of a set of reference values. Raises Refused("reference.rollback") below it."""
        with writing(self._engine) as connection:
            known = connection.execute(sa.select(_SERIALS.c.serial).where(_SERIALS.c.name == name)).scalar()
            if known is not None and serial < known:
                raise Refused(
                    "reference.rollback",
                    "older reference values than were used before",
                    expected=f">= {known}",
                    got=serial,
                    remedy="configure the newest set",
                )
            _upsert(connection, _SERIALS, _SERIALS.c.name == name, {"name": name, "serial": serial})

    def document(self, name: str) -> bytes | None:
        """A small value kept under a name."""
        with reading(self._engine) as connection:
            value: bytes | None = connection.execute(sa.select(_FACTS.c.value).where(_FACTS.c.name == name)).scalar()
        return value

    def set_document(self, name: str, value: bytes) -> None:
        """Keep a small value under a name."""
        with writing(self._engine) as connection:
            _upsert(connection, _FACTS, _FACTS.c.name == name, {"name": name, "value": value})

    @staticmethod
    def _require_free(connection: sa.Connection, host: str, ek_digest: bytes) -> EnrolledHost | None:
        found = connection.execute(
            sa.select(HOSTS).where(sa.or_(HOSTS.c.host == host, HOSTS.c.ek_digest == ek_digest))
        ).all()
        for row in found:
            if row.ek_digest != ek_digest:
                raise Conflict(
                    "enrol.other_tpm",
                    "this host is enrolled with another TPM",
                    expected=row.ek_digest,
                    got=ek_digest,
                    remedy="give a new machine a new name",
                )
            if row.host != host:
                raise Conflict("enrol.other_host", "this TPM is enrolled as another host", expected=row.host, got=host)
        return enrolled_of(found[0]) if found else None

    @staticmethod
    def _prune(connection: sa.Connection, table: sa.TableClause, key: sa.ColumnElement[Any], host: str) -> None:
        kept = sa.select(key).where(table.c.host == host).order_by(table.c.expires.desc()).limit(MAX_OPEN - 1)
        connection.execute(sa.delete(table).where(table.c.host == host, key.not_in(kept)))


def _upsert(connection: sa.Connection, table: sa.TableClause, where: sa.ColumnElement[bool], values: dict[str, Any]) -> None:
    if connection.execute(sa.update(table).where(where).values(values)).rowcount == 0:
        connection.execute(sa.insert(table).values(values))
