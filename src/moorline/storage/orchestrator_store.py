"""What an orchestrator must not forget: packages, functions and how far each launch is, and the newest ledger state seen.

A function's row is the saga's memory. It moves from state to state by `save`, one durable transaction each, and only from
the revision that was read: two workers, or one that came back from the dead, cannot both move it. The one-time token and the
reply key are in it for as long as the launch needs them and are erased when it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from moorline.clock import Instant
from moorline.errors import Conflict, Refused, Unavailable
from moorline.storage.database import open_database


class LaunchState(StrEnum):
    """How far a launch is. Each name says what is durably true."""

    REQUESTED = "requested"  # somebody asked; nothing was decided
    INTENDED = "intended"  # placed; the intent is recorded and signed; nothing happened outside
    GRANTED = "granted"  # the launcher's grant is recorded
    STARTED = "started"  # the host agent accepted the order
    ACTIVE = "active"  # the function said it has its identity and serves
    FAILED = "failed"  # it will not run; `problem` says why
    ENDED = "ended"  # it was stopped


TERMINAL: Final = (LaunchState.ACTIVE, LaunchState.FAILED, LaunchState.ENDED)


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
    configuration: bytes | None = None
    intent: bytes | None = None
    reply_key: bytes | None = field(default=None, repr=False)
    broker: str | None = None
    launch_fields: bytes | None = None
    token: bytes | None = field(default=None, repr=False)
    launcher: str | None = None
    address: str | None = None
    spiffe_id: str | None = None
    problem: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of one launch, for people."""

    at: Instant
    state: str
    says: str


_JSON: Final = ("contracts", "settings", "placement", "problem")
_PACKAGE_COLUMNS: Final = tuple(item.name for item in dataclasses.fields(PackageRow))
_FUNCTION_COLUMNS: Final = tuple(item.name for item in dataclasses.fields(FunctionRow))


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


_FACTS = _table("facts", "name", "value")
_PACKAGES = _table("packages", "csar", *_PACKAGE_COLUMNS)
_FUNCTIONS = _table("functions", *_FUNCTION_COLUMNS)
_EVENTS = _table("events", "number", "instance", "at", "state", "says")
_CHECKPOINT: Final = "checkpoint"


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
        return moved

    def events(self, instance: str) -> tuple[Event, ...]:
        """What happened to a function, oldest first."""
        query = sa.select(_EVENTS.c.at, _EVENTS.c.state, _EVENTS.c.says).where(_EVENTS.c.instance == instance)
        return tuple(Event(**row) for row in self._rows(query.order_by(_EVENTS.c.number)))

    def load(self) -> dict[str, int]:
        """How many functions each host runs or is about to run."""
        gone = [LaunchState.FAILED.value, LaunchState.ENDED.value]
        query = (
            sa.select(_FUNCTIONS.c.host, sa.func.count().label("functions"))
            .where(_FUNCTIONS.c.host.is_not(None), _FUNCTIONS.c.state.not_in(gone))
            .group_by(_FUNCTIONS.c.host)
        )
        return {row["host"]: row["functions"] for row in self._rows(query)}

    # -- the newest ledger state --------------------------------------------------------------------------------------

    def checkpoint(self) -> bytes | None:
        """The newest ledger checkpoint seen, encoded, or None before the first."""
        rows = self._rows(sa.select(_FACTS.c.value).where(_FACTS.c.name == _CHECKPOINT))
        return bytes(rows[0]["value"]) if rows else None

    def remember_checkpoint(self, encoded: bytes) -> None:
        """Replace it. The caller has made sure that it does not go back (ledger.light_client)."""
        with self._transaction() as connection:
            connection.execute(sa.delete(_FACTS).where(_FACTS.c.name == _CHECKPOINT))
            connection.execute(sa.insert(_FACTS).values(name=_CHECKPOINT, value=encoded))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                if connection.dialect.name == "sqlite":
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                else:
                    connection.execution_options(isolation_level="SERIALIZABLE")
                yield connection
                connection.commit()
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise Unavailable(
                "storage.unavailable", "the orchestrator's database cannot take this now", got=type(error.orig).__name__
            ) from None

    def _rows(self, query: sa.Select[Any]) -> list[Any]:
        try:
            with self._engine.connect() as connection:
                return [row._mapping for row in connection.execute(query)]  # noqa: SLF001 - SQLAlchemy's public name for it
        except DBAPIError as error:
            raise Unavailable(
                "storage.unavailable", "the orchestrator's database cannot be read now", got=type(error.orig).__name__
            ) from None


def _stored(row: FunctionRow) -> dict[str, object]:
    values: dict[str, object] = {name: getattr(row, name) for name in _FUNCTION_COLUMNS}
    for name in _JSON:
        values[name] = None if values[name] is None else json.dumps(values[name])
    values["state"] = row.state.value
    return values


def _loaded(row: Any) -> FunctionRow:  # noqa: ANN401 - a row mapping
    values = dict(row)
    for name in _JSON:
        values[name] = None if values[name] is None else json.loads(values[name])
    return FunctionRow(**{**values, "contracts": tuple(values["contracts"]), "state": LaunchState(values["state"])})


def _note(connection: sa.Connection, row: FunctionRow, at: Instant, says: str) -> None:
    connection.execute(sa.insert(_EVENTS).values(instance=row.instance, at=at, state=row.state.value, says=says))
