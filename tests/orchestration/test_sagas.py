"""Launch and clean-up under the saga harness: every call spoilt in every way, every durable step a crash."""

import dataclasses
import sys
from pathlib import Path

import pytest

from moorline.errors import Refused
from moorline.orchestration import clean_up
from moorline.orchestration import launch as launches
from moorline.orchestration import package as packages
from moorline.storage.orchestrator_store import TERMINAL, Afterwards, Halt, LaunchState, PackageRow

from .conftest import NOW
from .test_launch import Broker, Clock, Hosts, Mano
from .test_placement import result

sys.path.insert(0, str(Path(__file__).parents[1] / "sagas"))
from harness import Mischief, Outside, Spoilt, exercise

NAME = "records-1"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(launches, "RETRY_S", 0.0)
    monkeypatch.setattr(launches, "POLL_S", 0.0)
    monkeypatch.setattr(launches, "CLEAN_UP_RETRY_S", 0.0)


@dataclasses.dataclass
class LaunchSaga:
    """From the request to a function that serves."""

    mano: Mano

    async def start(self, outside: Outside) -> None:
        self._process(outside)
        await self._begun()
        await self.mano.launches.drive(NAME)

    async def resume(self, outside: Outside) -> None:
        self.mano.store.close()
        await self.start(outside)

    async def _begun(self) -> None:
        self.mano.request()  # the same request again is the same function: whoever asked asks again

    def observe(self):
        store = self.mano.store
        row = store.function(NAME)
        guests = {at: order.launch for at, order in self.mano.hosts.guests.items()}
        told = [(event.generation, event.state) for event in store.events(NAME)]
        left = {(one.host, one.generation) for one in store.left_guests()}
        store.close()
        return row, guests, told, left

    def judge(self, observed, spoilt: Spoilt | None) -> None:
        row, guests, told, left = observed
        assert row.state in TERMINAL
        assert len(told) == len(set(told)), "a step was made twice"
        assert row.token is None
        assert row.reply_key is None
        if spoilt is not None and (spoilt.how is Mischief.REFUSED or self.is_final(spoilt)):
            self.judge_refused(observed, spoilt)
            return
        assert row.state is LaunchState.ACTIVE, row.problem
        assert set(guests) == {(row.host, NAME)}
        assert left == set()
        assert [state for generation, state in told if generation == row.generation] == [
            "requested",
            "intended",
            "granted",
            "started",
            "active",
        ]
        self.judge_active(row)

    def is_final(self, _: Spoilt) -> bool:
        """Whether this saga takes silence for an answer here."""
        return False

    def judge_active(self, row) -> None:
        assert row.generation == 1
        assert self.mano.broker.retired == set()

    def judge_refused(self, observed, _: Spoilt) -> None:
        row, guests, _, _ = observed
        assert row.state is LaunchState.FAILED
        assert row.problem["code"] == "test.refused"
        assert guests == {}

    def _process(self, outside: Outside) -> None:
        mano = self.mano
        mano.process()
        mano.launches = launches.Launches(
            me=mano.launches._me,
            store=mano.store,
            ledger=outside.guard(mano.provider.ledger, "prove"),
            hosts=outside.guard(mano.hosts, "views", "start", "report", "stop"),
            launcher=outside.guard(mano.enclave, "exchange"),
            broker=outside.guard(mano.broker, "retire"),
            clock=mano.clock,
        )


class CleanUpSaga(LaunchSaga):
    """From a host that lost its verdict to the next generation on another one."""

    async def start(self, outside: Outside) -> None:
        self.mano.process()
        self.mano.request()
        await self.mano.launches.drive(NAME)
        self.mano.store.close()
        await super().start(outside)

    async def resume(self, outside: Outside) -> None:
        self.mano.store.close()
        await super().start(outside)

    async def _begun(self) -> None:
        """The supervisor reads the event again until it was acted upon; beginning twice is beginning once."""
        row = self.mano.store.function(NAME)
        if row.generation > 1 or row.state in (LaunchState.FAILED, *clean_up_states()):
            return
        self.mano.hosts.results |= {"h1": None, "h2": result("h2")}
        halt = Halt(
            cause=clean_up.HOST_LOST,
            code="host.file_not_in_reference_values",
            problem=Refused("compliance.host_lost", "the host lost its verdict").as_problem(),
            afterwards=Afterwards.RELAUNCH,
            noticed=NOW,
        )
        await self.mano.launches.clean_ups.begin(row, halt, says="the host lost its verdict")

    def is_final(self, spoilt: Spoilt) -> bool:
        return spoilt.name == "stop" and spoilt.how in (Mischief.NOT_REACHED, Mischief.ANSWER_LOST)

    def judge_active(self, row) -> None:
        assert (row.generation, row.host) == (2, "h2")
        assert self.mano.broker.retired == {(NAME, 1)}
        assert [one.generation for one in row.clean_ups] == [1]
        assert row.clean_ups[0].destroyed == ("storage-key",)

    def judge_refused(self, observed, spoilt: Spoilt) -> None:
        row, guests, _, left = observed
        assert (NAME, 1) in self.mano.broker.retired or spoilt.name == "retire"
        if spoilt.name == "stop":  # a host that will not say so gates nothing: its guest has neither keys nor identity
            assert (row.state, row.generation, row.host) == (LaunchState.ACTIVE, 2, "h2")
            assert left == {("h1", 1)}  # asked for again until the host says so
            stays = {("h1", NAME)} if spoilt.how is not Mischief.ANSWER_LOST else set()
            assert set(guests) == stays | {("h2", NAME)}
            assert "h1 did not confirm" in " ".join(row.clean_ups[0].not_proven)
        elif spoilt.name == "retire":  # no second generation beside one that may still have its identity
            assert (row.state, row.generation) == (LaunchState.FAILED, 1)
            assert row.problem["code"] == "compliance.keys_not_destroyed"
            assert guests == {}
        else:
            assert (row.state, row.generation) == (LaunchState.FAILED, 2)
            assert guests == {}


def clean_up_states():
    return (LaunchState.HALTING, LaunchState.STOPPING, LaunchState.CLEANED)


@pytest.fixture
def make(tmp_path, provider, publisher, enclave):
    """A world of its own for each story: database, hosts and broker; ledger and launcher are the same."""
    csar = publisher.build()
    verified = packages.verify(csar, signers=(publisher.der,), now=NOW)
    provider.service(verified.digest)
    made = 0

    def world(saga):
        nonlocal made
        made += 1
        mano = Mano(
            provider=provider,
            enclave=enclave,
            hosts=Hosts(),
            clock=Clock(),
            url=f"sqlite:///{tmp_path / f'{made}.db'}",
            broker=Broker(),
        ).process()
        mano.package = verified.digest
        mano.store.onboard(
            PackageRow(
                digest=verified.digest,
                service="records",
                version="1.0.0",
                use_case="4.7",
                jurisdiction="EU/DE",
                memory_mib=256,
                pids=64,
                signer=verified.signer,
                signer_name=verified.signer_name,
                onboarded=NOW,
            ),
            csar,
        )
        mano.store.close()
        return saga(mano)

    return world


async def test_launch(make, monkeypatch):
    done = await exercise(lambda: make(LaunchSaga), monkeypatch)
    assert {*done.calls} == {"prove", "views", "exchange", "start", "report"}
    assert done.steps == tuple(
        f"orchestrator.launch.{state}" for state in ("requested", "intended", "granted", "started", "active")
    )


async def test_clean_up(make, monkeypatch):
    done = await exercise(lambda: make(CleanUpSaga), monkeypatch)
    assert {*done.calls} >= {"retire", "stop", "start"}
    assert done.calls.index("retire") < done.calls.index("stop") < done.calls.index("start")
    assert set(done.steps) >= {
        "orchestrator.cleanup.halting",
        "orchestrator.cleanup.stopping",
        "orchestrator.cleanup.cleaned",
        "orchestrator.relaunch.requested",
    }
