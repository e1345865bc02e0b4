"""The four forms of a report, and what changed between two of them."""

import copy
import json
from html.parser import HTMLParser

import machines
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.attesters.probes import machine
from moorline.attesters.probes.tree import Tree
from moorline.cli.assessing import page, sarif
from moorline.errors import Malformed
from moorline.policy.sec009 import report
from moorline.policy.sec009.assessment import assess
from moorline.policy.sec009.catalogue import capabilities

NOW = 1_795_000_000
SHAPE = {"id", "status", "value", "variability", "attestable", "assurance", "root", "evidence", "reason", "improve"}


def found(root):
    tree = Tree(root)
    return assess(machine.observe(tree, NOW), host=machine.host_name(tree), at=NOW, privileged=False)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    made = {name: machines.write(tmp_path_factory.mktemp(name), getattr(machines, name)()) for name in ("server", "laptop")}
    made["hostile"] = machines.hostile(tmp_path_factory.mktemp("hostile"))
    return {name: found(root) for name, root in made.items()}


@pytest.mark.parametrize("name", ["server", "laptop", "hostile"])
def test_json_has_the_stated_shape_and_reads_back(trees, name):
    written = report.as_json(trees[name])
    assert set(written) == {"version", "host", "at", "privileged", "capabilities", "measures", "approach", "use_cases"}
    assert [one["id"] for one in written["capabilities"]] == list(capabilities())
    for one in written["capabilities"]:
        assert set(one) == SHAPE
        assert one["status"] in ("met", "not_met", "declared", "not_probed")
        assert one["assurance"] in ("none", "declared", "asserted")
        assert one["variability"] in ("static", "dynamic")
        assert one["attestable"] in ("boot_only", "run_time")
    assert {frozenset(one) for one in written["measures"]} == {frozenset({"id", "status", "by"})}
    assert {frozenset(one) for one in written["use_cases"]} == {frozenset({"id", "may_host", "missing", "roadmap"})}
    assert report.parse_report(json.dumps(written).encode()) == written


@pytest.mark.parametrize(
    "break_it",
    [
        lambda one: one.pop("host"),
        lambda one: one.update(more=1),
        lambda one: one.update(version=2),
        lambda one: one.update(version=True),
        lambda one: one["capabilities"].pop(),
        lambda one: one["capabilities"].append(one["capabilities"][0]),
        lambda one: one["capabilities"][0].update(id="root.tpm20.imaginary"),
        lambda one: one["capabilities"][0].update(status="splendid"),
        lambda one: one["capabilities"][0].update(assurance="absolute"),
        lambda one: one["capabilities"][0].update(value=7),
        lambda one: one["use_cases"][0].update(may_host="yes"),
        lambda one: one["measures"].reverse(),
        lambda one: one.update(capabilities={}),
        lambda one: one.update(approach=None),
    ],
)
def test_a_report_that_is_not_one_is_refused(trees, break_it):
    written = copy.deepcopy(report.as_json(trees["server"]))
    break_it(written)
    with pytest.raises(Malformed) as refused:
        report.parse_report(json.dumps(written).encode())
    assert refused.value.code in ("assessment.report", "assessment.version")


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps(x).encode()))
def test_any_bytes_are_a_report_or_malformed(data):
    with pytest.raises(Malformed):
        report.parse_report(data)


def test_a_difference_says_what_got_better_and_what_got_worse(trees):
    server, laptop = report.as_json(trees["server"]), report.as_json(trees["laptop"])
    assert report.compare(server, server) == ()
    down = {one.id: one for one in report.compare(server, laptop)}
    up = {one.id: one for one in report.compare(laptop, server)}
    assert down["kernel.lockdown"].better is False
    assert up["kernel.lockdown"].better is True
    assert down["approach"].better is False
    assert up["approach"].after == "7.2.2.1"
    assert set(down) == set(up)


def test_another_value_of_the_same_standing_is_neither(trees):
    before = report.as_json(trees["server"])
    after = copy.deepcopy(before)
    after["capabilities"][0]["value"] = "another TPM"
    (only,) = report.compare(before, after)
    assert (only.kind, only.better) == ("capability", None)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data") or name.startswith("on"):
                self.outside.append((tag, name, value))
            if name == "id":
                self.ids.append(value)


@pytest.mark.parametrize("name", ["server", "hostile"])
def test_the_page_stands_alone_and_believes_nothing(trees, name):
    text = page.render(trees[name])
    seen = Page()
    seen.feed(text)
    assert "script" not in seen.tags
    assert not {"img", "link", "iframe", "object", "embed"} & set(seen.tags)
    assert seen.outside == []
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert len(seen.ids) == len(set(seen.ids))
    assert set(capabilities()) <= set(seen.ids)
    if name == "hostile":
        assert "&lt;script&gt;" in text


@pytest.mark.parametrize("name", ["server", "laptop", "hostile"])
def test_sarif_is_whole_and_its_fingerprints_last(trees, name):
    log = sarif.render(trees[name])
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(rules) == len(set(rules)) == len(capabilities())
    prints = set()
    for one in run["results"]:
        assert rules[one["ruleIndex"]] == one["ruleId"]
        assert one["message"]["text"]
        assert (one["kind"], one["level"]) in (("fail", "warning"), ("open", "none"), ("review", "none"))
        prints.add(one["partialFingerprints"]["capability/v1"])
        for place in one.get("locations", ()):
            assert place["physicalLocation"]["artifactLocation"]["uri"].startswith("file:///")
    assert len(prints) == len(run["results"])
    told = {one["ruleId"] for one in run["results"]}
    assert told == {one.id for one in trees[name].capabilities if one.status.value != "met"}
    assert sarif.render(trees[name]) == log
