"""Verifies that a verdict says all it rests on, can be signed, kept, and computed again."""

import base64
import json

import pytest
from verdict_desk import AT, NONCE, OLD, OTHER

from moorline.clock import Instant
from moorline.policy import ear
from moorline.rats import EvidenceRoot, Tier

EXACT = {"pcr4": {"exact": OLD}, "pcr8": {"exact": OLD}}


def test_a_verdict_says_what_it_rests_on_and_what_it_is_worth(desk):
    code, verdict = desk.verdict("--policy", desk.policy(**EXACT))
    assert (code, verdict["status"], verdict["family"], verdict["root"]) == (0, "affirming", "tpm", "software")
    assert verdict["level"] == "asserted"  # what a software root carries, whatever the policy says
    assert verdict["trust_vector"]["executables"] == "affirming"
    assert verdict["trust_vector"]["storage-opaque"] == "none"
    assert "tpm.pcr0" in verdict["not_appraised"]
    assert len(verdict["evidence"]) == 3
    assert len(verdict["endorsements"]) == 1
    assert verdict["collateral_digest"]
    lines = desk.moor("appraise", *desk.files, "--nonce", NONCE, "--at", AT, "--policy", desk.policy(**EXACT))[1]
    assert lines.splitlines()[0] == "affirming: tpm"
    assert "not appraised  tpm.pcr0" in lines


def test_a_refusal_says_expected_got_and_what_next(desk):
    desk.boots(OTHER)
    code, verdict = desk.verdict("--policy", desk.policy(**EXACT))
    found = next(one for one in verdict["findings"] if one["code"] == "tpm.pcr4")
    assert (code, verdict["status"], verdict["level"]) == (1, "refused", "none")
    assert (found["expected"], found["got"]) == (OLD, OTHER)
    assert found["remedy"]
    assert verdict["trust_vector"]["executables"] == "contraindicated"


@pytest.mark.parametrize(
    ("demands", "code"),
    [
        ({"root": {"exact": "hardware"}}, "tpm.root"),
        ({"bank": {"exact": "sha384"}}, "tpm.bank"),
        ({"selection": {"all_bits": 0xFF}}, "tpm.selection"),
        ({"firmware_version": {"at_least": 8}}, "tpm.firmware_version"),
        ({"pcr0": {"exact": "00" * 32}}, "tpm.pcr0"),
    ],
)
def test_each_demand_on_a_quote_refuses_by_its_own_code(desk, demands, code):
    written = json.loads(desk.policy().read_text())
    written["demands"] |= demands
    path = desk.folder / "one.json"
    path.write_text(json.dumps(written))
    status, verdict = desk.verdict("--policy", path)
    assert (status, [one["code"] for one in verdict["findings"] if one["outcome"] == "not_met"]) == (1, [code])


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ("firmware", "host.firmware_not_measured"),
        ("kernel", "host.kernel_not_measured"),
        ("secure_boot", "host.secure_boot_off"),
        ("boot_anomalies", "host.boot_log_anomaly"),
        ("unlisted_files", "host.ima_missing"),
        ("location", "host.location_missing"),
    ],
)
def test_a_log_that_is_demanded_and_not_there_refuses(desk, field, code):
    written = json.loads(desk.policy().read_text())
    kinds = {"firmware": "00", "kernel": "00", "secure_boot": True, "location": True}
    written["demands"]["host"][field] = {"exact": kinds.get(field, 0)}
    path = desk.folder / "one.json"
    path.write_text(json.dumps(written))
    status, verdict = desk.verdict("--policy", path)
    assert (status, [one["code"] for one in verdict["findings"] if one["outcome"] == "not_met"]) == (1, [code])


def test_evidence_that_is_not_authentic_is_a_finding_too(desk):
    code, out = desk.moor("appraise", *desk.files, "--nonce", "00" * 24, "--policy", desk.policy(), "--json", "--at", AT)
    verdict = json.loads(out)
    assert (code, verdict["findings"][0]["code"]) == (1, "tpm.nonce_mismatch")
    assert verdict["trust_vector"]["instance-identity"] == "contraindicated"
    assert verdict["root"] is None


def test_a_policy_for_other_evidence_decides_nothing(desk, documents):
    path = desk.folder / "nitro.json"
    path.write_text(json.dumps(documents("nitro")))
    code, verdict = desk.verdict("--policy", path)
    assert (code, verdict["error"]["code"]) == (2, "evidence.policy_family")


def test_the_token_is_an_ear_that_carries_the_hashes(desk):
    out = desk.folder / "verdict.jwt"
    words = ("--policy", desk.policy(**EXACT), "--token", out, "--key", desk.folder / "token.pem", "--audience", "relying")
    code, verdict = desk.verdict(*words)
    now = Instant(1795435200 + 1)
    result = ear.parse_verified(out.read_text().strip(), desk.token_key.public_key(), now=now, audience="relying")
    assert (code, result.status, result.root) == (0, Tier.AFFIRMING, EvidenceRoot.SOFTWARE)
    assert result.policy_digest.hex() == verdict["policy_digest"]
    assert result.nonce.hex() == NONCE
    assert result.bound["collateral"] == verdict["collateral_digest"]
    for name, digest in {**verdict["evidence"]}.items():
        assert result.bound[f"evidence:{name}"] == digest
    for name, digest in verdict["endorsements"].items():
        assert result.bound[f"collateral:{name}"] == digest


def test_an_undecided_verdict_makes_a_token_that_affirms_nothing(desk):
    out = desk.folder / "verdict.jwt"
    (desk.folder / "ak.bin").unlink()
    files = [path for path in desk.files if path.exists()]
    words = ("--policy", desk.policy(), "--token", out, "--key", desk.folder / "token.pem", "--at", AT)
    assert desk.moor("appraise", *files, "--nonce", NONCE, *words)[0] == 2
    claims = json.loads(base64.urlsafe_b64decode(out.read_text().split(".")[1] + "=="))
    ((_, appraisal),) = claims["submods"].items()
    assert appraisal["ear_status"] == "none"


@pytest.mark.parametrize("words", [("--token", "x.jwt"), ("--key", "x.pem")])
def test_a_token_needs_a_key_and_a_policy(desk, words):
    assert desk.moor("appraise", *desk.files, *words)[0] == 2
    token = ("--token", desk.folder / "x.jwt", "--key", desk.folder / "token.pem")
    status, said = desk.moor("appraise", *desk.files, "--nonce", NONCE, "--at", AT, *token, "--json")
    assert (status, "evidence.token_without_policy" in said) == (2, True)
    assert not (desk.folder / "x.jwt").exists()


# ---------------------------------------------------------------- records


@pytest.fixture
def kept(desk):
    refs = desk.references(("1.4", "2026-09-01", "2026-12-31", OLD))
    where = desk.folder / "kept"
    words = ("--token", desk.folder / "v.jwt", "--key", desk.folder / "token.pem", "--store", where)
    code, _ = desk.verdict("--policy", desk.asking(), "--refs", refs, *words)
    assert code == 0
    return where


def test_a_verdict_is_computed_again_from_what_was_kept(desk, kept):
    for path in desk.files:
        path.unlink()  # nothing but the record is read
    code, out = desk.moor("replay", kept)
    assert (code, out.split(":")[0]) == (0, "the same verdict")
    assert json.loads(desk.moor("replay", kept, "--json")[1]) == {"same": True, "different": [], "status": "affirming"}


def test_a_record_whose_verdict_was_changed_is_told(desk, kept):
    verdict = json.loads((kept / "verdict.json").read_text())
    verdict["status"], verdict["root"] = "refused", "hardware"
    (kept / "verdict.json").write_text(json.dumps(verdict))
    code, out = desk.moor("replay", kept, "--json")
    assert (code, json.loads(out)["different"]) == (1, ["root", "status"])


def test_a_record_whose_files_were_changed_is_not_read(desk, kept):
    for path in sorted((kept / "files").iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert desk.moor("replay", kept)[0] == 2
        path.write_bytes(data)
    assert desk.moor("replay", kept)[0] == 0


def test_another_time_or_another_token_is_told(desk, kept):
    asked = json.loads((kept / "appraisal.json").read_text())
    (kept / "appraisal.json").write_text(json.dumps(asked | {"at": asked["at"] + 60 * 86400}))
    code, out = desk.moor("replay", kept, "--json")
    assert code == 1
    assert {"status", "token"} <= set(json.loads(out)["different"])
    (kept / "appraisal.json").write_text(json.dumps(asked))
    (kept / "token.jwt").write_text("x.y.z")
    assert json.loads(desk.moor("replay", kept, "--json")[1])["different"] == ["token"]


def test_a_folder_that_is_no_record(desk, tmp_path):
    for text in (None, "{}", "[]", "no JSON"):
        if text is not None:
            (tmp_path / "appraisal.json").write_text(text)
        status, said = desk.moor("replay", tmp_path, "--json")
        assert (status, json.loads(said)["error"]["code"]) == (2, "evidence.record")


def test_a_record_is_never_written_over(desk, kept):
    assert desk.moor("appraise", *desk.files, "--nonce", NONCE, "--at", AT, "--store", kept)[0] == 2
