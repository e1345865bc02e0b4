"""A launch is consumed once: against replays, races, restored databases and SIGKILL at every step."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import threading
from dataclasses import replace

import pytest
import sqlalchemy
from cryptography.hazmat.primitives import serialization

from moorline import storage
from moorline.audit import log
from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.hsm.launch_keys import COUNTER, LaunchKeys
from moorline.services.broker_clock import RisingClock
from moorline.storage import broker_facts
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_launches import CONFIRMED, Launch
from moorline.storage.broker_pool import PoolEntry
from moorline.storage.broker_store import BrokerStore
from moorline.wire import keys, launch
from moorline.wire.launch import ChannelProfile, LaunchFields
from statements import before_each

NOW = Instant(1_800_000_000)
LATER = Instant(NOW + 100)
LAUNCHER = b"L" * 32


def launch_of(sequence: int = 0, *, session: str = "one", instance: str = "r-1", generation: int = 1) -> Launch:
    return Launch(
        launcher=LAUNCHER,
        epoch=1,
        sequence=sequence,
        kem_digest=f"kem {session}".encode().ljust(32),
        signing_digest=f"sig {session}".encode().ljust(32),
        session=session,
        service="records",
        profile="tls",
        tenant="t1",
        instance=instance,
        generation=generation,
        host="h1",
    )


def moved(c) -> None:
    """As LaunchKeys.advance_in, with no token behind it."""
    BrokerStore.set_fact_in(c, "counter", 7)


def entry(number: int) -> PoolEntry:
    return PoolEntry(public=f"public {number}".encode(), wrapped=f"wrapped {number}".encode())


@pytest.fixture
def ready(store) -> BrokerStore:
    """A store with a launcher, an epoch, a lease of ten and a pool of five."""
    store.admit_launcher(launcher=LAUNCHER, ticket=b"t" * 32, measurement=b"m", chip=b"c", session="l", at=NOW)
    store.open_epoch(epoch=1, opened=NOW, not_after=Instant(NOW + 100), grace_s=10, wrapped=b"w")
    store.grant_lease(launcher=LAUNCHER, epoch=1, count=10, not_after=Instant(NOW + 50), counter=2, at=NOW)
    store.add_to_pool("records", "tls", [entry(number) for number in range(5)])
    return store


def refused(store, wanted: Launch, *, at: Instant = NOW) -> str:
    with pytest.raises(MoorlineError) as caught:
        store.consume(wanted, advance=moved, not_after=LATER, at=at)
    return caught.value.code


def issued(serial: str = "1", instance: str = "r-1") -> Issued:
    return Issued(
        serial=serial,
        spiffe_id=f"spiffe://alpha.test/svc/records/{instance}",
        key_digest=b"k" * 32,
        not_after=Instant(NOW + 100),
        der=b"certificate " + serial.encode(),
    )


def test_retry_until_confirmed(ready):
    """verifies that: the same keys get the same result until confirmation, and nothing after it."""
    first = ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW)
    again = ready.consume(replace(launch_of(), session="one again"), advance=moved, not_after=LATER, at=NOW)
    assert (first.again, again.again) == (False, True)
    assert (first.public, first.wrapped) == (again.public, again.wrapped)
    assert ready.pool_size("records", "tls") == 4
    assert ready.confirm(launch_of(), issued(), at=NOW).serial == "1"
    assert ready.confirm(launch_of(), issued("2"), at=NOW).serial == "1"  # repeatable, with the same certificate
    assert refused(ready, launch_of()) == "launch.token_consumed"
    assert ready.launches()[0].state == CONFIRMED


def test_another_session_raises_an_alarm(ready):
    """verifies that: a token shown by another session is refused, and the alarm names both sessions."""
    ready.consume(launch_of(session="the honest one"), advance=moved, not_after=LATER, at=NOW)
    assert refused(ready, launch_of(session="the thief")) == "launch.token_consumed"
    alarm = ready.alarms()[0]
    assert (alarm.code, alarm.first, alarm.second) == ("launch.token_consumed", "the honest one", "the thief")
    half = replace(launch_of(session="the honest one"), kem_digest=b"k" * 32)
    assert refused(ready, half) == "launch.token_consumed"
    assert len(ready.alarms()) == 2


def test_session_keys_serve_one_launch(ready):
    """verifies that: session keys that belong to one launch do not get another, and somebody hears of it."""
    ready.consume(launch_of(0, session="the first"), advance=moved, not_after=LATER, at=NOW)
    second = replace(launch_of(1, session="the first", instance="r-2"), session="the second")
    assert refused(ready, second) == "launch.key_reused"
    alarm = ready.alarms()[0]
    assert (alarm.code, alarm.first, alarm.second) == ("launch.key_reused", "the first", "the second")


@pytest.mark.parametrize(
    ("wanted", "at", "code"),
    [
        (launch_of(10), NOW, "launch.sequence_not_leased"),
        (launch_of(0), Instant(NOW + 51), "launch.sequence_not_leased"),
        (replace(launch_of(), epoch=2), NOW, "launch.sequence_not_leased"),
        (replace(launch_of(), launcher=b"K" * 32), NOW, "launch.sequence_not_leased"),
        (replace(launch_of(), service="other"), NOW, "launch.pool_empty"),
    ],
)
def test_what_cannot_be_consumed(ready, wanted, at, code):
    """verifies that: lease, epoch and pool are judged inside the transaction, and a refusal takes nothing."""
    assert refused(ready, wanted, at=at) == code
    assert ready.pool_size("records", "tls") == 5
    assert ready.launches() == ()


def test_generations_rise(ready):
    """verifies that: an instance is launched again only in a higher generation."""
    ready.consume(launch_of(0, session="a"), advance=moved, not_after=LATER, at=NOW)
    assert refused(ready, launch_of(1, session="b")) == "launch.generation_behind"
    ready.consume(launch_of(2, session="c", generation=2), advance=moved, not_after=LATER, at=NOW)
    assert ready.generation("r-1") == 2


def test_a_revoked_launcher_takes_its_epoch_along(ready):
    """verifies that: revoking a launcher closes the epoch without grace."""
    ready.revoke_launcher(LAUNCHER, at=NOW)
    assert refused(ready, launch_of()) == "launch.sequence_not_leased"
    assert ready.epoch(1).accept_until == 0
    assert not ready.launcher_active(LAUNCHER)


def test_confirming_needs_the_launch(ready):
    """verifies that: nobody confirms a launch of another session."""
    ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW)
    with pytest.raises(Conflict):
        ready.confirm(launch_of(session="other"), issued(), at=NOW)


def test_tickets_are_used_once(ready):
    """verifies that: a ticket serves one launcher; another one is refused with an alarm, a retry is not."""
    ticket = {"ticket": b"t" * 32, "measurement": b"m", "chip": b"c", "at": NOW}
    ready.admit_launcher(launcher=LAUNCHER, session="l again", **ticket)
    with pytest.raises(Refused) as caught:
        ready.admit_launcher(launcher=b"K" * 32, session="thief", **ticket)
    assert caught.value.code == "launcher.ticket_used"
    assert (ready.alarms()[0].first, ready.alarms()[0].second) == ("l", "thief")


def test_threads_race_for_one_launch(ready):
    """verifies that: of many sessions that show one token at once, one wins and the others are refused."""
    outcomes = []
    gate = threading.Barrier(8)

    def show(number: int) -> None:
        gate.wait()
        try:
            outcomes.append(ready.consume(launch_of(session=f"s{number}"), advance=moved, not_after=LATER, at=NOW).public)
        except Refused as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=show, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(map(str, outcomes)).startswith("b'public")
    assert outcomes.count("launch.token_consumed") == 7
    assert ready.pool_size("records", "tls") == 4


def test_processes_race_for_the_pool(ready, database_url, tmp_path):
    """verifies that: processes that consume different launches at once never get the same key pair."""
    children = []
    for number in range(5):
        out = tmp_path / f"got-{number}"
        pid = os.fork()
        if pid == 0:
            other = BrokerStore.open(database_url)
            wanted = launch_of(number, session=f"p{number}", instance=f"i-{number}")
            out.write_bytes(other.consume(wanted, advance=moved, not_after=LATER, at=NOW).public)
            os._exit(0)
        children.append((pid, out))
    for pid, _ in children:
        assert os.waitpid(pid, 0)[1] == 0
    assert len({out.read_bytes() for _, out in children}) == 5
    assert refused(ready, launch_of(9, session="late", instance="i-9")) == "launch.pool_empty"


def _die_at(url: str, step: int) -> int:
    """Consume in another process that kills itself before its statement number `step`; how it ended."""
    pid = os.fork()
    if pid == 0:
        other = BrokerStore.open(url)
        seen = 0

        def count(*_):
            nonlocal seen
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        before_each(other._engine, count)
        other.consume(launch_of(), advance=moved, not_after=LATER, at=NOW)
        count()  # the answer would be sent now
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_sigkill_at_every_step(ready, database_url, copied):
    """verifies that: killed at any step, a launch is consumed wholly or not at all, and no key pair is ever given twice."""
    step, committed = 0, 0
    ready.close()
    while True:
        url = copied(database_url)
        status = _die_at(url, step)
        after = BrokerStore.open(url)
        done = len(after.launches()) == 1
        committed += done
        assert after.pool_size("records", "tls") == (4 if done else 5)
        assert (after.generation("r-1") == 1) == done
        assert (b"launch-consumed" in after.audit()[-1]) == done
        # The function's retry gets the one pair; the next launch never the same.
        mine = after.consume(launch_of(), advance=moved, not_after=LATER, at=NOW)
        assert mine.again == done
        other = after.consume(launch_of(1, session="two", instance="r-2"), advance=moved, not_after=LATER, at=NOW)
        assert other.public != mine.public
        after.close()
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        step += 1
    assert step >= 10  # the steps were found by counting, and there are this many
    assert committed >= 2  # killed between commit and sending, and not killed


def test_the_audit_log_is_a_chain(ready):
    """verifies that: each entry's digest covers the one before it, and a changed entry breaks it."""
    ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW)
    entries = ready.audit()
    assert log.verify(entries, domain=broker_facts.AUDIT_DOMAIN).size == len(entries)
    changed = list(entries)
    changed[1] = changed[1].replace(b"epoch-opened", b"epoch-0pened")
    assert changed[1] != entries[1]
    with pytest.raises(NotAuthentic) as caught:
        log.verify(changed, domain=broker_facts.AUDIT_DOMAIN)
    assert caught.value.code == "audit.entry_changed"


# With the real token ---------------------------------------------------------------------------------------------------


def fields_for(secrets, **changes) -> LaunchFields:
    values = {
        "ledger_id": b"l" * 32,
        "provider": "alpha",
        "tenant": "t1",
        "service": "records",
        "package_digest": b"p" * 32,
        "configuration_digest": b"f" * 32,
        "measurement": b"m" * 48,
        "instance": "r-1",
        "generation": 1,
        "host": "h1",
        "chip": b"x" * 64,
        "hsm": "hsm-1",
        "profile": ChannelProfile.TLS,
        "launcher": LAUNCHER,
        "epoch": secrets.epoch,
        "sequence": secrets.lease_first,
        "not_after": NOW + 60,
    }
    return LaunchFields(**{**values, **changes})


@pytest.fixture
def leased(store, launch_keys):
    store.admit_launcher(launcher=LAUNCHER, ticket=b"t" * 32, measurement=b"m", chip=b"c", session="l", at=NOW)
    return launch_keys.lease(LAUNCHER, NOW)


def test_the_token_recomputes_what_the_launcher_mints(launch_keys, leased):
    """verifies that: a token minted with the released key is the one the HSM recomputes, and other fields give another."""
    fields = fields_for(leased)
    assert launch_keys.recompute(fields) == launch.token(leased.launch_key, fields)
    assert launch_keys.recompute(replace(fields, generation=2)) != launch.token(leased.launch_key, fields)
    assert launch_keys.recompute(replace(fields, epoch=leased.epoch + 1000)) is None


def test_leases_follow_each_other_within_an_epoch(launch_keys, leased, store):
    """verifies that: leases do not overlap, and a new epoch has another key."""
    second = launch_keys.lease(LAUNCHER, NOW)
    assert (leased.lease_first, second.lease_first) == (0, 10)
    assert second.launch_key == leased.launch_key
    launch_keys.open_epoch(NOW)
    third = launch_keys.lease(LAUNCHER, NOW)
    assert third.epoch > leased.epoch
    assert third.launch_key != leased.launch_key
    assert store.epoch(leased.epoch).accept_until == NOW + 60


def test_an_epoch_ends_by_itself_and_its_key_is_destroyed(launch_keys, leased, token):
    """verifies that: after epoch and grace the key is gone from the token, and old tokens are nothing."""
    launch_keys.current(Instant(NOW + 3601))
    launch_keys.open_epoch(Instant(NOW + 3601 + 61))
    assert launch_keys.recompute(fields_for(leased)) is None
    assert not token.has_secret(f"launch-key-{leased.epoch}")


def test_only_admitted_launchers_get_a_lease(launch_keys):
    """verifies that: an unknown launcher is refused."""
    with pytest.raises(Refused) as caught:
        launch_keys.lease(b"?" * 32, NOW)
    assert caught.value.code == "launch.launcher_not_admitted"


def test_a_restored_database_is_noticed(launch_keys, leased, store, pool, database_url, copied):
    """verifies that: a database behind the token's counter loses pools, epochs and leases, and waits for the operator."""
    pool.refill("records", "tls")
    store.close()  # its connections; the engine makes new ones
    backup = copied(database_url)
    assert launch_keys.reconcile(NOW)
    launch_keys.lease(LAUNCHER, NOW)  # the counter moves on after the backup was taken
    restored = BrokerStore.open(backup)
    keys_after = type(launch_keys)(launch_keys._token, restored, launch_keys._terms)
    assert not keys_after.reconcile(NOW)
    assert restored.pools() == {}
    assert restored.epoch(leased.epoch).accept_until == 0
    assert all(lease.void for lease in restored.leases(LAUNCHER, leased.epoch))
    assert restored.alarms()[0].code == "broker.database_restored"
    with pytest.raises(Unavailable) as caught:
        keys_after.lease(LAUNCHER, NOW)
    assert caught.value.code == "launch.halted"
    keys_after.open_epoch(NOW)
    assert keys_after.lease(LAUNCHER, NOW).epoch > leased.epoch
    assert keys_after.reconcile(NOW)
    restored.close()


def test_pool_keys_are_whole_and_bound_to_their_place(pool, store, leased):
    """verifies that: an entry unwraps to the key of its public half for its service only, and the pool fills to its mark."""
    assert pool.refill("records", "tls") == 8
    assert pool.refill("records", "tls") == 0
    fields = fields_for(leased)
    wanted = replace(launch_of(), epoch=fields.epoch, sequence=fields.sequence)
    taken = store.consume(wanted, advance=moved, not_after=LATER, at=NOW)
    private = serialization.load_der_private_key(pool.open(taken, "records", "tls"), password=None)
    assert keys.public_bytes(private.public_key()) == taken.public
    for place in (("other", "tls"), ("records", "hpke-only")):
        with pytest.raises(NotAuthentic):
            pool.open(taken, *place)
    assert store.pool_size("records", "tls") == 7


def test_storage_keys_belong_to_one_generation(launch_keys, leased):
    """verifies that: every generation gets a storage key of its own, which no other generation or instance can open."""
    fields = fields_for(leased)
    key, wrapped = launch_keys.new_storage_key(fields)
    assert len(key) == 32
    assert launch_keys.storage_key(fields, wrapped) == key
    assert launch_keys.new_storage_key(fields)[0] != key
    for change in ({"tenant": "t2"}, {"instance": "r-2"}, {"service": "s2"}, {"generation": 2}):
        with pytest.raises(NotAuthentic):
            launch_keys.storage_key(fields_for(leased, **change), wrapped)


def consume(store, launch_keys, wanted, **changes):
    """As a broker does it."""
    values = {"advance": launch_keys.advance_in, "not_after": LATER, "at": NOW, **changes}
    return launch_keys.guarded(lambda: store.consume(wanted, **values), NOW)


def test_a_generation_change_advances_the_counter(launch_keys, leased, store, pool, token):
    """verifies that: relaunching an instance moves the token's counter, a first launch does not, and database agrees."""
    pool.refill("records", "tls")
    before = token.counter(COUNTER)
    consume(store, launch_keys, replace(launch_of(), epoch=leased.epoch))
    assert token.counter(COUNTER) == before
    consume(store, launch_keys, replace(launch_of(1, session="two", generation=2), epoch=leased.epoch))
    assert token.counter(COUNTER) == before + 1
    assert launch_keys.reconcile(NOW)


def test_brokers_that_share_token_and_database_advance_in_a_row(launch_keys, leased, database_url, token):
    """verifies that: leases granted by several brokers at once neither overlap nor look like a restored database."""
    others = [LaunchKeys(token, BrokerStore.open(database_url), launch_keys._terms) for _ in range(3)]
    granted = []

    def lease(keys_of_one):
        for _ in range(5):
            granted.append(keys_of_one.lease(LAUNCHER, NOW).lease_first)
            assert keys_of_one.reconcile(NOW)

    threads = [threading.Thread(target=lease, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(granted) == list(range(10, 160, 10))
    assert {one._store.fact("halted") for one in others} == {0}


def test_a_database_put_back_behind_running_brokers_is_noticed(launch_keys, leased, store, database_url, copied, token):
    """verifies that: the next advance finds it, grants nothing, raises one alarm, and all wait for the operator."""
    store.close()
    backup = BrokerStore.open(copied(database_url))
    launch_keys.lease(LAUNCHER, NOW)
    behind = [LaunchKeys(token, backup, launch_keys._terms) for _ in range(2)]
    for one in behind:
        with pytest.raises(Unavailable) as caught:
            one.lease(LAUNCHER, NOW)
        assert caught.value.code == "launch.halted"
    assert [alarm.code for alarm in backup.alarms()] == ["broker.database_restored"]
    behind[0].open_epoch(NOW)
    assert behind[1].lease(LAUNCHER, NOW).lease_first == 0
    backup.close()


def test_a_failed_commit_is_made_good_by_the_process_that_lives(launch_keys, leased, store):
    """verifies that: a counter that moved while the database failed is recorded with that broker's next advance."""

    def fails(_c):
        sqlalchemy.event.remove(store._engine, "commit", fails)
        raise sqlalchemy.exc.OperationalError("COMMIT", None, Exception("the disk is full"))

    sqlalchemy.event.listen(store._engine, "commit", fails)
    with pytest.raises(Unavailable, match="storage.unavailable"):
        launch_keys.lease(LAUNCHER, NOW)
    assert launch_keys.lease(LAUNCHER, NOW).lease_first == 10  # what the failed one would have had: nobody got it
    assert launch_keys.reconcile(NOW)


# Time ------------------------------------------------------------------------------------------------------------------


class Set:
    """A clock one can set."""

    def __init__(self, at):
        self.at = at

    def now(self):
        return self.at


def test_a_clock_set_back_reopens_nothing(ready, database_url):
    """verifies that: what had expired stays expired, for the process whose clock went back and for others."""
    clock = Set(Instant(NOW + 40))
    RisingClock(clock, ready).mark()
    clock.at = NOW
    other = BrokerStore.open(database_url)
    for store in (ready, other):
        rising = RisingClock(clock, store)
        assert rising.now() == NOW + 40
        with pytest.raises(Refused) as caught:
            store.consume(launch_of(), advance=moved, not_after=Instant(NOW + 39), at=NOW)
        assert caught.value.code == "launch.expired"
    assert ready.consume(launch_of(), advance=moved, not_after=Instant(NOW + 40), at=NOW).public
    other.close()


def test_a_consumption_moves_time_for_everybody(ready, database_url):
    """verifies that: what is over by the clock of one broker is over for another one whose clock is slow."""
    other = BrokerStore.open(database_url)
    other.consume(launch_of(), advance=moved, not_after=LATER, at=Instant(NOW + 50))
    with pytest.raises(Refused, match="launch.expired"):
        ready.consume(launch_of(1, session="b", instance="r-2"), advance=moved, not_after=Instant(NOW + 49), at=NOW)
    assert ready.mark_time(NOW) == NOW + 50
    other.close()


def test_an_operator_hears_of_it_and_decides(launch_keys, leased, store):
    """verifies that: a clock far behind raises one alarm; accepting it voids what was leased, so nothing is reopened."""
    clock = Set(Instant(NOW + 10 * 365 * 86400))
    rising = RisingClock(clock, store)
    rising.mark()
    clock.at = NOW
    for _ in range(3):
        rising.mark()
    assert [alarm.code for alarm in store.alarms()] == ["broker.clock_set_back"]
    opened = launch_keys.accept_clock(rising.machine_now())
    rising.mark()
    assert rising.now() == NOW
    assert opened.epoch > leased.epoch
    assert refused(store, replace(launch_of(), epoch=leased.epoch)) == "launch.sequence_not_leased"


def _modules():
    """Every module of the room that may hold tables of the broker's store."""
    shared = ("audit_store", "checkpoint_store")
    found = (module.name for module in pkgutil.iter_modules(storage.__path__))
    return [f"moorline.storage.{name}" for name in found if name in shared or name.startswith("broker_")]


def test_two_brokers_on_different_tables_agree_on_names():
    """verifies that: the store's table clauses and the migration name the same columns."""
    from moorline.storage.database import open_database

    engine = open_database("sqlite://", "broker")
    inspector = sqlalchemy.inspect(engine)
    named = [one for name in _modules() for one in vars(importlib.import_module(name)).values()]
    clauses = {}
    for one in named:
        if isinstance(one, sqlalchemy.sql.expression.TableClause):
            clauses.setdefault(one.name, []).append([column.name for column in one.c])
    assert {name for name in inspector.get_table_names() if name != "broker_version"} == set(clauses)
    for name, ways in clauses.items():
        columns = [column["name"] for column in inspector.get_columns(name)]
        assert columns in ways, name  # whoever owns the table names all of it, in order; others only what they read
        assert all(set(way) <= set(columns) for way in ways), name
    engine.dispose()
