"""A broker's database fails: slow, read-only, full of somebody's lock. Nobody is told yes, and it goes on afterwards."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from moorline.audit import log
from moorline.errors import MoorlineError, Unavailable
from moorline.storage import database
from moorline.storage.broker_facts import AUDIT_DOMAIN
from moorline.storage.broker_store import BrokerStore

sys.path.insert(0, str(Path(__file__).parent))
from test_consumption import LATER, NOW, launch_of, moved, ready  # noqa: F401 - a fixture


class SlowSocket:
    """A proxy before PostgreSQL's socket that carries bytes, or holds them back."""

    def __init__(self, there: Path, here: Path) -> None:
        self.there, self.here = there, here
        self.open = threading.Event()
        self.open.set()
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._up.wait(10)

    def _run(self) -> None:
        async def serve() -> None:
            await asyncio.start_unix_server(self._carry, self.here)
            self._up.set()

        self._loop.create_task(serve())
        self._loop.run_forever()

    async def _carry(self, reader, writer) -> None:
        there, onward = await asyncio.open_unix_connection(self.there)

        async def pump(source, sink) -> None:
            while data := await source.read(65536):
                await asyncio.to_thread(self.open.wait)
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, onward), pump(there, writer), return_exceptions=True)

    def close(self) -> None:
        self.open.set()
        self._loop.call_soon_threadsafe(self._loop.stop)


def consumed(store, number=0):
    wanted = launch_of(number, session=f"s{number}", instance=f"i-{number}")
    return store.consume(wanted, advance=moved, not_after=LATER, at=NOW)


def refused(store, number=0) -> MoorlineError:
    with pytest.raises(MoorlineError) as caught:
        consumed(store, number)
    return caught.value


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_database_that_does_not_answer_is_given_up_in_time(ready, database_url, postgres, tmp_path, monkeypatch):  # noqa: F811
    """verifies that: behind a connection that hangs a consumption is Unavailable with a retry time, and works afterwards."""
    monkeypatch.setattr(database, "_SOCKET_S", 0.5)
    here = tmp_path / ".s.PGSQL.5432"
    proxy = SlowSocket(postgres.socket, here)
    store = BrokerStore.open(postgres.of(sa.make_url(database_url).database, socket=here))
    assert consumed(store).public
    proxy.open.clear()
    error = refused(store, 1)
    assert (error.code, error.retry_after_s > 0) == ("storage.unavailable", True)
    proxy.open.set()
    again = consumed(store, 1)  # perhaps the held commit came through after all: then it is the same launch again
    assert again.public
    store.close()
    proxy.close()
    entries = ready.audit()
    log.verify(entries, domain=AUDIT_DOMAIN)
    assert sum(b"launch-consumed" in entry for entry in entries) == 2


def test_a_database_that_may_only_be_read_consumes_nothing(ready, database_url):  # noqa: F811
    """verifies that: on a read-only database reading goes on, and everything that would have to be durable is refused."""
    store = BrokerStore.open(database_url)
    if database_url.startswith("sqlite"):
        sa.event.listen(store._engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only=ON"))
    else:
        name = sa.make_url(database_url).database
        with ready._engine.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            connection.commit()
    store._engine.dispose()  # its connections are from before
    assert store.pool_size("records", "tls") == 5
    assert refused(store).code == "storage.unavailable"
    store.close()
    assert ready.launches() == ()


def test_somebody_who_holds_the_lock_is_waited_for_and_not_for_ever(ready, database_url, monkeypatch):  # noqa: F811
    """verifies that: a writer that stands still makes others Unavailable within the bound; when it is gone they go on."""
    monkeypatch.setattr(database, "BUSY_MS", 300)
    store = BrokerStore.open(database_url)
    with ready.transaction():
        began = time.monotonic()
        assert refused(store).code == "storage.unavailable"
        assert time.monotonic() - began < 60
    assert consumed(store).public
    store.close()


def test_a_broker_that_starts_without_its_database_says_so(tmp_path):
    """verifies that: no database at the start is a typed error with what to do, not a traceback."""
    with pytest.raises(Unavailable) as caught:
        BrokerStore.open(f"sqlite:///{tmp_path / 'missing' / 'broker.db'}")
    assert caught.value.remedy
