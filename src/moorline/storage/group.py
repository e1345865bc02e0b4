"""Group commit: transactions that wait for the disk together.

A durable commit costs one wait for the disk (or for PostgreSQL), whoever waits. So what several threads want to write at one
time becomes one transaction: each piece of work in a savepoint of its own, one commit for all, and only then anybody's
answer. A piece that refuses is undone by itself; when the database fails, it fails for all of them and nothing of any was
done. Each piece still sees everything that was written before it, and its audit entry is in the same transaction.

Nobody waits for company: whoever comes while no group is under way begins one at once, and those who come meanwhile are the
next. There is no thread of its own; the first who waits leads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from moorline.storage.transactions import Kept, again

A = TypeVar("A")
T = TypeVar("T")

GROUP_MAX: Final = 64
"""Pieces in one transaction: a bound on what a failing commit makes all of them do again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Together(Generic[A, T]):
    """A kind of work that several can have done in a few statements. `many` may leave any to `one`: None for it.

    `many` refuses nobody: whatever it raises, all of them are done by `one`, each for itself.
    """

    one: Callable[[sa.Connection, A], T]
    many: Callable[[sa.Connection, Sequence[A]], Sequence[T | None]]


class _Piece(Generic[T]):
    """Somebody's work, and what came of it."""

    def __init__(
        self, work: Callable[[sa.Connection], T], kind: Together[Any, T] | None = None, item: object = None
    ) -> None:
        self.work, self.kind, self.item = work, kind, item
        self.woken = threading.Event()
        self.over = False
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self, connection: sa.Connection) -> None:
        self.result = self.work(connection)
        self.error = None

    def result_or_error(self) -> T | Exception:
        if isinstance(self.error, Exception):
            return self.error
        return self.outcome()

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return cast("T", self.result)


class GroupCommit:
    """The writers of one database in one process."""

    def __init__(self, connections: Kept) -> None:
        self._connections = connections
        self._turn = threading.Lock()
        self._waiting: list[_Piece[Any]] = []
        self._busy = False

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns, once it is durable; `work` may run more than once and must only touch its connection.

        Raises what `work` raises, with nothing of it done, and as `transactions.writing`.
        """
        return self._write(_Piece(work))

    def together(self, kind: Together[A, T], item: A) -> T:
        """As `write` of `kind.one` on this item, or of `kind.many` on those that are in one group. Raises as `kind.one`."""
        return self._write(_Piece(lambda c: kind.one(c, item), kind, item))

    def together_all(self, kind: Together[A, T], items: Sequence[A]) -> list[T | Exception]:
        """As `together` on each of these, in order: what it returns, or the exception it would have raised."""
        pieces: list[_Piece[T]] = [_Piece(partial(_one, kind, item), kind, item) for item in items]
        self._done(pieces)
        return [piece.result_or_error() for piece in pieces]

    def _write(self, piece: _Piece[T]) -> T:
        self._done([piece])
        return piece.outcome()

    def _done(self, pieces: Sequence[_Piece[Any]]) -> None:
        """All of these are over when it returns. They stand behind one another, and may be of several groups."""
        if not pieces:
            return
        with self._turn:
            self._waiting += pieces
            leads, self._busy = not self._busy, True
        for piece in pieces:
            if not leads:
                piece.woken.wait()
            leads = False
            if not piece.over:
                self._lead()

    def _lead(self) -> None:
        with self._turn:
            group, self._waiting = self._waiting[:GROUP_MAX], self._waiting[GROUP_MAX:]
        try:
            again(lambda: self._connections.write(partial(_written, group)))
        except BaseException as error:
            for piece in group:
                piece.error = error
        with self._turn:
            for piece in group:
                piece.over = True
                piece.woken.set()
            if self._waiting:
                self._waiting[0].woken.set()  # leads the next
            else:
                self._busy = False


def _written(group: list[_Piece[Any]], connection: sa.Connection) -> None:
    if len(group) == 1:
        group[0].run(connection)
        return
    for piece in _left(group, connection):
        _in_savepoint(piece, connection)


def _one(kind: Together[A, T], item: A, connection: sa.Connection) -> T:
    return kind.one(connection, item)


def _left(group: list[_Piece[Any]], connection: sa.Connection) -> list[_Piece[Any]]:
    """The pieces that must be done one by one, once those that can be were done together."""
    of_kind: dict[Together[Any, Any], list[_Piece[Any]]] = {}
    for piece in group:
        if piece.kind is not None:
            of_kind.setdefault(piece.kind, []).append(piece)
    done: set[int] = set()
    for kind, pieces in of_kind.items():
        if len(pieces) > 1:
            done |= _done_together(kind, pieces, connection)
    return [piece for piece in group if id(piece) not in done]


def _done_together(kind: Together[Any, Any], pieces: list[_Piece[Any]], connection: sa.Connection) -> set[int]:
    all_of_them: _Piece[Sequence[Any]] = _Piece(lambda c: kind.many(c, [piece.item for piece in pieces]))
    _in_savepoint(all_of_them, connection)
    if all_of_them.error is not None:
        return set()
    done = set()
    for piece, result in zip(pieces, all_of_them.outcome(), strict=True):
        if result is not None:
            piece.result, piece.error = result, None
            done.add(id(piece))
    return done


def _in_savepoint(piece: _Piece[Any], connection: sa.Connection) -> None:
    # Plain statements: a savepoint object of SQLAlchemy's costs more than what most pieces do.
    connection.exec_driver_sql("SAVEPOINT piece")
    try:
        piece.run(connection)
    except BaseException as error:
        if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
            raise  # the database failed, not this piece: nothing of this transaction is left
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT piece")
        piece.error = error
    connection.exec_driver_sql("RELEASE SAVEPOINT piece")
