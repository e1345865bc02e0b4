"""Every sgx and tdx case of ../shared/vectors, driven by its case.json: outcome, class and facts are those it demands."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic, Refused, Unavailable
from moorline.policy.intel_case import CaseFile, class_of, detect, run_case
from moorline.verification.intel_pck import production_intel_anchors

VECTORS = Path(__file__).parents[2].parent / "shared" / "vectors"


def cases(kind):
    found = [
        path.parent
        for family in ("sgx", "tdx")
        for path in sorted((VECTORS / family).glob("*/case.json"))
        if json.loads(path.read_text())["kind"] == kind
    ]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="../shared/vectors is not here"))]


def named(folder):
    return folder.name if folder else "absent"


def files(folder, listed):
    return [CaseFile(name=one["file"], hint=one["as"], data=(folder / one["file"]).read_bytes()) for one in listed]


def outcome(folder, case):
    at = case["at"] and Instant(int(datetime.fromisoformat(case["at"]).timestamp()))
    try:
        result = run_case(
            evidence=files(folder, case["evidence"]),
            endorsements=files(folder, case["endorsements"]),
            mode=case["mode"],
            at=at,
            inputs=case["inputs"],
            policy=case["policy"],
            anchors=production_intel_anchors(),
        )
    except Malformed as error:
        return "malformed", error.code, {}
    except (NotAuthentic, Refused) as error:
        return "refuse", error.code, {}
    except Unavailable as error:
        return "undecided", error.code, {}
    refusal = result.first_refusal()
    return ("accept", None, result.facts) if refusal is None else ("refuse", refusal.code, result.facts)


@pytest.mark.parametrize("folder", cases("evidence"), ids=named)
def test_the_case_comes_out_as_it_must(folder):
    """verifies that: outcome and code class are the demanded ones, and that accepted evidence has the demanded facts"""
    case = json.loads((folder / "case.json").read_text())
    got, code, facts = outcome(folder, case)
    assert (got, class_of(code) if code else None) == (case["expect"], case["code_class"]), code
    if facts:
        assert {name: facts.get(name) for name in case["facts"]} == case["facts"]


@pytest.mark.parametrize("folder", cases("evidence"), ids=named)
def test_kinds_are_found_by_content(folder):
    """verifies that: without hints every quote and every statement of Intel is recognised as what the case says it is"""
    case = json.loads((folder / "case.json").read_text())
    for one in files(folder, case["evidence"] + case["endorsements"]):
        if one.hint not in ("chain-pem", "crl-der", "ccel") and case["expect"] != "malformed":
            assert detect(one.data) == one.hint
