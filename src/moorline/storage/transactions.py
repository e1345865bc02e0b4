"""How a transaction runs on either database: writers one after the other, readers on a snapshot, failures as typed errors.

A writing transaction sees everything that was committed before it began, and no other writer runs beside it: on SQLite it
begins IMMEDIATE, on PostgreSQL it is SERIALIZABLE and its first statement locks the store's version table against other
writers, before its snapshot is taken. Every writing transaction of a service appends to one hash chain (its secure log), so
two that ran side by side would only be undone by the database and run again; in a row, each runs once.

Should PostgreSQL undo one all the same (40001, or a deadlock with somebody's own statements, 40P01), `retried` runs the
whole method again, a few times: a method of a store is one transaction, and of one that was undone nothing is left.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from moorline.errors import Unavailable
from moorline.storage.database import STORE_OPTION, code_of, reason

T = TypeVar("T")

Transaction = sa.Connection
"""A transaction under way, for rooms that hand it on and know no SQL."""

_UNDONE: Final = frozenset({"40001", "40P01"})
TRIES: Final = 5
_PAUSE_S: Final = 0.01
_KEPT_MAX: Final = 2
"""One that writes (others wait for it) and one that reads; more come from the pool."""


class Undone(Unavailable):
    """PostgreSQL put a transaction out of the order it had to be in; nothing of it happened."""


@contextlib.contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that writes. Commits at the end, rolls back on any exception.

    A broken rule of the schema (a second row under one key) is raised as sqlalchemy's IntegrityError, for the store to say
    what it means; everything else of the database as Unavailable("storage.unavailable" | "storage.undone").
    """
    with _typed(), engine.connect() as connection:
        begin(connection)
        yield connection
        _commit(connection)


@contextlib.contextmanager
def durably(engine: sa.Engine) -> Iterator[sa.Connection]:
    """As `writing`, and on the disk when it ends, on an engine that was opened `replayed` too."""
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO on")
        yield connection
    if engine.dialect.name == "sqlite":
        with _typed(), engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(FULL)")  # synchronises the log and the database


@contextlib.contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection to read with, on one snapshot. Raises as `writing`."""
    with _typed(), engine.connect() as connection:
        _begin_reading(connection)
        yield connection


def _begin_reading(connection: sa.Connection) -> None:
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN")  # Python's driver would read each statement's own snapshot


def begin(connection: sa.Connection) -> None:
    """Take this store's turn to write."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        # LOCK takes no snapshot: what is read afterwards is what the writer before us left (PostgreSQL, "LOCK", Notes).
        store = connection.get_execution_options()[STORE_OPTION]
        connection.exec_driver_sql(f"LOCK TABLE {store}_version IN SHARE ROW EXCLUSIVE MODE")


def _commit(connection: sa.Connection) -> None:
    try:
        connection.commit()
    except BaseException:
        # SQLite may still be in the transaction (no room), and SQLAlchemy would give such a connection back as it is.
        connection.invalidate()
        raise


class Kept:
    """Transactions on connections that stay out of their pool in between, for who runs hundreds of them a second.

    On SQLite the pool's own work is half of what a small transaction costs, and one that went well leaves nothing to be put
    right: its connection serves the next. After a failure it goes back to the pool. On PostgreSQL each is the pool's, which
    finds out whether it still lives. Safe for threads.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._keeps = engine.dialect.name == "sqlite"
        self._idle: list[sa.Connection] = []

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns, in a transaction as that of `writing`. Raises as `writing`."""
        if not self._keeps:
            with writing(self._engine) as connection:
                return work(connection)
        return self._on_kept(begin, work, _commit)

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns, on a snapshot as that of `reading`. Raises as `reading`."""
        if not self._keeps:
            with reading(self._engine) as connection:
                return work(connection)
        return self._on_kept(_begin_reading, work, sa.Connection.rollback)

    def close(self) -> None:
        """Give the connections back."""
        while self._idle:
            self._idle.pop().close()

    def _on_kept(
        self,
        start: Callable[[sa.Connection], None],
        work: Callable[[sa.Connection], T],
        end: Callable[[sa.Connection], None],
    ) -> T:
        with _typed():
            connection = self._taken()
            try:
                start(connection)
                result = work(connection)
                end(connection)
            except BaseException:
                connection.close()
                raise
            self._put_back(connection)
        return result

    def _taken(self) -> sa.Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return self._engine.connect()

    def _put_back(self, connection: sa.Connection) -> None:
        if len(self._idle) < _KEPT_MAX:
            self._idle.append(connection)
        else:
            connection.close()


@contextlib.contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        if code_of(error) in _UNDONE:
            raise Undone(
                "storage.undone", "the database undid a transaction that ran beside another", got=code_of(error)
            ) from None
        raise Unavailable(
            "storage.unavailable", "the database cannot do this now", got=reason(error), remedy="see to the database"
        ) from None
    except OSError as error:
        # pg8000 lets some failures of the socket through as they are, such as the deadline while it says goodbye.
        raise Unavailable("storage.unavailable", "the database does not answer", got=type(error).__name__) from None
    except PoolTimeoutError:
        raise Unavailable("storage.unavailable", "all connections to the database are in use", retry_after_s=2) from None


def again(work: Callable[[], T]) -> T:
    """`work`, run again while PostgreSQL undoes it, `TRIES` times at most."""
    for attempt in range(TRIES - 1):
        try:
            return work()
        except Undone:
            time.sleep(_PAUSE_S * 2**attempt * random.random())  # noqa: S311 - two that collided should not again
    return work()


def retried(store: type[T]) -> type[T]:
    """A class of which every public method is one transaction: each is run `again` when it was undone."""
    for name, method in list(vars(store).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(store, name, _retrying(method))
    return store


def _retrying(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: object, **kwargs: object) -> Any:  # noqa: ANN401 - whatever the method returns
        return again(lambda: method(*args, **kwargs))

    return call
