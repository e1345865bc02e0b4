"""A PostgreSQL cluster of the tests' own: initdb from Debian's package, a unix socket in a folder nobody else has, no port.

PostgreSQL refuses to run as root, so then the cluster belongs to the package's user `postgres`.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy

PORT = "5432"  # part of the socket's name; nothing listens on the network


def programs() -> Path | None:
    """Where initdb and pg_ctl are, newest version first."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: -int(path.parts[-3]))
    if found:
        return found[0].parent
    there = shutil.which("pg_ctl")
    return None if there is None else Path(there).parent


@dataclass
class Cluster:
    """A running cluster. `url()` is a fresh, empty database."""

    bin: Path
    folder: Path
    user: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def socket(self) -> Path:
        return self.folder / f".s.PGSQL.{PORT}"

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.bin / program), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups", *command]
        # Not captured: the server inherits the descriptors, and whoever waits for their end would wait for the server's.
        with (self.folder / "log").open("ab") as log:
            done = subprocess.run(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
        assert done.returncode == 0, (self.folder / "log").read_text()

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c max_connections=200"
        self.run("pg_ctl", "start", "-w", "-D", str(self.data), "-l", str(self.folder / "server.log"), "-o", options)

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "stop", "-w", "-m", mode, "-D", str(self.data))

    def of(self, database: str, *, socket: Path | None = None) -> str:
        return f"postgresql+pg8000://{self.user}@/{database}?unix_sock={socket or self.socket}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        engine = sqlalchemy.create_engine(self.of(database), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()

    def url(self, template: str = "template1") -> str:
        name = f"t{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.of(name)


def _roomy() -> Path | None:
    """Memory, if there is enough: the tests kill processes, not machines, and need no disk that waits."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 1 << 31 else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """The cluster of this test run."""
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="moorline-pg-", dir=_roomy()))
    if os.geteuid() == 0:
        account = pwd.getpwnam(user)
        os.chown(folder, account.pw_uid, account.pw_gid)
    cluster = Cluster(found, folder, user)
    try:
        cluster.run("initdb", "-D", str(cluster.data), "--auth=trust", "--encoding=UTF8", "--no-locale", "-U", user)
        cluster.start()
        yield cluster
        cluster.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> Iterator[str]:
    """An empty database of each kind, one after the other."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    cluster = request.getfixturevalue("postgres")
    made = cluster.url()
    yield made
    cluster.execute(f"DROP DATABASE {sqlalchemy.make_url(made).database} WITH (FORCE)")


@pytest.fixture
def copied(request, tmp_path):
    """Copies a database that nobody has open, as a backup would: `copied(url)` is the copy's URL."""
    numbers = itertools.count()

    def copy(url: str) -> str:
        if url.startswith("sqlite"):
            source = Path(url.removeprefix("sqlite:///"))
            engine = sqlalchemy.create_engine(url)
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            engine.dispose()
            made = tmp_path / f"copy-{next(numbers)}.db"
            shutil.copy(source, made)
            return f"sqlite:///{made}"
        return request.getfixturevalue("postgres").url(template=sqlalchemy.make_url(url).database)

    return copy
