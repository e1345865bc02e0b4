"""Verifies that `moor evidence inspect` and `appraise` say what they did, and never more."""

import dataclasses
import json

import pytest

from moorline.cli import run
from moorline.cli.evidence_cases import detect
from moorline.clock import Instant
from moorline.errors import Misconfigured, Unavailable
from moorline.policy import language
from moorline.policy.nitro import NitroPolicy
from moorline.rats import EvidenceRoot

AT = "2022-10-13T10:00:00+00:00"
NITRO_FIELDS = [field.name for field in dataclasses.fields(NitroPolicy)]


def moor(capsys, *arguments):
    code = run(["evidence", *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.fixture
def document(shared):
    return shared / "vectors" / "nitro" / "evervault-2022-nonce" / "attestation.cbor"


@pytest.fixture
def nonce(document):
    return json.loads((document.parent / "case.json").read_text())["inputs"]["nonce_hex"]


def parse_policy_file(text):
    return language.resolve(language.parse_policy(text), (), now=Instant(0), highest={})


def policy(**demands):
    open_field = '{ not_required = "a test" }'
    lines = [f"{name} = {demands.pop(name, open_field)}" for name in NITRO_FIELDS]
    lines += [f"{name} = {value}" for name, value in demands.items()]
    return 'family = "nitro"\nsupplied_keys = "software"\n[demands]\n' + "\n".join(lines)


def test_inspect_says_that_nothing_was_verified(capsys, document):
    code, out = moor(capsys, "inspect", document)
    assert code == 0
    assert out.startswith("not verified")
    code, out = moor(capsys, "inspect", document, "--json")
    found = json.loads(out)
    assert (found["verified"], found["files"][0]["kind"]) == (False, "nitro-document")


def test_without_a_policy_the_first_line_says_authenticity_only(capsys, document):
    code, out = moor(capsys, "appraise", document, "--at", AT)
    assert code == 0
    assert out.splitlines()[0].startswith("authenticity only")
    assert "not appraised  policy" in out
    assert "freshness" in out


def test_with_the_nonce_freshness_is_appraised(capsys, document, nonce):
    code, out = moor(capsys, "appraise", document, "--at", AT, "--nonce", nonce)
    assert code == 0
    assert "freshness" not in out
    code, out = moor(capsys, "appraise", document, "--at", AT, "--nonce", "00" * 20, "--json")
    assert code == 1
    assert json.loads(out)["error"]["code"] == "nitro.nonce_mismatch"


def test_now_is_the_default_and_the_evidence_is_old(capsys, document):
    code, out = moor(capsys, "appraise", document, "--json")
    assert code == 1
    assert json.loads(out)["error"]["code"] == "path.expired"


def test_a_policy_makes_affirming_or_refused(capsys, document, nonce, tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text(policy(debug="{ exact = false }"))
    code, out = moor(capsys, "appraise", document, "--at", AT, "--nonce", nonce, "--policy", file)
    assert code == 0
    assert out.splitlines()[0] == "affirming: nitro"
    assert "not appraised  nitro.pcr0" in out
    file.write_text(policy(debug="{ exact = false }", pcr0='{ one_of = ["' + "00" * 48 + '"] }'))
    code, out = moor(capsys, "appraise", document, "--at", AT, "--nonce", nonce, "--policy", file, "--json")
    verdict = json.loads(out)
    assert (code, verdict["status"]) == (1, "refused")
    assert [one["code"] for one in verdict["findings"] if one["outcome"] == "not_met"] == ["nitro.pcr0"]


def test_a_broken_document_is_undecided_and_not_refused(capsys, document, tmp_path):
    cut = tmp_path / "cut.cbor"
    cut.write_bytes(document.read_bytes()[:-9])
    code, out = moor(capsys, "appraise", cut, "--at", AT, "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "evidence.kind_unknown"


def test_a_missing_endorsement_is_undecided(capsys, shared):
    token = shared / "vectors" / "cca" / "tf-rmm-token" / "token.cbor"
    code, out = moor(capsys, "appraise", token, "--json")
    assert (code, json.loads(out)["status"]) == (2, "undecided")


def test_endorsements_can_lie_in_a_folder(capsys, shared):
    folder = shared / "vectors" / "cca" / "tf-rmm-token"
    code, out = moor(capsys, "appraise", folder / "token.cbor", folder / "cpak.pem")
    assert (code, out.splitlines()[1]) == (0, "authentic: cca")


def test_a_log_by_itself_is_no_evidence(capsys, shared):
    log = shared / "vectors" / "eventlog" / "crypto-agile" / "eventlog.bin"
    code, out = moor(capsys, "appraise", log, "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "evidence.log_alone"


def test_two_kinds_of_evidence_are_not_one_verdict(capsys, shared, document):
    token = shared / "vectors" / "cca" / "tf-rmm-token" / "token.cbor"
    code, out = moor(capsys, "appraise", token, document, "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "evidence.mixed"


def test_sha1_is_not_taken_from_a_machine_of_today(capsys, shared):
    folder = shared / "vectors" / "tpm" / "goattest-windows-gcp-shielded-vm"
    code, out = moor(capsys, "appraise", folder / "dump.json", folder / "ak_pub.tpmt_public.bin", "--nonce", "", "--json")
    assert code == 1
    assert json.loads(out)["error"]["code"] == "tpm.scheme_mismatch"


@pytest.mark.parametrize("options", [["--at", "yesterday"], ["--at", "2026-01-01T00:00:00"], ["--nonce", "xyz"]])
def test_options_that_are_not_understood(capsys, document, options):
    assert moor(capsys, "appraise", document, *options)[0] == 2


def test_a_file_of_no_kind_or_of_several_is_an_error(monkeypatch):
    with pytest.raises(Unavailable, match="evidence.kind_unknown"):
        detect.kind_of("it", b"nothing that anybody knows")
    monkeypatch.setattr(detect, "candidates", lambda _data: {"one", "another"})
    with pytest.raises(Unavailable, match=r"evidence.ambiguous") as refused:
        detect.kind_of("it", b"")
    assert refused.value.got == "it: another, one"


# ---------------------------------------------------------------- the policy file


def test_a_complete_policy_is_read_and_has_a_name():
    parsed = parse_policy_file(policy(pcr0='{ exact = "' + "ab" * 48 + '" }', other_pcrs="{ exact = [] }").encode())
    assert (parsed.family, parsed.supplied_root, len(parsed.digest)) == ("nitro", EvidenceRoot.SOFTWARE, 32)


SNP = """
family = "snp"
supplied_keys = "software"
[demands]
product = { one_of = ["Milan", "Genoa"] }
signer = { exact = "VCEK" }
chip_id = { not_required = "a test" }
measurement = { exact = "00" }
host_data = { not_required = "a test" }
debug = { exact = false }
migration_agent = { exact = false }
smt_allowed = { not_required = "a test" }
platform_smt = { not_required = "a test" }
single_socket = { not_required = "a test" }
abi = { at_least = [1, 51] }
vmpl = { exact = 0 }
reported_tcb = { at_least = { boot_loader = 3, tee = 0, snp = 8, microcode = 115 } }
committed_tcb = { not_required = "a test" }
launch_tcb = { not_required = "a test" }
guest_svn = { at_least = 0 }
family_id = { not_required = "a test" }
image_id = { not_required = "a test" }
id_key_digest = { not_required = "a test" }
author_key_digest = { not_required = "a test" }
platform_info = { all_bits = 32 }
launch_mitigations = { not_required = "a test" }
current_mitigations = { not_required = "a test" }
revocation = { not_required = "a test" }
"""


def test_values_of_every_type_are_read():
    policy_of_snp = parse_policy_file(SNP.encode()).policy
    assert policy_of_snp.abi.minimum == (1, 51)
    assert (policy_of_snp.reported_tcb.minimum.snp, policy_of_snp.reported_tcb.minimum.fmc) == (8, None)
    assert policy_of_snp.platform_info.mask == 32


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("family = ", "document.undecodable"),
        ('family = "nitro"', "policy_file.keys"),
        (policy().replace('"nitro"', '"other"'), "policy_file.keys"),
        (policy().replace('"software"', '"gold"'), "policy_file.supplied_keys"),
        (policy().replace("pcr0 =", "pcr99 ="), "policy_file.demands"),
        (policy(extra="{ exact = 1 }"), "policy_file.demands"),
        (policy(debug="false"), "policy_file.demand"),
        (policy(debug="{ exact = false, one_of = [false] }"), "policy_file.demand"),
        (policy(debug="{ one_of = [] }"), "policy_file.demand"),
        (policy(debug="{ anything = true }"), "policy_file.demand"),
        (policy(debug='{ exact = "false" }'), "policy_file.value"),
        (policy(pcr0='{ exact = "zz" }'), "policy_file.value"),
        (policy(pcr0='{ not_required = " " }'), "policy.no_reason"),
        (SNP.replace("[1, 51]", "[1]"), "policy_file.value"),
        (SNP.replace('"VCEK"', '"NOBODY"'), "policy_file.value"),
    ],
)
def test_a_slip_of_the_pen_never_weakens_a_policy(text, code):
    with pytest.raises(Misconfigured) as refused:
        parse_policy_file(text.encode())
    assert refused.value.code == code
