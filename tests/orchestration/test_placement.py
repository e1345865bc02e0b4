"""Placement: one table of hosts, each with what is wrong with it."""

import dataclasses

import pytest

from moorline.clock import Instant
from moorline.orchestration.placement import Demand, HostView, Platform, judge, place, within
from moorline.rats import (
    AR4SI_CLAIMS,
    Assurance,
    AttestationResult,
    CapabilityLevel,
    EvidenceRoot,
    Finding,
    Outcome,
    Tier,
)

NOW = Instant(1_790_000_000)
DEMAND = Demand(use_case="4.7", jurisdiction="EU", simulated_allowed=True)


def shown(**changes):
    levels = {
        "boot.measured": Assurance.MEASURED,
        "boot.kernel.identity": Assurance.MEASURED,
        "ima.measurement": Assurance.MEASURED,
        "integrity.runtime": Assurance.MEASURED,
        "location.geo": Assurance.ASSERTED,
    } | changes
    return tuple(
        CapabilityLevel(capability=name, level=level, value="EU/DE" if name == "location.geo" else None)
        for name, level in levels.items()
    )


def result(host="h1", *, status=Tier.AFFIRMING, findings=(), **changes):
    fields = {
        "subject": f"host/{host}",
        "verifier": "verifier-1",
        "issued": Instant(NOW - 5),
        "expires": Instant(NOW + 30),
        "root": EvidenceRoot.TEST,
        "simulated_allowed": True,
        "vector": dict.fromkeys(AR4SI_CLAIMS, Tier.NONE) | {"executables": status},
        "findings": findings,
        "policy_digest": bytes(32),
        "nonce": bytes(32),
        "capabilities": shown(),
    }
    return AttestationResult(**(fields | changes))


def view(host="h1", **changes):
    fields = {
        "host": host,
        "platform": Platform(chip_id=b"c" * 64, location="EU/DE", simulated=True),
        "result": result(host),
        "reachable": True,
        "functions": 0,
    }
    return HostView(**(fields | changes))


KERNEL = Finding(code="eventlog.kernel", outcome=Outcome.NOT_MET, claim="executables", says="the kernel is not a known one")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"platform": None}, "placement.no_platform"),
        ({"reachable": False}, "placement.no_agent"),
        ({"result": None}, "placement.no_result"),
        ({"result": None, "problem": ("result.none", "none")}, "placement.no_result"),
        ({"result": None, "problem": ("peer.unreachable", "away")}, "placement.no_result"),
        ({"result": None, "problem": ("eventlog.kernel", "changed")}, "placement.host_contraindicated"),
        ({"result": result("h2")}, "placement.no_result"),
        ({"result": result(expires=NOW)}, "placement.result_expired"),
        ({"result": result(status=Tier.CONTRAINDICATED, findings=(KERNEL,))}, "placement.host_contraindicated"),
        ({"result": result(status=Tier.WARNING)}, "placement.host_contraindicated"),
        ({"result": result(status=Tier.NONE)}, "placement.host_contraindicated"),
        ({"result": result(capabilities=())}, "placement.capability_missing"),
        ({"result": result(capabilities=shown(**{"boot.measured": Assurance.ASSERTED}))}, "placement.capability_missing"),
        ({"platform": Platform(chip_id=b"", location="EU/DE", simulated=True)}, "placement.capability_missing"),
        ({"platform": Platform(chip_id=b"c", location="US/CA", simulated=True)}, "placement.location_disagrees"),
        ({"platform": Platform(chip_id=b"c", location="EUX", simulated=True)}, "placement.location_disagrees"),
    ],
)
def test_why_a_host_does_not_qualify(changes, code):
    verdict = judge(view(**changes), DEMAND, now=NOW)
    assert (verdict.eligible, verdict.code) == (code is None, code)
    assert all(verdict.says)


def test_another_jurisdiction():
    there = result(
        "h3",
        capabilities=tuple(
            dataclasses.replace(item, value="US/CA") if item.capability == "location.geo" else item for item in shown()
        ),
    )
    platform = Platform(chip_id=b"c", location="US/CA", simulated=True)
    verdict = judge(view("h3", result=there, platform=platform), DEMAND, now=NOW)
    assert verdict.code == "placement.jurisdiction"


@pytest.mark.parametrize(
    ("location", "jurisdiction", "inside"),
    [("EU/DE", "EU", True), ("EU/DE", "EU/DE", True), ("EU", "EU/DE", False), ("EUX/DE", "EU", False), ("US", "EU", False)],
)
def test_within(location, jurisdiction, inside):
    assert within(location, jurisdiction) is inside


def test_simulated_roots_count_only_where_the_genesis_says_so():
    strict = dataclasses.replace(DEMAND, simulated_allowed=False)
    verdict = judge(view(), strict, now=NOW)
    assert verdict.code == "placement.simulated_root"
    platform = Platform(chip_id=b"c", location="EU/DE", simulated=False)
    assert judge(view(result=result(root=EvidenceRoot.HARDWARE), platform=platform), strict, now=NOW).eligible


def test_every_single_capability_of_the_profile_is_needed():
    for name in [item.capability for item in shown()]:
        lacking = tuple(item for item in shown() if item.capability != name)
        verdict = judge(view(result=result(capabilities=lacking)), DEMAND, now=NOW)
        assert verdict.code == "placement.capability_missing"
        assert any(name in says for says in verdict.says)


def test_the_story_of_three_hosts():
    hosts = [
        view("h3", platform=Platform(chip_id=b"c", location="US/CA", simulated=True), result=result("h3")),
        view("h2", result=result("h2", status=Tier.CONTRAINDICATED, findings=(KERNEL,))),
        view("h1"),
    ]
    placement = place(hosts, DEMAND, now=NOW)
    assert placement.chosen == "h1"
    codes = {verdict.host: verdict.code for verdict in placement.verdicts}
    assert codes == {"h1": None, "h2": "placement.host_contraindicated", "h3": "placement.location_disagrees"}
    assert "eventlog.kernel" in placement.as_json()["verdicts"][1]["says"][0]


def test_choice_is_the_emptiest_then_the_first_by_name():
    hosts = [view("h2", functions=1), view("h4", functions=0), view("h3", functions=0)]
    assert place(hosts, DEMAND, now=NOW).chosen == "h3"
    assert place(reversed(hosts), DEMAND, now=NOW).chosen == "h3"


def test_no_host_fits():
    placement = place([view(result=None)], DEMAND, now=NOW)
    assert placement.chosen is None
    assert place([], DEMAND, now=NOW).chosen is None
