"""What a policy reads decides, and nothing else: decisions that are remembered are those that would be made anew."""

from __future__ import annotations

import copy
import json

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.hsm.policy_reads import reads
from moorline.hsm.release_policy import SCHEMA, ReleasePolicy

FACTS = {
    "action": "release",
    "principal": {
        "tenant": "t1",
        "service": "records",
        "instance": "r-1",
        "generation": 1,
        "host": "h1",
        "package": "aa",
        "measurement": "bb",
    },
    "context": {
        "now": 5,
        "channel": "tls",
        "met": ["launch.token"],
        "enclave": {"root": "hardware", "chip_shown": True},
        "verdict": {"status": "affirming", "root": "hardware", "code": "", "age_s": 3, "left_s": 60, "gaps": ["g"]},
        "record": {"use_case": "4.7", "profiles": ["tls"], "callers": ["beta"]},
    },
}
OTHER = {str: "other", int: 7, bool: False, list: ["other"]}


def leaves(tree, before=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*before, name))
        else:
            yield (*before, name), value


ATTRIBUTES = [(path, value) for path, value in leaves(FACTS) if path != ("action",)]


def changed(path, value):
    facts = copy.deepcopy(FACTS)
    at = facts
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return facts


def written(value):
    return json.dumps(value)


def test_every_attribute_of_the_schema_is_tried_below():
    assert {path[-1] for path, _ in ATTRIBUTES} >= {
        word.rstrip(":") for word in SCHEMA.replace("{", " ").split() if word.endswith(":")
    } - {"enclave", "verdict", "record", "principal", "resource", "context"}


@pytest.mark.parametrize(("path", "value"), ATTRIBUTES, ids=[".".join(path) for path, _ in ATTRIBUTES])
def test_a_fact_that_is_read_is_decided_anew(path, value):
    """verifies that: whichever attribute a policy reads, another value of it finds no decision that is remembered."""
    text = f"permit (principal, action, resource) when {{ {'.'.join(path)} == {written(value)} }};"
    policy = ReleasePolicy(text, name="mine")
    assert policy.decide_known(FACTS).allowed
    assert not policy.decide_known(changed(path, OTHER[type(value)])).allowed
    assert policy.decide_known(FACTS).allowed


WORDS = [
    'principal == Moorline::Function::"r-1"',
    'principal in Moorline::Function::"r-1"',
    'principal is Moorline::Function in Moorline::Function::"r-2"',
    'resource == Moorline::Key::"records"',
    'action == Moorline::Action::"renew"',
    'action in [Moorline::Action::"release", Moorline::Action::"resume"]',
    'principal.host like "h1*"',
    'principal["tenant"] == "t1"',
    "principal has tenant && principal.generation > 3",
    '{a: principal}.a.host == "h1"',
    'context.verdict has gaps && context.verdict.gaps.contains("g")',
    "context.verdict == context.verdict && context.enclave.chip_shown",
    'if context.now > 5 then context.channel == "tls" else principal.generation == 1',
    '{"Var": context}["Var"].now == 5',
    '{".": context.record}["."].use_case == "4.7"',
    'context.met.containsAll(["launch.token"])',
    "context.verdict.age_s * 3074457345618258603 > 0",  # overflows, and an error denies, where age_s is 7
    'context.record.callers.contains(principal.host) || !(context.verdict.status == "affirming")',
    "[1, 5].contains(context.now)",
]
SCOPES = ["principal", 'principal == Moorline::Function::"r-1"', "principal is Moorline::Function"]
ACTIONS = ["action", 'action == Moorline::Action::"release"', 'action in [Moorline::Action::"renew"]']
RESOURCES = ["resource", 'resource == Moorline::Key::"records"']


@st.composite
def policies(draw):
    rules = []
    for effect in ["permit", *draw(st.lists(st.sampled_from(["permit", "forbid"]), max_size=2))]:
        scope = ", ".join(draw(st.sampled_from(each)) for each in (SCOPES, ACTIONS, RESOURCES))
        clauses = [
            f"{draw(st.sampled_from(['when', 'unless']))} {{ {word} }}"
            for word in draw(st.lists(st.sampled_from(WORDS), max_size=2))
        ]
        rules.append(f"{effect} ({scope}) {' '.join(clauses)};")
    return "\n".join(rules)


def fits(text):
    try:
        return not cedarpy.validate_policies(text, SCHEMA).errors
    except ValueError:
        return False


FACTS_OF_FEW = st.builds(
    lambda changes, action: {**one_of(changes), "action": action},
    st.lists(st.sampled_from(ATTRIBUTES), max_size=3),
    st.sampled_from(["release", "resume", "renew"]),
)


def one_of(changes):
    facts = copy.deepcopy(FACTS)
    for path, value in changes:
        at = facts
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = OTHER[type(value)]
    return facts


@settings(max_examples=60, deadline=None)
@given(text=policies().filter(fits), asked=st.lists(FACTS_OF_FEW, min_size=2, max_size=12))
def test_what_is_remembered_is_what_would_be_decided(text, asked):
    """verifies that: whatever a policy is made of, asked again and again it says what it says of each by itself."""
    policy = ReleasePolicy(text, name="mine")
    for facts in [*asked, *asked]:
        assert policy.decide_known(facts) == policy.decide(facts)


def test_a_fact_that_is_not_read_is_not_evaluated_for():
    """verifies that: functions that differ in their names only share a decision of a policy that reads no name."""
    text = 'permit (principal, action, resource) when { context.verdict.status == "affirming" };'
    policy = ReleasePolicy(text, name="mine")
    first = policy.decide_known(FACTS)
    assert policy.decide_known(changed(("principal", "instance"), "r-2")) is first
    assert policy.decide_known(changed(("context", "now"), 6)) is first
    assert policy.decide_known({**FACTS, "action": "renew"}) is not first


def test_a_number_no_engine_takes_is_denied_whether_it_is_read_or_not():
    """verifies that: what a fresh evaluation would refuse is refused, though the same facts otherwise were permitted."""
    policy = ReleasePolicy("permit (principal, action, resource);", name="all")
    assert policy.decide_known(FACTS).allowed
    for path in (("principal", "generation"), ("context", "now"), ("context", "verdict", "age_s")):
        for number in (1 << 63, -(1 << 63) - 1):
            assert not policy.decide_known(changed(path, number)).allowed


def test_facts_somebody_wrote_are_never_answered_from_memory():
    """verifies that: `explain` of facts that are not whole is denied, though the policy reads nothing that is missing."""
    policy = ReleasePolicy("permit (principal, action, resource);", name="all")
    assert policy.decide_known(FACTS).allowed
    odd = copy.deepcopy(FACTS)
    del odd["context"]["verdict"]
    assert not policy.decide(odd).allowed


def test_a_form_that_is_not_known_reads_all_of_its_variables():
    """verifies that: what a later Cedar may write differently makes less remembered, never too much."""
    made = {"staticPolicies": {"p": {"conditions": [{"body": {"new-form": {"of": [{"Var": "context"}]}}}]}}}
    assert reads(json.dumps(made)) == {("context",)}
    assert reads(json.dumps({"x": {"Var": "of a later version"}})) == {()}
    assert reads(json.dumps({"x": {".": {"left": {"Var": "context"}, "attr": "a", "more": 1}}})) == {("context",)}
