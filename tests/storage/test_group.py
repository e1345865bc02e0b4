"""Group commit: one commit for many, each in its own right."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import sqlalchemy as sa

from moorline.audit import log
from moorline.clock import Instant
from moorline.errors import Refused, Unavailable
from moorline.storage.broker_facts import AUDIT_DOMAIN
from moorline.storage.broker_store import BrokerStore
from moorline.storage.group import Together
from statements import before_each

NOW = Instant(1_790_000_000)


class Door:
    """Holds the first commit open, so that the others gather behind it; counts the commits."""

    def __init__(self, engine):
        self.inside, self.open, self.commits = threading.Event(), threading.Event(), 0
        sa.event.listen(engine, "commit", self._commit)

    def _commit(self, _connection):
        self.commits += 1
        if self.commits == 1:
            self.inside.set()
            assert self.open.wait(30)


def gathered(store, door, works):
    """Runs the first work, and the others while it waits for its commit; what became of each."""
    outcomes = [None] * len(works)

    def run(number):
        try:
            outcomes[number] = store.write(works[number])
        except BaseException as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    threads[0].start()
    assert door.inside.wait(30)
    for thread in threads[1:]:
        thread.start()
    while len(store._group._waiting) < len(works) - 1:
        pass
    door.open.set()
    for thread in threads:
        thread.join()
    return outcomes


def entry(store, name):
    return lambda c: store.append_in(c, NOW, "event", {"name": name})


def test_who_waits_is_committed_together(database_url):
    """verifies that: twenty that come during one commit are one more commit, each with its entry, and the chain holds."""
    store = BrokerStore.open(database_url)
    door = Door(store._engine)
    assert gathered(store, door, [entry(store, f"n{number}") for number in range(21)]) == [None] * 21
    assert door.commits == 2
    log.verify(store.audit(), domain=AUDIT_DOMAIN)
    assert len(store.audit()) == 21
    store.close()


def test_one_that_refuses_takes_nothing_along(database_url):
    """verifies that: of a group, the piece that raises is undone and told; those before and behind it are committed."""
    store = BrokerStore.open(database_url)

    def refuses(c):
        store.append_in(c, NOW, "refused", {"name": "never"})
        raise Refused("test.no", "no")

    def breaks_a_rule(c):
        store.append_in(c, NOW, "broken", {"name": "never"})
        c.exec_driver_sql("INSERT INTO facts (name, value) VALUES ('twice', 1)")
        c.exec_driver_sql("INSERT INTO facts (name, value) VALUES ('twice', 1)")

    works = [entry(store, "a"), entry(store, "b"), refuses, breaks_a_rule, entry(store, "c")]
    outcomes = gathered(store, Door(store._engine), works)
    assert [type(one).__name__ for one in outcomes] == ["NoneType", "NoneType", "Refused", "IntegrityError", "NoneType"]
    assert len(store.audit()) == 3
    assert store.fact("twice") == 0
    log.verify(store.audit(), domain=AUDIT_DOMAIN)
    store.close()


def test_a_database_that_fails_fails_for_all_and_the_next_go_on(database_url):
    """verifies that: when the commit of a group fails, nobody of it is told yes, nothing is left, and writing goes on."""
    store = BrokerStore.open(database_url)
    door = Door(store._engine)

    def fails(c):
        c.exec_driver_sql("INSERT INTO no_such_table VALUES (1)")

    outcomes = gathered(store, door, [entry(store, "a"), entry(store, "b"), fails, entry(store, "c")])
    assert outcomes[0] is None
    assert all(isinstance(one, Unavailable) for one in outcomes[1:])
    assert len(store.audit()) == 1
    store.append("after", {"name": "d"}, at=NOW)
    assert len(store.audit()) == 2
    store.close()


def test_killed_in_a_group_all_or_nothing(database_url):
    """verifies that: SIGKILL at any statement of a group leaves the whole group or none of it."""
    BrokerStore.open(database_url).close()
    step, whole = 0, 0
    while True:
        before = _entries(database_url)
        status = _die_at(database_url, step)
        grown = _entries(database_url) - before
        assert grown in (0, 1, 5)  # the first alone, then four together
        whole += grown == 5
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        step += 1
    assert step > 12
    assert whole >= 1


def _entries(url):
    store = BrokerStore.open(url)
    found = store.audit()
    log.verify(found, domain=AUDIT_DOMAIN)
    store.close()
    return len(found)


def _die_at(url, step):
    pid = os.fork()
    if pid == 0:
        store = BrokerStore.open(url)
        seen = 0

        def count(*_):
            nonlocal seen
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        before_each(store._engine, count)
        door = Door(store._engine)
        outcomes = gathered(store, door, [entry(store, f"n{number}") for number in range(5)])
        os._exit(0 if outcomes == [None] * 5 else 1)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status)
    return status


@pytest.mark.parametrize("threads", [8])
def test_many_threads_lose_nothing(database_url, threads):
    """verifies that: whatever groups come about, every entry of every thread is in the log once."""
    store = BrokerStore.open(database_url)

    def work(thread):
        for number in range(20):
            store.append("event", {"name": f"{thread}-{number}"}, at=NOW)

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    entries = store.audit()
    log.verify(entries, domain=AUDIT_DOMAIN)
    assert len(entries) == threads * 20
    store.close()


class Kind:
    """A store's door for one kind of work, in the shape that `gathered` knows: an item instead of a function."""

    def __init__(self, store, kind):
        self._group, self._kind, self._store = store._group, kind, store

    def write(self, item):
        return self._store.write(item) if callable(item) else self._group.together(self._kind, item)


@pytest.mark.parametrize("fails", [False, True])
def test_a_kind_of_work_is_done_together_or_else_each_for_itself(database_url, fails):
    """verifies that: what cannot be done together, or fails so, is done one by one, and nothing is done twice."""
    store, together = BrokerStore.open(database_url), []

    def one(c, name):
        store.append_in(c, NOW, "alone", {"name": name})
        if name == "refused":
            raise Refused("test.no", "no")
        return f"alone {name}"

    def many(c, names):
        together.append(tuple(names))
        for name in names[::2]:
            store.append_in(c, NOW, "together", {"name": name})
        if fails:
            raise Unavailable("test.broken", "it broke behind what it wrote")
        return [f"together {name}" if number % 2 == 0 else None for number, name in enumerate(names)]

    names = ["a", "b", "c", "refused"]
    outcomes = gathered(Kind(store, Together(one=one, many=many)), Door(store._engine), [entry(store, "first"), *names])
    (asked,) = together
    assert sorted(asked) == names
    done = {name: "together" if not fails and asked.index(name) % 2 == 0 else "alone" for name in names}
    expected = [f"{done[name]} {name}" for name in names]
    told = ["alone refused" if isinstance(outcome, Refused) else outcome for outcome in outcomes[1:]]
    assert told == expected
    written = [log.parse_entry(data) for data in store.audit()][1:]
    kept = [line for line in expected if line != "alone refused"]
    assert sorted(f"{line.event} {line.subject}" for line in written) == sorted(kept)
    log.verify(store.audit(), domain=AUDIT_DOMAIN)
    store.close()


def test_many_at_once_are_each_done_once_beside_others(database_url):
    """verifies that: more than a group takes, given by several threads at one time, are each done once."""
    store = BrokerStore.open(database_url)

    def one(c, number):
        if number % 10 == 7:
            raise Refused("test.odd", "no", got=number)
        store.append_in(c, NOW, "made", {"number": number})
        return -number

    kind = Together(one=one, many=lambda _c, items: [None] * len(items))
    outcomes = {}

    def run(first):
        outcomes[first] = store._group.together_all(kind, range(first, first + 100))

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [outcome for first in sorted(outcomes) for outcome in outcomes[first]]
    assert [one if isinstance(one, int) else one.code for one in said] == [
        "test.odd" if number % 10 == 7 else -number for number in range(300)
    ]
    assert len(store.audit()) == 270
    log.verify(store.audit(), domain=AUDIT_DOMAIN)
    assert store._group.together_all(kind, []) == []
    store.close()


def test_a_connection_that_is_kept_is_as_good_as_a_new_one(database_url):
    """verifies that: a refusal, a broken rule and a failing database leave nothing to whoever comes next."""
    store = BrokerStore.open(database_url)

    def half(error):
        def work(c):
            store.set_fact_in(c, "half", 1)
            raise error

        return work

    def breaks(c):
        store.set_fact_in(c, "half", 1)
        c.exec_driver_sql("INSERT INTO facts (name, value) VALUES ('half', 2)")

    def fails(c):
        store.set_fact_in(c, "half", 1)
        c.exec_driver_sql("INSERT INTO no_such_table VALUES (1)")

    trials = [(half(Refused("test.no", "no")), Refused), (half(KeyError()), KeyError), (breaks, sa.exc.IntegrityError)]
    for work, error in [*trials, (fails, Unavailable)]:
        store.write(lambda c: store.set_fact_in(c, "whole", 1))
        with pytest.raises(error):
            store.write(work)
        with pytest.raises(error):
            store._kept.read(work)
        cursor, _, _ = store.launch_facts("half", b"l", 1)
        assert (cursor, store.fact("half"), store.launch_facts("whole", b"l", 1)[0]) == (0, 0, 1)
    store.close()
    assert store._engine.pool.checkedout() == 0


def test_what_is_kept_reads_what_was_committed_since(database_url):
    """verifies that: no snapshot is kept along with a connection; several at once have one each."""
    store, other = BrokerStore.open(database_url), BrokerStore.open(database_url)
    for number in range(5):
        other.write(lambda c, number=number: store.set_fact_in(c, "n", number))
        assert store.launch_facts("n", b"l", 1)[0] == number

    def deeper(depth):
        return store._kept.read(lambda c: store.fact_in(c, "n") if depth == 0 else deeper(depth - 1))

    assert deeper(4) == 4
    for each in (store, other):
        each.close()
        assert each._engine.pool.checkedout() == 0
