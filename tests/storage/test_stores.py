"""Every store on either database: what is kept is given back, rules of the schema hold, and two at once are in a row.

The broker's store has its own suites (tests/hsm/test_consumption.py, test_instances.py), the verifier's events too
(tests/hosts/test_events.py); all of them run on SQLite and on a PostgreSQL cluster that the tests start.
"""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from moorline.clock import Instant, Validity
from moorline.errors import Conflict, Misconfigured, NotAuthentic, Refused, Unavailable
from moorline.evidence.tpm_quote import ClockInfo
from moorline.rats import EvidenceRoot
from moorline.storage import consensus_store, database, transactions
from moorline.storage.broker_store import BrokerStore
from moorline.storage.collateral_sqlite import SqliteStore
from moorline.storage.collateral_store import Put, StoredItem
from moorline.storage.consensus_store import Misbehaviour, StoredHead, open_consensus
from moorline.storage.database import open_database
from moorline.storage.ledger_store import (
    LedgerStore,
    StateWrites,
    StoredBlock,
    StoredEvidence,
    StoredProposal,
    StoredTerm,
)
from moorline.storage.orchestrator_store import FunctionRow, LaunchState, OrchestratorStore, PackageRow
from moorline.storage.verifier_rounds import Change, EnrolledHost, Progress, StoredResult
from moorline.storage.verifier_store import OpenEnrolment, VerifierStore
from moorline.verification.collateral import ItemName, Judged

NOW = Instant(1_790_000_000)
STORES = ("broker", "collateral", "ledger", "orchestrator", "verifier")


# Opening ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORES)
def test_every_chain_of_migrations_runs_from_the_start_and_once(database_url, name):
    """verifies that: a new database comes to the newest schema, and one that is there is left as it is."""
    first = open_database(database_url, name)
    tables = set(sa.inspect(first).get_table_names())
    first.dispose()
    second = open_database(database_url, name)
    assert set(sa.inspect(second).get_table_names()) == tables
    assert f"{name}_version" in tables
    second.dispose()


def _opened(url, gate, said):
    gate.wait()
    try:
        open_database(url, "broker").dispose()
        said.put("")
    except BaseException as error:
        said.put(repr(error))


def test_processes_that_start_at_once_migrate_once(database_url):
    """verifies that: several processes on a new database all come up; one migrates and the others find it done."""
    context = multiprocessing.get_context("fork")
    gate, said = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_opened, args=(database_url, gate, said)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [said.get(timeout=60) for _ in processes] == [""] * 4
    for process in processes:
        process.join()


@pytest.mark.long
def test_whoever_starts_while_another_migrates_waits_for_longer_than_a_statement_may(database_url):
    """verifies that: a migration of a large database does not turn away the processes that start meanwhile."""
    engine = database._engine(database_url, "broker")
    ended, opened = [], []

    def start():
        open_database(database_url, "broker").dispose()
        opened.append(time.monotonic())

    starting = threading.Thread(target=start)
    with database._alone(engine, "broker"):
        starting.start()
        time.sleep(database.BUSY_MS / 1000 + 4)  # pg8000 gives a silent server up after eight seconds
        ended.append(time.monotonic())
    starting.join(30)
    engine.dispose()
    assert opened[0] >= ended[0]


def test_a_newer_schema_and_a_wrong_address_are_refused(database_url):
    """verifies that: an older program does not touch a newer database, and a URL of another kind is told without secrets."""
    engine = open_database(database_url, "verifier")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE verifier_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(Misconfigured, match="storage.newer_schema"):
        open_database(database_url, "verifier")
    for wrong in ("mysql://root:hunter2@db/x", "postgresql://root:hunter2@db/x", "nonsense"):
        with pytest.raises(Misconfigured, match="storage.url") as caught:
            open_database(wrong, "verifier")
        assert "hunter2" not in str(caught.value.as_problem())


def test_nobody_there_is_unavailable(tmp_path):
    """verifies that: a database that cannot be reached is told as such, on both kinds."""
    for url in (
        f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}",
        f"postgresql+pg8000://u@/d?unix_sock={tmp_path}/.s.PGSQL.5432",
        "postgresql+pg8000://u@127.0.0.1:9/d",
    ):
        with pytest.raises(Unavailable, match="storage.unavailable"):
            open_database(url, "broker")


def test_over_the_network_the_server_must_be_known(tmp_path, monkeypatch):
    """verifies that: without a unix socket a connection is TLS with a verified name; a missing root is told."""
    with pytest.raises(Misconfigured, match="storage.url"):
        open_database(f"postgresql+pg8000://u@127.0.0.1:9/d?sslrootcert={tmp_path / 'missing.pem'}", "broker")
    from moorline.storage import database

    context = database._tls(sa.make_url("postgresql+pg8000://u@127.0.0.1:9/d"))
    assert context.check_hostname


# Transactions ----------------------------------------------------------------------------------------------------------


def test_writers_are_in_a_row(database_url):
    """verifies that: a writer sees what the writer before it committed, however they overlap; nothing is lost."""
    store = BrokerStore.open(database_url)

    def add(times):
        for _ in range(times):
            with store.transaction() as c:
                before = c.exec_driver_sql("SELECT value FROM facts WHERE name = 'sum'").scalar() or 0
                store.set_fact_in(c, "sum", before + 1)

    threads = [threading.Thread(target=add, args=(25,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.fact("sum") == 100
    store.close()


@transactions.retried
class Adding:
    """A store of one method, which a stranger gets in the way of."""

    def __init__(self, store, meanwhile):
        self.store, self.meanwhile, self.runs = store, meanwhile, 0

    def add(self):
        self.runs += 1
        with self.store.transaction() as c:
            before = c.exec_driver_sql("SELECT value FROM facts WHERE name = 'sum'").scalar()
            self.meanwhile(self.runs)
            c.exec_driver_sql(f"UPDATE facts SET value = {before + 1} WHERE name = 'sum'")


@pytest.mark.parametrize(("disturbed", "runs"), [(2, 3), (99, transactions.TRIES)])
def test_what_postgresql_undoes_is_run_again_a_few_times(postgres, disturbed, runs):
    """verifies that: a transaction undone by one outside the row (40001) runs again, and not for ever."""
    url = postgres.url()
    store = BrokerStore.open(url)
    with store.transaction() as c:
        store.set_fact_in(c, "sum", 0)
    stranger = sa.create_engine(url, isolation_level="SERIALIZABLE")

    def meanwhile(run):
        if run <= disturbed:
            with stranger.begin() as connection:
                connection.exec_driver_sql("UPDATE facts SET value = value + 10 WHERE name = 'sum'")

    adding = Adding(store, meanwhile)
    if disturbed < transactions.TRIES:
        adding.add()
        assert store.fact("sum") == 10 * disturbed + 1
    else:
        with pytest.raises(transactions.Undone, match="storage.undone"):
            adding.add()
        assert store.fact("sum") == 10 * transactions.TRIES
    assert adding.runs == runs
    stranger.dispose()
    store.close()


def test_a_server_that_was_restarted_costs_no_launch(postgres):
    """verifies that: connections that died with the server are replaced, and what was committed is there."""
    store = BrokerStore.open(postgres.url())
    store.append("before", {"a": 1}, at=NOW)
    postgres.stop()
    with pytest.raises(Unavailable, match="storage.unavailable"):
        store.append("meanwhile", {"a": 1}, at=NOW)
    postgres.start()
    store.append("after", {"a": 1}, at=NOW)
    assert len(store.audit()) == 2
    store.close()


# Stores ----------------------------------------------------------------------------------------------------------------


def test_the_verifiers_store(database_url):
    """verifies that: enrolment, challenges, progress, results, serials and facts, each with its one refusal."""
    store = VerifierStore.open(database_url)
    opened = OpenEnrolment(
        enrolment=b"e" * 16,
        host="h1",
        ek_digest=b"k",
        ak_public=b"a",
        root=EvidenceRoot.TEST,
        secret_digest=b"s",
        expires=Instant(NOW + 60),
    )
    store.open_enrolment(opened)
    assert store.take_enrolment(b"e" * 16, now=NOW) == opened
    with pytest.raises(NotAuthentic, match="enrol.unknown"):
        store.take_enrolment(b"e" * 16, now=NOW)
    host = EnrolledHost(host="h1", ek_digest=b"k", ak_public=b"a", root=EvidenceRoot.TEST, enrolled=NOW)
    assert store.enrol(host) == store.host("h1") == store.enrol(host)
    with pytest.raises(Conflict, match="enrol.other_host"):
        store.require_free("h2", b"k")
    for number in range(70):
        store.open_challenges({"h1": bytes([number]) * 32}, Instant(NOW + number))
    assert store.look({"h1": bytes(32)})["h1"].challenge_expires is None  # 64 are kept, and the oldest was pushed out
    assert store.look({"h2": bytes(32)}) == {}
    progress = Progress(
        clock=ClockInfo(1 << 40, 2, 3, safe=True),
        ima_count=1 << 33,
        ima_running=b"r",
        reference=b"v",
        standing=b"",
        boot_log=b"d" * 32,
    )
    result = StoredResult(
        host="h1", ear="a.b.c", status="affirming", code=None, issued=NOW, expires=Instant(NOW + 60), withdrawn=None
    )
    change = Change(
        host="h1",
        nonce=bytes([69]) * 32,
        before=None,
        progress=progress,
        boot_log=bytes(100_000),
        withdraw=None,
        result=result,
        next_nonce=b"n" * 32,
    )
    terms = {"at": NOW, "next_expires": Instant(NOW + 30), "patience_until": Instant(0)}
    assert store.look({"h1": change.nonce})["h1"].challenge_expires == NOW + 69
    assert store.settle((change,), **terms) == {"h1"}
    assert store.settle((change,), **terms) == frozenset()  # a challenge is used up once
    held = store.look({"h1": b"n" * 32})["h1"]
    assert (held.enrolled, held.progress, held.challenge_expires) == (host, progress, NOW + 30)
    assert store.boot_log(b"d" * 32) == bytes(100_000)
    assert store.progress("h1") == progress
    assert store.standing_result("h1", now=NOW) == result
    store.withdraw("h1", "ima.unknown_file", at=NOW)
    with pytest.raises(Refused, match="result.withdrawn"):
        store.standing_result("h1", now=NOW)
    events, newest = store.events(after=0, limit=10)
    assert ([one.kind for one in events], newest) == (["verdict_gained", "verdict_lost"], events[-1].cursor)
    store.accept_serial("set", 4)
    with pytest.raises(Refused, match="reference.rollback"):
        store.accept_serial("set", 3)
    store.set_document("name", b"\x00\xff")
    assert store.document("name") == b"\x00\xff"
    assert len(store.audit_rows(first=0, limit=10)) == 4
    store.close()


def test_the_orchestrators_store(database_url):
    """verifies that: a package and a function with its saga, from revision to revision, and a name taken once."""
    store = OrchestratorStore.open(database_url)
    package = PackageRow(
        digest=b"d" * 32,
        service="records",
        version="1",
        use_case="4.7",
        jurisdiction="EU",
        memory_mib=64,
        pids=8,
        signer=b"s",
        signer_name="p",
        onboarded=NOW,
    )
    store.onboard(package, b"\x00zip\xff")
    store.onboard(package, b"\x00zip\xff")
    assert store.package(b"d" * 32) == (package, b"\x00zip\xff")
    asked = FunctionRow(
        instance="r-1",
        service="records",
        tenant="t",
        hsm="hsm-1",
        package=b"d" * 32,
        contracts=("c1",),
        settings={"a": "b"},
        requested=NOW,
    )
    assert store.request(asked) == store.request(asked) == store.function("r-1")
    with pytest.raises(Conflict, match="launch.name_taken"):
        store.request(FunctionRow(**{**{n: getattr(asked, n) for n in FunctionRow.__dataclass_fields__}, "tenant": "u"}))
    moved = FunctionRow(
        **{
            **{n: getattr(asked, n) for n in FunctionRow.__dataclass_fields__},
            "state": LaunchState.INTENDED,
            "host": "h1",
            "intent": b"\x00\xff",
        }
    )
    saved = store.save(moved, at=NOW, says="placed")
    assert (saved.revision, store.function("r-1")) == (1, saved)
    with pytest.raises(Conflict, match="launch.moved_on"):
        store.save(moved, at=NOW, says="placed")
    assert store.unfinished() == ("r-1",)
    assert store.load() == {"h1": 1}
    assert [event.state for event in store.events("r-1")] == ["requested", "intended"]
    store.remember_cursor(7)
    store.remember_checkpoint(b"c")
    assert (store.cursor(), store.checkpoint()) == (7, b"c")
    assert len(store.audit()) == 3
    store.close()


def test_one_subtree_of_a_ledgers_state_is_read_as_all_of_it_is(database_url):
    """verifies that: each read sees what was committed last, first and last subtree too, also where the quick way errs."""
    store, other = (LedgerStore(open_database(database_url, "ledger")) for _ in range(2))
    for value in (b"1", b"2"):
        places = {prefix.to_bytes(2, "big") + bytes(30): (f"k{prefix}", value) for prefix in (0, 3, 4, 0xFFFF)}
        other.put_state(StateWrites(records=places, subtrees={}, nonces={}))
        assert [store.records(prefix, prefix) for prefix in (0, 3, 5, 0xFFFF)] == [
            [("k0", value)],
            [("k3", value)],
            [],
            [("k65535", value)],
        ]
    store._subtrees._between = store._subtrees._from = "SELECT nothing"
    assert store.records(3, 3) == [("k3", b"2")]
    other.put_state(StateWrites(records={b"\0\4" + bytes(30): ("k4", b"3")}, subtrees={}, nonces={}))
    assert store.records(4, 4) == [("k4", b"3")]
    for one in (store, other):
        one.close()


def test_the_ledgers_store(database_url):
    """verifies that: blocks with what follows from them, and one signature a height, by the schema itself."""
    store = LedgerStore(open_database(database_url, "ledger"))
    assert (store.head(), store.records(), store.proposed(), store.signed(), store.term()) == (None, [], None, None, None)
    store.propose(1, b"body", seal=b"seal")
    store.intend_signature(1, b"body", time_s=NOW, seal=b"seal")
    store.keep_cosignatures(1, {"a2": "line 2"})
    store.keep_cosignatures(1, {"a2": "line 2", "a3": "line 3"})
    assert store.proposed() == StoredProposal(height=1, body=b"body", seal=b"seal", first_seal=None)
    assert store.cosignatures(1) == {"a2": "line 2", "a3": "line 3"}
    with pytest.raises(IntegrityError):
        store.intend_signature(1, b"another body", time_s=NOW)
    block = StoredBlock(height=1, body=b"body", note=b"note", leaf=b"leaf", edge=b"edge")
    first = StateWrites(records={b"\0" * 32: ("k", b"v")}, subtrees={3: (b"h", 1)}, nonces={b"n" * 32: 5})
    store.commit(block, first, transactions=[(b"t", 5)], authorities=b"set")
    assert store.head() == store.block(1) == block
    assert (store.records(), store.subtrees()) == ([("k", b"v")], [(3, b"h", 1)])
    assert (store.nonces(), store.transaction(b"t", 5), store.transaction(b"t", 6)) == ({b"n" * 32: 5}, (1, 0), None)
    assert (store.leaves(), store.set_changes(), store.lowest()) == ([b"leaf"], [(b"note", b"set")], 1)
    assert (store.proposed(), store.signed().time_s) == (None, NOW)
    again = StateWrites(records={b"\0" * 32: ("k", b"w")}, subtrees={3: (b"i", 1)}, nonces={})
    later = StoredBlock(height=5, body=b"", note=b"", leaf=b"l2", edge=None)
    store.commit(later, again, transactions=[], authorities=None)
    assert (store.records(), store.subtrees(), store.nonces()) == ([("k", b"w")], [(3, b"i", 1)], {})
    store.fill_edges({5: b"e5"})
    assert store.block(5).edge == b"e5"
    store.put_term(StoredTerm(term=2, sequencer="a2", certificate=None))
    assert store.term() == StoredTerm(term=2, sequencer="a2", certificate=None)
    store.set_mark("m", 7)
    found = StoredEvidence(id="e", height=1, found_ms=1 << 41, body=b"b")
    store.keep_evidence(found)
    assert (store.mark("m"), store.evidence()) == (7, [found])
    assert store.damaged_pages() == []
    store.clear_state([0])
    assert store.records() == []
    store.close()


def test_the_consensus_store(database_url):
    """verifies that: blocks, state, headers and evidence, and a restored state in the place of all; waiting for a disk is
    left to CometBFT for blocks, and not for what CometBFT does not have."""
    store = open_consensus(database_url)
    assert (store.head(), store.records(), store.last_anchor(), store.next_body(0)) == (None, {}, None, None)
    block = StoredHead(height=1, time_ms=NOW, app_hash=b"root", body=b"body")
    wrong = Misbehaviour(height=1, address=b"a", kind="duplicate-vote", authority="a4", seen_at=1)
    store.commit(
        block,
        writes={"k": b"v", "l": b"w"},
        nonces={b"n": 2},
        transactions=[b"t0", b"t1"],
        authorities=b"set",
        misbehaviour=[wrong, wrong],
    )
    assert (store.head(), store.block(2), store.next_body(0)) == (block, None, 1)
    assert (store.records(), store.nonces()) == ({"k": b"v", "l": b"w"}, {b"n": 2})
    assert (store.transaction(b"t1"), store.transaction(b"?")) == ((1, 1), None)
    assert (store.set_changes(), store.misbehaviour()) == ([(1, b"set")], [wrong])
    for anchor in (b"first", b"again"):
        store.keep_anchor(1, anchor)
    assert (store.anchor(1), store.last_anchor()) == (b"again", (1, b"again"))
    found = consensus_store.StoredEvidence(id="e", kind="clock-off", height=1, seen_at=1, body=b"b")
    for _ in range(2):
        store.keep_evidence(found)
    assert store.evidence() == [found]
    later = StoredHead(height=2, time_ms=NOW, app_hash=b"r2", body=b"b2")
    store.commit(later, writes={"k": b"x"}, nonces={}, transactions=[], authorities=None)
    assert (store.records(), store.nonces()) == ({"k": b"x", "l": b"w"}, {})
    with pytest.raises(IntegrityError):
        store.commit(later, writes={"k": b"y"}, nonces={}, transactions=[], authorities=None)
    assert store.records()["k"] == b"x"
    taken = StoredHead(height=9, time_ms=NOW, app_hash=b"r9", body=None)
    store.restore(taken, records={"z": b"9"}, nonces={b"m": 20}, set_changes=[(3, b"s")], anchors={9: b"h9"})
    assert (store.head(), store.block(1), store.next_body(0)) == (taken, None, None)
    assert (store.records(), store.nonces(), store.set_changes()) == ({"z": b"9"}, {b"m": 20}, [(3, b"s")])
    assert (store.anchor(9), store.evidence(), store.damaged_pages()) == (b"h9", [found], [])
    store.close()
    again = open_consensus(database_url)
    assert again.head() == taken
    again.close()


def test_the_collateral_store(database_url):
    """verifies that: an item is held and given back, and nothing older replaces it, even after it was dropped."""
    store = SqliteStore(database_url)
    name = ItemName.parse("intel-root-crl/root")

    def item(number: int, data: bytes) -> StoredItem:
        judged = Judged(
            name=name,
            issued=NOW,
            validity=Validity(not_before=NOW, not_after=Instant(NOW + 10)),
            evaluation=17,
            number=number,
            content=data.ljust(32, b"\0"),
            root=EvidenceRoot.TEST,
            endorses="a test",
        )
        return StoredItem(judged=judged, source="https://vendor.test/x", fetched=NOW, data=data)

    held = item(1 << 159, b"new")
    assert (store.put(held), store.put(held), store.get(name)) == (Put.STORED, Put.UNCHANGED, held)
    store.drop(name)
    with pytest.raises(Refused, match="collateral.rollback"):
        store.put(item(3, b"old"))
    assert store.names() == ()
    store.close()
