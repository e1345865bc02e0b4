"""The catalogue is ours, complete, and says what it is made to say."""

import json

import pytest

from moorline.errors import Refused
from moorline.policy import sec009
from moorline.policy.sec009.catalogue import data
from moorline.rats import Assurance, CapabilityLevel


@pytest.mark.parametrize("name", ["catalogue.json", "capabilities.json"])
def test_the_shipped_data_is_the_shared_data(shared, name):
    assert data(name) == json.loads((shared / "sec009" / name).read_text())


def test_counts_of_the_catalogue():
    catalogue = sec009.catalogue()
    assert len(catalogue.requirements) == 24
    assert len(catalogue.table9) == 20
    assert len(catalogue.use_cases) == 7
    assert len(data("catalogue.json")["measures"]) == 21
    counts = {case.id: len(case.requirements) for case in catalogue.use_cases.values()}
    assert counts == data("catalogue.json")["table9_counts"]


def test_table9_says_the_same_by_row_and_by_column():
    raw = {entry["id"]: entry["table9"] for entry in data("catalogue.json")["use_cases"]}
    assert {case: list(sec009.requirements_of(case)) for case in raw} == raw


def test_every_requirement_of_table9_is_met_by_somebody():
    table = data("requirement_capabilities.json")["requirements"]
    assert set(table) == set(sec009.catalogue().table9)
    for requirement, entry in table.items():
        assert entry["host"] or entry["service"], requirement


def test_every_capability_named_exists_and_can_reach_its_minimum():
    known = sec009.capabilities()
    for entry in data("requirement_capabilities.json")["requirements"].values():
        for item in (*entry["host"], *entry["service"]):
            if item["capability"] is not None:
                minimum = Assurance[item["minimum"].upper()]
                assert minimum <= known[item["capability"]].max_assurance, item


def test_profile_of_personal_data():
    needs = {need.capability: need.minimum.word for need in sec009.profile("4.7")}
    assert needs == {
        "boot.measured": "measured",
        "boot.kernel.identity": "measured",
        "ima.measurement": "measured",
        "integrity.runtime": "measured",
        "location.geo": "asserted",
        "location.jurisdiction": "declared",
        "hmee.sev_snp": "declared",
    }
    assert {need.requirement for need in sec009.fulfilled_by_services("4.7")} >= {"5.1.3", "5.2.7", "5.2.8", "5.2.10"}


def test_every_requirement_of_a_use_case_is_on_one_side_or_the_other():
    for case in sec009.catalogue().use_cases:
        on_host = {requirement for need in sec009.profile(case) for requirement in need.requirements}
        elsewhere = {need.requirement for need in sec009.fulfilled_by_services(case)}
        assert on_host | elsewhere == set(sec009.requirements_of(case))


def test_gap_names_what_is_missing_and_what_is_too_weak():
    shown = [
        CapabilityLevel(capability=need.capability, level=Assurance.HW_ATTESTED)
        for need in sec009.profile("4.7")
        if need.capability not in ("boot.measured", "location.geo")
    ]
    shown.append(CapabilityLevel(capability="location.geo", level=Assurance.DECLARED))
    missing = {item.need.capability: item for item in sec009.gap(sec009.profile("4.7"), shown)}
    assert set(missing) == {"boot.measured", "location.geo"}
    assert missing["location.geo"].shown is Assurance.DECLARED
    assert "5.1.6" in missing["location.geo"].says


def test_leaving_out_any_single_capability_leaves_a_gap():
    needs = sec009.profile("4.5")
    full = [CapabilityLevel(capability=need.capability, level=need.minimum) for need in needs]
    assert sec009.gap(needs, full) == ()
    for index, need in enumerate(needs):
        missing = sec009.gap(needs, full[:index] + full[index + 1 :])
        assert [item.need.capability for item in missing] == [need.capability]


def test_unknown_use_case():
    with pytest.raises(Refused) as caught:
        sec009.profile("4.8")
    assert caught.value.code == "sec009.use_case_unknown"
