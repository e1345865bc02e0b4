"""Verifies that this build agrees with every case of real evidence beside the checkout."""

import dataclasses
import json

import pytest

from moorline.cli.evidence_cases import compare, families
from moorline.cli.evidence_cases.case import read_case
from moorline.errors import Malformed, NotAuthentic
from moorline.evidence import cca, corim

SKIPPED_EVIDENCE = {"nvgpu"}


@pytest.fixture(scope="module")
def rows(shared):
    vectors = shared / "vectors"
    if not vectors.is_dir():
        pytest.skip("no vectors in the shared folder")
    return list(compare.run_folders(compare.find_folders(vectors), families.family_of))


def test_every_appraisal_comes_out_as_its_case_says(rows):
    run = [row for row in rows if row.got != "skipped"]
    assert [row for row in run if not row.match] == []
    assert len(run) >= 145


def test_no_evidence_is_skipped_but_what_this_version_does_not_support(rows):
    unsupported = {row.family for row in rows if row.reason == compare.UNSUPPORTED}
    assert unsupported <= SKIPPED_EVIDENCE


def test_claims_in_json_are_read_as_their_names_say(shared):
    folder = shared / "vectors" / "cca" / "ccatoken-platform-json-claims-set"
    expected = json.loads((folder / "case.json").read_text())["per_file"]
    for file, outcome in expected.items():
        data = (folder / file).read_bytes()
        if outcome["expect"] == "accept":
            assert cca.parse_platform_claims_json(data).profile == cca.LEGACY_PROFILE
        else:
            with pytest.raises(Malformed):
                cca.parse_platform_claims_json(data)


def test_claims_in_cbor(shared):
    folder = shared / "vectors" / "cca"
    platform = cca.parse_platform_claims((folder / "rust-platform-claims" / "claims.cbor").read_bytes())
    assert (platform.lifecycle, platform.profile, len(platform.components)) == (12288, cca.LEGACY_PROFILE, 2)
    realm = cca.parse_realm_claims((folder / "rust-realm-claims" / "claims.cbor").read_bytes())
    assert (realm.hash_algorithm, realm.initial_measurement) == ("sha-256", bytes(32))
    with pytest.raises(Malformed, match="eat.claim_missing"):
        cca.parse_realm_claims((folder / "rust-realm-claims-missing-challenge" / "claims.cbor").read_bytes())


@pytest.mark.parametrize("family", ["cca", "psa"])
def test_keys_in_corim_are_read_and_nothing_but_malformed_is_raised(shared, family):
    found = 0
    for file in sorted((shared / "vectors" / family).glob("*/*corim*.cbor")):
        try:
            found += len(corim.parse_endorsed_keys(file.read_bytes()))
        except (Malformed, NotAuthentic) as error:
            assert isinstance(error, Malformed)
    assert found


AUTHENTICATED = {"cca-token", "cca-platform-token", "psa-token", "nitro-document", "snp-report"}
"""Kinds in which every bit is either signed, a signature, or judged by its form."""


def accepted(shared):
    """Every case that is accepted, with its files in memory and its runner."""
    for folder in compare.find_folders(shared / "vectors"):
        case = read_case(folder)
        run = families.family_of(case) if case.kind == "evidence" and case.expected.outcome == "accept" else None
        if run is not None:
            names = {entry.file for entry in (*case.evidence, *case.endorsements, *case.reference)}
            names |= {str(value) for key, value in case.inputs.items() if key.endswith("_file")}
            names |= set(case.files("trust_anchor_files"))
            inputs = {key: value for key, value in case.inputs.items() if key != "alternates"}
            yield dataclasses.replace(case, contents={name: case.read(name) for name in names}, inputs=inputs), run


def outcome(case, run):
    return compare._run(case, run)


def test_no_accepted_case_survives_another_nonce_or_report_data(shared):
    judged = 0
    for case, run in accepted(shared):
        for name in {"nonce_hex", "report_data_hex"} & set(case.inputs):
            wrong = case.inputs[name][:-2] + "ee" if case.inputs[name] else "ee"
            result = outcome(dataclasses.replace(case, inputs={**case.inputs, name: wrong}), run)
            assert (case.name, result.got) == (case.name, "refuse")
            assert result.code_classes & {"nonce", "report_data"}
            judged += 1
    assert judged


def test_no_accepted_case_survives_a_cut_or_a_flipped_bit(shared):
    """Spread over each file with a fixed stride, so that a failure is found again."""
    judged = 0
    for case, run in accepted(shared):
        entry = case.evidence[0]
        if entry.hint not in AUTHENTICATED:
            continue
        whole = case.contents[entry.file]
        spoiled = [whole[:-1], whole[: len(whole) // 2], whole + b"\x00", b""]
        for position in range(3, len(whole), max(1, len(whole) // 12)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            spoiled.append(bytes(flipped))
        for data in spoiled:
            result = outcome(dataclasses.replace(case, contents={**case.contents, entry.file: data}), run)
            assert result.got != "accept", (case.name, len(data))
            assert not result.crashed, (case.name, result.says)
            judged += 1
    assert judged > 300
