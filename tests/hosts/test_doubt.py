"""Doubt spreads: one claim that is not met lowers what rests on it, and the verdict shows over which way."""

import base64
import dataclasses
import json
import re
import sys
from graphlib import TopologicalSorter
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, Misconfigured
from moorline.policy import doubt, ear, host
from moorline.rats import Assurance, Finding, Outcome, Tier
from moorline.simulators import firmware
from moorline.wire import keys

sys.path.insert(0, str(Path(__file__).parent))
from test_policy import REFERENCE, SIGNER, appraise, facts, parse, resigned

GRAPH = doubt.shipped()
TEXT = (files("moorline.policy.sec009") / "doubt.json").read_text("utf-8")
SOURCE = Path(host.__file__).read_text("utf-8")


def levels(result):
    return {one.capability: one.level for one in result.capabilities}


def part(result, name):
    (found,) = [one for one in result.submodules if one.name == name]
    return found


def test_without_a_broken_claim_nobody_is_doubted():
    result = appraise()
    assert [one.name for one in result.submodules] == ["5.1.4", "5.1.5", "5.1.6", "identity"]
    assert all(one.status is Tier.AFFIRMING and one.doubts == () for one in result.submodules)
    assert levels(result)["integrity.runtime"] is Assurance.MEASURED


def test_an_unknown_kernel_takes_its_measurements_along():
    """verifies that: files that were all listed are worth nothing when the kernel that listed them is not known."""
    result = appraise(facts(firmware.CHANGED_KERNEL))
    bad = [finding.code for finding in result.findings if finding.outcome is Outcome.NOT_MET]
    assert bad == ["host.kernel_not_in_reference_values"]
    run_time = part(result, "5.1.5")
    assert run_time.status is Tier.WARNING
    assert "files <- kernel: host.kernel_not_in_reference_values" in run_time.doubts
    assert levels(result)["integrity.runtime"] is levels(result)["ima.measurement"] is Assurance.DECLARED
    assert levels(result)["boot.secure.enforced"] is Assurance.MEASURED  # what loaded the kernel is not in doubt
    assert part(result, "5.1.6").status is part(result, "identity").status is Tier.AFFIRMING


def test_doubt_at_the_bottom_reaches_everything():
    """verifies that: firmware nobody knows puts all that was booted by it in doubt, over a chain that names each step."""
    policy = dataclasses.replace(host.strict_policy(REFERENCE, not_required={}), firmware=host.OneOf(frozenset()))
    result = appraise(policy=policy)
    chain = "bootloader <- firmware: host.firmware_not_in_reference_values"
    assert chain in part(result, "5.1.4").doubts
    assert f"violations <- kernel <- {chain}" in part(result, "5.1.5").doubts
    assert {name for name, level in levels(result).items() if level > Assurance.DECLARED} == {
        "root.tpm20.hardware",
        "root.tpm20.virtual",
        "location.geo",
    }
    assert result.vector["configuration"] is Tier.WARNING


def test_what_was_not_appraised_casts_no_doubt_and_takes_none_away():
    policy = host.strict_policy(REFERENCE, not_required={"bootloader": "because of the test"})
    assert all(one.doubts == () for one in appraise(policy=policy).submodules)
    broken = dataclasses.replace(policy, firmware=host.OneOf(frozenset()))
    found = doubt.spread(appraise(policy=broken).findings, GRAPH)
    assert found.tiers["bootloader"] is Tier.NONE
    assert found.chains["kernel"].startswith("kernel <- bootloader <- firmware: ")


def test_every_rule_and_every_capability_has_its_place():
    """verifies that: each code the policy can give belongs to one claim, and each capability it can show is in the graph."""
    codes = set(re.findall(r'"(host\.[a-z_]+)"', SOURCE))
    codes |= {f"host.{component.value}_in_reference_values" for component in host.Component}
    codes |= {"host.file_in_reference_values", "host.ima_regular"}
    for code in codes:
        owners = [claim.id for claim in GRAPH.claims if code.startswith(claim.codes)]
        assert len(owners) == 1, (code, owners)
    shown = set(re.findall(r'\("((?:root|boot|ima|integrity|location|kernel|fs)\.[a-z0-9_.]+)"', SOURCE))
    shown |= {capability for _, capability, _ in host._FROM_COMMAND_LINE}
    assert shown == set(GRAPH.capabilities)


def test_a_rule_or_capability_without_a_place_is_an_error_and_not_silence():
    stray = Finding(code="weather.rain", outcome=Outcome.MET, claim="configuration", says="it rains")
    with pytest.raises(Misconfigured) as refused:
        doubt.spread([stray], GRAPH)
    assert refused.value.code == "doubt.code_unknown"


def changed(change):
    data = json.loads(TEXT)
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (changed(lambda d: d["claims"][0]["rests_on"].append("files")), "doubt.cycle"),
        (changed(lambda d: d["claims"][1]["rests_on"].append("boot_log")), "doubt.cycle"),
        (changed(lambda d: d["claims"][0]["rests_on"].append("nobody")), "doubt.unknown"),
        (changed(lambda d: d["capabilities"].update(x=["nobody"])), "doubt.unknown"),
        (changed(lambda d: d["capabilities"].update(x=[])), "doubt.unknown"),
        (changed(lambda d: d["claims"][0].update(group="9.9")), "doubt.unknown"),
        (changed(lambda d: d["claims"][0].update(claim="weather")), "doubt.unknown"),
        (changed(lambda d: d["claims"][0].update(codes=[])), "doubt.unknown"),
        (changed(lambda d: d["claims"].append(d["claims"][0])), "doubt.graph"),
        (changed(lambda d: d["claims"][0].update(more=1)), "doubt.graph"),
        (changed(lambda d: d.update(version=2)), "doubt.graph"),
        (changed(lambda d: d.pop("groups")), "doubt.graph"),
        ("[]", "doubt.graph"),
        ("{", "doubt.graph"),
    ],
)
def test_a_graph_that_is_none_is_not_loaded(text, code):
    with pytest.raises(Misconfigured) as refused:
        doubt.parse(text)
    assert refused.value.code == code


IDS = [claim.id for claim in GRAPH.claims]
ORDER = list(TopologicalSorter({claim.id: claim.rests_on for claim in GRAPH.claims}).static_order())


@given(st.sets(st.sampled_from(IDS)))
def test_whatever_breaks_exactly_what_rests_on_it_is_doubted(broken):
    """verifies that: against reachability worked out anew, no more and no less is doubted; more broken never doubts less."""

    def found_for(bad):
        findings = [
            Finding(
                code=claim.codes[0],
                outcome=Outcome.NOT_MET if claim.id in bad else Outcome.MET,
                claim=claim.ar4si,
                says="",
            )
            for claim in GRAPH.claims
        ]
        return set(doubt.spread(findings, GRAPH).chains)

    below = {claim.id: set(claim.rests_on) for claim in GRAPH.claims}
    for name in ORDER:
        below[name] |= {far for near in below[name] for far in below[near]}
    doubted = found_for(broken)
    assert doubted == {name for name in IDS if below[name] & broken}
    for one in broken:
        assert found_for(broken - {one}) <= doubted


# In the token ----------------------------------------------------------------------------------------------------------


def test_the_token_carries_its_submodules_with_vectors_of_their_own():
    result = appraise(facts(firmware.CHANGED_KERNEL))
    assert parse(ear.encode(result, SIGNER, audience="alpha.test")) == result


def submodule(change):
    def on(claims):
        change(claims["submods"])
        return claims

    return on


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda parts: parts["host/h1/5.1.5"].update(ear_status="contraindicated"), "ear.inconsistent"),
        (lambda parts: parts["host/h1/5.1.5"].update(more=1), "ear.claim"),
        (lambda parts: parts["host/h1/5.1.5"].pop("ear_verifier_claims"), "ear.claim"),
        (lambda parts: parts["host/h1/5.1.5"]["ear_trustworthiness_vector"].update(weather=2), "ear.claim"),
        (lambda parts: parts.update({"host/h1x": parts["host/h1/5.1.5"]}), "ear.claim"),
        (lambda parts: parts.pop("host/h1"), "ear.claim"),
    ],
)
def test_a_submodule_of_a_wrong_shape_or_of_somebody_else_is_refused(change, code):
    with pytest.raises(Malformed) as refused:
        parse(resigned(submodule(change)))
    assert refused.value.code == code


# The page --------------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs" / "spec"
EXAMPLE = json.loads((DOCS / "examples" / "host-verdict.json").read_text("utf-8"))


def test_the_example_of_the_page_is_what_the_code_says():
    key = keys.parse_public(bytes.fromhex(EXAMPLE["key"]))
    found = ear.parse_verified(EXAMPLE["token"], key, now=Instant(EXAMPLE["at"]), audience=EXAMPLE["audience"])
    assert found.status is Tier.CONTRAINDICATED
    block = json.loads(re.search(r"```json\n(.*?)```", (DOCS / "host-verdict.md").read_text("utf-8"), re.DOTALL).group(1))
    message = EXAMPLE["token"].split(".")[1]
    submods = json.loads(base64.urlsafe_b64decode(message + "=="))["submods"]
    for name, shown in block.items():
        assert submods[name] == shown
    assert part(found, "5.1.5").doubts
