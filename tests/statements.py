"""What a database is really given: each statement as its driver sends it, whoever made it."""

from __future__ import annotations

import sqlite3

import sqlalchemy as sa


def before_each(engine, call):
    """`call()` comes before each statement of this engine's transactions, their first and their COMMIT included.

    Of several rows on SQLite, before each. On PostgreSQL BEGIN is sent with the statement after it and counts with that.
    """

    def watched(connection, _record, _proxy):
        if isinstance(connection, sqlite3.Connection):
            connection.set_trace_callback(lambda _statement: call())
        elif "execute_simple" not in vars(connection):
            _watch(connection, call)

    sa.event.listen(engine, "checkout", watched)


def _watch(connection, call):
    simple, unnamed = connection.execute_simple, connection.execute_unnamed

    def execute_simple(statement):
        if statement != "begin transaction":
            call()
        return simple(statement)

    def execute_unnamed(statement, vals=(), oids=(), stream=None):
        if vals:
            call()
        return unnamed(statement, vals, oids, stream)

    connection.execute_simple, connection.execute_unnamed = execute_simple, execute_unnamed
