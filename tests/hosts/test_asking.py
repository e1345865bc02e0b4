"""A verifier asks its hosts: on suspicion, on a change of use, where it pulls; and what it thinks of silence."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic, Refused, Unavailable
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.verifier_asking import Asking, Terms
from moorline.simulators import firmware
from moorline.storage import steps
from moorline.storage.verifier_asks import OPEN_MAX, Reason
from moorline.storage.verifier_store import VerifierStore

sys.path.insert(0, str(Path(__file__).parent))
from served import Served
from test_stories import Machine as Booted

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
# The fleet of the benchmark: keys that sign TPM quotes.
from host_poll import NOW, Machine, authority, enrol, reference_of  # noqa: E402

sys.path.remove(BENCHMARKS)  # names there, such as ledger, are folders of tests too


@dataclasses.dataclass
class At:
    at: int = NOW

    def now(self):
        return Instant(self.at)


class House:
    """A verifier with one enrolled host of the benchmark's fleet, over a database that others can open too."""

    def __init__(self, url, directory):
        first, _ = authority(directory, reference_of())
        self.url, self.clock, self.machine = url, At(), Machine()
        self.parts = dataclasses.replace(first._parts, clock=self.clock)
        self.store = VerifierStore.open(url)
        self.authority = self.process(self.store)
        self.asking = self.asker(self.store)
        enrol(self.store, "h1", self.machine)

    def process(self, store):
        return AttestationAuthority(dataclasses.replace(self.parts, store=store))

    def asker(self, store, *, pull_every_s=None):
        return Asking(store, Terms(answer_s=30, pull_every_s=pull_every_s), self.clock)

    async def attests(self, challenge=None):
        return await self.authority.appraise("h1", self.machine.evidence(challenge or self.authority.challenge("h1")))

    async def suspected(self, says="odd packets"):
        return await self.asking.ask("h1", Reason.SUSPICION, says, asked_by="spiffe://alpha.test/operator/ann")


@pytest.fixture
def house(tmp_path):
    return House(f"sqlite:///{tmp_path / 'v.db'}", tmp_path)


@pytest.fixture
def either(database_url, tmp_path):
    """The same over each kind of database."""
    return House(database_url, tmp_path)


async def until(question):
    async with asyncio.timeout(20):
        while not question():  # noqa: ASYNC110 - it happens in other tasks and threads
            await asyncio.sleep(0.02)


async def test_only_what_was_quoted_after_the_question_answers_it(either):
    """verifies that: a challenge from before the question gives a verdict and no answer; one from after it answers."""
    held = (await either.attests()).next
    number = await either.suspected()
    between = await either.attests(held)
    assert between.status == "affirming"
    assert either.store.ask_open(number)
    assert (await either.attests(between.next)).status == "affirming"  # it came with a verdict given after the question
    assert not either.store.ask_open(number)
    again = await either.suspected()
    assert (await either.attests()).status == "affirming"
    assert not either.store.ask_open(again)


async def test_a_bad_answer_is_an_answer_and_ends_the_verdict(house):
    await house.attests()
    number = await house.suspected()
    drifted = Machine(extra=("/usr/local/bin/miner", b"not allowed"), key=house.machine.key)
    drifted.clock = house.machine.clock + 1
    fresh = dataclasses.replace(house.authority.challenge("h1"), ima_from=0)
    assert (await house.authority.appraise("h1", drifted.evidence(fresh))).status == "contraindicated"
    await house.asking.answered(number, wait_s=0)
    assert house.authority.standing("h1").status == "contraindicated"
    assert house.store.events(after=0, limit=9)[0][-1].kind == "verdict_lost"


async def test_a_host_that_does_not_answer_loses_its_verdict_though_it_renews_its_lease(house):
    """verifies that: renewing with challenges from before the question hides nothing; the event says why."""
    house.authority._patience_until = Instant(0)
    kept = [house.authority.challenge("h1") for _ in range(3)]  # a store of challenges, taken before anybody asks
    await house.attests(kept[0])
    number = await house.suspected()
    house.clock.at += 25
    assert (await house.attests(kept[1])).status == "affirming"
    with pytest.raises(Unavailable) as refused:
        await house.asking.answered(number, wait_s=0)
    assert refused.value.code == "host.not_answered_yet"
    house.clock.at += 5
    await house.authority.sweep()
    (_, lost), _ = house.store.events(after=0, limit=9)
    assert (lost.kind, lost.code) == ("verdict_lost", "host.ask_unanswered")
    with pytest.raises(Refused) as refused:
        house.authority.standing("h1")
    assert (refused.value.code, refused.value.got) == ("result.withdrawn", "host.ask_unanswered")
    assert (await house.attests()).status == "affirming"  # and stands again when it shows itself


async def test_a_host_that_waits_at_one_process_is_asked_by_another(either):
    """verifies that: the question goes through the database; a host hears each question once, and a stranger nothing."""
    other = VerifierStore.open(either.url)
    elsewhere = either.asker(other)
    looking = asyncio.create_task(elsewhere.keep(lambda _: True))
    try:
        waiting = asyncio.create_task(elsewhere.wait("h1", known=0, wait_s=30))
        await asyncio.sleep(0.05)
        number = await either.suspected()
        assert await asyncio.wait_for(waiting, 10) == number
        assert await elsewhere.wait("h1", known=number, wait_s=0.01) == number
        with pytest.raises(Refused) as refused:
            await elsewhere.wait("h9", known=0, wait_s=1)
        assert refused.value.code == "host.not_enrolled"
        assert elsewhere._waiting == {}
    finally:
        looking.cancel()


async def test_strangers_who_wait_in_a_hosts_name_hold_two_connections_and_not_more(house):
    """verifies that: of many who wait for one host the newest two do, the others are told at once that nobody asked; the
    host, which comes again, is asked all the same; whoever goes away while waiting leaves nothing."""
    strangers = [asyncio.create_task(house.asking.wait("h1", known=0, wait_s=30)) for _ in range(20)]
    await until(lambda: sum(task.done() for task in strangers) == 18)
    real = asyncio.create_task(house.asking.wait("h1", known=0, wait_s=30))
    await until(lambda: sum(task.done() for task in strangers) == 19)
    number = await house.suspected()
    assert await asyncio.wait_for(real, 10) == number
    gone = asyncio.create_task(house.asking.wait("h1", known=number, wait_s=30))
    await until(lambda: "h1" in house.asking._waiting)
    gone.cancel()
    await asyncio.gather(*strangers, gone, return_exceptions=True)
    assert gone.cancelled()
    assert house.asking._waiting == {}


async def test_a_verifier_that_pulls_asks_whoever_is_due_once(house):
    enrol(house.store, "h2", house.machine)
    await house.attests()
    pulls = house.asker(house.store, pull_every_s=20)
    await pulls.look(lambda _: True)
    assert set(house.store.asked()) == {"h2"}  # it never attested
    house.clock.at += 20
    await pulls.look(lambda _: True)
    await pulls.look(lambda _: True)
    assert sorted(house.store.asked()) == ["h1", "h2"]
    assert max(house.store.asked().values()) == 2
    await house.attests()
    assert set(house.store.asked()) == {"h2"}
    house.clock.at += 20
    await pulls.look(lambda host: host == "h2")  # h1 is watched by another process
    assert set(house.store.asked()) == {"h2"}


async def test_a_host_cannot_be_buried_in_questions(house):
    for _ in range(OPEN_MAX):
        await house.suspected()
    with pytest.raises(Unavailable) as refused:
        await house.suspected()
    assert refused.value.code == "host.asked_too_often"


async def test_a_question_outlives_the_verifier_that_asked(house, tmp_path):
    """verifies that: a verifier killed right after it wrote a question down has asked; the next one wakes the host."""
    file = tmp_path / "asked.db"
    store = VerifierStore.open(file)
    enrol(store, "h1", house.machine)
    if (pid := os.fork()) == 0:
        os.environ[steps.VARIABLE] = "verifier.host.asked"
        asking = house.asker(VerifierStore.open(file))
        with contextlib.suppress(BaseException):
            asking._store.ask(
                dataclasses.replace(_ask(), host="h1"),
            )
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL  # noqa: ASYNC222 - it kills itself at once
    after = house.asker(VerifierStore.open(file))
    await after.look(lambda _: True)
    assert await after.wait("h1", known=0, wait_s=1) == 1


def _ask():
    from moorline.storage.verifier_asks import Ask

    return Ask(host="h1", reason=Reason.SUSPICION, says="", asked_by="ann", at=Instant(NOW), until=Instant(NOW + 30))


@pytest.mark.story
async def test_an_operator_asks_and_the_host_answers_at_once(world, running, tmp_path):
    """verifies that: a host with a period of an hour attests within seconds of the question; results show their age, and
    who wants a younger one than there is, is told; strangers and hosts may not ask."""
    served = Served(world)
    async with served.serving():
        machine = Booted(world, running[0], "h1")
        logs = FileLogs(machine.logs / firmware.EVENT_LOG, machine.logs / firmware.IMA_LIST)
        verdicts = asyncio.Queue()
        async with served.client() as client, served.client(timeout_s=200) as held:
            agent = HostAttestation(
                host="h1", verifier=client, tpm=machine.tpm, logs=logs, tag=machine.tag, period_s=3600, held=held
            )
            running_agent = asyncio.create_task(agent.run(verdicts.put_nowait))
            try:
                assert (await asyncio.wait_for(verdicts.get(), 20)).status == "affirming"
                async with served.client("spiffe://alpha.test/operator/ann") as ann:
                    question = {"reason": "suspicion", "says": "odd packets", "wait_s": 20}
                    answer = await ann.post_json("/v1/hosts/h1/ask", question)
                    assert (answer["host"], answer["age_s"] <= 1) == ("h1", True)
                    assert (await asyncio.wait_for(verdicts.get(), 20)).ear == answer["ear"]
                    code, out, _ = await served.moor(tmp_path, "host", "suspect", "h1", "--reason", "odd packets")
                    assert (code, "affirming" in out) == (0, True)
                    firmware.execute(machine.tpm, machine.logs, "/tmp/.x/miner", b"miner")
                    code, out, _ = await served.moor(tmp_path, "host", "suspect", "h1", "--reason", "odd", "--json")
                    assert (code, json.loads(out)["code"]) == (1, "host.file_not_in_reference_values")
                    answer = await ann.post_json("/v1/hosts/h1/ask", question | {"reason": "change_of_use"})
                    assert (answer["status"], answer["code"]) == ("contraindicated", "host.file_not_in_reference_values")
                    for bad in ({}, {"reason": "period"}, {"reason": "suspicion", "wait_s": 21}, question | {"x": 1}):
                        with pytest.raises(Malformed):
                            await ann.post_json("/v1/hosts/h1/ask", bad)
                    with pytest.raises(Refused) as refused:
                        await ann.post_json("/v1/hosts/h9/ask", question)
                    assert refused.value.code == "host.not_enrolled"
                for uri in ("spiffe://alpha.test/host/h1", "spiffe://beta.test/operator/bob"):
                    async with served.client(uri) as stranger:
                        with pytest.raises(Refused):
                            await stranger.post_json("/v1/hosts/h1/ask", question)
                async with served.client() as nobody:
                    with pytest.raises(NotAuthentic):
                        await nobody.post_json("/v1/hosts/h1/ask", question)
            finally:
                running_agent.cancel()


@pytest.mark.story
async def test_a_stored_result_shows_its_age(world, running):
    """verifies that: who asks later hears how old the result is, and may demand a younger one."""
    served = Served(world)
    machine = Booted(world, running[0], "h1")
    agent = machine.agent(served.authority)
    await agent.enrol()
    await agent.attest()
    await asyncio.sleep(2.1)
    async with served.serving(), served.client("spiffe://alpha.test/orchestrator/o1") as client:
        shown = await client.get_json("/v1/results/h1")
        assert shown["age_s"] >= 2
        assert await client.get_json("/v1/results/h1", {"max_age_s": "3600"})
        with pytest.raises(Refused) as refused:
            await client.get_json("/v1/results/h1", {"max_age_s": "1"})
        assert refused.value.code == "result.too_old"
