"""Launches consumed and confirmed together leave what they would have left one by one, whatever is among them."""

from __future__ import annotations

import hashlib
import itertools
import threading

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.audit import log
from moorline.clock import Instant
from moorline.errors import MoorlineError, Refused
from moorline.storage import broker_consumption as together
from moorline.storage import broker_generations as generations
from moorline.storage import broker_launches as launches
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_consumption import Confirmation, Consumption
from moorline.storage.broker_facts import AUDIT_DOMAIN
from moorline.storage.broker_instances import InstanceStore
from moorline.storage.broker_launches import Fresh, Launch
from moorline.storage.broker_pool import PoolEntry
from moorline.storage.broker_store import BrokerStore
from moorline.storage.verifier_events import LOST, VerdictEvent
from statements import before_each

NOW = Instant(1_800_000_000)
LATER = Instant(NOW + 1000)
LAUNCHER = b"L" * 32
TABLES = (
    *("facts", "pool", "launches", "instances", "alarms", "certificates", "audit", "generations", "storage_keys"),
    *("revocations", "session_holders", "host_losses"),
)


def advanced(c):
    BrokerStore.set_fact_in(c, "counter", BrokerStore.fact_in(c, "counter") + 1)


def filled(url="sqlite://", pairs=6):
    store = BrokerStore.open(url)
    store.admit_launcher(launcher=LAUNCHER, ticket=b"t", measurement=b"m", chip=b"c", session="l", at=NOW)
    store.open_epoch(epoch=1, opened=NOW, not_after=LATER, grace_s=0, wrapped=b"")
    store.grant_lease(launcher=LAUNCHER, epoch=1, count=40, not_after=LATER, counter=1, at=NOW)
    for service in ("records", "other"):
        made = [PoolEntry(public=b"%s-%d" % (service.encode(), n), wrapped=b"w%d" % n) for n in range(pairs)]
        store.add_to_pool(service, "tls", made)
    InstanceStore(store).act_on_loss(
        VerdictEvent(cursor=7, host="h2", at=NOW, kind=LOST, code="host.drift", result_expires=NOW), at=NOW
    )
    return store


def digest(of):
    return hashlib.sha256(str(of).encode()).digest()


@st.composite
def asked(draw):
    """A launch out of so few numbers, keys, instances and hosts that they collide in every way."""
    instance = f"i-{draw(st.integers(1, 6))}"
    launch = Launch(
        launcher=draw(st.sampled_from([LAUNCHER, LAUNCHER, LAUNCHER, b"S" * 32])),
        epoch=draw(st.sampled_from([1, 1, 1, 2])),
        sequence=draw(st.sampled_from([*range(8), 41])),
        kem_digest=digest(("kem", draw(st.integers(0, 9)))),
        signing_digest=digest(("signing", draw(st.integers(0, 9)))),
        session=f"session {draw(st.integers(0, 99))}",
        service=draw(st.sampled_from(["records", "records", "other"])),
        profile="tls",
        tenant="t",
        instance=instance,
        generation=draw(st.integers(1, 2)),
        host=draw(st.sampled_from(["h1", "h1", "h2"])),
    )
    fresh = Fresh(
        storage=draw(st.sampled_from([b"", b"wrapped"])),
        commitment=b"commitment",
        verdicts_seen=draw(st.sampled_from([0, 7])),
        not_after=draw(st.sampled_from([LATER, LATER, Instant(NOW - 1)])),
        advance=advanced,
        host_result=b"result",
        nonce=draw(st.sampled_from([b"", b"n" * 32])),
    )
    return Consumption(launch, NOW, fresh)


def content(store):
    with store.reading() as c:
        return {name: sorted(map(repr, c.execute(sa.text(f"SELECT * FROM {name}")).all())) for name in TABLES}


def said(outcome):
    return outcome.code if isinstance(outcome, MoorlineError) else outcome


def consumed(c, one):
    """The single step, which refuses and alarms."""
    return launches.consume(c, one.launch, one.at, one.fresh)


def confirmed(c, one, confirm=launches.confirm):
    try:
        return confirm(c, one.launch, one.issued, one.at)
    except MoorlineError as error:
        return error


def quickly_confirmed(c, one):
    return confirmed(c, one, lambda c, *_: together.confirm(c, one))


@pytest.mark.parametrize(
    "consume_and_confirm",
    [(together.consume_plain, together.confirm_plain), (together.consume_many, together.confirm_many)],
    ids=["each", "many"],
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=st.lists(asked(), max_size=3), wanted=st.lists(asked(), min_size=2, max_size=8), data=st.data())
def test_together_is_as_one_by_one(consume_and_confirm, first, wanted, data):
    """verifies that: the same launches give the same answers and the same database, row for row and log entry for entry."""
    consume_together, confirm_together = consume_and_confirm
    quick, slow = filled(), filled()
    for store in (quick, slow):
        with store.transaction() as c:
            for one in first:
                consumed(c, one)
    with quick.transaction() as c:
        plain = consume_together(c, wanted)
        left = [one for one, taken in zip(wanted, plain, strict=True) if taken is None]
        outcomes = [taken for taken in plain if taken is not None] + [together.consume(c, one) for one in left]
    order = [one for one, taken in zip(wanted, plain, strict=True) if taken is not None] + left
    with slow.transaction() as c:
        expected = [consumed(c, one) for one in order]
    assert [said(one) for one in outcomes] == [said(one) for one in expected]
    assert content(quick) == content(slow)

    signed = [
        Confirmation(
            one.launch,
            Issued(serial=f"{n:x}", spiffe_id=f"id-{one.launch.instance}", key_digest=b"", not_after=LATER, der=b"der"),
            NOW,
        )
        for n, one in enumerate(data.draw(st.lists(st.sampled_from(wanted), min_size=1, max_size=8)))
    ]
    with quick.transaction() as c:
        plain = confirm_together(c, signed)
        left = [one for one, kept in zip(signed, plain, strict=True) if kept is None]
        outcomes = [kept for kept in plain if kept is not None] + [quickly_confirmed(c, one) for one in left]
    order = [one for one, kept in zip(signed, plain, strict=True) if kept is not None] + left
    with slow.transaction() as c:
        expected = [confirmed(c, one) for one in order]
    assert [said(one) for one in outcomes] == [said(one) for one in expected]
    assert content(quick) == content(slow)
    log.verify(quick.audit(), domain=AUDIT_DOMAIN)
    for store in (quick, slow):
        store.close()


def test_those_that_come_together_share_their_statements(database_url):
    """verifies that: threads that launch at one time share transactions, and where each is a message, statements too."""
    store = filled(database_url, pairs=64)
    with store.transaction() as c:
        BrokerStore.grant_lease_in(c, launcher=LAUNCHER, epoch=1, count=100, not_after=LATER, counter=2, at=NOW)
    counted, numbers = itertools.count(), itertools.count()
    before_each(store._engine, lambda: next(counted))
    start, answers = threading.Barrier(16), []

    def one():
        number = next(numbers)
        launch = Launch(
            launcher=LAUNCHER,
            epoch=1,
            sequence=number,
            kem_digest=digest(("kem", number)),
            signing_digest=digest(("signing", number)),
            session=f"s-{number}",
            service="records",
            profile="tls",
            tenant="t",
            instance=f"new-{number}",
            generation=1,
            host="h1",
        )
        issued = Issued(serial=f"{number:x}", spiffe_id=f"id-{number}", key_digest=b"", not_after=LATER, der=b"der")
        start.wait()
        answers.append(store.consume(launch, advance=advanced, not_after=LATER, at=NOW, nonce=b"n", storage=b"w"))
        start.wait()
        assert store.confirm(launch, issued, at=NOW) == issued

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.public for one in answers}) == 16
    # One by one they would be sixteen each on SQLite, BEGIN and COMMIT included; by single steps two dozen on PostgreSQL.
    assert next(counted) < 16 * (12 if database_url.startswith("postgresql") else 14)
    assert {row.state for row in store.launches()} == {"confirmed"}
    assert len(store.certificates(valid_at=NOW)) == 16
    with store.reading() as c:
        assert len(generations.known(c, [f"new-{n}" for n in range(16)])) == 16
    log.verify(store.audit(), domain=AUDIT_DOMAIN)
    store.close()


def some_launch(number, **changed):
    named = {
        "launcher": LAUNCHER,
        "epoch": 1,
        "sequence": number,
        "kem_digest": digest(("kem", number)),
        "signing_digest": digest(("signing", number)),
        "session": f"s-{number}",
        "service": "records",
        "profile": "tls",
        "tenant": "t",
        "instance": f"new-{number}",
        "generation": 1,
        "host": "h1",
    }
    return Launch(**named | changed)


def brought(**changed):
    named = {"storage": b"w", "commitment": b"c", "verdicts_seen": 0, "not_after": LATER, "advance": advanced}
    return Fresh(**named | {"host_result": b"r", "nonce": b"n" * 32} | changed)


ODD = (
    ("a number again", {"sequence": 0}, {}),
    ("a KEM key again", {"kem_digest": digest(("kem", 0))}, {}),
    ("a signing key again", {"signing_digest": digest(("signing", 0))}, {}),
    ("an instance again", {"instance": "new-0"}, {}),
    ("an instance's next generation", {"instance": "new-0", "generation": 2}, {}),
    ("a number beyond its lease", {"sequence": 41}, {}),
    ("a launcher nobody admitted", {"launcher": b"S" * 32}, {}),
    ("an epoch never opened", {"epoch": 2}, {}),
    ("a host that lost its verdict", {"host": "h2"}, {}),
    ("a launch whose time is over", {}, {"not_after": Instant(NOW - 1)}),
    ("a service without keys", {"service": "none"}, {}),
    ("nothing to store under", {}, {"storage": b""}),
    ("an event seen after the loss", {"host": "h2"}, {"verdicts_seen": 7}),
)


@pytest.mark.parametrize(("changed", "fresh"), [one[1:] for one in ODD], ids=[one[0] for one in ODD])
def test_alone_is_as_the_single_step(database_url, changed, fresh):
    """verifies that: in two statements the same is taken, written and refused as in a dozen, on either database."""
    quick, slow = filled(database_url), filled()
    outcomes = []
    for store, consume, confirm in ((quick, together.consume, quickly_confirmed), (slow, consumed, confirmed)):
        said_here = []
        for one in (
            Consumption(some_launch(0), NOW, brought()),
            Consumption(some_launch(1, **changed), NOW, brought(**fresh)),
        ):
            issued = Issued(serial=one.launch.session, spiffe_id="id", key_digest=b"", not_after=LATER, der=b"d")
            with store.transaction() as c:
                said_here.append(said(consume(c, one)))
            for _ in range(2):  # the second time it is confirmed already
                with store.transaction() as c:
                    said_here.append(said(confirm(c, Confirmation(one.launch, issued, NOW))))
        outcomes.append(said_here)
    assert outcomes[0] == outcomes[1]
    assert content(quick) == content(slow)
    log.verify(quick.audit(), domain=AUDIT_DOMAIN)
    for store in (quick, slow):
        store.close()


def test_one_that_comes_alone_waits_for_few_statements(database_url):
    """verifies that: a plain launch is two statements under the writers' lock on PostgreSQL, and its confirmation two."""
    store = filled(database_url)
    counted = []
    before_each(store._engine, lambda: counted.append(1))
    store.consume(some_launch(0), advance=advanced, not_after=LATER, at=NOW, nonce=b"n", storage=b"w")  # time has risen
    counted.clear()
    launch = some_launch(1)
    issued = Issued(serial="1", spiffe_id="id", key_digest=b"", not_after=LATER, der=b"der")
    store.consume(launch, advance=advanced, not_after=LATER, at=NOW, nonce=b"n", storage=b"w")
    store.confirm(launch, issued, at=NOW)
    # Of two transactions, each with its beginning and its COMMIT.
    assert len(counted) == (4 + 2 * 2 if database_url.startswith("postgresql") else 4 + 8 + 4)
    store.close()


@pytest.mark.parametrize("ended", ["launcher revoked", "epoch closed", "time passed, and the clock set back"])
def test_what_ended_after_it_was_read_is_not_consumed(database_url, ended):
    """verifies that: epoch and leases as a session read them outlive nothing: consumption judges them anew."""
    store = filled(database_url)
    _, epoch, leases = store.launch_facts("verifier-cursor", LAUNCHER, 1)
    assert epoch.accept_until >= NOW
    assert any(lease.covers(0, NOW) for lease in leases)
    if ended == "launcher revoked":
        store.revoke_launcher(LAUNCHER, at=NOW)
    elif ended == "epoch closed":
        store.open_epoch(epoch=2, opened=Instant(NOW + 1), not_after=LATER, grace_s=-2, wrapped=b"")
    else:
        store.mark_time(Instant(LATER + 1))
    brings = {"advance": advanced, "not_after": LATER, "at": NOW, "nonce": b"n", "storage": b"w"}
    with pytest.raises(Refused) as refusal:
        store.consume(some_launch(0), **brings)
    assert refusal.value.code in ("launch.sequence_not_leased", "launch.expired")
    outcomes = store.consume_all([Consumption(some_launch(n), NOW, brought()) for n in (1, 2)])
    assert {one.code for one in outcomes} == {refusal.value.code}
    assert not store.launches()
    store.close()
