"""A round of appraisals: what is known of its hosts is read at once, and what became of them is written at once.

A verifier of ten thousand hosts cannot wait for the disk once a host. It takes whatever evidence came while the round before
was under way, and every host of a round is in one read and in one durable transaction (ADR 0004, 0019). For each host that
transaction uses up the challenge first: where somebody else has used it, nothing else of that host is written, and nobody is
answered. A host stands in a round once.

Verdicts gained and lost are written as everywhere (storage.verifier_events); renewals of hosts that stand, which is nearly
all of a round, are one statement for all, and so are first verdicts, which is nearly all of it when a fleet begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from moorline.clock import Instant
from moorline.evidence.tpm_quote import ClockInfo
from moorline.rats import EvidenceRoot, Tier
from moorline.storage import verifier_asks, verifier_events


def table(name: str, *columns: str) -> sa.TableClause:
    """A table by name, for the statements of the verifier's stores."""
    return sa.table(name, *(sa.column(column) for column in columns))


HOSTS: Final = table("hosts", "host", "ek_digest", "ak_public", "root", "enrolled", "refused")
CHALLENGES: Final = table("challenges", "nonce", "host", "expires", "ask")
PROGRESS: Final = table(
    "progress",
    *("host", "clock", "reset_count", "restart_count", "safe"),
    *("ima_count", "ima_running", "reference", "standing", "boot_log", "pieces", "pieces_since"),
)
RESULTS: Final = table("results", "host", "ear", "status", "code", "issued", "expires", "withdrawn")
_BOOT_LOGS: Final = table("boot_logs", "digest", "data")
_STANDINGS: Final = table("standings", "host", "expires")

# The statements of a round, made once: where a round is of one host, making them would cost more than running them.
_NAMES: Final[sa.BindParameter[Any]] = sa.bindparam("names", expanding=True)
_NONCES: Final[sa.BindParameter[Any]] = sa.bindparam("nonces", expanding=True)
_HOSTS_NAMED: Final = sa.select(HOSTS).where(HOSTS.c.host.in_(_NAMES))
_PROGRESS_NAMED: Final = sa.select(PROGRESS).where(PROGRESS.c.host.in_(_NAMES))
_CLOCKS_NAMED: Final = sa.select(PROGRESS.c.host, PROGRESS.c.clock, PROGRESS.c.reset_count, PROGRESS.c.restart_count).where(
    PROGRESS.c.host.in_(_NAMES)
)
_STANDINGS_NAMED: Final = sa.select(_STANDINGS.c.host, _STANDINGS.c.expires).where(_STANDINGS.c.host.in_(_NAMES))
_OPEN: Final = sa.select(CHALLENGES).where(CHALLENGES.c.nonce.in_(_NONCES))
_TAKEN: Final = (
    sa.delete(CHALLENGES)
    .where(CHALLENGES.c.nonce.in_(_NONCES))
    .returning(CHALLENGES.c.nonce, CHALLENGES.c.host, CHALLENGES.c.ask)
)
_EXPIRED: Final = sa.delete(CHALLENGES).where(CHALLENGES.c.host.in_(_NAMES), CHALLENGES.c.expires < sa.bindparam("at"))
_GIVEN: Final = sa.insert(CHALLENGES)


_NEVER: Final = Instant(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolledHost:
    """A host's keys for good: digest of its endorsement key, TPMT_PUBLIC of its attestation key, and what they rest on.

    `refused` is why no evidence of it counts, if so: its TPM's maker revoked it (storage.verifier_chains).
    """

    host: str
    ek_digest: bytes
    ak_public: bytes
    root: EvidenceRoot
    enrolled: Instant
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far one host was read in its present boot: clock, IMA entries and their PCR value, standing, and its boot log.

    `reference` is the digest of the reference values its files were judged by; `standing` is policy.host.FileStanding,
    encoded; `boot_log` is SHA-256 of the log, which is kept once for all hosts that booted alike. Where `pieces` is not
    0, the list came in that many pieces since `pieces_since` and is not whole: none of it is proven, no verdict rests on it.
    """

    clock: ClockInfo
    ima_count: int
    ima_running: bytes
    reference: bytes
    standing: bytes
    boot_log: bytes
    pieces: int = 0
    pieces_since: Instant = _NEVER


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResult:
    """A signed result. `withdrawn` is the code of the problem that ended it before its time, if one did."""

    host: str
    ear: str
    status: str
    code: str | None
    issued: Instant
    expires: Instant
    withdrawn: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is known of a host whose evidence came. `challenge_expires` is None if its challenge is not open."""

    enrolled: EnrolledHost
    progress: Progress | None
    challenge_expires: Instant | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one host in a round, once its challenge `nonce` is used up; what is None stays as it is.

    `before` is what was held of the host when it was judged: where another process has written since, this is not true any
    more. `boot_log` is the log itself where it came with the evidence; `withdraw` ends the standing result for that reason,
    before `result` takes its place; `next_nonce` is opened as the host's next challenge.
    """

    host: str
    nonce: bytes
    before: Progress | None
    progress: Progress | None
    boot_log: bytes | None
    withdraw: str | None
    result: StoredResult | None
    next_nonce: bytes | None


def look(connection: sa.Connection, asked: Mapping[str, bytes]) -> dict[str, Held]:
    """What is known of these hosts, each with the nonce its evidence answers; hosts that are not enrolled are left out."""
    names = list(asked)
    hosts = connection.execute(_HOSTS_NAMED, {"names": names}).all()
    read = connection.execute(_PROGRESS_NAMED, {"names": names}).all()
    held = {row.host: progress_of(row) for row in read}
    open_now = connection.execute(_OPEN, {"nonces": list(asked.values())}).all()
    expires = {row.host: Instant(row.expires) for row in open_now if bytes(row.nonce) == asked.get(row.host)}
    return {
        row.host: Held(enrolled=enrolled_of(row), progress=held.get(row.host), challenge_expires=expires.get(row.host))
        for row in hosts
    }


def open_challenges(
    connection: sa.Connection, nonces: Mapping[str, bytes], expires: Instant, *, most: int
) -> dict[str, Held]:
    """Remember a nonce for each of these hosts that is enrolled, until it is taken, expires, or `most` follow."""
    held = look(connection, nonces)
    if not held:
        return held
    place = sa.func.row_number().over(partition_by=CHALLENGES.c.host, order_by=CHALLENGES.c.expires.desc())
    ranked = sa.select(CHALLENGES.c.nonce, place.label("place")).where(CHALLENGES.c.host.in_(list(held))).subquery()
    old = sa.select(ranked.c.nonce).where(ranked.c.place >= most)
    connection.execute(sa.delete(CHALLENGES).where(CHALLENGES.c.nonce.in_(old)))
    asked = verifier_asks.newest(connection, held)
    values = [{"nonce": nonces[host], "host": host, "expires": expires, "ask": asked.get(host, 0)} for host in held]
    connection.execute(_GIVEN, values)
    return held


def settle(
    connection: sa.Connection, changes: Sequence[Change], *, at: Instant, next_expires: Instant, patience_until: Instant
) -> frozenset[str]:
    """Write a round in the caller's transaction; the hosts of which alone it is true.

    Those are the hosts whose challenge was still open, and of which no other process wrote since they were looked at: two
    that judge two quotes of a host at once must not write the older one last.
    """
    taken = connection.execute(_TAKEN, {"nonces": [one.nonce for one in changes]})
    used = {(bytes(row.nonce), row.host): int(row.ask) for row in taken}
    unmoved = _unmoved(connection, changes)
    settled = [one for one in changes if (one.nonce, one.host) in used and one.host in unmoved]
    _keep(connection, settled)
    _withdraw(connection, settled, at=at)
    store_results(connection, [one.result for one in settled if one.result is not None], patience_until=patience_until)
    asked = _answered(connection, settled, used)
    following = [
        {"nonce": one.next_nonce, "host": one.host, "expires": next_expires, "ask": asked.get(one.host, 0)}
        for one in settled
        if one.next_nonce is not None
    ]
    if following:
        connection.execute(_EXPIRED, {"names": [one["host"] for one in following], "at": at})
        connection.execute(_GIVEN, following)
    return frozenset(one.host for one in settled)


def store_results(connection: sa.Connection, results: Sequence[StoredResult], *, patience_until: Instant) -> None:
    """These are their hosts' results from now on; a host stands by one that affirms, and by no other."""
    if not results:
        return
    values = [
        {name: getattr(one, name) for name in ("host", "ear", "status", "code", "issued", "expires", "withdrawn")}
        for one in results
    ]
    _put(connection, RESULTS, "host", values)
    found = connection.execute(_STANDINGS_NAMED, {"names": [one.host for one in results]})
    standing = {row.host: row.expires for row in found}
    renewed, first = [], []
    for one in results:
        affirms = one.status == Tier.AFFIRMING.word and one.withdrawn is None
        if affirms and standing.get(one.host, 0) > one.issued:
            renewed.append({"host": one.host, "expires": one.expires})
        elif affirms and one.host not in standing:
            first.append((one.host, one.issued, one.expires))
        elif affirms:
            verifier_events.gained(connection, one.host, one.expires, at=one.issued, patience_until=patience_until)
        else:
            verifier_events.lost(connection, one.host, one.code or "result.not_affirming", at=one.issued)
    verifier_events.gained_first(connection, first)
    if renewed:
        _put(connection, _STANDINGS, "host", renewed)


def boot_log(connection: sa.Connection, digest: bytes) -> bytes | None:
    """A boot log by its digest."""
    found = connection.execute(sa.select(_BOOT_LOGS.c.data).where(_BOOT_LOGS.c.digest == digest)).scalar()
    return None if found is None else bytes(found)


def enrolled_of(row: Any) -> EnrolledHost:  # noqa: ANN401 - a row of `hosts`
    """A host from its row."""
    return EnrolledHost(
        host=row.host,
        ek_digest=row.ek_digest,
        ak_public=row.ak_public,
        root=EvidenceRoot(row.root),
        enrolled=Instant(row.enrolled),
        refused=row.refused,
    )


def progress_of(row: Any) -> Progress:  # noqa: ANN401 - a row of `progress`
    """How far a host was read, from its row."""
    return Progress(
        clock=ClockInfo(row.clock, row.reset_count, row.restart_count, bool(row.safe)),
        ima_count=row.ima_count,
        ima_running=row.ima_running,
        reference=row.reference,
        standing=row.standing,
        boot_log=row.boot_log,
        pieces=row.pieces,
        pieces_since=Instant(row.pieces_since),
    )


def withdrawal(host: str, code: str) -> sa.Update:
    """The statement that ends a host's result before its time."""
    return sa.update(RESULTS).where(RESULTS.c.host == host).values(withdrawn=code)


def _unmoved(connection: sa.Connection, changes: Sequence[Change]) -> frozenset[str]:
    """The hosts that were read no further since they were looked at. Each quote moves its TPM's clock on."""
    found = connection.execute(_CLOCKS_NAMED, {"names": [one.host for one in changes]})
    now = {row.host: (row.clock, row.reset_count, row.restart_count) for row in found}
    before = {one.host: None if one.before is None else one.before.clock for one in changes}
    return frozenset(
        host
        for host, clock in before.items()
        if now.get(host) == (None if clock is None else (clock.clock, clock.reset_count, clock.restart_count))
    )


def _answered(connection: sa.Connection, settled: Sequence[Change], used: Mapping[tuple[bytes, str], int]) -> dict[str, int]:
    """End the questions that were answered; the newest that is still open, of each host that has one."""
    told = {one.host: used[one.nonce, one.host] for one in settled if one.result is not None or one.withdraw is not None}
    verifier_asks.answered(connection, {host: number for host, number in told.items() if number})
    return verifier_asks.newest(connection, [one.host for one in settled])


def _keep(connection: sa.Connection, settled: Sequence[Change]) -> None:
    moved = [one for one in settled if one.progress is not None]
    if not moved:
        return
    logs = {one.progress.boot_log: one.boot_log for one in moved if one.progress and one.boot_log is not None}
    if logs:
        _put(connection, _BOOT_LOGS, "digest", [{"digest": digest, "data": data} for digest, data in logs.items()])
    values = []
    for one in moved:
        assert one.progress is not None
        clock = one.progress.clock
        values.append(
            {
                "host": one.host,
                "clock": clock.clock,
                "reset_count": clock.reset_count,
                "restart_count": clock.restart_count,
                "safe": clock.safe,
                "ima_count": one.progress.ima_count,
                "ima_running": one.progress.ima_running,
                "reference": one.progress.reference,
                "standing": one.progress.standing,
                "boot_log": one.progress.boot_log,
                "pieces": one.progress.pieces,
                "pieces_since": one.progress.pieces_since,
            }
        )
    _put(connection, PROGRESS, "host", values)
    if logs:  # logs change when hosts boot: what no host stands on any more goes then
        used = sa.select(PROGRESS.c.boot_log).where(PROGRESS.c.boot_log == _BOOT_LOGS.c.digest)
        connection.execute(sa.delete(_BOOT_LOGS).where(~sa.exists(used)))


def _withdraw(connection: sa.Connection, settled: Sequence[Change], *, at: Instant) -> None:
    for one in settled:
        if one.withdraw is not None:
            connection.execute(withdrawal(one.host, one.withdraw))
            verifier_events.lost(connection, one.host, one.withdraw, at=at)


def _put(connection: sa.Connection, into: sa.TableClause, key: str, rows: Sequence[dict[str, object]]) -> None:
    """Insert rows, or put them in the place of those with the same key."""
    connection.execute(_putting(connection.dialect.name, into, key, tuple(rows[0])), list(rows))


@lru_cache(maxsize=16)
def _putting(dialect: str, into: sa.TableClause, key: str, columns: tuple[str, ...]) -> Any:  # noqa: ANN401 - of either dialect
    made: Any = (postgresql if dialect == "postgresql" else sqlite).insert(into)
    others = {name: made.excluded[name] for name in columns if name != key}
    putting = made.on_conflict_do_update(index_elements=[key], set_=others)
    # SQLAlchemy sends many rows in one message only where something is returned; else pg8000 waits for each row's answer.
    return putting.returning(into.c[key]) if dialect == "postgresql" else putting
