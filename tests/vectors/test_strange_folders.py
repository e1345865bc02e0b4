"""Folders nobody has seen: whatever lies in them, each case gives one well-formed row, and never a traceback."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.cli import run
from moorline.cli.evidence_cases import compare, families
from moorline.cli.evidence_cases.compare import SKIPS

GOOD = {
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
}
OUTCOMES = {"accept", "refuse", "malformed", "undecided", "skipped"}


def put(folder, document, files=(("token.cbor", b"\x01"),)):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files:
        (folder / name).write_bytes(data)
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    (folder / "case.json").write_bytes(text)
    return folder


def judged(folder):
    rows = list(compare.run_folders(compare.find_folders(folder), families.family_of))
    for row in rows:
        assert row.got in OUTCOMES
        assert row.code is None or "." in row.code
        assert row.code != "evidence.crashed", row.reason
        assert (row.reason in SKIPS) if row.got == "skipped" else (row.match or row.reason)
    return rows


WRONG = [
    ("not json", b"\xff{"),
    ("nothing", b""),
    ("a list", b"[]"),
    ("deep", b"[" * 100_000),
    ("a huge number", b'{"format": ' + b"9" * 5000 + b"}"),
    ("fewer keys", {"format": 1}),
    ("more keys", GOOD | {"note": "x"}),
    ("another format", GOOD | {"format": 2}),
    ("true is not one", GOOD | {"format": True}),
    ("kind is a list", GOOD | {"kind": []}),
    ("kind is unknown", GOOD | {"kind": "vibes"}),
    ("mode is an object", GOOD | {"mode": {}}),
    ("expect is an object", GOOD | {"expect": {}}),
    ("expect without class", GOOD | {"expect": "refuse"}),
    ("accept with class", GOOD | {"code_class": "key"}),
    ("no evidence", GOOD | {"evidence": []}),
    ("evidence is a name", GOOD | {"evidence": "token.cbor"}),
    ("evidence without kind", GOOD | {"evidence": [{"file": "token.cbor"}]}),
    ("at is a number", GOOD | {"at": 5}),
    ("at before all times", GOOD | {"at": "0001-01-01T00:00:00+23:59"}),
    ("at without zone", GOOD | {"at": "2026-01-01T00:00:00"}),
    ("inputs is a list", GOOD | {"inputs": []}),
    ("alternates are words", GOOD | {"inputs": {"alternates": ["x"]}}),
    ("per_file about nothing", GOOD | {"per_file": {}}),
    ("per_file about another", GOOD | {"per_file": {"other": {"expect": "accept", "code_class": None}}}),
    ("per_file is a word", GOOD | {"per_file": {"token.cbor": "accept"}}),
    ("a file that is not there", GOOD | {"evidence": [{"file": "gone", "as": "psa-token"}]}),
    ("a file outside", GOOD | {"evidence": [{"file": "../token.cbor", "as": "psa-token"}]}),
    ("a file without name", GOOD | {"evidence": [{"file": "", "as": "psa-token"}]}),
    ("half a surrogate", GOOD | {"evidence": [{"file": "\ud800", "as": "psa-token"}]}),
    ("a zero byte", GOOD | {"evidence": [{"file": "a\0b", "as": "psa-token"}]}),
    ("nonce is a number", GOOD | {"inputs": {"nonce_hex": 7}}),
    ("nonce is no hex", GOOD | {"inputs": {"nonce_hex": "xyz"}}),
    ("debug is a word", GOOD | {"mode": "policy", "policy": {"allow_debug": "false"}}),
    ("measurements are a list", GOOD | {"mode": "policy", "policy": {"measurements": []}}),
    ("a measurement is no hex", GOOD | {"mode": "policy", "policy": {"measurements": {"spe": "xyz"}}}),
    ("tcb of unknown part", GOOD | {"mode": "policy", "policy": {"min_tcb": {"microcode": 255}}}),
    ("tcb is a list", GOOD | {"mode": "policy", "policy": {"min_tcb": [255]}}),
    ("a demand in authentic mode", GOOD | {"policy": {"allow_debug": False}}),
    ("anchors are a word", GOOD | {"inputs": {"trust_anchor_files": "x"}}),
]


@pytest.mark.parametrize(("name", "document"), WRONG, ids=[name for name, _ in WRONG])
def test_a_case_that_is_wrong_is_one_row_that_does_not_match(tmp_path, name, document):
    put(tmp_path / "psa" / name.replace(" ", "-"), document)
    (row,) = judged(tmp_path)
    assert not row.match
    assert row.got in ("undecided", "malformed"), row


def test_a_missing_file_is_never_a_refusal_that_was_expected(tmp_path):
    """verifies that: a case that expects a refusal is not passed by leaving its files out"""
    gone = [{"file": "gone", "as": "psa-token"}]
    for code_class in ("structure", "signature", "key"):
        for outcome in ("refuse", "malformed", "undecided"):
            document = GOOD | {"evidence": gone, "expect": outcome, "code_class": code_class}
            put(tmp_path / "psa" / f"{outcome}-{code_class}", document)
    rows = judged(tmp_path)
    assert len(rows) == 9
    assert {(row.got, row.code, row.match) for row in rows} == {("undecided", "case.file", False)}


def test_pipes_folders_loops_and_names_that_are_no_text(tmp_path, capsys):
    case = put(tmp_path / "psa" / "pipe", GOOD | {"evidence": [{"file": "pipe", "as": "psa-token"}]})
    os.mkfifo(case / "pipe")
    put(tmp_path / "psa" / "folder", GOOD | {"evidence": [{"file": "sub", "as": "psa-token"}]})
    (tmp_path / "psa" / "folder" / "sub").mkdir()
    (tmp_path / "psa" / "loop").symlink_to(tmp_path)
    (tmp_path / "psa" / "case.json").mkdir()
    os.mkfifo(tmp_path / "case.json")
    put(tmp_path / "psa" / os.fsdecode(b"\xff\xfe"), GOOD)
    assert len(judged(tmp_path)) == 3
    for words in ([], ["--json"]):
        assert run(["evidence", "vectors", str(tmp_path), *words]) == 1
        assert "Traceback" not in "".join(capsys.readouterr())


def test_unknown_families_and_kinds_are_skipped_with_a_reason_of_the_list(tmp_path):
    put(tmp_path / "riscv" / "cove", GOOD | {"evidence": [{"file": "token.cbor", "as": "cove-token"}]})
    put(tmp_path / "psa" / "claims", GOOD | {"kind": "claims"})
    assert [(row.got, row.reason) for row in judged(tmp_path)] == [
        ("skipped", "not_an_appraisal"),
        ("skipped", "unsupported"),
    ]


def test_evidence_in_a_folder_of_another_name_is_appraised_all_the_same(tmp_path):
    put(tmp_path / "arm" / "token", GOOD | {"expect": "malformed", "code_class": "structure"})
    put(tmp_path / "tpm" / "token", GOOD | {"expect": "malformed", "code_class": "structure"})
    assert [row.match for row in judged(tmp_path)] == [True, True]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=6) | st.sampled_from(["accept", "refuse", "key"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["file", "as", "x"]), inner, max_size=3),
    max_leaves=8,
)


INPUTS = (
    *("nonce_hex", "report_data_hex", "user_data_hex", "expected_pcrs", "pcr_bank", "public_key_file", "mac_key_file"),
    *("realm_key_file", "trust_anchor_files", "intermediates", "collateral", "ak_trust", "cose_alg", "alternates"),
    *("tls_certificate_file", "other_files"),
)
HINTS = (
    *("psa-token", "cca-token", "nitro-document", "snp-report", "tdx-quote", "sgx-quote", "tpm-quote-msg"),
    *("tcg-eventlog", "ccel", "ima-ascii", "azure-snp-vtpm-json-v0"),
)


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from(sorted(GOOD)),
    value=JSON,
    hint=st.sampled_from(HINTS),
)
def test_any_value_of_any_key_gives_a_row(tmp_path_factory, key, value, hint):
    folder = tmp_path_factory.mktemp("any")
    evidence = [{"file": "token.cbor", "as": hint}]
    put(folder / "psa" / "one", GOOD | {"evidence": evidence} | {key: value})
    judged(folder)
    shutil.rmtree(folder)


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(INPUTS), value=JSON, hint=st.sampled_from(HINTS), mode=st.sampled_from(["authentic", "policy"]))
def test_any_value_of_any_input_gives_a_row(tmp_path_factory, name, value, hint, mode):
    folder = tmp_path_factory.mktemp("any")
    document = GOOD | {"evidence": [{"file": "token.cbor", "as": hint}], "inputs": {name: value}, "mode": mode}
    put(folder / "psa" / "one", document)
    judged(folder)
    shutil.rmtree(folder)
