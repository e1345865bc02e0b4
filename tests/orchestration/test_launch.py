"""The launch saga: the straight way, every refusal, every repeat, and going on from each recorded step."""

import dataclasses

import pytest

from moorline.clock import Instant
from moorline.errors import Conflict, MoorlineError, Refused, Unavailable
from moorline.ledger import fetching
from moorline.ledger.records import Status
from moorline.orchestration import intent as intents
from moorline.orchestration import package as packages
from moorline.orchestration.clean_up import Retired
from moorline.orchestration.launch import GuestReport, Identity, Launches, as_json
from moorline.orchestration.placement import HostView, Platform
from moorline.storage.orchestrator_store import FunctionRow, LaunchState, OrchestratorStore, PackageRow
from moorline.wire import launch, schema
from moorline.wire.guest import FunctionConfiguration, FunctionLaunch
from moorline.wire.orchestration import LaunchReply, LaunchRequest

from .conftest import CHIP, NOW
from .test_placement import result

SPIFFE = "spiffe://alpha.test/svc/records/records-1"


class Clock:
    """A clock that is set."""

    def __init__(self):
        self.at = NOW

    def now(self):
        return Instant(self.at)


class Hosts:
    """Host agents and verifier as the saga sees them; each call can be made to fail once, or always."""

    def __init__(self):
        self.results = {"h1": result("h1"), "h2": None, "h3": result("h3")}
        self.guests, self.starts, self.stops, self.asked = {}, [], [], []
        self.fail, self.before_start = {}, None
        self.refusal, self.ended = None, False

    def names(self):
        return ("h1", "h2", "h3")

    async def views(self, state, load, now):
        await self._maybe("views")
        places = {"h1": "EU/DE", "h2": "EU/DE", "h3": "US/CA"}
        return tuple(
            HostView(
                host=host,
                platform=Platform(chip_id=CHIP, location=places[host], simulated=True),
                result=self.results[host],
                reachable=True,
                functions=load.get(host, 0),
            )
            for host in self.names()
        )

    async def fresh(self, host, says):
        self.asked.append((host, says))
        await self._maybe("fresh")

    async def start(self, host, order):
        await self._maybe("start")
        if self.before_start is not None:
            await self.before_start()
        self.starts.append((host, order))
        self.guests.setdefault((host, order.instance), order)
        assert self.guests[host, order.instance] == order, "the same name was ordered differently"
        return GuestReport(running=True, address="127.0.0.1:9", spiffe_id=None, refusal=None)

    async def report(self, host, instance, wait_s=0):
        await self._maybe("report")
        running = (host, instance) in self.guests and not self.ended
        spiffe_id = None if self.refusal or self.ended else SPIFFE
        return GuestReport(running=running, address="127.0.0.1:9", spiffe_id=spiffe_id, refusal=self.refusal)

    async def reports(self, host):
        here = [instance for at, instance in self.guests if at == host]
        return {instance: await self.report(host, instance) for instance in here}

    async def stop(self, host, instance):
        self.stops.append((host, instance))
        self.guests.pop((host, instance), None)

    async def _maybe(self, step):
        if self.fail.get(step):
            raise self.fail[step].pop()


class Broker:
    """The broker's retirement as the saga sees it: the same answer each time, and it can be made to fail."""

    def __init__(self):
        self.asked, self.fail, self.order = [], [], []

    async def retire(self, asked):
        self.asked.append(asked)
        if self.fail:
            raise self.fail.pop(0)
        self.order.append(("keys", asked.instance, asked.generation))
        return Retired(destroyed=("storage-key",), not_proven=("enclave-memory",), revoked_at_height=40 + asked.generation)

    @property
    def retired(self):
        return {(asked.instance, asked.generation) for asked in self.asked}


@dataclasses.dataclass
class Mano:
    """An orchestrator with everything around it; `process()` makes another one over the same database."""

    provider: object
    enclave: object
    hosts: Hosts
    clock: Clock
    url: str
    broker: Broker = dataclasses.field(default_factory=Broker)

    def process(self):
        self.store = OrchestratorStore.open(self.url)
        me = Identity(
            provider="alpha",
            trust_domain="alpha.test",
            id="o1",
            signer=self.provider.intent_signer,
            trust=self.provider.trust,
            max_age_s=30,
            launch_life_s=300,
        )
        self.launches = Launches(
            me=me,
            store=self.store,
            ledger=self.provider.ledger,
            hosts=self.hosts,
            launcher=self.enclave,
            broker=self.broker,
            clock=self.clock,
        )
        return self

    def request(self, **changes):
        fields = {
            "instance": "records-1",
            "service": "records",
            "tenant": "tenant-1",
            "hsm": "hsm-1",
            "package": self.package,
            "contracts": ("contract-1",),
            "settings": {"quota": "10"},
            "requested": self.clock.now(),
        }
        return self.store.request(FunctionRow(**(fields | changes)))


@pytest.fixture
def mano(tmp_path, provider, publisher, enclave):
    made = Mano(
        provider=provider, enclave=enclave, hosts=Hosts(), clock=Clock(), url=f"sqlite:///{tmp_path / 'orchestrator.db'}"
    ).process()
    csar = publisher.build()
    verified = packages.verify(csar, signers=(publisher.der,), now=NOW)
    made.package, made.csar = verified.digest, csar
    made.store.onboard(
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
    provider.service(verified.digest)
    yield made
    made.store.close()


async def test_the_straight_way(mano):
    mano.request()
    row = await mano.launches.drive("records-1")
    assert (row.state, row.host, row.spiffe_id) == (LaunchState.ACTIVE, "h1", SPIFFE)
    states = [event.state for event in mano.store.events("records-1")]
    assert states == ["requested", "intended", "granted", "started", "active"]
    verdicts = {verdict["host"]: verdict["code"] for verdict in row.placement["verdicts"]}
    assert verdicts == {"h1": None, "h2": "placement.no_result", "h3": "placement.location_disagrees"}
    assert row.token is None
    assert row.reply_key is None
    assert "token" not in str(as_json(row)).lower().replace("tokens", "")


async def test_what_the_host_is_told_and_what_is_bound(mano):
    mano.request()
    await mano.launches.drive("records-1")
    [(host, order)] = mano.hosts.starts
    told = schema.decode(FunctionLaunch, order.launch)
    fields = launch.parse_fields(told.launch_fields)
    assert host == "h1" == fields.host
    assert order.host_data == launch.commitment(fields)
    assert order.package == mano.csar
    assert fields.package_digest == packages.package_digest(order.package)
    assert fields.configuration_digest == packages.package_digest(order.configuration)
    assert told.token == launch.token(bytes([7]) * 32, fields)
    configuration = schema.decode(FunctionConfiguration, order.configuration)
    assert configuration.contracts == ("contract-1",)
    assert configuration.settings == {"quota": "10"}
    assert order.relays == {"broker": "127.0.0.1:7443"}  # from the HSM's record on the ledger
    assert (order.memory_mib, order.pids) == (256, 64)


async def test_nothing_happens_outside_before_the_intent_is_recorded(mano):
    mano.request()
    row = await mano.launches.advance("records-1")
    assert row.state is LaunchState.INTENDED
    assert mano.hosts.starts == []
    assert mano.enclave.session.calls == []
    assert mano.enclave.launcher._granted == {}
    assert intents.parse(row.intent).host == "h1"
    again = OrchestratorStore.open(mano.url)
    assert again.function("records-1").intent == row.intent
    again.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
async def test_another_process_goes_on_from_every_recorded_step(mano, steps):
    mano.request()
    for _ in range(steps):
        await mano.launches.advance("records-1")
    before = mano.store.function("records-1")
    mano.store.close()
    later = mano.process()
    assert later.store.unfinished() == ("records-1",)
    row = await later.launches.drive("records-1")
    assert row.state is LaunchState.ACTIVE
    assert before.intent in (None, row.intent)
    assert len(mano.hosts.guests) == 1
    assert len(mano.enclave.launcher._granted) == 1


class Died(BaseException):
    """The process ends here: nothing after the effect is recorded."""


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
async def test_a_step_whose_effect_was_not_recorded_is_repeated_without_harm(mano, steps, monkeypatch):
    """The row is as if the process had died between the effect and its record. (SIGKILL at each point is issue 3.)"""
    mano.request()
    for _ in range(steps):
        await mano.launches.advance("records-1")

    def die(*_, **__):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(mano.store, "save", die)
        with pytest.raises(Died):
            await mano.launches.advance("records-1")
    mano.store.close()
    row = await mano.process().launches.drive("records-1")
    assert row.state is LaunchState.ACTIVE
    assert len(mano.hosts.guests) == 1
    assert mano.enclave.launcher._lease._next == 1  # one number, however often the intent was shown


async def test_two_processes_resume_one_launch(mano):
    mano.request()
    await mano.launches.advance("records-1")
    other = Mano(mano.provider, mano.enclave, mano.hosts, mano.clock, mano.url).process()
    await mano.launches.advance("records-1")
    row = other.store.function("records-1")
    await other.launches.advance("records-1")
    with pytest.raises(Conflict) as caught:
        await mano.launches._start(row)
    assert caught.value.code == "launch.moved_on"
    assert (await other.launches.drive("records-1")).state is LaunchState.ACTIVE
    assert len(mano.hosts.guests) == 1
    other.store.close()


async def failing(mano, code):
    row = await mano.launches.drive("records-1")
    assert row.state is LaunchState.FAILED
    assert row.problem["code"] == code
    assert row.token is None
    assert row.reply_key is None
    assert mano.hosts.guests == {}
    return row


async def test_no_host_fits_and_every_reason_is_kept(mano):
    mano.hosts.results["h1"] = result("h1", expires=NOW)
    mano.request()
    row = await failing(mano, "placement.none_fits")
    assert {verdict["host"] for verdict in row.placement["verdicts"]} == {"h1", "h2", "h3"}
    assert row.intent is None


async def test_package_not_registered_for_the_service(mano):
    mano.provider.service(b"q" * 32)
    mano.request()
    await failing(mano, "launch.package_not_registered")


async def test_service_record_of_another_use_case(mano):
    mano.provider.service(mano.package, use_case="4.5")
    mano.request()
    await failing(mano, "launch.use_case_differs")


async def test_orchestrator_revoked_between_intent_and_grant(mano):
    mano.request()
    await mano.launches.advance("records-1")
    mano.provider.orchestrator(status=Status.REVOKED)
    await failing(mano, "ledger.orchestrator_not_active")


async def test_host_refuses(mano):
    mano.request()
    mano.hosts.fail["start"] = [Refused("host.limits", "too much")]
    await failing(mano, "host.limits")


async def test_function_is_refused_by_the_broker(mano):
    mano.request()
    mano.hosts.refusal = Refused("launch.token_used", "the token was used before")
    await failing(mano, "launch.token_used")
    assert mano.hosts.stops == [("h1", "records-1")]


async def test_guest_that_ends_silently(mano):
    mano.request()
    mano.hosts.ended = True
    await failing(mano, "launch.guest_ended")


async def test_what_is_only_away_is_tried_again(mano):
    mano.request()
    away = Unavailable("peer.unreachable", "away", retry_after_s=0.01)
    mano.hosts.fail = {"views": [away], "start": [away, away], "report": [away]}
    assert (await mano.launches.drive("records-1")).state is LaunchState.ACTIVE


async def test_what_stays_away_fails_when_the_intent_ends(mano):
    mano.request()
    await mano.launches.advance("records-1")
    mano.clock.at = NOW + 300
    mano.hosts.fail["start"] = [Unavailable("peer.unreachable", "away", retry_after_s=0.01)] * 50
    row = await mano.launches.drive("records-1")
    assert (row.state, row.problem["code"]) == (LaunchState.FAILED, "launch.intent_expired")


class Overtaking:
    """The way to the launcher, on which another launch overtakes ours with a newer proof: so often."""

    def __init__(self, mano, times):
        self.mano, self.times, self.asked = mano, times, 0

    async def exchange(self, request):
        self.asked += 1
        if self.asked <= self.times:
            ledger, intent = self.mano.provider.ledger, intents.parse(schema.decode(LaunchRequest, request).intent)
            ledger.height += 1
            other = dataclasses.replace(intent, instance=f"other-{self.asked}")
            newer = LaunchRequest(
                intent=intents.sign(other, self.mano.provider.intent_signer),
                bundle=ledger.bundle(intents.keys_to_prove(other)),
            )
            assert schema.decode(LaunchReply, await self.mano.enclave.exchange(schema.encode(newer))).grant
        return await self.mano.enclave.exchange(request)


async def test_a_proof_that_another_launch_overtook_is_fetched_again(mano):
    """verifies that: of two launches asked for around a new block neither fails, whichever comes second to the launcher."""
    mano.request()
    await mano.launches.advance("records-1")
    overtaken = mano.launches._launcher = Overtaking(mano, times=2)
    await mano.launches.advance("records-1")
    assert mano.store.function("records-1").state is LaunchState.GRANTED
    assert overtaken.asked == 3


async def test_a_launcher_that_is_shown_an_old_head_for_good_refuses(mano, monkeypatch):
    """verifies that: an orchestrator whose authorities stay behind what the launcher saw gets no launch."""
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.2)
    mano.request()
    await mano.launches.advance("records-1")
    mano.launches._launcher = Overtaking(mano, times=1)
    going_back = mano.launches._launcher.exchange

    async def behind(request):
        try:
            return await going_back(request)
        finally:
            mano.provider.ledger.height = before

    before, mano.launches._launcher.exchange = mano.provider.ledger.height, behind
    row = await mano.launches.drive("records-1")
    assert (row.state, row.problem["code"]) == (LaunchState.FAILED, "ledger.rollback")


async def test_the_ledger_never_goes_back(mano, monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.1)
    mano.request()
    await mano.launches.advance("records-1")
    mano.provider.ledger.height -= 3
    with pytest.raises(MoorlineError) as caught:
        await mano.launches.proven(("provider/alpha",))
    assert caught.value.code == "ledger.rollback"
    mano.store.close()
    with pytest.raises(MoorlineError) as caught:  # nor for a process that starts later
        await mano.process().launches.proven(("provider/alpha",))
    assert caught.value.code == "ledger.rollback"


async def test_ending_a_function(mano):
    mano.request()
    await mano.launches.drive("records-1")
    assert (await mano.launches.end("records-1")).state is LaunchState.HALTING
    assert (await mano.launches.drive("records-1")).state is LaunchState.ENDED
    assert mano.hosts.guests == {}
    assert mano.broker.retired == {("records-1", 1)}
    assert (await mano.launches.end("records-1")).state is LaunchState.ENDED
    assert mano.store.load() == {}


async def test_ending_while_the_host_starts_it(mano):
    mano.request()
    mano.hosts.before_start = lambda: mano.launches.end("records-1")
    row = await mano.launches.drive("records-1")
    assert row.state is LaunchState.ENDED
    assert mano.hosts.guests == {}


def test_a_request_repeated_is_one_function(mano):
    first = mano.request()
    assert mano.request(requested=Instant(NOW + 5)) == first
    with pytest.raises(Conflict) as caught:
        mano.request(tenant="tenant-2")
    assert caught.value.code == "launch.name_taken"


def test_secrets_do_not_show_in_a_row(mano):
    row = dataclasses.replace(mano.request(), token=b"secret-token", reply_key=b"secret-key")
    assert "secret" not in repr(row)


def test_what_is_not_there(mano):
    with pytest.raises(Refused) as caught:
        mano.store.function("nothing")
    assert caught.value.code == "launch.no_such_function"
    with pytest.raises(Refused) as caught:
        mano.store.package(bytes(32))
    assert caught.value.code == "package.not_onboarded"


# Change of use (SEC009 5.1.2) ------------------------------------------------------------------------------------------


def running_already(mano, use_case):
    """A function of another service that runs on h1."""
    mano.store.onboard(
        PackageRow(
            digest=b"q" * 32,
            service="billing",
            version="1.0.0",
            use_case=use_case,
            jurisdiction="EU/DE",
            memory_mib=256,
            pids=64,
            signer=b"",
            signer_name="somebody",
            onboarded=NOW,
        ),
        b"another package",
    )
    row = mano.request(instance="billing-1", service="billing", package=b"q" * 32)
    mano.store.save(dataclasses.replace(row, state=LaunchState.ACTIVE, host="h1"), at=NOW, says="runs")


async def test_a_host_attests_anew_before_it_takes_in_another_class_of_function(mano):
    """verifies that: one that does not is given nothing, and is chosen again when it has; the control asks nobody."""
    running_already(mano, "4.5")
    mano.hosts.fail["fresh"] = [Refused("result.withdrawn", "it drifted")]
    mano.request()
    with pytest.raises(Unavailable) as refused:
        await mano.launches.advance("records-1")
    assert (refused.value.code, refused.value.got) == ("launch.host_not_fresh", "result.withdrawn")
    row = mano.store.function("records-1")
    assert (row.state, row.intent, mano.hosts.starts) == (LaunchState.REQUESTED, None, [])
    assert (await mano.launches.drive("records-1")).host == "h1"
    assert mano.hosts.asked == [("h1", "4.7 beside 4.5")] * 2


async def test_a_host_that_runs_the_same_class_is_not_asked_again(mano):
    running_already(mano, "4.7")
    mano.request()
    assert (await mano.launches.drive("records-1")).host == "h1"
    assert mano.hosts.asked == []
