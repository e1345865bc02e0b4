"""The clean-up saga and what begins it: lost verdicts, ended guests; every step repeated, failed, and gone on from."""

import asyncio
import dataclasses
import json
import re
from pathlib import Path

import pytest

from moorline.audit import log as audit
from moorline.clock import Instant
from moorline.errors import Conflict, Malformed, NotAuthentic, Refused, Unavailable
from moorline.orchestration.clean_up import GUEST_ENDED, HOST_LOST, LAUNCH_FAILED
from moorline.orchestration.compliance import Compliance, EventPage, HostEvent, Loss, Reactions, parse_events
from moorline.orchestration.launch import as_json
from moorline.storage.orchestrator_store import AUDIT_DOMAIN, Afterwards, LaunchState, OrchestratorStore
from moorline.wire import launch, schema
from moorline.wire.guest import FunctionLaunch

from .conftest import NOW, until
from .test_launch import SPIFFE, Died, mano  # noqa: F401 - a fixture
from .test_placement import result

RULE = "ima.file_unknown"


class Verifier:
    """A verifier's event stream with a cursor, and its standing losses."""

    def __init__(self):
        self.history, self.losses, self.fail = [], set(), []

    def lose(self, host, *, at=NOW, code=RULE):
        self.history.append(HostEvent(cursor=len(self.history) + 1, host=host, at=Instant(at), lost=True, code=code))
        self.losses.add(Loss(host=host, code=code))

    def gain(self, host, *, at=NOW):
        self.history.append(HostEvent(cursor=len(self.history) + 1, host=host, at=Instant(at), lost=False, code=""))
        self.losses = {loss for loss in self.losses if loss.host != host}

    async def events(self, after, wait_s):
        if self.fail:
            raise self.fail.pop(0)
        if after > len(self.history):
            raise Conflict("events.cursor_unknown", "another history")
        return EventPage(events=tuple(self.history[after:]), next=len(self.history))

    async def lost(self, hosts):
        if self.fail:
            raise self.fail.pop(0)
        return tuple(loss for loss in sorted(self.losses, key=lambda loss: loss.host) if loss.host in hosts)


@dataclasses.dataclass
class Watch:
    """An orchestrator with a second host that fits, a verifier, and somebody who watches."""

    mano: object
    verifier: Verifier
    errors: list
    interrupted: list
    reactions: Reactions = dataclasses.field(default_factory=Reactions)

    def process(self):
        self.mano.process()
        self.compliance = Compliance(
            store=self.mano.store,
            clean_ups=self.mano.launches.clean_ups,
            verdicts=self.verifier,
            guests=self.mano.hosts,
            clock=self.mano.clock,
            reactions=self.reactions,
            interrupt=self.interrupted.append,
            on_error=self.errors.append,
        )
        return self

    def drift(self, host="h1", *, code=RULE):
        """The host loses its verdict: results, events and placement all know."""
        self.verifier.lose(host, at=self.mano.clock.at, code=code)
        self.mano.hosts.results[host] = None

    async def active(self):
        self.mano.request()
        row = await self.mano.launches.drive("records-1")
        assert (row.state, row.host, row.generation) == (LaunchState.ACTIVE, "h1", 1)
        self.mano.clock.at += 5
        return row

    async def settled(self):
        return await self.mano.launches.drive("records-1")

    @property
    def row(self):
        return self.mano.store.function("records-1")

    def states(self):
        return [(event.generation, event.state) for event in self.mano.store.events("records-1")]

    def log(self):
        """The secure log, verified."""
        entries = self.mano.store.audit()
        audit.verify(entries, domain=AUDIT_DOMAIN)
        return [audit.parse_entry(entry) for entry in entries]


@pytest.fixture
def watch(mano):  # noqa: F811 - the fixture
    mano.hosts.results["h2"] = result("h2", expires=Instant(NOW + 10_000))
    mano.hosts.results["h1"] = result("h1", expires=Instant(NOW + 10_000))
    return Watch(mano=mano, verifier=Verifier(), errors=[], interrupted=[]).process()


RELAUNCHED = [
    *((1, state) for state in ("requested", "intended", "granted", "started", "active", "halting", "stopping", "cleaned")),
    *((2, state) for state in ("requested", "intended", "granted", "started", "active")),
]


def relaunched(watch):
    """What must be true after any way through a drift of h1, however often it was interrupted."""
    row = watch.row
    assert (row.state, row.host, row.generation, row.spiffe_id) == (LaunchState.ACTIVE, "h2", 2, SPIFFE)
    assert set(watch.mano.hosts.guests) == {("h2", "records-1")}
    assert watch.mano.broker.retired == {("records-1", 1)}
    assert watch.states() == RELAUNCHED
    assert len(watch.mano.enclave.launcher._granted) == 2  # one token a generation
    (done,) = row.clean_ups
    assert (done.generation, done.host, done.cause, done.code) == (1, "h1", HOST_LOST, RULE)
    assert done.destroyed == ("storage-key",)
    assert done.revoked_at_height == 41
    assert "function-cleaned" in [entry.event for entry in watch.log()]
    assert watch.mano.store.left_guests() == ()


async def test_drift_ends_one_generation_and_begins_the_next_elsewhere(watch):
    await watch.active()
    watch.drift()
    assert await watch.compliance.read_events(0) == 1
    assert watch.interrupted == ["records-1"]
    assert watch.row.state is LaunchState.HALTING
    assert watch.row.halt.lost_at == watch.mano.clock.at
    await watch.settled()
    relaunched(watch)
    [_, (host, order)] = watch.mano.hosts.starts
    fields = launch.parse_fields(schema.decode(FunctionLaunch, order.launch).launch_fields)
    assert (host, fields.host, fields.generation, fields.instance) == ("h2", "h2", 2, "records-1")


async def test_keys_are_destroyed_before_the_guest_is_stopped(watch):
    await watch.active()
    order = watch.mano.broker.order
    stop = watch.mano.hosts.stop

    async def stopping(host, instance):
        order.append(("guest", instance, host))
        await stop(host, instance)

    watch.mano.hosts.stop = stopping
    watch.drift()
    await watch.compliance.look()
    await watch.settled()
    assert order == [("keys", "records-1", 1), ("guest", "records-1", "h1")]


async def test_the_record_says_what_was_destroyed_and_what_nobody_could_prove(watch):
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    row = await watch.settled()
    (done,) = as_json(row)["clean_ups"]
    assert done["not_proven"] == ("enclave-memory", "guest stopped: only h1 says so, and it has no verdict")
    (cleaned,) = [entry for entry in watch.log() if entry.event == "function-cleaned"]
    assert cleaned.subject == "records-1"
    assert cleaned.details["destroyed"] == "storage-key"
    assert "enclave-memory" in cleaned.details["not_proven"]
    assert (cleaned.details["revoked_at_height"], cleaned.details["code"]) == ("41", RULE)


async def test_the_page_shows_what_happens(watch):
    page = (Path(__file__).parents[2] / "docs" / "spec" / "clean-up.md").read_text("utf-8")
    shown, entry = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    row = await watch.settled()
    assert json.loads(json.dumps(as_json(row)["clean_ups"])) == [shown]
    assert [dict(told.details) for told in watch.log() if told.event == "function-cleaned"] == [entry]


async def test_looking_is_enough_without_any_event(watch):
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    assert watch.row.halt.lost_at is None
    await watch.settled()
    relaunched(watch)


async def test_events_and_looks_and_repeats_halt_once(watch):
    await watch.active()
    watch.drift()
    for _ in range(2):
        await watch.compliance.read_events(0)
        await watch.compliance.look()
        watch.mano.store.remember_cursor(0)
    await watch.settled()
    await watch.compliance.read_events(0)
    await watch.compliance.look()
    relaunched(watch)
    assert watch.interrupted == ["records-1"]


@pytest.mark.parametrize("steps", range(8))
async def test_another_process_goes_on_from_every_recorded_step(watch, steps):
    await watch.active()
    watch.drift()
    await watch.compliance.read_events(0)
    for _ in range(steps):
        await watch.mano.launches.advance("records-1")
    watch.mano.store.close()
    later = watch.process()
    if steps < 7:
        assert later.mano.store.unfinished() == ("records-1",)
    await later.settled()
    relaunched(later)


@pytest.mark.parametrize("steps", range(7))
async def test_a_step_whose_effect_was_not_recorded_is_repeated_without_harm(watch, steps, monkeypatch):
    await watch.active()
    watch.drift()
    await watch.compliance.read_events(0)
    for _ in range(steps):
        await watch.mano.launches.advance("records-1")

    def die(*_, **__):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(watch.mano.store, "save", die)
        with pytest.raises(Died):
            await watch.mano.launches.advance("records-1")
    watch.mano.store.close()
    await watch.process().settled()
    relaunched(watch)
    assert watch.mano.enclave.launcher._lease._next == 2  # one number a generation, however often an intent was shown


async def test_dying_between_halt_and_cursor_halts_nothing_twice(watch, monkeypatch):
    await watch.active()
    watch.drift()

    def die(*_, **__):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(watch.mano.store, "remember_cursor", die)
        with pytest.raises(Died):
            await watch.compliance.read_events(0)
    watch.mano.store.close()
    watch.process()
    await watch.settled()
    assert watch.mano.store.cursor() == 0
    assert await watch.compliance.read_events(0) == 1
    assert watch.mano.store.cursor() == 1
    relaunched(watch)


@pytest.mark.parametrize("step", ["halting", "stopping", "cleaned"])
async def test_two_processes_clean_up_one_function(watch, step):
    await watch.active()
    watch.drift()
    await watch.compliance.read_events(0)
    while watch.row.state.value != step:
        await watch.mano.launches.advance("records-1")
    row = watch.row
    other = OrchestratorStore.open(watch.mano.url)
    await watch.mano.launches.advance("records-1")
    with pytest.raises(Conflict) as caught:
        await watch.mano.launches._steps[row.state](row)
    assert caught.value.code == "launch.moved_on"
    other.close()
    await watch.settled()
    relaunched(watch)


@pytest.mark.parametrize(
    "away", [Unavailable("peer.unreachable", "away", retry_after_s=0.01), NotAuthentic("peer.tls_not_trusted", "no")]
)
async def test_a_broker_that_is_away_holds_the_clean_up_up_until_it_answers(watch, away, monkeypatch):
    """Nothing is stopped, and nothing launched, before the keys are destroyed."""
    monkeypatch.setattr("moorline.orchestration.launch.RETRY_S", 0.01)
    monkeypatch.setattr("moorline.orchestration.launch.CLEAN_UP_RETRY_S", 0.01)
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    watch.mano.broker.fail = [away] * 3
    for _ in range(2):
        with pytest.raises(type(away)):
            await watch.mano.launches.advance("records-1")
    assert watch.row.state is LaunchState.HALTING
    assert watch.mano.hosts.stops == []
    await watch.settled()
    relaunched(watch)


async def test_a_ledger_that_is_behind_does_not_let_the_guest_run_on(watch):
    """The keys are gone, only the revocation is not on the ledger: the guest is stopped, and nothing is launched yet."""
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    watch.mano.broker.fail = [Unavailable("retire.revocation_pending", "not yet", retry_after_s=0.01)]
    with pytest.raises(Unavailable):
        await watch.mano.launches.advance("records-1")
    assert watch.row.state is LaunchState.HALTING
    assert watch.mano.hosts.guests == {}
    await watch.settled()
    relaunched(watch)


async def test_a_broker_that_moved_is_found_on_the_ledger(watch):
    await watch.active()
    watch.mano.store.save(
        dataclasses.replace(watch.row, broker_url="https://127.0.0.1:9"), at=watch.mano.clock.now(), says="an old address"
    )
    watch.drift()
    await watch.compliance.look()
    watch.mano.broker.fail = [Unavailable("peer.unreachable", "nobody there")]
    await watch.settled()
    assert [asked.url for asked in watch.mano.broker.asked] == ["https://127.0.0.1:9", "https://127.0.0.1:7444"]


async def test_a_broker_that_refuses_leaves_no_second_generation_beside_the_first(watch):
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    watch.mano.broker.fail = [Refused("launch.generation_behind", "a later one runs")]
    row = await watch.settled()
    assert (row.state, row.problem["code"]) == (LaunchState.FAILED, "compliance.keys_not_destroyed")
    assert "launch.generation_behind" in row.problem["got"]
    assert row.clean_ups[0].destroyed == ()
    assert "the broker refused" in row.clean_ups[0].not_proven[0]
    assert watch.mano.hosts.guests == {}


async def test_a_host_that_does_not_answer_gates_nothing_and_is_avoided(watch):
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    stop, watch.mano.hosts.stop = watch.mano.hosts.stop, failing(Unavailable("peer.unreachable", "away"))
    row = await watch.settled()
    assert (row.host, row.generation) == ("h2", 2)
    assert row.clean_ups[0].stopped is False
    assert "h1 did not confirm it, peer.unreachable" in row.clean_ups[0].not_proven[-1]
    (left,) = watch.mano.store.left_guests()
    assert (left.host, left.instance, left.generation) == ("h1", "records-1", 1)
    await watch.compliance.look()
    assert watch.mano.store.left_guests() == (left,)
    watch.verifier.gain("h1")
    watch.mano.hosts.results["h1"] = result("h1", expires=Instant(NOW + 10_000))
    launches = watch.mano.launches
    views = await launches._views(row, await launches.proven(("provider/alpha",)), watch.mano.clock.now())
    assert {view.host for view in views if view.guest_left} == {"h1"}
    watch.mano.hosts.stop = stop  # the host is back
    await watch.compliance.look()
    assert watch.mano.store.left_guests() == ()
    assert set(watch.mano.hosts.guests) == {("h2", "records-1")}
    assert [entry.event for entry in watch.log()][-1] == "guest-gone"


def failing(error):
    async def fail(*_):
        raise error

    return fail


async def test_a_host_that_hangs_is_given_up_after_a_while(watch):
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    watch.mano.launches.clean_ups._stop_deadline_s = 0.01

    async def hang(*_):
        await asyncio.Event().wait()

    watch.mano.hosts.stop = hang
    row = await watch.settled()
    assert (row.generation, row.clean_ups[0].stopped) == (2, False)


@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_a_host_that_drifts_during_a_launch_loses_it_to_another(watch, steps):
    watch.mano.request()
    for _ in range(steps):
        await watch.mano.launches.advance("records-1")
    assert watch.row.host == "h1"
    watch.mano.clock.at += 5
    watch.drift()
    await watch.compliance.read_events(0)
    row = await watch.settled()
    assert (row.state, row.host, row.generation) == (LaunchState.ACTIVE, "h2", 2)
    assert watch.mano.broker.retired == {("records-1", 1)}  # its token may be with the host already
    assert set(watch.mano.hosts.guests) == {("h2", "records-1")}


async def test_a_host_agent_that_is_away_during_a_launch(watch, monkeypatch):
    """Tried again until its host's verdict ends; then the function goes elsewhere."""
    monkeypatch.setattr("moorline.orchestration.launch.RETRY_S", 0.01)
    watch.mano.request()
    for _ in range(2):
        await watch.mano.launches.advance("records-1")
    watch.mano.hosts.fail["start"] = [Unavailable("peer.unreachable", "away", retry_after_s=0.01)] * 3
    for _ in range(3):
        with pytest.raises(Unavailable):
            await watch.mano.launches.advance("records-1")
    watch.mano.clock.at += 20
    watch.drift(code="result.expired")
    await watch.compliance.read_events(0)
    row = await watch.settled()
    assert (row.host, row.generation, row.clean_ups[0].code) == ("h2", 2, "result.expired")


async def test_a_start_that_lands_after_its_clean_up_is_undone(watch):
    """The host was slow: the order is carried out when the function is on another host already."""
    watch.mano.request()
    for _ in range(2):
        await watch.mano.launches.advance("records-1")

    async def meanwhile():
        watch.mano.hosts.before_start = None
        watch.mano.clock.at += 5
        watch.drift()
        await watch.compliance.read_events(0)
        for _ in range(4):
            await watch.mano.launches.advance("records-1")

    watch.mano.hosts.before_start = meanwhile
    row = await watch.settled()
    assert (row.host, row.generation) == ("h2", 2)
    assert set(watch.mano.hosts.guests) == {("h2", "records-1")}


async def test_a_guest_that_ended_by_itself_is_launched_again(watch):
    await watch.active()
    watch.mano.hosts.ended = True
    await watch.compliance.look()
    watch.mano.hosts.ended = False
    row = await watch.settled()
    assert (row.state, row.host, row.generation) == (LaunchState.ACTIVE, "h1", 2)
    assert (row.clean_ups[0].cause, row.clean_ups[0].code) == (GUEST_ENDED, "launch.guest_ended")
    assert row.clean_ups[0].not_proven == ("enclave-memory",)


async def test_a_guest_says_why_it_ended(watch):
    await watch.active()
    watch.mano.hosts.ended, watch.mano.hosts.refusal = True, Refused("renewal.host_not_standing", "no")
    await watch.compliance.look()
    assert watch.row.halt.code == "renewal.host_not_standing"


async def test_a_guest_unknown_to_its_host_is_gone(watch):
    await watch.active()
    watch.mano.hosts.guests.clear()
    await watch.compliance.look()
    assert watch.row.halt.code == "launch.guest_unknown"


async def test_what_decides_nothing(watch):
    """A verifier or host agent that is away, an answer that cannot be believed, an event about others, a gain."""
    await watch.active()
    away = Unavailable("peer.unreachable", "away")
    watch.verifier.fail = [away]
    watch.mano.hosts.fail["report"] = [away]
    await watch.compliance.look()
    watch.mano.hosts.fail["report"] = [Refused("http.not_authorised", "no")]
    await watch.compliance.look()
    watch.verifier.fail = [Malformed("ear.malformed", "not believed")]
    watch.mano.hosts.fail["report"] = [Malformed("peer.answer_malformed", "junk")]
    await watch.compliance.look()
    watch.verifier.lose("h3", at=watch.mano.clock.at)
    watch.verifier.gain("h1", at=watch.mano.clock.at)
    await watch.compliance.read_events(0)
    await watch.compliance.look()
    assert watch.row.state is LaunchState.ACTIVE
    assert len(watch.errors) == 4


async def test_a_loss_from_before_the_function_came_does_not_concern_it(watch):
    watch.verifier.lose("h1", at=NOW - 100)
    watch.verifier.gain("h1", at=NOW - 50)
    await watch.active()
    await watch.compliance.read_events(0)
    await watch.compliance.look()
    assert watch.row.state is LaunchState.ACTIVE


async def test_an_event_that_seems_older_is_settled_by_looking(watch):
    """The verifier's clock is behind: the event alone would be taken for an old one."""
    await watch.active()
    watch.verifier.lose("h1", at=NOW - 100)
    watch.mano.hosts.results["h1"] = None
    await watch.compliance.read_events(0)
    assert watch.compliance._look_now.is_set()
    await watch.compliance.look()
    assert watch.row.state is LaunchState.HALTING


async def test_a_result_that_is_only_missing_counts_after_a_while(watch):
    """The verifier was away and is back: every result it has is expired, and the hosts attest again in a moment."""
    await watch.active()
    watch.verifier.losses = {Loss(host="h1", code="result.expired")}
    await watch.compliance.look()
    watch.verifier.losses = set()
    await watch.compliance.look()
    watch.verifier.losses = {Loss(host="h1", code="result.expired")}
    await watch.compliance.look()
    watch.mano.clock.at += 29
    await watch.compliance.look()
    assert watch.row.state is LaunchState.ACTIVE
    watch.mano.clock.at += 1
    await watch.compliance.look()
    assert watch.row.state is LaunchState.HALTING


async def test_a_verifier_whose_database_was_restored(watch):
    await watch.active()
    watch.mano.store.remember_cursor(7)
    watch.drift()
    assert await watch.compliance.read_events(0) == 0
    assert await watch.compliance.read_events(0) == 1
    assert watch.row.state is LaunchState.HALTING


async def test_no_host_fits_for_a_while(watch, monkeypatch):
    monkeypatch.setattr("moorline.orchestration.launch.RETRY_S", 0.01)
    await watch.active()
    watch.mano.hosts.results["h2"] = None
    watch.drift()
    await watch.compliance.look()
    driving = asyncio.ensure_future(watch.settled())
    await until(lambda: "records-1" in watch.mano.launches.waiting)
    assert watch.mano.launches.waiting["records-1"].code == "launch.waiting_for_host"
    watch.mano.hosts.results["h2"] = result("h2", expires=Instant(NOW + 10_000))
    assert (await driving).host == "h2"
    assert watch.mano.launches.waiting == {}


async def test_no_host_fits_at_all(watch, monkeypatch):
    monkeypatch.setattr("moorline.orchestration.launch.RETRY_S", 0.01)
    await watch.active()
    watch.mano.hosts.results["h2"] = None
    watch.drift()
    await watch.compliance.look()
    for _ in range(3):
        await watch.mano.launches.advance("records-1")
    watch.mano.clock.at += 61
    watch.mano.provider.ledger.now, watch.mano.provider.ledger.height = watch.mano.clock.at, 99
    row = await watch.settled()
    assert (row.state, row.problem["code"], row.generation) == (LaunchState.FAILED, "placement.none_fits", 2)


@pytest.mark.parametrize(
    ("reactions", "code"),
    [
        (Reactions(host_lost=Afterwards.FAIL), "compliance.host_lost"),
        (Reactions(relaunches=0), "compliance.relaunched_too_often"),
    ],
)
async def test_failing_by_policy(watch, reactions, code):
    watch.reactions = reactions
    watch.process()
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    row = await watch.settled()
    assert (row.state, row.problem["code"]) == (LaunchState.FAILED, code)
    assert watch.mano.broker.retired == {("records-1", 1)}
    assert watch.mano.hosts.guests == {}


async def test_a_function_that_ends_again_and_again_is_given_up(watch):
    await watch.active()
    for _ in range(4):
        watch.mano.hosts.ended = True
        await watch.compliance.look()
        watch.mano.hosts.ended = False
        row = await watch.settled()
    assert (row.state, row.generation) == (LaunchState.FAILED, 4)
    assert row.problem["code"] == "compliance.relaunched_too_often"
    assert watch.mano.broker.retired == {("records-1", generation) for generation in (1, 2, 3, 4)}


async def test_ending_while_it_is_cleaned_up_ends_it(watch):
    await watch.active()
    watch.drift()
    await watch.compliance.look()
    await watch.mano.launches.advance("records-1")
    await watch.mano.launches.end("records-1")
    row = await watch.settled()
    assert (row.state, row.generation) == (LaunchState.ENDED, 1)
    assert watch.mano.hosts.guests == {}


async def test_a_launch_that_fails_with_its_token_out_is_cleaned_up(watch):
    watch.mano.request()
    watch.mano.hosts.refusal = Refused("launch.token_consumed", "used")
    row = await watch.settled()
    assert (row.state, row.problem["code"]) == (LaunchState.FAILED, "launch.token_consumed")
    assert (row.clean_ups[0].cause, row.clean_ups[0].code) == (LAUNCH_FAILED, "launch.token_consumed")
    assert watch.mano.broker.retired == {("records-1", 1)}


async def test_secrets_are_gone_once_it_is_halted(watch):
    watch.mano.request()
    for _ in range(2):
        await watch.mano.launches.advance("records-1")
    assert watch.row.token is not None
    watch.mano.clock.at += 5
    watch.drift()
    await watch.compliance.read_events(0)
    assert watch.row.token is None
    assert watch.row.reply_key is None


# The verifier's answer --------------------------------------------------------------------------------------------------

LOST = {"cursor": 4, "host": "h1", "at": NOW, "kind": "verdict_lost", "code": RULE, "result_expires": NOW}


def test_a_page_of_events():
    page = parse_events({"events": [LOST, LOST | {"cursor": 6, "kind": "verdict_gained"}], "next": 6, "newest": 9}, after=3)
    assert page.next == 6
    assert [(event.cursor, event.lost) for event in page.events] == [(4, True), (6, False)]
    assert parse_events({"events": [], "next": 3}, after=3) == EventPage(events=(), next=3)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {"events": []},
        {"events": {}, "next": 4},
        {"events": [], "next": 2},
        {"events": [LOST], "next": 3},
        {"events": [LOST], "next": True},
        {"events": [LOST, LOST], "next": 4},
        {"events": [LOST | {"cursor": 3}], "next": 4},
        {"events": [LOST | {"cursor": "4"}], "next": 4},
        {"events": [LOST | {"at": 1.5}], "next": 4},
        {"events": [LOST | {"host": None}], "next": 4},
        {"events": [LOST | {"kind": "other"}], "next": 4},
        {"events": ["x"], "next": 4},
    ],
)
def test_answers_that_are_no_page(answer):
    with pytest.raises(Malformed) as caught:
        parse_events(answer, after=3)
    assert caught.value.code == "peer.answer_malformed"
