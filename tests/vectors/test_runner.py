"""Verifies that the runner of cases never counts a case as passed that did not come out exactly as expected."""

import json
import re
from pathlib import Path

import pytest

from moorline.cli import evidence as command
from moorline.cli.evidence_cases import classes, compare, families
from moorline.cli.evidence_cases.case import read_case
from moorline.errors import Malformed, Misconfigured, NotAuthentic, Refused, Unavailable
from moorline.rats import Finding, Outcome

SOURCE = Path(__file__).parents[2] / "src" / "moorline"


def write(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token.cbor").write_bytes(b"\x01")
    document = {
        "format": 1,
        "kind": "evidence",
        "mode": "authentic",
        "at": None,
        "evidence": [{"file": "token.cbor", "as": "psa-token"}],
        "endorsements": [],
        "reference": [],
        "inputs": {},
        "policy": {},
        "expect": "accept",
        "code_class": None,
        "per_file": None,
        "facts": {},
        **changes,
    }
    (folder / "case.json").write_text(json.dumps(document))
    return folder


def rows(folder, family):
    return list(compare.run_folders(compare.find_folders(folder), lambda _case: family))


def raising(error):
    def family(_case, facts):
        facts["seen"] = 1
        raise error

    return family


def accepting(_case, facts):
    facts["seen"] = 1
    return ()


MALFORMED = Malformed("psa.profile", "a test")
SIGNATURE = NotAuthentic("cose.signature_invalid", "a test")
NO_KEY = Unavailable("psa.iak_unknown", "a test")


@pytest.mark.parametrize(
    ("expect", "code_class", "family", "got", "match"),
    [
        ("accept", None, accepting, "accept", True),
        ("accept", None, raising(SIGNATURE), "refuse", False),
        ("accept", None, raising(NO_KEY), "undecided", False),
        ("refuse", "signature", raising(SIGNATURE), "refuse", True),
        ("refuse", "chain", raising(SIGNATURE), "refuse", False),
        ("refuse", "signature", accepting, "accept", False),
        ("refuse", "key", raising(NO_KEY), "undecided", False),
        ("undecided", "key", raising(NO_KEY), "undecided", True),
        ("undecided", "chain", raising(NO_KEY), "undecided", False),
        ("undecided", "key", raising(SIGNATURE), "refuse", False),
        ("malformed", "structure", raising(MALFORMED), "malformed", True),
        ("refuse", "structure", raising(MALFORMED), "malformed", True),
        ("refuse", "signature", raising(MALFORMED), "malformed", False),
        ("refuse", "unsupported", raising(Malformed("ima.template_unknown", "a test")), "refuse", True),
        ("malformed", "structure", raising(Refused("some.code_nobody_classified", "a test")), "refuse", False),
        ("refuse", "signature", raising(KeyError("a defect of ours")), "undecided", False),
        ("undecided", "key", raising(KeyError("a defect of ours")), "undecided", False),
    ],
)
def test_what_matches(tmp_path, expect, code_class, family, got, match):
    write(tmp_path / "psa" / "one", expect=expect, code_class=code_class)
    (row,) = rows(tmp_path, family)
    assert (row.family, row.case, row.got, row.match) == ("psa", "one", got, match)


@pytest.mark.parametrize(
    ("facts", "match"),
    [({"seen": 1}, True), ({}, True), ({"seen": 2}, False), ({"seen": True}, False), ({"other": 1}, False)],
)
def test_facts_are_compared_exactly(tmp_path, facts, match):
    write(tmp_path / "psa" / "one", facts=facts)
    assert rows(tmp_path, accepting)[0].match is match


def test_any_finding_may_have_the_class(tmp_path):
    def family(_case, _facts):
        return tuple(
            Finding(code=code, outcome=Outcome.NOT_MET, claim="hardware", says="a test")
            for code in ("snp.debug", "snp.root")
        )

    write(tmp_path / "snp" / "one", expect="refuse", code_class="chain")
    (row,) = rows(tmp_path, family)
    assert (row.got, row.code, row.match) == ("refuse", "snp.debug", True)


def test_an_alternate_encoding_must_give_the_same(tmp_path):
    def family(case, _facts):
        if case.evidence[0].file == "bad.b64":
            raise SIGNATURE
        return ()

    write(tmp_path / "nitro" / "one", inputs={"alternates": [{"file": "bad.b64", "as": "nitro-document-b64"}]})
    (row,) = rows(tmp_path, family)
    assert not row.match
    assert "bad.b64" in row.reason


def test_each_file_of_a_folder_can_be_a_case(tmp_path):
    write(
        tmp_path / "psa" / "many",
        evidence=[{"file": "a", "as": "psa-token"}, {"file": "b", "as": "psa-token"}],
        per_file={
            "a": {"expect": "accept", "code_class": None},
            "b": {"expect": "malformed", "code_class": "structure"},
        },
    )
    assert [(row.case, row.match) for row in rows(tmp_path, accepting)] == [("many:a", True), ("many:b", False)]


@pytest.mark.parametrize(
    "broken",
    [
        {"format": 2},
        {"kind": "guess"},
        {"expect": "refuse"},
        {"code_class": "key"},
        {"at": "2026-01-01T00:00:00"},
        {"evidence": [{"file": "x"}]},
        {"inputs": []},
        {"surplus": 1},
    ],
)
def test_a_case_that_cannot_be_read_never_passes(tmp_path, broken):
    write(tmp_path / "psa" / "one", **broken)
    (row,) = rows(tmp_path, accepting)
    assert (row.got, row.match) == ("undecided", False)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "sub/file", ".hidden", "", "absent"])
def test_a_case_reads_only_its_own_folder(tmp_path, file):
    case = read_case(write(tmp_path / "psa" / "one"))
    with pytest.raises(Malformed, match="case.file"):
        case.read(file)


def test_what_is_not_run_is_skipped_with_a_reason_of_the_list(tmp_path):
    write(tmp_path / "psa" / "answers", kind="known_answer")
    write(tmp_path / "gpu" / "one", evidence=[{"file": "token.cbor", "as": "nv-evidence-json"}])
    found = list(compare.run_folders(compare.find_folders(tmp_path), families.family_of))
    assert {row.reason for row in found} == set(compare.SKIPS)
    assert {row.got for row in found} == {"skipped"}
    assert not any(row.match for row in found)


def test_a_family_of_any_name_is_found_by_its_hints(tmp_path):
    write(tmp_path / "mine" / "one", expect="malformed", code_class="structure")
    (row,) = compare.run_folders(compare.find_folders(tmp_path), families.family_of)
    assert (row.family, row.got, row.match) == ("mine", "malformed", True)


def command_line(directory, *options):
    from moorline.cli import run

    return run(["evidence", "vectors", str(directory), *options])


def test_the_command_exits_1_on_a_mismatch_and_prints_what_the_schema_says(tmp_path, capsys):
    write(tmp_path / "psa" / "good", expect="malformed", code_class="structure")
    assert command_line(tmp_path, "--json") == 0
    write(tmp_path / "psa" / "worse")
    assert command_line(tmp_path, "--json") == 1
    text = capsys.readouterr().out
    document = json.loads(text[text.rindex('{\n "cases"') :])
    assert set(document) == {"cases", "totals"}
    assert [row["match"] for row in document["cases"]] == [True, False]
    assert set(document["cases"][0]) == {"family", "case", "expected", "got", "code", "reason", "match"}
    assert document["totals"]["mismatched"] == 1
    assert command_line(tmp_path) == 1
    assert "FAIL psa/worse" in capsys.readouterr().out


def test_a_folder_without_cases_is_no_success(tmp_path):
    with pytest.raises(Misconfigured, match="evidence.no_cases"):
        command.vectors(tmp_path)


def test_every_code_that_verification_refuses_with_has_a_class():
    files = [
        *(SOURCE / "verification" / f"{name}.py" for name in ("cca", "psa", "nitro", "snp", "vtpm", "eventlog", "ima")),
        *(SOURCE / "verification" / f"{name}.py" for name in ("cose_signature", "certificate_path")),
        *(SOURCE / "cli" / "evidence_cases").rglob("*.py"),
    ]
    pattern = re.compile(r"(?:NotAuthentic|Refused)\(\s*\"([a-z0-9_.]+)\"")
    raised = {code for file in files for code in pattern.findall(file.read_text("utf-8"))}
    assert {code for code in raised if classes.class_of(code) is None} == set()
    assert {classes.class_of(code) for code in raised} <= classes.CLASSES
