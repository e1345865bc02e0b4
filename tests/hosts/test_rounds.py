"""Rounds: many hosts in one transaction, each by itself all the same."""

import asyncio
import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.verifier_queue import MOST, VerifierQueue
from moorline.storage.verifier_store import VerifierStore

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
# The fleet of the benchmark: keys that sign TPM quotes.
from host_poll import NOW, Machine, authority, enrol, reference_of  # noqa: E402

sys.path.remove(BENCHMARKS)  # names there, such as ledger, are folders of tests too


@pytest.fixture
def fleet(tmp_path):
    served, store = authority(tmp_path, reference_of())
    return served, store, Machine()


def rebuilt(served, store, **changes):
    """Another process of the same verifier, over the same database."""
    return AttestationAuthority(dataclasses.replace(served._parts, store=store, **changes))


async def first(served, machine, names):
    """All these hosts attest for the first time, at once; their verdicts."""
    asked = [(name, machine.evidence(served.challenge(name))) for name in names]
    return await asyncio.gather(*(served.appraise(name, evidence) for name, evidence in asked), return_exceptions=True)


async def test_hosts_that_attest_at_once_are_written_at_once(fleet):
    """verifies that: two hundred hosts cost a handful of transactions, and each has its verdict and its next challenge."""
    served, store, machine = fleet
    names = [f"h{number}" for number in range(200)]
    for name in names:
        enrol(store, name, machine)
    settled = []
    inner = store.settle

    def counted(changes, **terms):
        settled.append(len(changes))
        return inner(changes, **terms)

    store.settle = counted
    verdicts = await first(served, machine, names)
    assert {verdict.status for verdict in verdicts} == {"affirming"}
    assert sum(settled) == 200
    assert max(settled) == MOST
    assert len({verdict.next.nonce for verdict in verdicts}) == 200
    again = [(name, machine.evidence(verdict.next)) for name, verdict in zip(names, verdicts, strict=True)]
    assert all(evidence.event_log is None and evidence.ima == b"" for _, evidence in again)
    followed = await asyncio.gather(*(served.appraise(name, evidence) for name, evidence in again))
    assert {verdict.status for verdict in followed} == {"affirming"}
    assert store.events(after=0, limit=500)[1] == 200  # renewals are no events


async def test_one_bad_host_spoils_its_own_answer_only(fleet):
    """verifies that: garbage, a stranger, a foreign nonce and a wrong key are each told their own, and the rest stand."""
    served, store, machine = fleet
    for name in ("good", "odd", "late", "other"):
        enrol(store, name, machine)
    fresh = {name: machine.evidence(served.challenge(name)) for name in ("good", "odd", "late", "other")}
    fresh["odd"] = dataclasses.replace(fresh["odd"], quoted=b"\xff" * 40)
    fresh["late"] = machine.evidence(dataclasses.replace(served.challenge("late"), nonce=bytes(32)))
    fresh["other"] = dataclasses.replace(fresh["other"], signature=fresh["good"].signature)
    fresh["stranger"] = fresh["good"]
    answers = await asyncio.gather(*(served.appraise(*one) for one in fresh.items()), return_exceptions=True)
    said = dict(zip(fresh, answers, strict=True))
    assert said["good"].status == "affirming"
    assert isinstance(said["odd"], Malformed)
    assert said["late"].code == "tpm.nonce_mismatch"
    assert said["other"].code == "tpm.signature_invalid"
    assert said["stranger"].code == "host.not_enrolled"
    assert set(store.results()) == {"good"}


async def test_evidence_answers_once_also_in_one_round(fleet):
    """verifies that: the same evidence posted five times at once gives one verdict."""
    served, store, machine = fleet
    enrol(store, "h1", machine)
    evidence = machine.evidence(served.challenge("h1"))
    answers = await asyncio.gather(*(served.appraise("h1", evidence) for _ in range(5)), return_exceptions=True)
    assert [isinstance(one, NotAuthentic) for one in answers] == [False, True, True, True, True]


async def test_a_challenge_used_by_another_process_in_between_writes_nothing(fleet, tmp_path):
    """verifies that: two processes that judge the same evidence at once answer it once; the other writes nothing of it."""
    served, store, machine = fleet
    enrol(store, "h1", machine)
    evidence = machine.evidence(served.challenge("h1"))
    other = rebuilt(served, VerifierStore.open(tmp_path / "verifier.db"))
    inner = store.look

    def slowly(asked):
        found = inner(asked)
        # Everything the other process does with this evidence happens after our look and before our write.
        asyncio.run_coroutine_threadsafe(overtake(), loop).result(20)
        return found

    async def overtake():
        assert (await other.appraise("h1", evidence)).status == "affirming"

    loop = asyncio.get_running_loop()
    store.look = slowly
    with pytest.raises(NotAuthentic) as refused:
        await served.appraise("h1", evidence)
    assert refused.value.code == "tpm.nonce_mismatch"
    assert store.events(after=0, limit=9)[1] == 1


async def test_where_nothing_signs_a_lost_verdict_is_lost_all_the_same(fleet):
    """verifies that: with the broker away a good host keeps its lease, a bad one loses its verdict, nobody is answered."""
    served, store, machine = fleet
    for name in ("good", "bad"):
        enrol(store, name, machine)
    verdicts = dict(zip(("good", "bad"), await first(served, machine, ("good", "bad")), strict=True))

    async def away(_):
        raise Unavailable("peer.unreachable", "no answer from the broker")

    silent = rebuilt(served, store, sign=away)
    good = machine.evidence(verdicts["good"].next)
    drifted = Machine(extra=("/usr/local/bin/miner", b"not allowed"), key=machine.key)
    drifted.clock = machine.clock + 1
    bad = drifted.evidence(dataclasses.replace(verdicts["bad"].next, ima_from=0))
    answers = await asyncio.gather(silent.appraise("good", good), silent.appraise("bad", bad), return_exceptions=True)
    assert [one.code for one in answers] == ["peer.unreachable", "peer.unreachable"]
    assert store.results()["good"].withdrawn is None
    assert store.results()["bad"].withdrawn == "host.file_not_in_reference_values"
    assert store.progress("good").clock.clock < store.progress("bad").clock.clock  # a good host is read again from before


async def test_a_lease_counts_from_the_question(fleet):
    """verifies that: a host that quotes at once and answers late gains nothing by it."""
    served, store, machine = fleet
    enrol(store, "h1", machine)
    evidence = machine.evidence(served.challenge("h1"))

    class Later:
        def now(self):
            return Instant(NOW + 20)

    late = rebuilt(served, store, clock=Later())
    verdict = await late.appraise("h1", evidence)
    assert verdict.status == "affirming"
    assert store.results()["h1"].expires == NOW + 60
    assert store.results()["h1"].issued == NOW + 20


async def test_a_database_that_is_gone_is_said_and_nobody_loses_a_verdict(fleet):
    """verifies that: a read-only or locked database answers Unavailable, and the same challenge can be answered after it."""
    served, store, machine = fleet
    enrol(store, "h1", machine)
    evidence = machine.evidence(served.challenge("h1"))
    with store._engine.connect() as held:
        held.exec_driver_sql("PRAGMA busy_timeout=1")
        held.exec_driver_sql("BEGIN IMMEDIATE")
        for connection in (store._engine.connect(),):
            connection.exec_driver_sql("PRAGMA busy_timeout=1")
            connection.close()
        with pytest.raises(Unavailable) as refused:
            await served.appraise("h1", evidence)
        held.rollback()
    assert refused.value.code == "storage.unavailable"
    assert (await served.appraise("h1", evidence)).status == "affirming"


async def test_a_queue_that_is_full_says_when_to_come_back(monkeypatch):
    monkeypatch.setattr("moorline.services.verifier_queue.MAX_WAITING", 2)
    gate = asyncio.Event()

    async def settle(entries):
        await gate.wait()
        for entry in entries:
            entry.tell(Refused("test.told", "told"))

    queue = VerifierQueue(settle)
    waiting = [asyncio.create_task(queue.join(f"h{number}", None)) for number in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refused:
        await queue.join("h3", None)
    assert refused.value.code == "verifier.busy"
    gate.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [one.code for one in answers] == ["test.told"] * 2


async def test_a_defect_reaches_whoever_waits_and_the_next_round_goes_on():
    """verifies that: an error nobody expected is not swallowed, and is of its own round only."""
    rounds = []

    async def settle(entries):
        rounds.append(len(entries))
        if len(rounds) == 1:
            raise ZeroDivisionError
        for entry in entries:
            entry.tell(Refused("test.told", "told"))

    queue = VerifierQueue(settle)
    with pytest.raises(ZeroDivisionError):
        await queue.join("h1", None)
    with contextlib.suppress(MoorlineError):
        await queue.join("h1", None)
    assert rounds == [1, 1]
