"""Opening a database: SQLite with durable settings by default, or PostgreSQL; migrations by Alembic, one chain a store.

`store` names a folder below storage/migrations/; its revisions are applied in order and recorded in the table
`<store>_version`. A database that is already at the newest revision is opened without loading Alembic. Processes that open
one database at once migrate it one after the other: under SQLite's write lock, or an advisory lock of PostgreSQL.

PostgreSQL is reached by pg8000 (ADR 0014): `postgresql+pg8000://user@/name?unix_sock=/run/postgresql/.s.PGSQL.5432`, or
`postgresql+pg8000://user:password@host/name?sslrootcert=/path/ca.pem` over TLS that is verified. There every session is
SERIALIZABLE with deadlines of its own; how transactions run is in storage/transactions.py.
"""

from __future__ import annotations

import re
import sqlite3
import ssl
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError

from moorline.errors import Misconfigured, Unavailable
from moorline.storage import postgres

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_REVISION: Final = re.compile(r'^revision\s*(?::\s*str)?\s*=\s*"(\w+)"', re.MULTILINE)
BUSY_MS: Final = 5000
_MIGRATION_S: Final = 120  # another process may be migrating a large database: whoever starts meanwhile waits for it
_MIGRATION_TURN_S: Final = 0.1
STATEMENT_MS: Final = 5000
_SOCKET_S: Final = 8.0  # a server that went silent altogether; longer than any statement may take
_IDLE_MS: Final = 30_000  # a transaction whose process stands still must not hold the lock of all others
STORE_OPTION: Final = "moorline_store"
"""The execution option under which an engine carries the name of its store."""


def open_database(url: str, store: str, *, replayed: bool = False) -> sqlalchemy.Engine:
    """An engine on `url` (`sqlite:////path` or `postgresql+pg8000://...`) whose schema is at `store`'s newest revision.

    `replayed`: whoever had a transaction committed gives it again if a power cut takes it away, so none waits for the disk.
    Raises Misconfigured("storage.url" | "storage.unknown_store" | "storage.newer_schema") or
    Unavailable("storage.unavailable").
    """
    newest = _newest(store)
    engine = _engine(url, store)
    if replayed:
        event.listen(engine, "connect", _replayed)
    try:
        if _current(engine, store) != newest:
            _migrate(engine, store)
    except DBAPIError as error:
        engine.dispose()
        raise Unavailable(
            "storage.unavailable",
            "the database cannot be opened",
            got=reason(error),
            remedy="check path or address, space and rights",
        ) from None
    except BaseException:
        engine.dispose()
        raise
    return engine


def reason(error: DBAPIError) -> str:
    """What the database said, in one line: PostgreSQL's code and words, or SQLite's. Never a parameter."""
    said = _said_by_postgres(error)
    if said:
        return f"{said.get('C', '?')} {said.get('M', '')}".strip()
    return str(error.orig) if error.orig is not None else type(error).__name__


def code_of(error: DBAPIError) -> str:
    """The SQLSTATE of an error of PostgreSQL; empty for anything else."""
    return _said_by_postgres(error).get("C", "")


def is_gone(error: DBAPIError) -> bool:
    """Whether this error of PostgreSQL ends its connection: the socket is gone, or the server shut down."""
    return type(error.orig).__name__ == "InterfaceError" or code_of(error).startswith(("57P", "08"))


# Engines ---------------------------------------------------------------------------------------------------------------


def _engine(url: str, store: str) -> sqlalchemy.Engine:
    options = {STORE_OPTION: store}
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        raise _not_a_url() from None
    if parsed.drivername == "sqlite":
        engine = sqlalchemy.create_engine(parsed, execution_options=options)
        event.listen(engine, "connect", _durable)
        if store == "ledger":
            event.listen(engine, "connect", _scattered)
        if store == "verifier":
            event.listen(engine, "connect", _rewritten)
        return engine
    if parsed.drivername != "postgresql+pg8000":
        raise _not_a_url()
    engine = sqlalchemy.create_engine(
        parsed.difference_update_query(["sslrootcert"]),
        execution_options=options,
        isolation_level="SERIALIZABLE",
        connect_args={
            "timeout": _SOCKET_S,
            "application_name": f"moorline-{store}",
            **({} if "unix_sock" in parsed.query else {"ssl_context": _tls(parsed)}),
        },
        pool_size=8,
        max_overflow=24,
        pool_timeout=_SOCKET_S,
    )
    # Several rows of one table in one message: pg8000 sends a message a row otherwise, and waits for each answer.
    engine.dialect.use_insertmanyvalues_wo_returning = True
    postgres.use(engine)
    event.listen(engine, "connect", _strict)
    event.listen(engine, "handle_error", _disconnected)
    return engine


def _not_a_url() -> Misconfigured:
    # The URL itself is not shown: it may hold a password.
    return Misconfigured(
        "storage.url",
        "this is no database URL that is served here",
        expected="sqlite:////path or postgresql+pg8000://user@/name?unix_sock=/path/.s.PGSQL.5432",
    )


def _tls(url: sqlalchemy.URL) -> ssl.SSLContext:
    """TLS that knows its server: rows of a broker must not be answered by whoever sits on the network."""
    authority = url.query.get("sslrootcert")
    try:
        return ssl.create_default_context(cafile=authority if isinstance(authority, str) else None)
    except OSError as error:
        raise Misconfigured("storage.url", "sslrootcert cannot be read", got=error.strerror) from None


def _durable(connection: Any, _: object) -> None:  # noqa: ANN401 - a DB-API connection has no common type
    # WAL with synchronous=FULL: a transaction that was acknowledged survives power loss (intent before effect, ADR 0004).
    # secure_delete: what is deleted is overwritten, for rows that hold (wrapped) keys.
    pragmas = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", f"busy_timeout={BUSY_MS}")
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")


def _scattered(connection: Any, _: object) -> None:  # noqa: ANN401 - as above
    # The ledger's keys are hashes: each row of a block is on a page of its own, wherever. Pages that come again stay in
    # memory, and reach the database once for several blocks. Everything in it is public: what is deleted need not be
    # overwritten, on yet another page.
    for pragma in ("cache_size=-65536", "wal_autocheckpoint=8000", "secure_delete=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def _rewritten(connection: Any, _: object) -> None:  # noqa: ANN401 - as above
    # A verifier writes its hosts' results again once a period, megabytes a second of a large fleet. The log may be 32 MiB
    # before it is copied into the database: a third less is written, and the disk is waited for less often.
    connection.execute("PRAGMA wal_autocheckpoint=8000")


def _replayed(connection: Any, _: object) -> None:  # noqa: ANN401 - as above
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=NORMAL")
        return
    cursor = connection.cursor()
    cursor.execute("SET synchronous_commit TO off")
    connection.commit()
    cursor.close()


def _strict(connection: Any, _: object) -> None:  # noqa: ANN401 - as above
    # synchronous_commit=on whatever the server's configuration says: a commit that was acknowledged is on the disk.
    settings = {
        "synchronous_commit": "on",
        "statement_timeout": STATEMENT_MS,
        "lock_timeout": BUSY_MS,
        "idle_in_transaction_session_timeout": _IDLE_MS,
    }
    cursor = connection.cursor()
    for name, value in settings.items():
        cursor.execute(f"SET {name} TO '{value}'")
    connection.commit()
    cursor.close()


def _disconnected(context: sqlalchemy.engine.ExceptionContext) -> None:
    """pg8000 does not say which of its errors end a connection."""
    error = context.sqlalchemy_exception
    if isinstance(error, DBAPIError) and is_gone(error):
        context.is_disconnect = True


def _said_by_postgres(error: DBAPIError) -> dict[str, str]:
    said = error.orig.args[0] if error.orig is not None and error.orig.args else None
    return said if isinstance(said, dict) else {}


# Migrations ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _newest(store: str) -> str:
    files = sorted((_MIGRATIONS / store / "versions").glob("[0-9]*.py"))
    if not files:
        raise Misconfigured("storage.unknown_store", "there are no migrations for this store", got=store)
    found = _REVISION.search(files[-1].read_text("utf-8"))
    if found is None:
        raise Misconfigured("storage.unknown_store", "a migration names no revision", got=files[-1].name)
    return found.group(1)


def _current(engine: sqlalchemy.Engine, store: str) -> str | None:
    with engine.connect() as connection:
        return _version_in(connection, store)


def _version_in(connection: sqlalchemy.Connection, store: str) -> str | None:
    table = f"{store}_version"
    if not sqlalchemy.inspect(connection).has_table(table):
        return None
    return connection.execute(
        sqlalchemy.select(sqlalchemy.column("version_num")).select_from(sqlalchemy.table(table))
    ).scalar()


@contextmanager
def _alone(engine: sqlalchemy.Engine, store: str) -> Iterator[sqlalchemy.Connection]:
    """A transaction of the one process that migrates; what it reads is what the one before it left."""
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA busy_timeout={_MIGRATION_S * 1000}")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()
            connection.exec_driver_sql(f"PRAGMA busy_timeout={BUSY_MS}")
        return
    # The lock is held by a session of its own: the transaction must take its snapshot after the lock is ours.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as holder:
        number = zlib.crc32(f"moorline-migrate-{store}".encode())
        _wait_for_turn(holder, number)
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            holder.exec_driver_sql(f"SELECT pg_advisory_unlock({number})")


def _wait_for_turn(holder: sqlalchemy.Connection, number: int) -> None:
    """Take an advisory lock by asking again: one statement that waits has the deadline of any statement."""
    last = time.monotonic() + _MIGRATION_S
    while not holder.exec_driver_sql(f"SELECT pg_try_advisory_lock({number})").scalar():
        if time.monotonic() > last:
            raise Unavailable(
                "storage.unavailable",
                "another process has been migrating the database for too long",
                expected=f"at most {_MIGRATION_S} s",
                remedy="see what that process does, then start again",
            )
        time.sleep(_MIGRATION_TURN_S)


def _migrate(engine: sqlalchemy.Engine, store: str) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS / store))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in scripts.walk_revisions()}

    def upgrade(revision: object, _: object) -> Any:  # noqa: ANN401 - Alembic's private step type
        return scripts._upgrade_revs("head", revision)  # type: ignore[arg-type]  # noqa: SLF001 - as alembic.command.upgrade does

    with (
        _alone(engine, store) as connection,
        EnvironmentContext(config, scripts, fn=upgrade, destination_rev="head") as environment,
    ):
        current = _version_in(connection, store)
        if current is not None and current not in known:
            raise Misconfigured(
                "storage.newer_schema",
                "the database was made by a newer version",
                expected=sorted(known),
                got=current,
                remedy="run the version that made it",
            )
        environment.configure(connection=connection, version_table=f"{store}_version", transactional_ddl=True)
        environment.run_migrations()
