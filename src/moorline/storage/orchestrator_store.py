"""What an orchestrator must not forget: packages, functions and how far each is, events read, ledger seen, its secure log.

A function's row is the memory of both sagas, launch and clean-up. It moves from state to state by `save`, one durable
transaction each, and only from the revision that was read: two workers, or one that came back from the dead, cannot both
move it. The same transaction writes the step into the history and into the secure log (moorline.audit.log). The one-time
token and the reply key are in a row for as long as the launch needs them and are erased when it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from moorline.clock import Instant
from moorline.errors import Conflict, Refused
from moorline.storage import audit_store
from moorline.storage.database import open_database
from moorline.storage.steps import reached
from moorline.storage.transactions import reading, retried, writing

AUDIT_DOMAIN: Final = "orchestrator"


class LaunchState(StrEnum):
    """How far a function is, in its launch or in its clean-up. Each name says what is durably true."""

    REQUESTED = "requested"  # somebody asked; nothing was decided
    INTENDED = "intended"  # placed; the intent is recorded and signed; nothing happened outside
    GRANTED = "granted"  # the launcher's grant is recorded
    STARTED = "started"  # the host agent accepted the order
    ACTIVE = "active"  # the function said it has its identity and serves
    HALTING = "halting"  # this generation is to end; `halt` says why and what comes after; nothing is destroyed yet
    STOPPING = "stopping"  # the broker answered: what it destroyed and revoked is recorded
    CLEANED = "cleaned"  # the guest was stopped, or could not be; the clean-up is recorded, proven or not
    FAILED = "failed"  # it will not run; `problem` says why
    ENDED = "ended"  # it was stopped


TERMINAL: Final = (LaunchState.ACTIVE, LaunchState.FAILED, LaunchState.ENDED)
ON_A_HOST: Final = (LaunchState.INTENDED, LaunchState.GRANTED, LaunchState.STARTED, LaunchState.ACTIVE)
CLEANING: Final = (LaunchState.HALTING, LaunchState.STOPPING, LaunchState.CLEANED)


class Afterwards(StrEnum):
    """What a function becomes once its generation is cleaned up."""

    RELAUNCH = "relaunch"
    FAIL = "fail"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt:
    """Why a generation ends: `code` is the rule that was broken, `problem` what to show if the function fails for it.

    `lost_at` and `cursor` are the verifier's, where it reported the loss as an event.
    """

    cause: str
    code: str
    problem: dict[str, Any]
    afterwards: Afterwards
    noticed: int
    lost_at: int | None = None
    cursor: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanUp:
    """What ending one generation destroyed, and what nobody could prove. Words, in the order in which it happened."""

    generation: int
    host: str
    cause: str
    code: str
    destroyed: tuple[str, ...] = ()
    not_proven: tuple[str, ...] = ()
    revoked_at_height: int | None = None
    stopped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftGuest:
    """A guest whose host did not confirm that it ended. It holds no standing identity; it is asked for again."""

    instance: str
    host: str
    generation: int
    since: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRow:
    """An onboarded package, without its bytes. It verified when it was onboarded."""

    digest: bytes
    service: str
    version: str
    use_case: str
    jurisdiction: str
    memory_mib: int
    pids: int
    signer: bytes
    signer_name: str
    onboarded: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRow:
    """A function and its launch. What a state has not reached yet is None."""

    instance: str
    revision: int = 0
    state: LaunchState = LaunchState.REQUESTED
    service: str
    tenant: str
    hsm: str
    package: bytes
    contracts: tuple[str, ...]
    settings: dict[str, str]
    generation: int = 1
    requested: Instant
    placement: dict[str, Any] | None = None
    host: str | None = None
    placed: Instant | None = None
    configuration: bytes | None = None
    intent: bytes | None = None
    reply_key: bytes | None = field(default=None, repr=False)
    broker: str | None = None
    broker_url: str | None = None
    launch_fields: bytes | None = None
    token: bytes | None = field(default=None, repr=False)
    launcher: str | None = None
    address: str | None = None
    spiffe_id: str | None = None
    problem: dict[str, Any] | None = None
    halt: Halt | None = None
    clean_ups: tuple[CleanUp, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of one function, for people. `at_ms` is this machine's clock when it was written, to measure with."""

    at: Instant
    at_ms: int | None
    generation: int
    state: str
    host: str | None
    says: str


_JSON: Final = ("contracts", "settings", "placement", "problem")
_PACKAGE_COLUMNS: Final = tuple(item.name for item in dataclasses.fields(PackageRow))
_FUNCTION_COLUMNS: Final = tuple(item.name for item in dataclasses.fields(FunctionRow))


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


_FACTS = _table("facts", "name", "value")
_PACKAGES = _table("packages", "csar", *_PACKAGE_COLUMNS)
_FUNCTIONS = _table("functions", *_FUNCTION_COLUMNS)
_EVENTS = _table("events", "number", "instance", "at", "state", "says", "generation", "host", "at_ms")
_LEFT = _table("left_guests", "instance", "host", "generation", "since")
_CHECKPOINT: Final = "checkpoint"
_CURSOR: Final = "verifier-cursor"


@retried
class OrchestratorStore:
    """The orchestrator's durable state. Safe for threads and for several processes on one database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> OrchestratorStore:
        """The store at `url`, migrated to its newest schema."""
        return cls(open_database(url, "orchestrator"))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # -- packages -----------------------------------------------------------------------------------------------------

    def onboard(self, row: PackageRow, csar: bytes) -> None:
        """Keep a verified package. The same again is fine: its digest is its name."""
        with self._transaction() as connection:
            found = connection.execute(sa.select(_PACKAGES.c.digest).where(_PACKAGES.c.digest == row.digest)).first()
            if found is None:
                connection.execute(sa.insert(_PACKAGES).values(csar=csar, **dataclasses.asdict(row)))
                facts = {"package": row.digest, "service": row.service, "version": row.version, "use_case": row.use_case}
                _append(connection, row.onboarded, "package-onboarded", {**facts, "signer": row.signer})
        reached("orchestrator.package.onboarded")

    def packages(self) -> tuple[PackageRow, ...]:
        """All packages, oldest first."""
        query = sa.select(*(_PACKAGES.c[name] for name in _PACKAGE_COLUMNS)).order_by(_PACKAGES.c.onboarded)
        return tuple(PackageRow(**row) for row in self._rows(query))

    def package(self, digest: bytes) -> tuple[PackageRow, bytes]:
        """A package and its bytes. Raises Refused("package.not_onboarded")."""
        rows = self._rows(sa.select(_PACKAGES).where(_PACKAGES.c.digest == digest))
        if not rows:
            raise Refused("package.not_onboarded", "no such package is here", got=digest, remedy="onboard it first")
        row = dict(rows[0])
        csar = bytes(row.pop("csar"))
        return PackageRow(**row), csar

    # -- functions ----------------------------------------------------------------------------------------------------

    def request(self, row: FunctionRow) -> FunctionRow:
        """Record a request. The same request again is the same function; another under its name is a Conflict."""
        try:
            with self._transaction() as connection:
                connection.execute(sa.insert(_FUNCTIONS).values(**_stored(row)))
                _note(connection, row, row.requested, "requested")
        except IntegrityError:
            found = self.function(row.instance)
            asked = ("service", "tenant", "hsm", "package", "contracts", "settings")
            if any(getattr(found, name) != getattr(row, name) for name in asked):
                raise Conflict("launch.name_taken", "another function has this name", got=row.instance) from None
            return found
        reached("orchestrator.launch.requested")
        return row

    def function(self, instance: str) -> FunctionRow:
        """A function. Raises Refused("launch.no_such_function")."""
        rows = self._rows(sa.select(_FUNCTIONS).where(_FUNCTIONS.c.instance == instance))
        if not rows:
            raise Refused("launch.no_such_function", "there is no function of this name", got=instance)
        return _loaded(rows[0])

    def functions(self) -> tuple[FunctionRow, ...]:
        """All functions, oldest first."""
        return tuple(_loaded(row) for row in self._rows(sa.select(_FUNCTIONS).order_by(_FUNCTIONS.c.requested)))

    def unfinished(self) -> tuple[str, ...]:
        """Names of functions whose launch is under way: what a process that starts has to resume."""
        query = sa.select(_FUNCTIONS.c.instance).where(_FUNCTIONS.c.state.not_in([state.value for state in TERMINAL]))
        return tuple(row["instance"] for row in self._rows(query.order_by(_FUNCTIONS.c.requested)))

    def save(self, row: FunctionRow, *, at: Instant, says: str) -> FunctionRow:
        """Move a function on, from exactly the revision that was read. Raises Conflict("launch.moved_on")."""
        moved = dataclasses.replace(row, revision=row.revision + 1)
        with self._transaction() as connection:
            done = connection.execute(
                sa.update(_FUNCTIONS)
                .where(_FUNCTIONS.c.instance == row.instance, _FUNCTIONS.c.revision == row.revision)
                .values(**_stored(moved))
            )
            if done.rowcount != 1:
                raise Conflict("launch.moved_on", "somebody else moved this launch on", got=row.instance)
            _note(connection, moved, at, says)
            if moved.state is LaunchState.CLEANED and not moved.clean_ups[-1].stopped:
                _remember_left(connection, moved, at)
        _say_reached(moved.state)
        return moved

    def events(self, instance: str) -> tuple[Event, ...]:
        """What happened to a function, oldest first."""
        columns = [_EVENTS.c[item.name] for item in dataclasses.fields(Event)]
        query = sa.select(*columns).where(_EVENTS.c.instance == instance)
        return tuple(Event(**row) for row in self._rows(query.order_by(_EVENTS.c.number)))

    def halts_since(self, instance: str, since: Instant) -> int:
        """How often a function was halted at or after `since`."""
        query = sa.select(sa.func.count().label("halts")).where(
            _EVENTS.c.instance == instance, _EVENTS.c.state == LaunchState.HALTING.value, _EVENTS.c.at >= since
        )
        return int(self._rows(query)[0]["halts"])

    def on_hosts(self) -> tuple[FunctionRow, ...]:
        """Functions that run on a host, or are about to: those whom a lost verdict concerns."""
        query = sa.select(_FUNCTIONS).where(_FUNCTIONS.c.state.in_([state.value for state in ON_A_HOST]))
        return tuple(_loaded(row) for row in self._rows(query.order_by(_FUNCTIONS.c.requested)))

    # -- guests that may be left --------------------------------------------------------------------------------------

    def left_guests(self, instance: str | None = None) -> tuple[LeftGuest, ...]:
        """Guests that no host confirmed to have ended, of one function or of all."""
        query = sa.select(_LEFT).order_by(_LEFT.c.since)
        found = query if instance is None else query.where(_LEFT.c.instance == instance)
        return tuple(LeftGuest(**row) for row in self._rows(found))

    def guest_is_gone(self, left: LeftGuest, *, at: Instant) -> None:
        """The host confirmed it after all. Once only."""
        with self._transaction() as connection:
            where = (_LEFT.c.instance == left.instance, _LEFT.c.host == left.host, _LEFT.c.generation == left.generation)
            if connection.execute(sa.delete(_LEFT).where(*where)).rowcount:
                details = {"instance": left.instance, "generation": left.generation, "host": left.host}
                _append(connection, at, "guest-gone", details)

    # -- the verifier's events ----------------------------------------------------------------------------------------

    def cursor(self) -> int:
        """Up to which of the verifier's events everything was done; 0 before the first."""
        rows = self._rows(sa.select(_FACTS.c.value).where(_FACTS.c.name == _CURSOR))
        return int(bytes(rows[0]["value"])) if rows else 0

    def remember_cursor(self, cursor: int) -> None:
        """All of the verifier's events up to `cursor` were acted upon."""
        with self._transaction() as connection:
            connection.execute(sa.delete(_FACTS).where(_FACTS.c.name == _CURSOR))
            connection.execute(sa.insert(_FACTS).values(name=_CURSOR, value=str(cursor).encode("ascii")))
        reached("orchestrator.cursor.kept")

    # -- the secure log -----------------------------------------------------------------------------------------------

    def audit(self, *, first: int = 0, limit: int = 1000) -> tuple[bytes, ...]:
        """Encoded entries of the secure log (moorline.audit.log, domain AUDIT_DOMAIN), in order."""
        return tuple(data for _, data in self.audit_rows(first=first, limit=limit))

    def audit_rows(self, *, first: int, limit: int) -> tuple[tuple[int, bytes], ...]:
        """The same with the numbers they are kept under."""
        with reading(self._engine) as connection:
            return audit_store.rows(connection, first=first, limit=limit)

    def load(self) -> dict[str, int]:
        """How many functions each host runs or is about to run."""
        gone = [LaunchState.FAILED.value, LaunchState.ENDED.value]
        query = (
            sa.select(_FUNCTIONS.c.host, sa.func.count().label("functions"))
            .where(_FUNCTIONS.c.host.is_not(None), _FUNCTIONS.c.state.not_in(gone))
            .group_by(_FUNCTIONS.c.host)
        )
        return {row["host"]: row["functions"] for row in self._rows(query)}

    def uses(self, host: str) -> frozenset[str]:
        """The use cases of the functions that a host runs or is about to run."""
        gone = [LaunchState.FAILED.value, LaunchState.ENDED.value]
        query = (
            sa.select(_PACKAGES.c.use_case)
            .join(_FUNCTIONS, _FUNCTIONS.c.package == _PACKAGES.c.digest)
            .where(_FUNCTIONS.c.host == host, _FUNCTIONS.c.state.not_in(gone))
            .distinct()
        )
        return frozenset(row["use_case"] for row in self._rows(query))

    # -- the newest ledger state --------------------------------------------------------------------------------------

    def checkpoint(self) -> bytes | None:
        """The newest ledger checkpoint seen, encoded, or None before the first."""
        return self.document(_CHECKPOINT)

    def remember_checkpoint(self, encoded: bytes) -> None:
        """Replace it. The caller has made sure that it does not go back (ledger.light_client)."""
        self.set_document(_CHECKPOINT, encoded)

    def document(self, name: str) -> bytes | None:
        """Stored bytes, or None."""
        rows = self._rows(sa.select(_FACTS.c.value).where(_FACTS.c.name == name))
        return bytes(rows[0]["value"]) if rows else None

    def set_document(self, name: str, value: bytes) -> None:
        """Store bytes under a name."""
        with self._transaction() as connection:
            connection.execute(sa.delete(_FACTS).where(_FACTS.c.name == name))
            connection.execute(sa.insert(_FACTS).values(name=name, value=value))

    def _transaction(self) -> contextlib.AbstractContextManager[sa.Connection]:
        return writing(self._engine)

    def _rows(self, query: sa.Select[Any]) -> list[Any]:
        with reading(self._engine) as connection:
            return [row._mapping for row in connection.execute(query)]  # noqa: SLF001 - SQLAlchemy's public name for it


def _stored(row: FunctionRow) -> dict[str, object]:
    values: dict[str, object] = {name: getattr(row, name) for name in _FUNCTION_COLUMNS}
    for name in _JSON:
        values[name] = None if values[name] is None else json.dumps(values[name])
    values["state"] = row.state.value
    values["halt"] = None if row.halt is None else json.dumps(dataclasses.asdict(row.halt))
    values["clean_ups"] = json.dumps([dataclasses.asdict(one) for one in row.clean_ups])
    return values


def _loaded(row: Any) -> FunctionRow:  # noqa: ANN401 - a row mapping
    values = dict(row)
    for name in _JSON:
        values[name] = None if values[name] is None else json.loads(values[name])
    typed: dict[str, Any] = {
        "contracts": tuple(values["contracts"]),
        "state": LaunchState(values["state"]),
        "halt": None if values["halt"] is None else _halt(json.loads(values["halt"])),
        "clean_ups": tuple(_clean_up(one) for one in json.loads(values["clean_ups"])),
    }
    return FunctionRow(**{**values, **typed})


def _halt(kept: dict[str, Any]) -> Halt:
    return Halt(**{**kept, "afterwards": Afterwards(kept["afterwards"])})


def _clean_up(kept: dict[str, Any]) -> CleanUp:
    return CleanUp(**{**kept, "destroyed": tuple(kept["destroyed"]), "not_proven": tuple(kept["not_proven"])})


# Steps inside a transaction ---------------------------------------------------------------------------------------------


def _note(connection: sa.Connection, row: FunctionRow, at: Instant, says: str) -> None:
    """The step, in the history for people and in the secure log."""
    step = {"state": row.state.value, "generation": row.generation, "host": row.host}
    at_ms = time.time_ns() // 1_000_000
    connection.execute(sa.insert(_EVENTS).values(instance=row.instance, at=at, says=says, at_ms=at_ms, **step))
    _append(connection, at, f"function-{row.state.value}", {"instance": row.instance, **step, "says": says, **_proof(row)})


def _proof(row: FunctionRow) -> dict[str, object]:
    """What the log holds of a clean-up that just ended, field by field."""
    if row.state is not LaunchState.CLEANED:
        return {}
    done = row.clean_ups[-1]
    return {
        "cause": done.cause,
        "code": done.code,
        "destroyed": "; ".join(done.destroyed),
        "not_proven": "; ".join(done.not_proven),
        "revoked_at_height": done.revoked_at_height,
    }


def _remember_left(connection: sa.Connection, row: FunctionRow, at: Instant) -> None:
    connection.execute(sa.delete(_LEFT).where(_LEFT.c.instance == row.instance, _LEFT.c.host == row.host))
    values = {"instance": row.instance, "host": row.host, "generation": row.generation, "since": at}
    connection.execute(sa.insert(_LEFT).values(**values))


def _append(connection: sa.Connection, at: Instant, event: str, body: Mapping[str, object]) -> None:
    """One entry of the secure log; the first of `body` is its subject. What is None is left out."""
    told = {name: value for name, value in body.items() if value is not None}
    audit_store.append(connection, AUDIT_DOMAIN, at=at, event=event, body=told)


def _say_reached(state: LaunchState) -> None:  # noqa: C901 - one literal name a state, so that all can be enumerated
    match state:
        case LaunchState.REQUESTED:
            reached("orchestrator.relaunch.requested")
        case LaunchState.INTENDED:
            reached("orchestrator.launch.intended")
        case LaunchState.GRANTED:
            reached("orchestrator.launch.granted")
        case LaunchState.STARTED:
            reached("orchestrator.launch.started")
        case LaunchState.ACTIVE:
            reached("orchestrator.launch.active")
        case LaunchState.HALTING:
            reached("orchestrator.cleanup.halting")
        case LaunchState.STOPPING:
            reached("orchestrator.cleanup.stopping")
        case LaunchState.CLEANED:
            reached("orchestrator.cleanup.cleaned")
        case LaunchState.FAILED:
            reached("orchestrator.launch.failed")
        case LaunchState.ENDED:
            reached("orchestrator.launch.ended")
