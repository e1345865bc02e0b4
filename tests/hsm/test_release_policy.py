"""The provider's release policy: the shipped one says what the protocol says, others narrow it, and every doubt denies."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from moorline.clock import Instant
from moorline.errors import Misconfigured, Refused, Unavailable
from moorline.hsm import release
from moorline.hsm.release_policy import RecordFacts, ReleaseAction, ReleasePolicy, facts_of
from moorline.services import broker_explain
from moorline.services.broker_explain import Decisions
from moorline.storage import broker_decisions
from moorline.storage.broker_decisions import DecisionStore
from moorline.storage.broker_store import BrokerStore

sys.path.insert(0, str(Path(__file__).parent))
from test_release import FIELDS, GOOD, TABLE, host

RECORD = RecordFacts(use_case="4.7", profiles=("tls",), callers=("beta",))
SHIPPED = (resources.files("moorline.services.defaults") / "release.cedar").read_text("utf-8")
ALL = "permit (principal, action, resource);"
DOCS = Path(__file__).parents[2] / "docs" / "spec"


@pytest.fixture(scope="module")
def shipped():
    return ReleasePolicy(SHIPPED, name="shipped")


def facts(request=GOOD, action=ReleaseAction.RELEASE):
    floor = release.decide(request) if action is ReleaseAction.RELEASE else release.decide_resumption(request)
    return facts_of(action, request, floor, RECORD)


def test_the_shipped_policy_permits_what_the_protocol_permits(shipped):
    assert shipped.decide(facts()).allowed
    for action in (ReleaseAction.RESUME, ReleaseAction.RENEW):
        late = replace(GOOD, expected_token=None, epoch=None, leases=())
        assert shipped.decide(facts(late, action)).allowed


@pytest.mark.parametrize("name", TABLE)
def test_the_shipped_policy_refuses_what_the_protocol_refuses(shipped, name):
    """verifies that: each single thing that makes the protocol refuse makes the policy refuse too, without the floor."""
    request, _ = TABLE[name]
    said = shipped.decide(facts(request))
    assert not said.allowed
    assert said.rules


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ('forbid (principal, action, resource) when { principal.tenant == "t1" };', None),
        ("forbid (principal, action, resource) when { context.verdict.age_s > 3 };", None),
        ('forbid (principal, action, resource) when { context.enclave.root != "hardware" };', None),
        ('forbid (principal, action, resource) when { context.channel == "tls" };', None),
        ('forbid (principal, action, resource) unless { context.record.callers.contains("gamma") };', None),
        ('forbid (principal, action == Moorline::Action::"release", resource) when { principal.generation < 2 };', None),
    ],
)
def test_a_policy_narrows(rule, change):
    """verifies that: a provider can withhold keys by tenant, age of the verdict, root, channel, contract or generation."""
    assert change is None
    said = ReleasePolicy(f'{ALL}\n@id("mine")\n{rule}', name="mine").decide(facts())
    assert (said.allowed, said.rules) == (False, ("mine",))


def test_a_policy_does_not_widen():
    """verifies that: a policy that permits everything releases nothing that the protocol refuses."""
    decisions = Decisions(ReleasePolicy(ALL, name="all"))
    request, code = TABLE["guessed proof"]
    with pytest.raises(Refused) as caught:
        decisions.decide(ReleaseAction.RELEASE, request, release.decide(request), RECORD, session="s")
    assert caught.value.code == code
    (kept,) = decisions.about(FIELDS.instance)
    assert kept.policy.allowed
    assert kept.as_json()["decided_by"] == code


def test_a_policy_that_denies_is_told_with_its_rule():
    decisions = Decisions(ReleasePolicy(f'{ALL} @id("no-tenant") forbid (principal, action, resource);', name="mine"))
    with pytest.raises(Refused) as caught:
        decisions.decide(ReleaseAction.RELEASE, GOOD, release.decide(GOOD), RECORD, session="s")
    assert (caught.value.code, caught.value.got) == ("release.policy_denied", "no-tenant")
    assert decisions.about("s")[0].as_json()["allowed"] is False


def test_no_rule_is_a_no():
    """verifies that: an empty policy denies, and so do facts that are not facts."""
    assert not ReleasePolicy("", name="empty").decide(facts()).allowed
    everything = ReleasePolicy(ALL, name="all")
    assert not everything.decide({"action": "release", "principal": {}, "context": {}}).allowed
    for section in ("principal", "context"):
        odd = facts()
        del odd[section][next(iter(odd[section]))]
        assert not everything.decide(odd).allowed
    assert not everything.decide({**facts(), "action": "own"}).allowed


@pytest.mark.parametrize(
    "text",
    [
        "permit (principal",
        "permit (principal, action, resource) when { context.nothing };",
        "permit (principal, action, resource) when { context.now == true };",
        'permit (principal == Moorline::Device::"d", action, resource);',
        'permit (principal, action == Moorline::Action::"own", resource);',
    ],
)
def test_a_policy_that_does_not_fit_stops_the_broker(text):
    """verifies that: syntax, attributes, types and actions are checked at the start, not when a function asks."""
    with pytest.raises(Misconfigured, match="release.policy_invalid"):
        ReleasePolicy(text, name="mine")


def test_of_many_decisions_the_newest_are_kept():
    decisions = Decisions(ReleasePolicy(ALL, name="all"))
    for number in range(1010):
        decisions.decide(ReleaseAction.RELEASE, GOOD, release.decide(GOOD), RECORD, session=f"session-{number}")
    assert len(decisions.about(FIELDS.instance)) == 1000
    assert decisions.about("session-1009")
    assert not decisions.about("session-9 ")


@dataclass
class Written:
    """What broker_explain needs of a broker."""

    decisions: Decisions
    explanations: DecisionStore

    @property
    def clock(self):
        """Its clock stands where that of the requests does."""
        return SimpleNamespace(now=lambda: GOOD.now)


@pytest.fixture
def store(tmp_path):
    made = BrokerStore.open(f"sqlite:///{tmp_path / 'broker.db'}")
    yield made
    made.close()


def told(broker, name):
    broker_explain._write(broker)
    return [json.loads(body) for body in broker.explanations.about(name)]


def decide(broker, session, request=GOOD):
    with contextlib.suppress(Refused):
        broker.decisions.decide(ReleaseAction.RELEASE, request, release.decide(request), RECORD, session=session)


def test_decisions_outlive_the_process_and_the_newest_of_a_session_counts(store):
    """verifies that: another process over the database says what this one decided, by instance and by part of a session."""
    policy = ReleasePolicy(ALL, name="all")
    one = Written(Decisions(policy), DecisionStore(store))
    decide(one, "function from 127.0.0.1, kem aa%", TABLE["guessed proof"][0])
    decide(one, "function from 127.0.0.1, kem bb")
    broker_explain._write(one)
    decide(one, "function from 127.0.0.1, kem aa%")
    broker_explain._write(one)
    other = Written(Decisions(policy), DecisionStore(store))
    assert [found["allowed"] for found in told(other, FIELDS.instance)] == [True, True]
    assert [found["session"] for found in told(other, "kem aa%")] == ["function from 127.0.0.1, kem aa%"]
    assert told(other, "kem %b") == told(other, "nobody") == []


def test_decisions_are_pruned_by_age_and_number(store, monkeypatch):
    policy = ReleasePolicy(ALL, name="all")
    broker = Written(Decisions(policy), DecisionStore(store))
    old = Decisions(policy)
    request = replace(GOOD, now=Instant(GOOD.now - broker_decisions.KEPT_S - 1))
    with contextlib.suppress(Refused):
        old.decide(ReleaseAction.RELEASE, request, release.decide(request), RECORD, session="old")
    rows = [broker_explain._stored(one) for one in old.taken()]
    broker.explanations.keep(rows, at=request.now)
    assert broker.explanations.about("old")
    broker.explanations.keep([], at=GOOD.now)
    assert not broker.explanations.about("old")
    monkeypatch.setattr(broker_decisions, "KEPT", 3)
    for number in range(5):
        decide(broker, f"session-{number}")
    broker.explanations.keep([broker_explain._stored(one) for one in broker.decisions.taken()], at=GOOD.now)
    assert [json.loads(body)["session"] for body in broker.explanations.about("session-")] == [
        "session-4", "session-3", "session-2"
    ]  # fmt: skip


def test_what_cannot_be_written_is_kept_and_written_later(store, monkeypatch):
    broker = Written(Decisions(ReleasePolicy(ALL, name="all")), DecisionStore(store))
    decide(broker, "s-1", TABLE["guessed proof"][0])
    decide(broker, "s-2")

    def away(*_args, **_options):
        decide(broker, "s-1")  # meanwhile decided anew
        raise Unavailable("storage.unavailable", "the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(DecisionStore, "keep", away)
        with pytest.raises(Unavailable):
            broker_explain._write(broker)
    assert {one["session"]: one["allowed"] for one in told(broker, "s-")} == {"s-1": True, "s-2": True}


def test_the_page_shows_facts_as_they_are(shipped):
    """verifies that: the example of docs/spec/release.md is decided as the page says, and has the shape of real facts."""
    example = json.loads((DOCS / "examples" / "release-request.json").read_text("utf-8"))
    said = shipped.decide(example)
    page = (DOCS / "release.md").read_text("utf-8")
    assert f"allowed      {str(said.allowed).lower()}" in page
    assert f"decided_by   {', '.join(said.rules)}" in page

    def shape(value):
        return {name: shape(one) for name, one in value.items()} if isinstance(value, dict) else type(value)

    gone = host(result=None, problem="result.withdrawn")
    assert shape(example) == shape(facts(replace(GOOD, host=gone)))
    for name in re.findall(r"^    context\.(\w+)", page, re.MULTILINE):
        assert name in example["context"]
