"""Verdicts gained and lost are events: each change is told once, in order, also over a crash, a restart and a long poll."""

import asyncio
import dataclasses
import os
import signal

import pytest
import sqlalchemy as sa
from test_service import client, configured, serving, silicon  # noqa: F401 - fixtures
from test_stories import Machine

from moorline.clock import Instant
from moorline.errors import Conflict, Malformed, NotAuthentic, Refused
from moorline.evidence.tpm_quote import ClockInfo
from moorline.rats import EvidenceRoot
from moorline.simulators import firmware
from moorline.storage.verifier_rounds import Change, EnrolledHost, Progress, StoredResult
from moorline.storage.verifier_store import VerifierStore
from statements import before_each

NOW = Instant(1_790_000_000)
LONG_AGO = Instant(0)


@pytest.fixture
def store(database_url):
    opened = VerifierStore.open(database_url)
    for host in ("h1", "h2"):
        opened.enrol(EnrolledHost(host=host, ek_digest=host.encode(), ak_public=b"", root=EvidenceRoot.TEST, enrolled=NOW))
    return opened


def result(host="h1", *, at=NOW, life=60, status="affirming", code=None):
    return StoredResult(host=host, ear="", status=status, code=code, issued=at, expires=Instant(at + life), withdrawn=None)


def progress():
    return Progress(
        clock=ClockInfo(0, 1, 1, safe=True), ima_count=0, ima_running=b"", reference=b"", standing=b"", boot_log=b""
    )


def advance(store, host, *, withdraw, at):
    """A round in which one host answered its challenge and lost its verdict."""
    nonce = os.urandom(32)
    store.open_challenges({host: nonce}, Instant(at + 30))
    change = Change(
        host=host,
        nonce=nonce,
        before=store.progress(host),
        progress=progress(),
        boot_log=b"a boot log",
        withdraw=withdraw,
        result=None,
        next_nonce=None,
    )
    return store.settle((change,), at=at, next_expires=Instant(at + 30), patience_until=LONG_AGO)


def told(store, *, after=0):
    return [(one.host, one.kind, one.code) for one in store.events(after=after, limit=500)[0]]


def test_each_change_of_a_verdict_is_told_once(store):
    """verifies that: renewals of a verdict are no events, a loss is one with its reason, and only who stood can lose."""
    store.put_result(result("h2", status="contraindicated", code="host.kernel"), patience_until=LONG_AGO)
    for step in range(3):
        store.put_result(result(at=Instant(NOW + 10 * step)), patience_until=LONG_AGO)
    assert told(store) == [("h1", "verdict_gained", "")]
    advance(store, "h1", withdraw="ima.unknown_file", at=Instant(NOW + 40))
    store.put_result(
        result(at=Instant(NOW + 40), status="contraindicated", code="ima.unknown_file"), patience_until=LONG_AGO
    )
    store.withdraw("h1", "tpm.reset", at=Instant(NOW + 41))
    store.sweep(now=Instant(NOW + 10_000))
    assert told(store, after=1) == [("h1", "verdict_lost", "ima.unknown_file")]
    store.put_result(result(at=Instant(NOW + 50)), patience_until=LONG_AGO)
    events, newest = store.events(after=0, limit=500)
    assert [one.cursor for one in events] == [1, 2, 3]
    assert (newest, events[1].at, events[1].result_expires) == (3, NOW + 40, NOW + 80)


def test_a_silent_host_is_told_once_also_after_a_restart(store, database_url):
    """verifies that: a lease that ran out is one event, found by the sweep, the next result or the next process."""
    store.put_result(result("h1"), patience_until=LONG_AGO)
    store.put_result(result("h2"), patience_until=LONG_AGO)
    assert store.sweep(now=Instant(NOW + 59)) == ()
    assert store.sweep(now=Instant(NOW + 60)) == ("h1", "h2")
    again = VerifierStore.open(database_url)
    assert again.sweep(now=Instant(NOW + 61)) == ()
    again.put_result(result("h1", at=Instant(NOW + 70)), patience_until=LONG_AGO)
    again.put_result(result("h1", at=Instant(NOW + 200)), patience_until=LONG_AGO)  # came back before the sweep saw it
    expired, gained = ("h1", "verdict_lost", "result.expired"), ("h1", "verdict_gained", "")
    assert told(again, after=3) == [("h2", "verdict_lost", "result.expired"), gained, expired, gained]


def test_a_verifier_that_was_away_does_not_blame_the_hosts(store):
    """verifies that: a lease that ran out while the verifier was down is no loss before it was up for a lease."""
    store.put_result(result("h1"), patience_until=LONG_AGO)
    store.put_result(result("h1", at=Instant(NOW + 500)), patience_until=Instant(NOW + 510))
    assert told(store) == [("h1", "verdict_gained", "")]
    with pytest.raises(Refused) as refused:
        store.standing_result("h1", now=Instant(NOW + 600))
    assert refused.value.code == "result.expired"  # nobody relies on it meanwhile


def test_cursors_of_the_future_are_refused(store):
    """verifies that: a reader that is ahead of a restored database is told, and can go on."""
    store.put_result(result("h1"), patience_until=LONG_AGO)
    assert store.events(after=1, limit=5) == ((), 1)
    with pytest.raises(Conflict) as refused:
        store.events(after=2, limit=5)
    assert refused.value.code == "events.cursor_unknown"


def test_pages_lose_nothing(store):
    """verifies that: a reader that takes small pages gets every event, once, in order."""
    for step in range(0, 2000, 100):
        store.put_result(result("h1", at=Instant(NOW + step)), patience_until=LONG_AGO)
        store.sweep(now=Instant(NOW + step + 60))
    after, seen = 0, []
    while True:
        events, _ = store.events(after=after, limit=3)
        if not events:
            break
        seen += [one.cursor for one in events]
        after = seen[-1]
    assert seen == list(range(1, 41))


def _die_at(url, step):
    """Withdraw h1's verdict in a process that is killed before its statement number `step`; how it ended."""
    pid = os.fork()
    if pid == 0:
        other = VerifierStore.open(url)
        seen = 0

        def count(*_):
            nonlocal seen
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        before_each(other._engine, count)
        advance(other, "h1", withdraw="ima.unknown_file", at=NOW)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_killed_verifier_has_both_verdict_and_event_or_neither(store, database_url):
    """verifies that: SIGKILL at each statement leaves result and event agreeing, and going on tells the loss once."""
    store.put_result(result("h1"), patience_until=LONG_AGO)
    killed = 0
    while _die_at(database_url, killed) == signal.SIGKILL:
        killed += 1
        withdrawn = store.results()["h1"].withdrawn is not None
        lost = ("h1", "verdict_lost", "ima.unknown_file") in told(store)
        assert withdrawn == lost
    assert killed >= 5
    advance(store, "h1", withdraw="ima.unknown_file", at=NOW)
    assert told(store) == [("h1", "verdict_gained", ""), ("h1", "verdict_lost", "ima.unknown_file")]


def test_hosts_that_stood_before_there_were_events_are_not_forgotten(store, database_url):
    """verifies that: a database of the schema before is migrated with the hosts that stand in it."""
    store.put_result(result("h1"), patience_until=LONG_AGO)
    store.put_result(result("h2", status="contraindicated"), patience_until=LONG_AGO)
    with store._engine.begin() as c:
        later = ("asks", "watchers", "watched", "deliveries", "events", "standings", "audit", "boot_logs", "progress")
        for table in (*later, "ek_chains"):
            c.execute(sa.text(f"DROP TABLE {table}"))
        for table, column in (("challenges", "ask"), ("hosts", "refused"), ("enrolments", "chain")):
            c.execute(sa.text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        numbers = ("clock", "reset_count", "restart_count", "ima_count")
        blobs = ("ima_running", "reference", "standing", "event_log")
        progress_then = sa.Table(
            "progress",
            sa.MetaData(),
            sa.Column("host", sa.String(63), primary_key=True),
            *(sa.Column(name, sa.BigInteger) for name in numbers),
            sa.Column("safe", sa.Boolean),
            *(sa.Column(name, sa.LargeBinary) for name in blobs),
        )
        progress_then.create(c)
        row = {**dict.fromkeys(numbers, 9), **dict.fromkeys(blobs, b"\xaa\xbb")}
        c.execute(sa.insert(progress_then).values(host="h1", safe=True, **row))
        c.execute(sa.text("UPDATE verifier_version SET version_num = '0001'"))
    again = VerifierStore.open(database_url)
    assert again.sweep(now=Instant(NOW + 60)) == ("h1",)
    assert told(again) == [("h1", "verdict_lost", "result.expired")]
    read = again.progress("h1")
    assert (read.ima_count, again.boot_log(read.boot_log)) == (9, b"\xaa\xbb")


@pytest.mark.story
async def test_drift_of_a_real_tpm_is_heard_by_who_waits(world, running):
    """verifies that: one file that is not allowed extends PCR 10, the verdict is lost, and a long poll ends with it."""
    authority = world.authority()
    machine = Machine(world, running[0], "h1")
    agent = machine.agent(authority)
    await agent.enrol()
    await agent.attest()
    (gained,), newest = await authority.events(after=0, wait_s=0)
    assert (gained.kind, newest) == ("verdict_gained", 1)
    waiting = asyncio.create_task(authority.events(after=newest, wait_s=20))
    firmware.execute(machine.tpm, machine.logs, "/usr/local/bin/miner", b"not allowed")
    verdict = await agent.attest()
    (lost,), _ = await waiting
    assert (lost.host, lost.kind, lost.code) == ("h1", "verdict_lost", verdict.code)
    assert await authority.events(after=lost.cursor, wait_s=0) == ((), lost.cursor)
    machine.tpm.close()


@pytest.mark.story
async def test_a_silent_host_is_heard_of_when_its_lease_ran_out(world, running):
    """verifies that: the sweep ends a long poll, but not while a verifier that was away is still patient."""
    first = world.authority()
    machine = Machine(world, running[0], "h1")
    agent = machine.agent(first)
    await agent.enrol()
    await agent.attest()
    machine.tpm.close()
    world.clock.at += 1000
    restarted = world.authority()
    await restarted.sweep()
    assert (await restarted.events(after=1, wait_s=0))[0] == ()
    world.clock.at += world.lease_s
    waiting = asyncio.create_task(restarted.events(after=1, wait_s=20))
    await asyncio.sleep(0)
    await restarted.sweep()
    (lost,), _ = await waiting
    assert (lost.kind, lost.code) == ("verdict_lost", "result.expired")


async def test_events_over_tls_are_for_those_who_act_on_them(serving):  # noqa: F811
    """verifies that: orchestrator, broker and operator of the own trust domain read events; nobody else does."""
    for uri in ("orchestrator/o1", "hsm/h1", "operator/ann"):
        async with client(serving, f"spiffe://alpha.test/{uri}") as session:
            assert await session.get_json("/v1/events") == {"events": [], "next": 0, "newest": 0}
    for uri in ("spiffe://beta.test/hsm/h1", "spiffe://alpha.test/host/h1", "spiffe://alpha.test/verifier/v2"):
        async with client(serving, uri) as session:
            with pytest.raises(Refused) as refused:
                await session.get_json("/v1/events")
            assert refused.value.code == "http.not_authorised"
    async with client(serving) as session:
        with pytest.raises(NotAuthentic):
            await session.get_json("/v1/events")
    async with client(serving, "spiffe://alpha.test/operator/ann") as session:
        for query in ({"after": "-1"}, {"wait_s": "21"}, {"wait_s": "nan"}, {"after": "x"}, {"after": str(1 << 70)}):
            with pytest.raises(Malformed):
                await session.get_json("/v1/events", query)
        with pytest.raises(Conflict) as ahead:
            await session.get_json("/v1/events", {"after": "7"})
        assert ahead.value.code == "events.cursor_unknown"


def test_an_event_says_what_the_interface_promises(store):
    store.put_result(result("h1"), patience_until=LONG_AGO)
    (event,), _ = store.events(after=0, limit=1)
    assert set(dataclasses.asdict(event)) == {"cursor", "host", "at", "kind", "code", "result_expires"}
