"""Verifies that a rolling update raises no false alarm, and that going back is caught."""

import json
from pathlib import Path

import pytest
from verdict_desk import AT, NEW, OLD, OTHER

from moorline.errors import Malformed, Misconfigured
from moorline.policy import reference_sets, reference_text
from moorline.wire import keys

ROLLING = (("1.4", "2026-09-01", "2026-11-30", OLD), ("1.5", "2026-11-20", "2026-12-31", NEW))
BEFORE, AFTER = "2026-11-01T00:00:00+00:00", "2026-12-05T00:00:00+00:00"


def outcome(desk, at, *, refs, policy):
    _, verdict = desk.verdict("--policy", policy, "--refs", refs, "--at", at)
    codes = [one["code"] for one in verdict["findings"] if one["outcome"] == "not_met"]
    return verdict["status"], [code for code in codes if code.startswith("reference.")]


def test_old_then_both_then_new(desk):
    """verifies that: the old release counts before and during the update, the new one during and after it, and nobody is
    refused who follows the update; who falls behind or goes back is refused with its own code."""
    refs, policy = desk.references(*ROLLING), desk.asking()
    for release, expected in ((OLD, ("affirming", "affirming", "refused")), (NEW, ("refused", "affirming", "affirming"))):
        desk.boots(release)
        found = [outcome(desk, at, refs=refs, policy=policy) for at in (BEFORE, AT, AFTER)]
        assert tuple(status for status, _ in found) == expected
    desk.boots(OLD)
    assert outcome(desk, AFTER, refs=refs, policy=policy) == ("refused", ["reference.superseded"])
    desk.boots(OTHER)
    assert outcome(desk, AFTER, refs=refs, policy=policy) == ("refused", ["reference.release_unknown"])


def test_half_of_one_release_and_half_of_another_is_no_release(desk):
    desk.boots(OLD, second=NEW)
    refs, policy = desk.references(*ROLLING), desk.asking()
    _, verdict = desk.verdict("--policy", policy, "--refs", refs)
    refused = [one["code"] for one in verdict["findings"] if one["outcome"] == "not_met"]
    assert refused == ["reference.release_unknown"]


def test_an_older_set_put_back_does_not_count(desk):
    marks = desk.folder / "marks.json"
    first = desk.references(ROLLING[0], serial=4)
    second = desk.references(*ROLLING, serial=5)
    policy = desk.asking(serial=3)
    desk.boots(OLD)
    assert desk.verdict("--policy", policy, "--refs", first, "--marks", marks)[0] == 0
    assert desk.verdict("--policy", policy, "--refs", second, "--marks", marks)[0] == 0
    code, verdict = desk.verdict("--policy", policy, "--refs", first, "--marks", marks)
    assert (code, verdict["error"]["code"]) == (2, "reference.rollback")
    code, verdict = desk.verdict("--policy", desk.asking(serial=6), "--refs", second)
    assert (code, verdict["error"]["code"]) == (2, "reference.rollback")
    marks.write_text("[]")
    assert desk.moor("appraise", *desk.files, "--policy", policy, "--refs", second, "--marks", marks)[0] == 2


@pytest.mark.parametrize(
    ("made", "at", "code"),
    [
        ({"family": "snp"}, AT, "reference.family"),
        ({"until": "2026-06-01T00:00:00Z"}, AT, "reference.expired"),
        ({}, "2025-01-01T00:00:00+00:00", "reference.not_yet_valid"),
        ({}, "2026-02-01T00:00:00+00:00", "reference.no_release"),
        ({"name": "others"}, AT, "reference.missing"),
    ],
)
def test_a_set_that_does_not_count_leaves_the_evidence_undecided(desk, made, at, code):
    releases = ROLLING if made.get("family") != "snp" else ()
    if made.get("family") == "snp":
        signer = keys.KeySigner(desk.signer)
        held = reference_sets.ReferenceSet(
            name="machines",
            family="snp",
            serial=1,
            not_before=0,
            not_after=1 << 33,
            releases=(reference_sets.Release(name="1", not_before=0, not_after=1 << 33, values={}, files={}),),
        )
        refs = desk.folder / "snp.cose"
        refs.write_bytes(reference_sets.sign(held, signer))
    else:
        refs = desk.references(*releases, **made)
    status, verdict = desk.verdict("--policy", desk.asking(), "--refs", refs, "--at", at)
    assert (status, verdict["status"], verdict["error"]["code"]) == (2, "undecided", code)


def test_the_signature_counts_and_only_that_of_a_signer_that_the_policy_names(desk):
    refs, policy = desk.references(*ROLLING), desk.asking()
    data = bytearray(refs.read_bytes())
    for at in range(0, len(data), 97):
        data[at] ^= 1
        refs.write_bytes(data)
        code, _ = desk.verdict("--policy", policy, "--refs", refs)
        assert code == 2, at
        data[at] ^= 1
    desk.signer = desk.token_key
    refs.write_bytes(data)
    code, verdict = desk.verdict("--policy", desk.asking(), "--refs", refs)
    assert (code, verdict["error"]["code"]) == (2, "reference.signer_unknown")


def test_two_files_of_one_set_are_not_merged(desk):
    first = desk.references(*ROLLING, serial=4)
    second = desk.references(*ROLLING, serial=5)
    _, verdict = desk.verdict("--policy", desk.asking(), "--refs", first, "--refs", second)
    assert verdict["error"]["code"] == "reference.twice"


def test_a_set_that_is_asked_for_must_be_named_and_the_other_way_round(desk):
    for policy in (desk.policy(pcr4={"reference": "machines"}), desk.policy(references={"machines": {"serial": 1}})):
        assert desk.moor("appraise", *desk.files, "--policy", policy)[0] == 2
    unasked = desk.asking()
    written = json.loads(unasked.read_text())
    written["demands"]["pcr4"] = written["demands"]["pcr8"] = {"not_required": "a test"}
    unasked.write_text(json.dumps(written))
    assert desk.moor("appraise", *desk.files, "--policy", unasked)[0] == 2


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda text: text.pop("serial"), Misconfigured),
        (lambda text: text.update(family="other"), Misconfigured),
        (lambda text: text.update(not_after="tomorrow"), Misconfigured),
        (lambda text: text["releases"][0]["values"].update(pcr99=["00"]), Misconfigured),
        (lambda text: text["releases"][0]["values"].update(pcr4=["zz"]), Misconfigured),
        (lambda text: text["releases"][0]["values"].update(pcr4=[]), Misconfigured),
        (lambda text: text["releases"][0]["files"].update({"/bin/x": "00"}), Misconfigured),
        (lambda text: text["releases"].reverse(), Malformed),
        (lambda text: text["releases"].clear(), Malformed),
    ],
)
def test_a_set_that_is_not_whole_is_not_signed(desk, change, kind):
    desk.references(*ROLLING)
    text = json.loads((desk.folder / "set.json").read_text())
    change(text)
    with pytest.raises(kind):
        reference_sets.sign(reference_text.parse_reference_set(json.dumps(text).encode()), keys.KeySigner(desk.signer))


def test_the_example_on_the_page_can_be_signed(desk):
    page = (Path(__file__).parents[2] / "docs" / "spec" / "reference-set.md").read_text("utf-8")
    text = page.split("```json\n")[1].split("```")[0]
    held = reference_text.parse_reference_set(text.encode())
    signed = reference_sets.sign(held, keys.KeySigner(desk.signer))
    assert reference_sets.peek(signed) == held
    assert [release.name for release in held.releases] == ["1.4", "1.5"]
