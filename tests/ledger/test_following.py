"""A service that follows a registrant: one count instead of a proof a key, and never a revocation that does not count."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import fetching, genesis, light_client, records, standing, state, transactions
from moorline.ledger.records import IndexRecord, RevocationKind, RevocationsRecord
from moorline.ledger.revocation_list import NONE, RevocationList, digest_after
from moorline.ledger.state import Applied
from moorline.ledger.transactions import Revoke, SenderKind
from moorline.services import ledger_documents, ledger_revocations
from moorline.services.broker_revocation import Lists
from moorline.services.ledger_view import LedgerView
from moorline.storage.broker_revocations import Named
from moorline.wire import keys as wire_keys

from .conftest import consortium_at
from .test_light_client import bundle_of, now_of

DEVICE = RevocationKind.DEVICE
LATER = Instant(1 << 40)
COUNT = "index/revocations/alpha"


def key_of(name):
    return records.revocation_key(DEVICE, "alpha", name)


class Store(dict):
    def document(self, name):
        return self.get(name)

    def set_document(self, name, value):
        self[name] = value

    @property
    def pages(self):
        return sorted(name for name in self if name.startswith("revocations-"))


class Authorities:
    """Proofs of a consortium's state of now, or of `held` for those keys that `hold` says."""

    def __init__(self, consortium):
        self.consortium, self.asked, self.gone = consortium, [], False
        self.held, self.hold = None, lambda _keys: False

    async def prove(self, keys, *, height=0):
        self.asked.append(keys)
        if self.gone:
            raise Unavailable("ledger.unreachable", "nobody answers")
        return bundle_of(self.consortium, keys, state=self.held if self.hold(keys) else None)

    async def aclose(self):
        """Nothing is open."""


class Service:
    """A service's view over its store, with a clock for `reuse_s` (a second)."""

    def __init__(self, consortium, store=None):
        self.passed, self.store, self.ledger = 0.0, Store() if store is None else store, Authorities(consortium)
        clock = SimpleNamespace(now=lambda: now_of(consortium))
        self.view = LedgerView(
            self.ledger, consortium.made.trust, self.store, clock, reuse_s=1.0, elapsed=lambda: self.passed
        )

    async def revoked(self, *names):
        """Which of these devices are said to be revoked; everybody else is said not to be."""
        found = await self.view.state(tuple(key_of(name) for name in names))
        return [name for name in names if said(found, name) == "ledger.revoked"]

    async def later(self, *names, by=1.0):
        self.passed += by
        return await self.revoked(*names)


def said(found, name):
    try:
        standing.not_revoked(found, DEVICE, "alpha", name)
    except Refused as error:
        assert error.code == "ledger.revoked", error
        return error.code
    return None


def revoke(consortium, provider, *names):
    batch = []
    for name in names:
        payload = consortium.payload(SenderKind.PROVIDER, provider.name, Revoke(kind=DEVICE, id=name))
        batch.append(transactions.sign(payload, wire_keys.KeySigner(provider.ca.key)))
    assert all(isinstance(one, Applied) for one in consortium.block(*batch))


def rewritten(consortium, **records_of):
    """The next block of a ledger whose rules would be others: with these records, signed by a quorum all the same."""
    consortium.block()
    tree = consortium.state.tree.updated({key: records.encode(one) for key, one in records_of.items()})
    consortium.state = replace(consortium.state, tree=tree)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE_S", 0)


async def until(true):
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError


async def test_nobody_is_asked_about_each_key_of_a_registrant_that_is_followed(consortium, alpha):
    """verifies that: five thousand names are one question, and one again when it is too old; nobody is missed."""
    revoke(consortium, alpha, "d-7")
    service = Service(consortium)
    names = [f"d-{number}" for number in range(5000)]
    for start in range(0, 5000, 64):
        assert await service.revoked(*names[start : start + 64]) == (["d-7"] if start == 0 else [])
    assert service.ledger.asked == [(COUNT,), ("index/revocation/alpha/1",), (key_of("d-7"),)]
    for start in range(0, 5000, 64):
        await service.later(*names[start : start + 64], by=1.0 if start == 0 else 0.0)
    assert service.ledger.asked[3:] == [(COUNT,), (key_of("d-7"),)]


async def test_a_poll_over_thousands_of_certificates_is_one_question(consortium, alpha):
    """verifies that: a broker's look with nothing new costs one proof; with one thing revoked two more, and it is learnt."""
    service, learnt = Service(consortium), []
    names = [Named(serial=f"{n:x}", spiffe_id=f"spiffe://alpha.test/device/d-{n}", not_after=LATER) for n in range(1000)]
    certificates = SimpleNamespace(unexpired=lambda _now: [tuple(names[:500]), tuple(names[500:])], learn=learnt.extend)
    lists = Lists(
        SimpleNamespace(
            clock=SimpleNamespace(now=lambda: now_of(consortium)),
            ledger=service.view,
            revocations=certificates,
            settings=SimpleNamespace(provider="alpha"),
            trust=consortium.made.trust,
        )
    )
    lists.look_at_cas = _now(consortium)
    await lists.look()
    assert (service.ledger.asked, learnt) == ([(COUNT,)], [])
    seen = lists.validity().not_before
    revoke(consortium, alpha, "d-7")
    service.passed += 1.0
    await lists.look()
    assert service.ledger.asked[1:] == [(COUNT,), ("index/revocation/alpha/1",), (key_of("d-7"),)]
    assert [one.serial for one in learnt] == ["7"]
    assert lists.validity().not_before == seen + 1  # as old as the proof of the count


def _now(consortium):
    async def looked():
        return now_of(consortium)

    return looked


async def test_a_revocation_counts_after_reuse_s_at_the_latest(consortium, alpha):
    """verifies that: whatever was asked before, a second after a revocation it is refused, also among others."""
    service = Service(consortium)
    assert await service.revoked("d-1", "d-2") == []
    revoke(consortium, alpha, "d-1")
    assert await service.later("d-1", "d-2", by=0.5) == []  # proven half a second ago
    assert await service.later("d-1", "d-2", by=0.5) == ["d-1"]
    revoke(consortium, alpha, "d-2", "d-3")
    assert await service.later("d-1", "d-2", "d-3", "d-4") == ["d-1", "d-2", "d-3"]


async def test_what_is_said_is_as_old_as_the_proof_of_the_count(consortium, alpha):
    service = Service(consortium)
    before = (await service.view.state((key_of("d-1"),))).checkpoint
    consortium.block()
    service.passed = 0.5
    assert (await service.view.state((key_of("d-2"),))).checkpoint == before
    service.passed = 1.0
    after = (await service.view.state((key_of("d-2"), "provider/alpha"))).checkpoint
    assert after.height == before.height + 1 == consortium.state.height


async def test_an_old_count_is_a_rollback(consortium, alpha):
    """verifies that: a count from before the revocation, shown again, is not believed, also after a restart."""
    service = Service(consortium)
    old = consortium.state
    revoke(consortium, alpha, "d-1")
    assert await service.revoked("d-1") == ["d-1"]
    for again in (service, Service(consortium, service.store)):
        again.ledger.held, again.ledger.hold = old, lambda _keys: True
        with pytest.raises(Refused, match="ledger.rollback"):
            await again.later("d-1")
        with pytest.raises(Refused, match="ledger.rollback"):
            await again.later("d-2")


async def test_an_answer_that_was_overtaken_takes_nothing_off_the_list(consortium, alpha):
    """verifies that: a count asked about before a revocation and answered after it neither hides it nor stops anything."""
    service = Service(consortium)
    assert await service.revoked("d-1") == []
    overtaken = light_client.verify_bundle(
        bundle_of(consortium, [COUNT, "provider/alpha"]), consortium.made.trust, now=now_of(consortium)
    )
    revoke(consortium, alpha, "d-1")
    assert await service.later("d-1") == ["d-1"]
    service.view._kept[COUNT] = (service.passed, overtaken)
    assert await service.revoked("d-1", "d-2") == ["d-1"]


async def test_a_proof_from_before_the_revocation_is_not_used_for_a_listed_key(consortium, alpha):
    service = Service(consortium)
    bundle = bundle_of(consortium, [key_of("d-1")])
    absent = light_client.verify_bundle(bundle, consortium.made.trust, now=now_of(consortium))
    revoke(consortium, alpha, "d-1")
    service.view._kept[key_of("d-1")] = (service.passed, absent)
    assert await service.revoked("d-1") == ["d-1"]


async def test_while_the_ledger_is_away_nobody_is_said_to_stand(consortium, alpha):
    """verifies that: without a count, without numbers that are missing, and without the record, it is an error."""
    service = Service(consortium)
    service.ledger.gone = True
    with pytest.raises(Unavailable):
        await service.revoked("d-1")
    service.ledger.gone = False
    assert await service.later("d-1") == []
    revoke(consortium, alpha, "d-1")
    for wanted in ("index/revocations/", "index/revocation/", "revocation/device"):
        prove = service.ledger.prove

        async def partly(keys, *, height=0, wanted=wanted, prove=prove):
            if keys[0].startswith(wanted):
                raise Unavailable("ledger.unreachable", "nobody answers")
            return await prove(keys)

        service.ledger.prove = partly
        with pytest.raises(Unavailable):
            await service.later("d-1", "d-2")
        service.ledger.prove = prove
    assert await service.later("d-1", "d-2") == ["d-1"]


async def test_a_restart_goes_on_from_what_is_stored(consortium, alpha):
    """verifies that: nothing is fetched twice, over pages of 256, and what came meanwhile is."""
    names = [f"d-{number}" for number in range(300)]
    store = Store()
    for start in range(0, 300, 50):
        revoke(consortium, alpha, *names[start : start + 50])
        service = Service(consortium, store)
        assert await service.revoked(names[start], "x-1") == [names[start]]
        assert service.ledger.asked[1][0].startswith(f"index/revocation/alpha/{start + 1}")
        assert len(service.ledger.asked) == 2
    assert len(store.pages) == 2
    again = Service(consortium, store)
    assert await again.revoked("d-0", "d-299", "x-1") == ["d-0", "d-299"]
    assert again.ledger.asked == [(COUNT, key_of("d-0"), key_of("d-299"), key_of("x-1"))]


async def test_a_database_from_yesterday_fetches_what_it_lacks(consortium, alpha):
    service = Service(consortium)
    revoke(consortium, alpha, "d-1")
    assert await service.revoked("d-1") == ["d-1"]
    yesterday = Store(service.store)
    revoke(consortium, alpha, "d-2")
    assert await service.later("d-2") == ["d-2"]
    assert await Service(consortium, yesterday).revoked("d-1", "d-2", "d-3") == ["d-1", "d-2"]


EDITS = {
    "dropped": lambda keys: keys[:1] + keys[2:],
    "last one dropped": lambda keys: keys[:-1],
    "another in its place": lambda keys: [keys[0], key_of("x-1"), keys[2]],
    "other order": lambda keys: [keys[1], keys[0], keys[2]],
    "one more": lambda keys: [*keys, key_of("x-1")],
    "all gone": lambda _keys: [],
    "of another registrant": lambda keys: [*keys[:2], keys[2].replace("alpha", "beta")],
    "twice": lambda keys: [keys[0], keys[0], keys[2]],
}


@pytest.mark.parametrize("edit", EDITS)
async def test_a_list_that_was_changed_on_disk_is_not_believed(consortium, alpha, edit):
    """verifies that: whoever writes the database can neither take a revocation away nor add one; all is fetched again."""
    names = ["d-1", "d-2", "d-3"]
    revoke(consortium, alpha, *names)
    service = Service(consortium)
    assert await service.revoked(*names) == names
    (page,) = service.store.pages
    changed = ledger_documents._Page(keys=tuple(EDITS[edit]([key_of(name) for name in names])))
    service.store[page] = ledger_documents.schema.encode(changed)
    again = Service(consortium, service.store)
    assert await again.revoked(*names, "x-1") == names
    assert await Service(consortium, service.store).revoked(*names, "x-1") == names  # what is stored is right again
    numbers = [one for keys in again.ledger.asked for one in keys if one.startswith("index/revocation/")]
    assert numbers, "it was fetched again"


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xa1dkeys\x00"])
async def test_a_page_that_cannot_be_read_is_fetched_again(consortium, alpha, data):
    revoke(consortium, alpha, "d-1")
    service = Service(consortium)
    assert await service.revoked("d-1") == ["d-1"]
    service.store[service.store.pages[0]] = data
    assert await Service(consortium, service.store).revoked("d-1", "d-2") == ["d-1"]


async def test_two_processes_over_one_store_disturb_each_other_in_nothing(consortium, alpha):
    """verifies that: each sees every revocation, whoever wrote last; and what is stored serves a third."""
    store = Store()
    one, other = Service(consortium, store), Service(consortium, store)
    names = []
    for turn in range(6):
        names += [f"d-{turn}", f"e-{turn}"]
        revoke(consortium, alpha, *names[-2:])
        for service in (one, other) if turn % 2 else (other,):
            assert await service.later(*names, "x-1") == names
    assert await Service(consortium, store).revoked(*names, "x-1") == names
    assert await one.later(*names, "x-1") == names


async def test_a_long_list_is_fetched_behind_and_nobody_waits_for_it(consortium, alpha):
    """verifies that: until two hundred numbers are here each key is asked about by itself; then a count is enough."""
    names = [f"d-{number}" for number in range(200)]
    revoke(consortium, alpha, *names)
    service = Service(consortium)
    assert await service.revoked("d-199", "x-1") == ["d-199"]
    assert service.ledger.asked[0] == (COUNT, key_of("d-199"), key_of("x-1"))
    await until(lambda: service.store.pages)
    await until(lambda: not service.view._followed._running)
    asked = len(service.ledger.asked)
    assert await service.later("d-5", "x-2") == ["d-5"]
    assert service.ledger.asked[asked:] == [(COUNT,), (key_of("d-5"),)]
    await service.view.aclose()


async def test_who_gives_up_waiting_leaves_the_list_whole(consortium, alpha):
    """verifies that: a caller that is cancelled while numbers are fetched spoils nothing for the next."""
    service = Service(consortium)
    assert await service.revoked("d-1") == []
    revoke(consortium, alpha, "d-1")
    let, prove = asyncio.Event(), service.ledger.prove

    async def slowly(keys, *, height=0):
        if keys[0].startswith("index/revocation/"):
            await let.wait()
        return await prove(keys)

    service.ledger.prove = slowly
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await service.later("d-1")
    let.set()
    assert await service.revoked("d-1", "d-2") == ["d-1"]
    await until(lambda: not service.view._followed._running)


async def test_more_than_there_is_room_for_is_asked_about_key_by_key(consortium, alpha, beta, monkeypatch):
    """verifies that: neither a long list nor many registrants fill the memory, and their revocations count all the same."""
    monkeypatch.setattr(ledger_revocations, "_LISTED_MAX", 2)
    revoke(consortium, alpha, "d-1", "d-2", "d-3")
    service = Service(consortium)
    assert await service.revoked("d-1", "x-1") == ["d-1"]
    assert await service.later("d-2", "x-1") == ["d-2"]
    assert service.ledger.asked[-1] == (key_of("d-2"), key_of("x-1"))
    monkeypatch.setattr(ledger_revocations, "_FOLLOWED_MAX", 1)
    revoke(consortium, beta, "d-1")
    found = await service.view.state((records.revocation_key(DEVICE, "beta", "d-1"),))
    with pytest.raises(Refused, match="ledger.revoked"):
        standing.not_revoked(found, DEVICE, "beta", "d-1")
    assert set(service.view._followed._ones) == {"alpha"}


async def test_where_nothing_is_numbered_each_key_is_asked_about(consortium):
    """verifies that: on a ledger of before (genesis of version 1) a service does as it did, and sees every revocation."""
    consortium.made = replace(consortium.made, genesis=replace(consortium.made.genesis, version=1))
    consortium.made = replace(consortium.made, trust=consortium.made.genesis.trust())
    consortium.state = state.initial(genesis.parse(consortium.made.genesis.encode()))
    alpha = consortium.admitted("alpha", "alpha.test")
    service = Service(consortium)
    assert await service.revoked("d-1") == []
    revoke(consortium, alpha, "d-1")
    assert await service.later("d-1", "d-2") == ["d-1"]
    assert service.ledger.asked == [(COUNT, key_of("d-1")), (key_of("d-1"), key_of("d-2"))]  # in one question each


NUMBER_2 = "index/revocation/alpha/2"
TWO = [key_of("d-1"), key_of("d-2")]
LIES = {
    "a count without its entry": {COUNT: RevocationsRecord(count=2, digest=digest_after(bytes(32), TWO))},
    "an entry of another registrant": {
        COUNT: RevocationsRecord(count=2, digest=digest_after(bytes(32), [key_of("d-1"), "revocation/device/beta/d-2"])),
        NUMBER_2: IndexRecord(holders=("revocation/device/beta/d-2",)),
    },
    "an entry that names no revocation": {
        COUNT: RevocationsRecord(count=2, digest=digest_after(bytes(32), [key_of("d-1"), "provider/alpha"])),
        NUMBER_2: IndexRecord(holders=("provider/alpha",)),
    },
    "an entry without a key": {
        COUNT: RevocationsRecord(count=2, digest=digest_after(bytes(32), [key_of("d-1")])),
        NUMBER_2: IndexRecord(holders=()),
    },
    "a digest of others": {
        COUNT: RevocationsRecord(count=2, digest=bytes(32)),
        NUMBER_2: IndexRecord(holders=(key_of("d-2"),)),
    },
    "fewer than before": {COUNT: NONE},
    "another digest of the same": {COUNT: RevocationsRecord(count=1, digest=b"\x01" * 32)},
    "a huge count": {COUNT: RevocationsRecord(count=60, digest=bytes(32))},
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
async def test_a_ledger_that_contradicts_itself_says_nothing_about_anybody(consortium, alpha, lie):
    """verifies that: gaps, others' keys, a list that shrank: refused by name, of the revoked and of everybody else."""
    revoke(consortium, alpha, "d-1")
    service = Service(consortium)
    assert await service.revoked("d-1", "d-9") == ["d-1"]
    rewritten(consortium, **LIES[lie])
    for names in (("d-1",), ("d-9",)):
        with pytest.raises(NotAuthentic, match="ledger.revocations_differ"):
            await service.later(*names)


async def test_a_listed_revocation_without_a_record_is_refused(consortium, alpha):
    key = key_of("d-1")
    rewritten(
        consortium,
        **{
            COUNT: RevocationsRecord(count=1, digest=digest_after(bytes(32), [key])),
            "index/revocation/alpha/1": IndexRecord(holders=(key,)),
        },
    )
    with pytest.raises(NotAuthentic, match="ledger.revocations_differ"):
        await Service(consortium).revoked("d-1")


def test_no_state_is_said_to_show_what_its_count_and_list_do_not(consortium, alpha):
    """verifies that: a shorter list, a key that is on it, another registrant's, and a state without a count show nothing."""
    revoke(consortium, alpha, "d-1", "d-2")
    keys = [key_of("d-1"), key_of("d-2")]
    trust, now = consortium.made.trust, now_of(consortium)
    counted = light_client.verify_bundle(bundle_of(consortium, [COUNT]), trust, now=now)
    whole = RevocationList("alpha", keys)
    light_client.unlisted(counted, whole, [key_of("d-3")]).absent(key_of("d-3"))
    for listed, asked in [
        (RevocationList("alpha", keys[:1]), key_of("d-3")),
        (RevocationList("alpha"), key_of("d-2")),
        (whole, key_of("d-2")),
        (whole, "revocation/device/beta/d-3"),
        (whole, "provider/beta"),
    ]:
        with pytest.raises(Refused, match="ledger.not_proven"):
            light_client.unlisted(counted, listed, [asked])
    silent = light_client.verify_bundle(bundle_of(consortium, ["provider/alpha"]), trust, now=now)
    with pytest.raises(Refused, match="ledger.not_proven"):
        light_client.unlisted(silent, whole, [key_of("d-3")])
    with pytest.raises(NotAuthentic):
        light_client.unlisted(counted, RevocationList("alpha", [key_of("d-1"), key_of("d-9")]), [key_of("d-3")])


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_and_keys_always_say_the_same(data, tmp_path_factory):
    """verifies that: over any order of revocations, restarts and pauses, a follower says what a proof of each key says."""
    made = _shared(tmp_path_factory)
    consortium, alpha = replace(made[0]), made[1]
    names = [f"d-{number}" for number in range(8)]

    async def story():
        service = Service(consortium)
        for _ in range(data.draw(st.integers(1, 6))):
            left = [name for name in names if consortium.state.get(key_of(name)) is None]
            chosen = data.draw(st.lists(st.sampled_from(left), unique=True, max_size=3)) if left else []
            revoke(consortium, alpha, *chosen)
            if data.draw(st.booleans()):
                service = Service(consortium, service.store)
            asked = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
            assert await service.later(*asked) == [name for name in asked if consortium.state.get(key_of(name)) is not None]

    asyncio.run(story())


_MADE = []


def _shared(tmp_path_factory):
    if not _MADE:
        made = consortium_at(tmp_path_factory.mktemp("followed") / "c")
        _MADE.append((made, made.admitted("alpha", "alpha.test")))
    return _MADE[0]


def test_a_proven_list_is_never_forgotten():
    listed = RevocationList("alpha", [key_of("d-1")])
    listed.covers(RevocationsRecord(count=1, digest=digest_after(bytes(32), [key_of("d-1")])), height=3)
    with pytest.raises(MoorlineError):
        listed.forget()
    assert key_of("d-1") in listed
