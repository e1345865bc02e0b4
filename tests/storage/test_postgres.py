"""What is sent to PostgreSQL in one message is what pg8000 would have sent in many, and fails as that would."""

from __future__ import annotations

import itertools
import os
import threading

import pytest
import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Unavailable
from moorline.storage import postgres as one_trip
from moorline.storage.broker_store import BrokerStore
from moorline.storage.transactions import writing

FACTS = sa.table("facts", sa.column("name"), sa.column("value"))


@pytest.fixture
def store(postgres):
    opened = BrokerStore.open(postgres.url())
    yield opened
    opened.close()


def fact(c, name):
    return c.execute(sa.text("SELECT value FROM facts WHERE name = :name"), {"name": name}).scalar()


def prepared(c):
    return c.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar()


def test_a_statement_that_fails_leaves_a_connection_that_works(store):
    """verifies that: a broken rule of the schema is known as such, undone, and what comes next is executed."""
    kept = sa.insert(FACTS)
    for name in ("a", "b"):
        with pytest.raises(sa.exc.IntegrityError), writing(store._engine) as c:
            c.execute(kept, [{"name": name, "value": value} for value in (1, 2)])
    with store.transaction() as c:
        c.execute(kept, {"name": "a", "value": 3})
    with store.reading() as c:
        assert (fact(c, "a"), fact(c, "b")) == (3, None)


def test_a_transaction_sees_what_the_writer_before_it_left(store):
    """verifies that: a writer which waited for another one reads its rows, instead of being undone for an older snapshot."""
    tries = itertools.count()
    begun = threading.Event()

    def second():
        begun.set()
        with writing(store._engine) as c:  # not run again: one that was undone fails this test
            next(tries)
            seen.append(fact(c, "first"))

    seen, waits = [], threading.Thread(target=second)
    store.set_document("used", b"so that a connection waits in the pool")
    with writing(store._engine) as c:
        c.execute(sa.insert(FACTS), {"name": "first", "value": 7})
        waits.start()
        begun.wait()
        waits.join(0.2)
        assert waits.is_alive()
    waits.join()
    assert (seen, next(tries)) == ([7], 1)


def test_a_server_that_ended_the_connection_costs_a_new_one(store, postgres):
    """verifies that: connections the server ended meanwhile are found so before they are used, without asking each time."""
    store.set_document("a", b"1")
    postgres.execute(
        f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{store._engine.url.database}'"
    )
    store.set_document("a", b"2")
    assert store.document("a") == b"2"


def test_a_kept_statement_outlives_no_change_of_its_table(store):
    """verifies that: after a migration by another process a kept statement is refused once, and then parsed anew."""
    question = sa.text("SELECT value FROM facts WHERE name = :name")
    with store.transaction() as c:
        c.execute(sa.insert(FACTS), {"name": "a", "value": 5})
        c.execute(question, {"name": "a"})
    with store.transaction() as c:
        c.exec_driver_sql("ALTER TABLE facts ALTER COLUMN value TYPE text")
    with pytest.raises(Unavailable), writing(store._engine) as c:
        c.execute(question, {"name": "a"})
    with store.reading() as c:
        assert c.execute(question, {"name": "a"}).scalar() == "5"


def test_kept_statements_are_bounded(store, monkeypatch):
    """verifies that: the server keeps no more statements of a connection than are remembered here, failed ones included."""
    monkeypatch.setattr(one_trip, "_PREPARED_MAX", 5)
    with store.reading() as c:
        before = prepared(c)
        for number in range(20):
            asked = sa.text(f"SELECT value + {number} FROM facts WHERE name = :name OR name = 'halted'")
            c.execute(asked, {"name": "none"})
        assert prepared(c) <= max(before, 5) + 1
    for number in range(20):
        with pytest.raises(Unavailable), store.reading() as c:
            c.execute(sa.text(f"SELECT {number} / value FROM facts, nowhere WHERE name = :name"), {"name": "none"})
    with store.reading() as c:
        assert prepared(c) <= max(before, 5) + 1


def test_what_cannot_be_sent_begins_nothing(store):
    """verifies that: parameters that cannot be written leave no transaction behind on the connection."""
    with pytest.raises(TypeError), store.reading() as c:
        c.connection.dbapi_connection.cursor().execute("SELECT %s", (object.__new__(type("Odd", (), {"__str__": None})),))
    with store.reading() as c:
        assert c.connection.dbapi_connection._in_transaction is False


def test_a_process_with_many_descriptors_still_looks_at_its_connections(store):
    """verifies that: a broker with thousands of open sessions reaches its database (select() would end at 1023)."""
    taken = [os.dup(0) for _ in range(1100)]
    try:
        fresh = BrokerStore.open(store._engine.url.render_as_string(hide_password=False))
        for at in (1, 2):
            fresh.append("seen", {"number": at}, at=Instant(at))
        assert len(fresh.audit()) == 2
        fresh.close()
    finally:
        for descriptor in taken:
            os.close(descriptor)
