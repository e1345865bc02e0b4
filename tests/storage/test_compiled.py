"""Statements that are compiled once: the same rows, the same errors, and nothing that would have had to be converted."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from moorline.errors import Misconfigured, Unavailable
from moorline.storage.broker_facts import FACTS
from moorline.storage.broker_store import BrokerStore
from moorline.storage.compiled import Compiled, insert_into
from moorline.storage.transactions import reading, writing

KEEP = insert_into(FACTS)
OF = Compiled(sa.select(FACTS.c.name, FACTS.c.value).where(FACTS.c.name == sa.bindparam("of")))
FROM = Compiled(sa.select(FACTS).where(FACTS.c.value >= sa.bindparam("least")).order_by(FACTS.c.value).limit(2))
RAISE = Compiled(sa.update(FACTS).where(FACTS.c.name == sa.bindparam("of")).values(value=7))


@pytest.fixture
def store(database_url):
    opened = BrokerStore.open(database_url)
    yield opened
    opened.close()


def test_rows_are_as_sqlalchemy_has_them(store):
    """verifies that: one row, several and none are written and read, with values given and values fixed."""
    with writing(store._engine) as c:
        KEEP.run(c, {"name": "a", "value": 1})
        KEEP.run(c, {"name": "b", "value": 2}, {"name": "c", "value": 3}, {"name": "d", "value": 4})
        RAISE.run(c, {"of": "a", "what no statement asks for": 1})
    with reading(store._engine) as c:
        assert OF.one(c, {"of": "a"})._asdict() == {"name": "a", "value": 7}
        assert OF.one(c, {"of": "z"}) is None
        assert [tuple(row) for row in FROM.all(c, {"least": 3})] == [("c", 3), ("d", 4)]
        assert sorted(map(tuple, c.execute(sa.select(FACTS)))) == [("a", 7), ("b", 2), ("c", 3), ("d", 4)]


def test_a_transaction_that_fails_leaves_nothing(store):
    """verifies that: what it wrote is the transaction's: undone with it."""
    with pytest.raises(ZeroDivisionError), writing(store._engine) as c:  # noqa: PT012 - a transaction is more than a line
        KEEP.run(c, {"name": "a", "value": 1})
        raise ZeroDivisionError
    assert store.fact("a") == 0


def test_a_broken_rule_is_said_as_one(store):
    """verifies that: a second row under one key is an IntegrityError, of one row and of several, and undone."""
    for rows in ([{"name": "a", "value": 1}], [{"name": "b", "value": 1}, {"name": "a", "value": 2}]):
        with pytest.raises(IntegrityError), writing(store._engine) as c:  # noqa: PT012 - a transaction is more than a line
            KEEP.run(c, {"name": "a", "value": 0})
            KEEP.run(c, *rows)
    assert store.fact("a") == store.fact("b") == 0


def test_a_failing_database_is_unavailable(store):
    """verifies that: anything else the database says is Unavailable, and the next transaction goes on."""
    missing = insert_into(sa.table("no_such_table", sa.column("name")))
    with pytest.raises(Unavailable) as refused, writing(store._engine) as c:
        missing.run(c, {"name": "a"})
    assert refused.value.code == "storage.unavailable"
    with writing(store._engine) as c:
        KEEP.run(c, {"name": "a", "value": 1})
    assert store.fact("a") == 1


def test_a_connection_that_ends_serves_nobody_again(store, database_url):
    """verifies that: when the server ends a connection under a transaction, that one fails and the next has another."""
    if not database_url.startswith("postgresql"):
        pytest.skip("SQLite has no server")
    with pytest.raises(Unavailable), writing(store._engine) as c:  # noqa: PT012 - as above
        mine = c.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        with store._engine.connect() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({mine})")
        for number in range(2000):
            KEEP.run(c, {"name": f"n{number}", "value": number})
    with writing(store._engine) as c:
        assert c.exec_driver_sql("SELECT pg_backend_pid()").scalar() != mine
        KEEP.run(c, {"name": "after", "value": 1})
    assert store.fact("n0") == 0


@pytest.mark.parametrize(
    "statement",
    [
        sa.select(FACTS).where(FACTS.c.value == sa.bindparam("of", type_=sa.JSON())),
        sa.select(FACTS).where(FACTS.c.name.in_(sa.bindparam("of", expanding=True))),
    ],
    ids=["converted", "expanding"],
)
def test_what_must_be_converted_is_refused(store, statement):
    """verifies that: a parameter that SQLAlchemy would have made something else of never reaches a driver as it is."""
    with pytest.raises(Misconfigured) as refused, reading(store._engine) as c:
        Compiled(statement).all(c, {"of": ["a"]})
    assert refused.value.code == "storage.not_plain"


def test_a_result_that_must_be_converted_is_refused(store):
    """verifies that: so is a column whose values a driver gives in another form."""
    made = sa.select(sa.type_coerce(FACTS.c.value, sa.PickleType()).label("value"))
    with pytest.raises(Misconfigured) as refused, reading(store._engine) as c:
        Compiled(made).all(c, {})
    assert refused.value.code == "storage.not_plain"
