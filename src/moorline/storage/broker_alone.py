"""One launch by itself, consumed and confirmed in two statements each: one that reads all there is to know, one that writes.

A consumer that has the database to itself waits for each statement, and on PostgreSQL every one of them is a message there
and back under the lock of all writers. As with those that come together (broker_consumption), only the plain launch is taken
here: nothing of it was seen before, its lease stands, its host lost nothing, a key pair is ready, and it brings all that a
generation begins with. Whatever else it is, None is returned, nothing is written, and the single step judges it. A test
holds answers, rows and log against the single step's.

SQLite, which knows no INSERT within another statement, is written to table by table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage import audit_store
from moorline.storage import broker_epochs as epochs
from moorline.storage import broker_facts as facts
from moorline.storage import broker_generations as generations
from moorline.storage import broker_launches as launches
from moorline.storage.audit_store import AUDIT
from moorline.storage.broker_certificates import CERTIFICATES, Issued
from moorline.storage.broker_generations import GENERATIONS, HOLDERS, HOST_LOSSES, STORAGE_KEYS
from moorline.storage.broker_launches import CONFIRMED, CONSUMED, INSTANCES, LAUNCHES, Fresh, Launch
from moorline.storage.broker_pool import POOL, PoolEntry, Taken
from moorline.storage.compiled import Compiled


class _Writes:
    """A row for each of several tables, and one change, in one statement where the database can."""

    def __init__(self, tables: tuple[sa.TableClause, ...], change: sa.Update | sa.Delete) -> None:
        """The parameter of a column is called as its table and itself; `change` has others."""
        inserts = [
            sa.insert(table).values({each.name: sa.bindparam(_name(table, each)) for each in table.c}) for table in tables
        ]
        self._each = [*map(Compiled, inserts), Compiled(change)]
        self._folded = Compiled(change.add_cte(*(insert.cte(f"into_{number}") for number, insert in enumerate(inserts))))

    def write(self, c: sa.Connection, rows: Mapping[sa.TableClause, Mapping[str, Any]], changed: Mapping[str, Any]) -> None:
        """`rows` has one for each table."""
        values = {_name(table, each): row[each.name] for table, row in rows.items() for each in table.c} | dict(changed)
        if c.dialect.name == "postgresql":
            self._folded.run(c, values)
            return
        for statement in self._each:
            statement.run(c, values)


def _name(table: sa.TableClause, column: sa.ColumnElement[Any]) -> str:
    return f"{table.name}_{column.key}"


_NUMBER: Final = (
    LAUNCHES.c.launcher == sa.bindparam("by"),
    LAUNCHES.c.epoch == sa.bindparam("in"),
    LAUNCHES.c.sequence == sa.bindparam("number"),
)
_OF_SIGNER: Final = (*_NUMBER, LAUNCHES.c.signing_digest == sa.bindparam("signing"))
_MARK: Final = sa.select(facts.FACTS.c.value).where(facts.FACTS.c.name == facts.TIME_MARK).scalar_subquery()
_LAST: Final = audit_store.LAST.subquery("last_entry")
_READY: Final = (
    sa.select(POOL.c.entry, POOL.c.public, POOL.c.wrapped)
    .where(POOL.c.service == sa.bindparam("service"), POOL.c.profile == sa.bindparam("profile"))
    .order_by(POOL.c.entry)
    .limit(1)
    .subquery("ready")
)
_ASK: Final = Compiled(
    sa.select(
        _MARK.label("mark"),
        sa.or_(
            sa.exists().where(*_NUMBER),
            sa.exists().where(LAUNCHES.c.kem_digest == sa.bindparam("kem")),
            sa.exists().where(LAUNCHES.c.signing_digest == sa.bindparam("signing")),
            sa.exists().where(GENERATIONS.c.instance == sa.bindparam("instance")),
            sa.exists().where(INSTANCES.c.instance == sa.bindparam("instance")),
        ).label("seen"),
        epochs.covering(sa.bindparam("now"), sa.func.coalesce(_MARK, 0)).scalar_subquery().label("leased"),
        sa.select(HOST_LOSSES.c.cursor).where(HOST_LOSSES.c.host == sa.bindparam("host")).scalar_subquery().label("lost"),
        _READY,
        _LAST,
    ).select_from(_READY.outerjoin(_LAST, sa.true()))
)
_CONSUME: Final = _Writes(
    (LAUNCHES, INSTANCES, GENERATIONS, STORAGE_KEYS, HOLDERS, AUDIT),
    sa.delete(POOL).where(POOL.c.entry == sa.bindparam("taken")),
)
_NEWEST: Final = GENERATIONS.alias("any_generation")
_ASK_OPEN: Final = Compiled(
    sa.select(
        LAUNCHES.c.state,
        GENERATIONS.c.state.label("lives"),
        sa.select(sa.func.max(_NEWEST.c.generation))
        .where(_NEWEST.c.instance == sa.bindparam("instance"))
        .scalar_subquery()
        .label("newest"),
        _LAST,
    )
    .select_from(LAUNCHES.join(GENERATIONS, sa.true()).outerjoin(_LAST, sa.true()))
    .where(
        *_OF_SIGNER,
        GENERATIONS.c.instance == sa.bindparam("instance"),
        GENERATIONS.c.generation == sa.bindparam("generation"),
    )
)
_CONFIRM: Final = _Writes(
    (CERTIFICATES, AUDIT),
    sa.update(LAUNCHES).where(*_OF_SIGNER).values(state=CONFIRMED, wrapped=None),
)


def consume(c: sa.Connection, launch: Launch, at: Instant, fresh: Fresh) -> Taken | None:
    """What a plain launch took, consumed as by `broker_launches.consume`; None for any other."""
    if not (fresh.storage and fresh.nonce):
        return None
    asked = {"kem": launch.kem_digest, "service": launch.service, "profile": launch.profile, "host": launch.host}
    row = _ASK.one(c, {**_named(launch), **asked, "now": at})
    if row is None or row.seen or not row.leased or (row.lost is not None and row.lost > fresh.verdicts_seen):
        return None
    if max(at, row.mark or 0) > fresh.not_after:
        return None
    if at > (row.mark or 0):
        facts.risen(c, at)
    pair = PoolEntry(public=row.public, wrapped=row.wrapped)
    known = {"instance": launch.instance, "generation": launch.generation}
    entry = audit_store.following(
        facts.AUDIT_DOMAIN, _last(row), at=at, happened=(("launch-consumed", launches.entry(launch, fresh)),)
    )[0]
    rows = {
        LAUNCHES: launches.row_of(launch, pair, at),
        INSTANCES: {**known, "service": launch.service},
        GENERATIONS: generations.row_of(launches.generation_of(launch, fresh, at)),
        STORAGE_KEYS: {**known, "wrapped": fresh.storage},
        HOLDERS: {**known, "nonce": fresh.nonce},
        AUDIT: entry,
    }
    _CONSUME.write(c, rows, {"taken": row.entry})
    return Taken(public=pair.public, wrapped=pair.wrapped, again=False, storage=fresh.storage)


def confirm(c: sa.Connection, launch: Launch, issued: Issued, at: Instant) -> Issued | None:
    """The certificate of a plain launch, confirmed as by `broker_launches.confirm`; None for any other."""
    named = _named(launch)
    row = _ASK_OPEN.one(c, {**named, "generation": launch.generation})
    if row is None or (row.state, row.lives, row.newest) != (CONSUMED, generations.LIVE, launch.generation):
        return None
    said = ("launch-confirmed", {"instance": launch.instance, "serial": issued.serial})
    entry = audit_store.following(facts.AUDIT_DOMAIN, _last(row), at=at, happened=(said,))[0]
    _CONFIRM.write(c, {CERTIFICATES: issued.row(), AUDIT: entry}, named)
    return issued


def _named(launch: Launch) -> dict[str, Any]:
    return {
        "by": launch.launcher,
        "in": launch.epoch,
        "number": launch.sequence,
        "signing": launch.signing_digest,
        "instance": launch.instance,
    }


def _last(row: sa.Row[Any]) -> tuple[int, bytes] | None:
    return None if row.number is None else (row.number, row.data)
