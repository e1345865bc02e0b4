"""Statements that run thousands of times a second: compiled once for each kind of database, given to its driver as they are.

SQLAlchemy looks a statement up, builds its parameters and wraps its result anew at each execution: several times what SQLite
itself takes for a row. Here that is done once. What stays SQLAlchemy's: the words of each database, the connection, its
transaction, and the types of errors (storage.transactions). Values go to the driver as they are given and come back as the
driver gives them (a truth may be 0 or 1); what SQLAlchemy would have converted is refused when it is first run.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from moorline.errors import Misconfigured
from moorline.storage.database import is_gone

_FIXED: Final = object()


@dataclass(frozen=True, slots=True)
class _Way:
    """A statement in one database's words: its parameters in order (a name, or _FIXED and a value), what makes a row."""

    text: str
    parameters: tuple[tuple[str | object, Any], ...]
    row: Callable[[Sequence[Any]], Any] | None
    errors: type[Exception]
    broken_rule: type[Exception]

    def arguments(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple([fixed if name is _FIXED else values[name] for name, fixed in self.parameters])  # type: ignore[index]


class Compiled:
    """One statement. Safe for threads; each call is on the connection of the caller's transaction."""

    def __init__(self, statement: sa.Select[Any] | sa.Insert | sa.Update | sa.Delete) -> None:
        """An INSERT names its values; each parameter is a `bindparam` without a type, or a value that never changes."""
        self._statement = statement
        self._ways: dict[str, _Way] = {}

    def all(self, c: sa.Connection, values: Mapping[str, Any]) -> list[Any]:
        """The rows of a SELECT, as named tuples. Raises as `Connection.execute`."""
        way = self._way(c)
        assert way.row is not None
        cursor = c.connection.cursor()
        try:
            cursor.execute(way.text, way.arguments(values))
            found = cursor.fetchall()
        except way.errors as error:
            raise _raised(c, way, error) from error
        return [way.row(each) for each in found]

    def one(self, c: sa.Connection, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a row has the columns of its statement
        """The first row, or None. Raises as `Connection.execute`."""
        return next(iter(self.all(c, values)), None)

    def run(self, c: sa.Connection, *rows: Mapping[str, Any]) -> None:
        """Execute it with each of these parameters. Raises as `Connection.execute`."""
        if len(rows) > 1 and c.dialect.name == "postgresql":
            c.execute(self._statement, list(rows))  # several rows in one message: its driver sends a message a row
            return
        way = self._way(c)
        cursor = c.connection.cursor()
        try:
            if len(rows) == 1:
                cursor.execute(way.text, way.arguments(rows[0]))
            else:
                cursor.executemany(way.text, [way.arguments(each) for each in rows])
        except way.errors as error:
            raise _raised(c, way, error) from error

    def _way(self, c: sa.Connection) -> _Way:
        return self._ways.get(c.dialect.name) or self._ways.setdefault(c.dialect.name, _way(self._statement, c.dialect))


def insert_into(table: sa.TableClause) -> Compiled:
    """A row of this table, by the names of its columns."""
    return Compiled(sa.insert(table).values({each.name: sa.bindparam(each.name) for each in table.c}))


def _way(statement: sa.Select[Any] | sa.Insert | sa.Update | sa.Delete, dialect: sa.Dialect) -> _Way:
    made = statement.compile(dialect=dialect)
    parameters: list[tuple[str | object, Any]] = []
    for name in made.positiontup or ():
        bind = made.binds[name]
        _require(bind.type.dialect_impl(dialect).bind_processor(dialect) is None and not bind.expanding, name)
        parameters.append((bind.key, None) if bind.required else (_FIXED, bind.effective_value))
    row, driver = None, dialect.loaded_dbapi
    if isinstance(statement, sa.Select):
        columns = [(str(name), column.type) for name, column in statement.selected_columns.items()]
        for name, kind in columns:
            _require(kind.dialect_impl(dialect).result_processor(dialect, None) is None or kind.python_type is bool, name)
        row = _rows([name for name, _ in columns])
    return _Way(str(made), tuple(parameters), row, driver.Error, driver.IntegrityError)


def _require(plain: bool, name: str) -> None:  # noqa: FBT001 - it is what is required
    if not plain:
        raise Misconfigured("storage.not_plain", "a compiled statement has something that must be converted", got=name)


def _rows(columns: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    row: Any = namedtuple("Row", columns)  # type: ignore[misc] # noqa: PYI024 - its columns are known when it runs
    make: Callable[[Sequence[Any]], Any] = row._make
    return make


def _raised(c: sa.Connection, way: _Way, error: Exception) -> DBAPIError:
    """A driver's error, as SQLAlchemy would have raised it; of a connection that is gone, nobody gets it again."""
    kind = IntegrityError if isinstance(error, way.broken_rule) else DBAPIError
    made = kind(way.text, None, error)
    if is_gone(made):
        c.invalidate(error)
    return made
