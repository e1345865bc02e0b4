"""Verifies that this build agrees with every case of real evidence beside the checkout."""

import json

import pytest

from moorline.cli.evidence_cases import compare, families
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
