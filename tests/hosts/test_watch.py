"""Several processes of one verifier over one database: who watches what, who takes over, and that any of them answers."""

import asyncio
import dataclasses
import random
import sys
from pathlib import Path

import pytest

from moorline.errors import NotAuthentic, Unavailable
from moorline.host_agent.verifier_processes import VerifierProcesses
from moorline.services import verifier_watch
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.verifier_watch import Watch
from moorline.storage.verifier_store import VerifierStore
from moorline.storage.verifier_watch import PARTS, part_of

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
# The fleet of the benchmark: keys that sign TPM quotes.
from host_poll import Machine, authority, enrol, reference_of  # noqa: E402

sys.path.remove(BENCHMARKS)  # names there, such as ledger, are folders of tests too
TAKEOVER_S = 5.0
NAMES = {}
for number in range(2000):  # a host of every part
    NAMES.setdefault(part_of(f"h{number}"), f"h{number}")


class Processes:
    """Processes of one verifier by name, each with its own database connections; one steady clock, which tests move."""

    def __init__(self, url):
        self.url, self.now, self.ready, self.running = url, 0.0, {}, {}

    def start(self, name, *, ready=True):
        self.ready[name] = ready
        self.running[name] = Watch(
            VerifierStore.open(self.url).watchers(),
            process=name,
            takeover_s=TAKEOVER_S,
            steady=lambda: self.now,
            ready=lambda: self.ready[name],
        )

    def pass_time(self, seconds, *, without=()):
        """Each second every process beats, except those named."""
        for _ in range(seconds):
            self.now += 1
            for name, watch in self.running.items():
                if name not in without:
                    watch.beat()

    def held(self, *names):
        return {name: {part for part, host in NAMES.items() if self.running[name].holds(host)} for name in names}


@pytest.fixture
def processes(database_url):
    return Processes(database_url)


def whole(*held):
    """Every part is watched, and by one."""
    return sum(map(len, held)) == PARTS and set().union(*held) == set(range(PARTS))


def test_processes_share_the_fleet_and_take_over_from_the_dead(processes):
    """verifies that: one has all, two have half each, and what a killed one had is taken a takeover later, not sooner."""
    processes.start("a")
    processes.pass_time(1)
    assert processes.held("a")["a"] == set(range(PARTS))
    processes.start("b")
    processes.pass_time(3)
    held = processes.held("a", "b")
    assert whole(*held.values())
    assert len(held["a"]) == len(held["b"]) == PARTS // 2
    processes.pass_time(4, without=("a",))
    assert processes.held("b")["b"] == held["b"]  # a may be slow: what is not shown is not assumed
    processes.pass_time(2, without=("a",))
    assert processes.held("a")["a"] == set()  # it has let go by itself, though nothing told it
    assert processes.held("b")["b"] == set(range(PARTS))
    processes.pass_time(3)  # a was only stopped: it is one of two again, and nothing is watched twice
    assert whole(*processes.held("a", "b").values())


def test_a_process_that_cannot_blame_hosts_yet_takes_no_work_from_one_that_can(processes):
    """verifies that: a fresh process holds nothing beside an old one, everything alone, its share when it has grown old."""
    processes.start("old")
    processes.start("new", ready=False)
    processes.pass_time(3)
    assert processes.held("new")["new"] == set()
    processes.pass_time(7, without=("old",))
    assert processes.held("new")["new"] == set(range(PARTS))
    processes.pass_time(3)
    assert processes.held("new")["new"] == set()
    processes.ready["new"] = True
    processes.pass_time(3)
    assert whole(*processes.held("old", "new").values())
    assert processes.held("new")["new"]


def test_who_leaves_is_followed_at_the_next_beat(processes):
    processes.start("a")
    processes.start("b")
    processes.pass_time(3)
    gone = processes.running.pop("a")
    gone._watchers.leave("a")
    processes.pass_time(1)
    assert processes.held("b")["b"] == set(range(PARTS))


@pytest.mark.parametrize("seed", range(2))
def test_whatever_dies_and_returns_no_part_is_watched_twice_and_none_is_left(tmp_path, seed):
    """verifies that: in a hundred seconds of deaths and returns no two hold one part, and all is held once quiet returns."""
    chance = random.Random(seed)
    processes = Processes(f"sqlite:///{tmp_path / 'watch.db'}")
    names = ("a", "b", "c")
    for name in names:
        processes.start(name)
    silent = set()
    for _ in range(100):
        if chance.random() < 0.15:
            silent ^= {chance.choice(names)}
        processes.pass_time(1, without=silent)
        held = processes.held(*names)
        assert sum(map(len, held.values())) == len(set().union(*held.values())), "watched twice"
    processes.pass_time(10, without=("c",))
    assert whole(*processes.held("a", "b").values())


# Any process answers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(database_url, tmp_path):
    """Two processes of one verifier, a fleet's key, and what enrolled h1."""
    first, _ = authority(tmp_path, reference_of())
    stores = [VerifierStore.open(database_url) for _ in range(2)]
    served = [AttestationAuthority(dataclasses.replace(first._parts, store=store)) for store in stores]
    machine = Machine()
    enrol(stores[0], "h1", machine)
    return served, stores, machine


async def test_any_process_answers_any_host(pair):
    """verifies that: a challenge of one is answered at the other, once; logs are read on from where the other stopped."""
    (one, other), _, machine = pair
    evidence = machine.evidence(one.challenge("h1"))
    verdict = await other.appraise("h1", evidence)
    assert verdict.status == "affirming"
    with pytest.raises(NotAuthentic) as refused:
        await one.appraise("h1", evidence)
    assert refused.value.code == "tpm.nonce_mismatch"
    further = machine.evidence(verdict.next)
    assert further.event_log is None
    assert further.ima_from > 0
    assert (await one.appraise("h1", further)).status == "affirming"
    assert other.standing("h1").ear == one.standing("h1").ear


async def test_of_two_quotes_judged_at_once_the_older_is_not_written_last(pair):
    """verifies that: a bad quote, judged elsewhere while an older good one is under way, is not undone by it."""
    (one, other), (store, _), machine = pair
    verdict = await one.appraise("h1", machine.evidence(one.challenge("h1")))
    older = machine.evidence(verdict.next)
    drifted = Machine(extra=("/usr/local/bin/miner", b"not allowed"), key=machine.key)
    drifted.clock = machine.clock + 1
    newer = drifted.evidence(dataclasses.replace(other.challenge("h1"), ima_from=0))
    inner, loop = store.look, asyncio.get_running_loop()

    def slowly(asked):
        found = inner(asked)
        bad = asyncio.run_coroutine_threadsafe(other.appraise("h1", newer), loop).result(20)
        assert bad.status == "contraindicated"
        return found

    store.look = slowly
    with pytest.raises(NotAuthentic):
        await one.appraise("h1", older)
    assert store.results()["h1"].status == "contraindicated"


async def test_readers_at_one_process_hear_what_the_other_wrote(pair):
    """verifies that: a reader that waits at one process is woken by a verdict written by the other, once, in order."""
    (one, other), _, machine = pair
    following = asyncio.create_task(verifier_watch.follow(one))
    try:
        waiting = asyncio.create_task(one.events(after=0, wait_s=20))
        await asyncio.sleep(0.05)
        await other.appraise("h1", machine.evidence(other.challenge("h1")))
        found, newest = await asyncio.wait_for(waiting, 10)
    finally:
        following.cancel()
    assert [(event.host, event.kind, event.cursor) for event in found] == [("h1", "verdict_gained", newest)]


class Answering:
    """A process that answers with its name, or is away."""

    def __init__(self, name):
        self.name, self.away = name, False

    async def post_cbor(self, path, body):
        if self.away:
            raise Unavailable("peer.unreachable", f"{self.name} is away")
        return self.name.encode()


async def test_a_host_goes_to_the_next_process_and_stays_there():
    a, b = Answering("a"), Answering("b")
    reached = VerifierProcesses([a, b])
    assert await reached.post_cbor("/", b"") == b"a"
    a.away = True
    assert await reached.post_cbor("/", b"") == b"b"
    a.away = False
    assert await reached.post_cbor("/", b"") == b"b"  # no going to and fro
    a.away = b.away = True
    with pytest.raises(Unavailable):
        await reached.post_cbor("/", b"")
