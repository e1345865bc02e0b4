"""Generations of instances: what one transaction of the broker's store does to them. No transaction begins or ends here.

A generation is live from its consumption until its host loses its verdict, a later one is launched, or it is retired; it is
never live again. Each has a storage key of its own, wrapped under the token, in a row of its own: deleting the row, with
SQLite's secure_delete and the write-ahead log truncated after it, is what makes the key unrecoverable from this database.
That proves nothing about copies of the database made before, nor about the copy in the enclave's memory.

Whatever ends a generation leaves a revocation to be made: an intention, durable before the ledger hears of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.storage.compiled import Compiled
from moorline.wire.launch import identity_name

LIVE: Final = "live"
HOST_LOST: Final = "host-lost"
SUPERSEDED: Final = "superseded"
RETIRED: Final = "retired"

GENERATIONS: Final = sa.table(
    "generations",
    *(sa.column(name) for name in ("instance", "generation", "service", "host")),
    *(sa.column(name) for name in ("state", "code", "commitment", "destroyed", "at")),
)
STORAGE_KEYS: Final = sa.table("storage_keys", sa.column("instance"), sa.column("generation"), sa.column("wrapped"))
REVOCATIONS: Final = sa.table(
    "revocations", *(sa.column(name) for name in ("id", "instance", "generation", "code", "at", "data", "height"))
)
HOLDERS: Final = sa.table("session_holders", sa.column("instance"), sa.column("generation"), sa.column("nonce"))
HOST_LOSSES: Final = sa.table("host_losses", *(sa.column(name) for name in ("host", "cursor", "code", "at")))

# Made once: a statement that is built anew costs several times what it costs to run.
_ONE: Final = (GENERATIONS.c.instance == sa.bindparam("of"), GENERATIONS.c.generation == sa.bindparam("number"))
_FIND: Final = sa.select(GENERATIONS).where(*_ONE)
_NEWEST: Final = sa.select(sa.func.max(GENERATIONS.c.generation)).where(GENERATIONS.c.instance == sa.bindparam("of"))
_LIVE_OF: Final = sa.select(GENERATIONS).where(GENERATIONS.c.instance == sa.bindparam("of"), GENERATIONS.c.state == LIVE)
_ANY: Final = GENERATIONS.alias("any_generation")
_WITH_NEWEST: Final = sa.select(
    GENERATIONS,
    sa.select(sa.func.max(_ANY.c.generation))
    .where(_ANY.c.instance == GENERATIONS.c.instance)
    .scalar_subquery()
    .label("newest"),
)
_FIND_AND_NEWEST: Final = Compiled(_WITH_NEWEST.where(*_ONE))
_THESE_AND_NEWEST: Final = _WITH_NEWEST.where(
    GENERATIONS.c.instance.in_(sa.bindparam("these", expanding=True)),
    GENERATIONS.c.generation.in_(sa.bindparam("numbers", expanding=True)),
)
_LOST: Final = sa.select(HOST_LOSSES.c.cursor).where(HOST_LOSSES.c.host == sa.bindparam("on"))
_HOLD: Final = sa.insert(HOLDERS)
_LET_GO: Final = sa.delete(HOLDERS).where(
    HOLDERS.c.instance == sa.bindparam("of"), HOLDERS.c.generation == sa.bindparam("number")
)
_HOLDERS_OF_THESE: Final = sa.select(HOLDERS).where(HOLDERS.c.instance.in_(sa.bindparam("these", expanding=True)))
_KNOWN_OF_THESE: Final = (
    sa.select(GENERATIONS.c.instance).where(GENERATIONS.c.instance.in_(sa.bindparam("these", expanding=True))).distinct()
)
_LOSSES_OF_THESE: Final = sa.select(HOST_LOSSES.c.host, HOST_LOSSES.c.cursor).where(
    HOST_LOSSES.c.host.in_(sa.bindparam("these", expanding=True))
)
_LOSE: Final = (
    sa.update(GENERATIONS)
    .where(GENERATIONS.c.host == sa.bindparam("on"), GENERATIONS.c.state == LIVE)
    .values(state=HOST_LOST, code=sa.bindparam("why"))
)
_INTENDED_OF_THESE: Final = sa.select(REVOCATIONS.c.id).where(REVOCATIONS.c.id.in_(sa.bindparam("these", expanding=True)))
_BEGIN: Final = sa.insert(GENERATIONS)
_KEEP_KEY: Final = sa.insert(STORAGE_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generation as stored. `code` says why it is not live any more; `destroyed` what retiring it destroyed."""

    instance: str
    generation: int
    service: str
    host: str
    state: str
    code: str
    commitment: bytes
    destroyed: str
    at: Instant

    @property
    def identity(self) -> str:
        """Its name in SPIFFE ID and revocation."""
        return identity_name(self.instance, self.generation)


def find(c: sa.Connection, instance: str, generation: int) -> Generation | None:
    """One generation, if this broker knows it."""
    row = c.execute(_FIND, {"of": instance, "number": generation}).mappings().one_or_none()
    return None if row is None else Generation(**row)


def live_on(c: sa.Connection, host: str) -> tuple[Generation, ...]:
    """What is live on a host."""
    query = sa.select(GENERATIONS).where(GENERATIONS.c.host == host, GENERATIONS.c.state == LIVE)
    return tuple(Generation(**row) for row in c.execute(query).mappings())


def live_of(c: sa.Connection, instance: str) -> tuple[Generation, ...]:
    """What is live of an instance."""
    return tuple(Generation(**row) for row in c.execute(_LIVE_OF, {"of": instance}).mappings())


def newest(c: sa.Connection, instance: str) -> int | None:
    """The newest generation of an instance, launched or retired."""
    found: int | None = c.execute(_NEWEST, {"of": instance}).scalar()
    return found


def row_of(made: Generation) -> dict[str, Any]:
    """The row of a generation."""
    return {name: getattr(made, name) for name in Generation.__dataclass_fields__}


def begin(c: sa.Connection, made: Generation, *, storage: bytes) -> None:
    """A new live generation with its wrapped storage key."""
    c.execute(_BEGIN, row_of(made))
    if storage:
        c.execute(_KEEP_KEY, {"instance": made.instance, "generation": made.generation, "wrapped": storage})


def begin_all(c: sa.Connection, made: Sequence[tuple[Generation, bytes, bytes]]) -> None:
    """New live generations, each with its wrapped storage key and the nonce of its session; either may be empty."""
    c.execute(_BEGIN, [row_of(one) for one, _, _ in made])
    names = [({"instance": one.instance, "generation": one.generation}, key, nonce) for one, key, nonce in made]
    kept = [{**name, "wrapped": key} for name, key, _ in names if key]
    if kept:
        c.execute(_KEEP_KEY, kept)
    held = [{**name, "nonce": nonce} for name, _, nonce in names if nonce]
    if held:
        c.execute(_HOLD, held)


def known(c: sa.Connection, instances: Collection[str]) -> set[str]:
    """Those of these instances of which there is a generation, launched or retired."""
    return set(c.execute(_KNOWN_OF_THESE, {"these": sorted(instances)}).scalars())


def losses(c: sa.Connection, hosts: Collection[str]) -> dict[str, int]:
    """The cursor of the last loss that this broker acted on, for each of these hosts that had one."""
    return {row.host: row.cursor for row in c.execute(_LOSSES_OF_THESE, {"these": sorted(hosts)})}


def hold(c: sa.Connection, instance: str, generation: int, nonce: bytes) -> None:
    """The session of this nonce is the newest of a generation, at whichever broker process."""
    c.execute(_LET_GO, {"of": instance, "number": generation})
    c.execute(_HOLD, {"instance": instance, "generation": generation, "nonce": nonce})


def held_elsewhere(c: sa.Connection, held: Mapping[tuple[str, int], bytes]) -> tuple[tuple[str, int], ...]:
    """Those of these sessions (nonce by instance and generation) that are not the newest of their generation."""
    rows = c.execute(_HOLDERS_OF_THESE, {"these": sorted({instance for instance, _ in held})})
    newest = {(row.instance, row.generation): row.nonce for row in rows}
    return tuple(name for name, nonce in held.items() if newest.get(name, nonce) != nonce)


def storage_key(c: sa.Connection, instance: str, generation: int) -> bytes | None:
    """The wrapped storage key; None for a generation that is not live (any more)."""
    query = (
        sa.select(STORAGE_KEYS.c.wrapped)
        .select_from(
            STORAGE_KEYS.join(
                GENERATIONS,
                sa.and_(
                    GENERATIONS.c.instance == STORAGE_KEYS.c.instance,
                    GENERATIONS.c.generation == STORAGE_KEYS.c.generation,
                ),
            )
        )
        .where(
            STORAGE_KEYS.c.instance == instance,
            STORAGE_KEYS.c.generation == generation,
            GENERATIONS.c.state == LIVE,
        )
    )
    found = c.execute(query).scalar()
    return None if found is None else bytes(found)


def end(c: sa.Connection, known: Generation, *, state: str, code: str, at: Instant) -> bool:
    """A generation is not live any more, and its identity is to be revoked; True if that was not intended before."""
    where = (GENERATIONS.c.instance == known.instance, GENERATIONS.c.generation == known.generation)
    c.execute(sa.update(GENERATIONS).where(*where).values(state=state, code=code))
    if c.execute(sa.select(REVOCATIONS.c.id).where(REVOCATIONS.c.id == known.identity)).one_or_none() is not None:
        return False
    c.execute(
        sa.insert(REVOCATIONS).values(
            id=known.identity, instance=known.instance, generation=known.generation, code=code, at=at
        )
    )
    return True


def end_on(c: sa.Connection, host: str, ended: Sequence[Generation], *, code: str, at: Instant) -> tuple[Generation, ...]:
    """What was live on a host (`ended`, as `live_on` said) is live no more; those whose revocation was not intended before.

    As `end` for each, in a few statements for all: every function of the host waits for this one transaction.
    """
    if not ended:
        return ()
    c.execute(_LOSE, {"on": host, "why": code})
    intended = set(c.execute(_INTENDED_OF_THESE, {"these": [one.identity for one in ended]}).scalars())
    fresh = tuple(one for one in ended if one.identity not in intended)
    if fresh:
        rows = [{"id": one.identity, "instance": one.instance, "generation": one.generation} for one in fresh]
        c.execute(sa.insert(REVOCATIONS), [{**row, "code": code, "at": at} for row in rows])
    return fresh


def destroy_storage_key(c: sa.Connection, instance: str, generation: int) -> bool:
    """Delete a storage key; True if there was one."""
    where = (STORAGE_KEYS.c.instance == instance, STORAGE_KEYS.c.generation == generation)
    return c.execute(sa.delete(STORAGE_KEYS).where(*where)).rowcount > 0


def lost_since(c: sa.Connection, host: str, cursor: int) -> bool:
    """Whether the host lost its verdict in an event after `cursor` that this broker acted on."""
    found = c.execute(_LOST, {"on": host}).scalar()
    return found is not None and found > cursor


def require_live(c: sa.Connection, instance: str, generation: int) -> Generation:
    """The generation, live and the newest. Raises Refused (`renewal.*`), which is what a function is told."""
    row = _FIND_AND_NEWEST.one(c, {"of": instance, "number": generation})
    why = _why_ended(row, instance, generation)
    if why is not None:
        raise why
    return Generation(**{name: getattr(row, name) for name in Generation.__dataclass_fields__})


def ended(c: sa.Connection, names: Sequence[tuple[str, int]]) -> list[Refused | None]:
    """As `require_live` about many (instance, generation) at once: for each why not, or None."""
    if not names:
        return []
    if c.dialect.name == "sqlite" or len(names) == 1:
        found = [_FIND_AND_NEWEST.one(c, {"of": instance, "number": number}) for instance, number in names]
    else:
        asked = {"these": sorted({instance for instance, _ in names}), "numbers": sorted({number for _, number in names})}
        rows = {(row.instance, row.generation): row for row in c.execute(_THESE_AND_NEWEST, asked)}
        found = [rows.get(name) for name in names]
    return [_why_ended(row, *name) for row, name in zip(found, names, strict=True)]


def _why_ended(row: Any, instance: str, generation: int) -> Refused | None:  # noqa: ANN401 - a row, or None
    if row is None:
        return Refused("renewal.not_known", "this broker launched no such generation", got=f"{instance} {generation}")
    if row.state == HOST_LOST:
        return Refused(
            "renewal.host_not_standing",
            "the host lost its standing; the identity is revoked and not renewed",
            got=row.code,
            remedy="the orchestrator launches the function again on another host",
        )
    if row.state == RETIRED:
        return Refused("renewal.instance_revoked", "this generation was retired and its identity revoked", got=row.code)
    if row.state != LIVE or row.newest != generation:
        return Refused(
            "renewal.generation_behind",
            "a later generation of this instance was launched",
            expected=row.newest,
            got=generation,
        )
    return None
