"""Verifies what the command line takes: files of every kind in any order, folders, collateral stores; real evidence too."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verdict_desk import document

from moorline.cli.evidence_cases import detect, gathered
from moorline.clock import Instant, Validity
from moorline.errors import Malformed, Misconfigured
from moorline.policy import language, notation, reference_sets, reference_text
from moorline.rats import EvidenceRoot
from moorline.storage.collateral_store import StoredItem, open_collateral
from moorline.verification.collateral import Judged, needs_of

STARTS = (b"{", b"[", b"\x30\x82", b"-----BEGIN CERTIFICATE-----", b"\xd2\x84", b"CCEL", b"\xff\x54\x43\x47\x80\x18", b"10 ")
WHEN = "2026-06-01T00:00:00+00:00"


@pytest.fixture
def genoa(shared):
    return shared / "vectors" / "snp" / "genoa-v5-live"


def stored(path, report, vcek):
    """A store with the chip's certificate, and with one of another chip."""
    store = open_collateral(path, create=True)
    name = needs_of(report)[0].items[0]
    other = type(name)(kind=name.kind, subject=name.subject.replace("b5f9", "b5fa"))
    for one, data in ((name, vcek), (other, b"never looked at")):
        judged = Judged(
            name=one,
            issued=Instant(0),
            validity=Validity(not_before=Instant(0), not_after=Instant(1 << 33)),
            evaluation=None,
            number=None,
            content=data.ljust(32, b"\0")[:32],
            root=EvidenceRoot.HARDWARE,
            endorses="a test",
        )
        store.put(StoredItem(judged=judged, source="https://vendor.test/x", fetched=Instant(0), data=data))
    return path


@pytest.mark.parametrize("name", ["store", "store.sqlite"])
def test_a_store_gives_what_the_evidence_needs_and_nothing_of_others(desk, genoa, name):
    report, vcek = ((genoa / file).read_bytes() for file in ("report.bin", "vcek.der"))
    path = stored(desk.folder / name, report, vcek)
    expected = json.loads((genoa / "case.json").read_text())["inputs"]["report_data_hex"]
    words = ("--at", WHEN, "--report-data", expected, "--collateral", path, "--json")
    code, out = desk.moor("appraise", genoa / "report.bin", *words)
    verdict = json.loads(out)
    assert (code, verdict["status"], verdict["root"]) == (0, "authentic", "hardware")
    assert [name.partition("/")[0] for name in verdict["endorsements"]] == ["collateral:snp-vcek"]


def test_what_a_store_lacks_is_named_and_the_verdict_undecided(desk, genoa):
    report = (genoa / "report.bin").read_bytes()
    path = stored(desk.folder / "store", report, (genoa / "vcek.der").read_bytes())
    open_collateral(path, create=False).drop(needs_of(report)[0].items[0])
    code, out = desk.moor("appraise", genoa / "report.bin", "--at", WHEN, "--collateral", path, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "snp.leaf_missing")
    files = gathered.read([genoa / "report.bin"])
    assert str(gathered.lacking(files, path)[0].items[0]).startswith("snp-vcek/Genoa/")


def test_a_folder_that_is_no_store_is_a_folder_of_files(desk, genoa):
    folder = desk.folder / "folder"
    folder.mkdir()
    (folder / "anything").write_bytes((genoa / "vcek.der").read_bytes())
    code, out = desk.moor("appraise", genoa / "report.bin", "--at", WHEN, "--collateral", folder, "--json")
    assert (code, json.loads(out)["status"]) == (0, "authentic")
    assert gathered.lacking({}, folder) == ()
    assert desk.moor("appraise", genoa / "report.bin", "--collateral", desk.folder / "nothing")[0] == 2


def test_real_evidence_under_a_whole_policy_is_worth_what_hardware_is(desk, genoa):
    case = json.loads((genoa / "case.json").read_text())
    demands = {
        "product": {"exact": "Genoa"},
        "signer": {"exact": "VCEK"},
        "measurement": {"exact": case["facts"]["measurement"]},
        "debug": {"exact": False},
        "vmpl": {"exact": 0},
        "reported_tcb": {"at_least": {"boot_loader": 10, "tee": 0, "snp": 27, "microcode": 27}},
    }
    policy = desk.folder / "snp.json"
    policy.write_text(json.dumps(document("snp", **demands)))
    words = ("--at", WHEN, "--report-data", case["inputs"]["report_data_hex"], "--policy", policy, "--json")
    code, out = desk.moor("appraise", genoa / "vcek.der", genoa / "report.bin", *words)
    verdict = json.loads(out)
    assert (code, verdict["status"], verdict["level"]) == (0, "affirming", "hw_attested")
    demands["reported_tcb"]["at_least"]["microcode"] = 28
    policy.write_text(json.dumps(document("snp", **demands)))
    code, out = desk.moor("appraise", genoa / "report.bin", genoa / "vcek.der", *words)
    refused = [one["code"] for one in json.loads(out)["findings"] if one["outcome"] == "not_met"]
    assert (code, refused) == (1, ["snp.reported_tcb"])


@pytest.mark.parametrize(("family", "case"), [("sgx", "v3-"), ("tdx", "v4-")])
def test_intel_evidence_under_a_policy(desk, shared, family, case):
    folders = sorted((shared / "vectors" / family).glob("*/case.json"))
    for path in folders:
        told = json.loads(path.read_text())
        kinds = {one["as"] for one in told["evidence"]}
        full = told["inputs"].get("collateral", "full") == "full"
        if told["expect"] == "accept" and kinds == {f"{family}-quote"} and full and told["kind"] == "evidence":
            break
    else:
        pytest.skip(f"no whole case of {family}")
    written = document(family, debug={"exact": False})
    written["demands"]["platform"]["status"] = {"one_of": ["UpToDate"]}
    policy = desk.folder / "intel.json"
    policy.write_text(json.dumps(written))
    files = [path.parent / one["file"] for role in ("evidence", "endorsements") for one in told[role]]
    words = ("--at", told["at"].replace("Z", "+00:00"), "--policy", policy, "--json")
    code, out = desk.moor("appraise", *files, *words)
    verdict = json.loads(out)
    assert (verdict["family"], verdict["root"]) == (family, "hardware"), verdict["error"]
    wrong = {one["code"] for one in verdict["findings"] if one["outcome"] == "not_met"}
    assert wrong <= {"intel.status"}
    assert code == (1 if wrong else 0)


def test_a_measured_list_by_itself_is_no_evidence(desk, shared):
    lists = [path for path in sorted((shared / "vectors" / "ima").rglob("*.log")) if path.stat().st_size]
    code, out = desk.moor("appraise", lists[0], "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "evidence.log_alone")


# ---------------------------------------------------------------- kinds by content


@given(st.binary(max_size=300) | st.builds(lambda a, b: a + b, st.sampled_from(STARTS), st.binary(max_size=200)))
def test_any_bytes_are_of_some_kinds_or_of_none(data):
    assert isinstance(detect.candidates(data), set)


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_document_a_set_or_an_error_of_ours(data):
    for read in (notation.read_document, language.parse_policy, reference_text.parse_reference_set, reference_sets.peek):
        try:
            read(data)
        except (Misconfigured, Malformed):
            continue


UNDETECTED = {"nv-evidence-json", "nv-spdm-report-hex", "expected-pcrs-json"}
"""Evidence that this version does not support, and values that only a case folder gives."""
SAME = {"azure-snp-vtpm-json-v0": "azure-snp-vtpm-json-v2", "azure-tdx-vtpm-json-v0": "azure-tdx-vtpm-json-v1"}
"""Older versions of an envelope that one parser reads."""


def test_every_file_of_every_accepted_case_is_found_to_be_what_it_is(shared):
    wrong = []
    for path in sorted((shared / "vectors").rglob("case.json")):
        told = json.loads(path.read_text())
        if told["kind"] not in ("evidence", "eventlog", "ima") or told["expect"] != "accept":
            continue
        for one in (*told["evidence"], *told["endorsements"], *told["reference"]):
            data = (path.parent / one["file"]).read_bytes()
            found = detect.candidates(data)
            if one["as"] not in UNDETECTED and data and found != {SAME.get(one["as"], one["as"])}:
                wrong.append((path.parent.name, one["file"], one["as"], found))
    # A CoRIM for another purpose than endorsing keys.
    assert [one for one in wrong if one[1] != "corim-valid.cbor"] == []


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (bytes(range(256)), {"tpm-quote-sig-raw"}),
        (b"\x07" * 32, {"mac-key-raw"}),
        (b"\x07" * 33, set()),
        (b"", set()),
        (b"{", set()),
        (b"[]", set()),
        (b'{"digests": {}, "excludes": []}', {"keylime-runtime-policy"}),
        (b'{"platform": []}', set()),
    ],
)
def test_what_has_no_form_is_told_by_its_size_and_nothing_is_guessed(data, kinds):
    assert detect.candidates(data) == kinds


@pytest.mark.parametrize(
    ("vector", "kinds"),
    [
        ("tpm/azure-tdx-vtpm-v1", {"intel-tcb-info", "intel-enclave-identity", "intel-pck-crl", "intel-root-crl"}),
        ("snp/genoa-v5-live", {"snp-vcek", "snp-chain", "snp-crl"}),
    ],
)
def test_what_is_wrapped_says_what_it_needs_too(shared, vector, kinds):
    folder = shared / "vectors" / vector
    told = json.loads((folder / "case.json").read_text())
    files = gathered.read([folder / one["file"] for one in told["evidence"]])
    assert {need.items[0].kind.value for need in gathered.needed(files)} == kinds
