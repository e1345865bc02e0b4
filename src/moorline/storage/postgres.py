"""PostgreSQL in as few round trips as its protocol allows: pg8000, sending what belongs together in one message.

pg8000 waits three times for a statement with parameters (parse, bind, execute), once more for BEGIN, and SQLAlchemy's ping
asks twice before each use. A writing transaction waits for each of them while all other writers wait for it. So here

- a statement is bound and executed in one message (PostgreSQL, "Extended Query", pipelined up to one Sync), and parsed only
  the first time: the latest are kept under names, which the server plans anew by itself when their tables change;
- BEGIN goes out with the first statement of its transaction, and nothing comes between it and that statement: were it
  SQLAlchemy's ping, a transaction's snapshot would be older than its lock (storage.transactions.begin);
- a connection is asked whether it lives only where there is doubt: its socket has something to say that nobody asked for,
  which is how a server says goodbye, or it was silent for a while.

A statement that was kept and is no more what it was (its columns changed type, or somebody between discarded it) fails its
transaction once, and is parsed anew the next time.
"""

from __future__ import annotations

import itertools
import select
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Self

import sqlalchemy as sa
from pg8000.core import CLOSE, NULL_BYTE, STATEMENT, SYNC_MSG, Context, make_params
from pg8000.dbapi import convert_paramstyle
from pg8000.exceptions import DatabaseError
from pg8000.legacy import Connection, Cursor, IntegrityError, ProgrammingError
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError

_BEGIN: Final = "begin transaction"
_DOUBTED_AFTER_S: Final = 10.0
_USED: Final = "moorline_used"
_PREPARED_MAX: Final = 128
_NOT_ANY_MORE: Final = frozenset({"0A000", "26000"})  # the result would be of another type; there is no such statement


@dataclass(frozen=True, slots=True)
class _Prepared:
    name: bytes
    columns: Any
    input_funcs: Any


class _Cursor(Cursor):  # type: ignore[misc] # pg8000 has no types
    """A cursor that rewrites a statement's parameters once: pg8000 reads it letter by letter each time."""

    _input_oids: Sequence[int]

    def execute(self, operation: str, args: Sequence[object] = (), stream: object = None) -> Self:
        if not args or stream is not None:
            super().execute(operation, args, stream)
            return self
        connection = self._c
        if not connection._in_transaction and not connection.autocommit:  # noqa: SLF001 - as pg8000's cursor does
            connection.execute_simple(_BEGIN)
        try:
            self._context = connection.execute_unnamed(_rewritten(operation), args, self._input_oids)
        except DatabaseError as error:
            # A broken rule of the schema is known by its class, all else by its SQLSTATE (storage.database).
            kind = IntegrityError if _code(error).startswith("23") else ProgrammingError
            raise kind(*error.args) from None
        self._row_iter = iter(self._context.rows or ())
        self._input_oids = ()
        self.input_types: list[object] = []
        return self


@lru_cache(maxsize=512)
def _rewritten(statement: str) -> str:
    return str(convert_paramstyle("format", statement, ())[0])


class OneTrip(Connection):  # type: ignore[misc] # as above
    """A connection that begins and executes in one message. Used by one thread at a time, as pg8000's."""

    _begins = False

    def __init__(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - pg8000's own
        self._prepared: OrderedDict[tuple[str, tuple[int, ...]], _Prepared] = OrderedDict()
        self._failed: list[bytes] = []  # names that may have been given to statements which then failed
        self._number = itertools.count()
        super().__init__(*arguments, **named)

    def cursor(self) -> Cursor:
        """A cursor on it."""
        return _Cursor(self)

    def execute_simple(self, statement: str) -> Context:
        """As pg8000's; a BEGIN waits for the statement it is for."""
        if statement == _BEGIN:
            self._begins = True
            return Context(statement)
        begun = f"{_BEGIN}; {statement}" if self._begins else statement
        self._begins = False
        return super().execute_simple(begun)

    def execute_unnamed(
        self, statement: str, vals: Sequence[object] = (), oids: Sequence[int] = (), stream: object = None
    ) -> Context:
        """As pg8000's, in one message; parsed and planned once if it comes with parameters."""
        if not vals:
            return self.execute_simple(statement)
        parameters = make_params(self.py_types, vals)  # before anything is sent: what cannot be sent leaves no half
        self._begin()
        key = (statement, tuple(oids))
        known = self._prepared.get(key)
        if known is None:
            return self._prepare(key, parameters, Context(statement, stream=stream))
        self._prepared.move_to_end(key)
        try:
            return self.execute_named(known.name, parameters, known.columns, known.input_funcs, statement)
        except DatabaseError as error:
            if _code(error) in _NOT_ANY_MORE:
                self._failed.append(self._prepared.pop(key).name)
            raise

    def _begin(self) -> None:
        """Put a BEGIN that waits in front of the next statement's messages."""
        if self._begins:
            self._begins = False
            self.send_PARSE(NULL_BYTE, _BEGIN)
            self.send_BIND(NULL_BYTE, ())
            self.send_EXECUTE()

    def _prepare(self, key: tuple[str, tuple[int, ...]], parameters: Sequence[str | None], context: Context) -> Context:
        while len(self._prepared) >= _PREPARED_MAX:
            self._failed.append(self._prepared.popitem(last=False)[1].name)
        for name in self._failed:
            self._send_message(CLOSE, STATEMENT + name)
        name = b"moorline_%d" % next(self._number) + NULL_BYTE
        self.send_PARSE(name, *key)
        self.send_DESCRIBE_STATEMENT(name)
        self.send_BIND(name, parameters)
        self.send_EXECUTE()
        self._sock.write(SYNC_MSG)
        self._sock.flush()
        self._failed = [name]
        self.handle_messages(context)
        self._failed = []
        self._prepared[key] = _Prepared(name, context.columns, context.input_funcs)
        return context

    def rollback(self) -> None:
        """As pg8000's; a BEGIN that waits is forgotten."""
        self._begins = False
        super().rollback()

    def speaks_unasked(self) -> bool:
        """Whether something came that nobody asked for: a goodbye, the end of the connection, or a notice."""
        watch = select.poll()  # select() knows no descriptor above 1023
        watch.register(self._usock, select.POLLIN)
        return bool(watch.poll(0))


def _code(error: DatabaseError) -> str:
    said = error.args[0] if error.args else None
    return str(said.get("C", "")) if isinstance(said, dict) else ""


def use(engine: sa.Engine) -> None:
    """Let `engine` connect this way, and doubt its idle connections as the module's docstring says."""
    event.listen(engine, "do_connect", _connected)
    event.listen(engine.pool, "checkin", _returned)
    event.listen(engine.pool, "checkout", _doubted)


def _connected(_dialect: object, _record: object, arguments: Sequence[Any], named: dict[str, Any]) -> OneTrip:
    return OneTrip(*arguments, **named)


def _returned(_connection: object, record: Any) -> None:  # noqa: ANN401 - SQLAlchemy's record of a connection
    record.info[_USED] = time.monotonic()


def _doubted(connection: Any, record: Any, _proxy: object) -> None:  # noqa: ANN401 - a DB-API connection has no common type
    used = record.info.get(_USED)
    if used is None or (time.monotonic() - used < _DOUBTED_AFTER_S and not connection.speaks_unasked()):
        return
    try:
        connection.execute_simple("SELECT 1")  # outside of any transaction: it leaves no snapshot behind
    except Exception as error:
        raise DisconnectionError(type(error).__name__) from None
