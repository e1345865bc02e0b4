"""Opening a database: SQLite with durable settings by default, and migrations by Alembic, one chain a store.

`store` names a folder below storage/migrations/; its revisions are applied in order and recorded in the table
`<store>_version`. A database that is already at the newest revision is opened without loading Alembic.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from sqlalchemy import event

from moorline.errors import Misconfigured, Unavailable

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_REVISION: Final = re.compile(r'^revision\s*(?::\s*str)?\s*=\s*"(\w+)"', re.MULTILINE)
BUSY_MS: Final = 5000


def open_database(url: str, store: str) -> sqlalchemy.Engine:
    """An engine on `url` (`sqlite:////path` or PostgreSQL) whose schema is at `store`'s newest revision.

    Raises Misconfigured("storage.unknown_store" | "storage.newer_schema") or Unavailable("storage.unavailable").
    """
    newest = _newest(store)
    engine = sqlalchemy.create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _durable)
    try:
        current = _current(engine, store)
        if current != newest:
            _migrate(engine, store, current)
    except sqlalchemy.exc.DBAPIError as error:
        raise Unavailable(
            "storage.unavailable",
            "the database cannot be opened",
            got=str(error.orig),
            remedy="check path, space and rights",
        ) from None
    return engine


def _durable(connection: Any, _: object) -> None:  # noqa: ANN401 - a DB-API connection has no common type
    # WAL with synchronous=FULL: a transaction that was acknowledged survives power loss (intent before effect, ADR 0004).
    # secure_delete: what is deleted is overwritten, for rows that hold (wrapped) keys.
    pragmas = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", f"busy_timeout={BUSY_MS}")
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")


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
    table = f"{store}_version"
    if not sqlalchemy.inspect(engine).has_table(table):
        return None
    with engine.connect() as connection:
        return connection.execute(
            sqlalchemy.select(sqlalchemy.column("version_num")).select_from(sqlalchemy.table(table))
        ).scalar()


def _migrate(engine: sqlalchemy.Engine, store: str, current: str | None) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS / store))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in scripts.walk_revisions()}
    if current is not None and current not in known:
        raise Misconfigured(
            "storage.newer_schema",
            "the database was made by a newer version",
            expected=sorted(known),
            got=current,
            remedy="run the version that made it",
        )

    def upgrade(revision: object, _: object) -> Any:  # noqa: ANN401 - Alembic's private step type
        return scripts._upgrade_revs("head", revision)  # type: ignore[arg-type]  # noqa: SLF001 - as alembic.command.upgrade does

    with (
        engine.begin() as connection,
        EnvironmentContext(config, scripts, fn=upgrade, destination_rev="head") as environment,
    ):
        environment.configure(connection=connection, version_table=f"{store}_version", transactional_ddl=True)
        environment.run_migrations()
