"""The examples of the format pages are what the code writes and reads."""

import json
import re
from pathlib import Path

import machines
import pytest

from moorline.attesters.probes import machine
from moorline.attesters.probes.tree import Tree
from moorline.errors import MoorlineError
from moorline.policy import distance, inspection
from moorline.policy.sec009 import report
from moorline.policy.sec009.assessment import assess
from moorline.wire import keys

SPEC = Path(__file__).parents[2] / "docs" / "spec"
NOW = 1_795_000_000


def example(name):
    return json.loads((SPEC / "examples" / name).read_text("utf-8"))


def first_column(page):
    """The names in the first column of the page's table of members."""
    return set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", (SPEC / page).read_text("utf-8"), re.MULTILINE))))


def test_the_assessment_of_the_page_is_what_the_server_of_these_tests_gives(tmp_path):
    tree = Tree(machines.write(tmp_path, machines.server()))
    found = assess(machine.observe(tree, NOW), host=machine.host_name(tree), at=NOW, privileged=False)
    written = example("host-assessment.json")
    assert report.as_json(found) == written
    assert report.parse_report(json.dumps(written).encode()) == written
    shown = json.loads(re.search(r"```json\n(.*?)```", (SPEC / "host-assessment.md").read_text(), re.DOTALL)[1])
    assert shown in written["capabilities"]


def test_the_members_of_the_page_are_those_of_a_report():
    assert first_column("host-assessment.md") == set(example("host-assessment.json"))


def test_the_inspection_of_the_page_is_authorised_and_no_byte_of_it_can_be_changed():
    told = example("host-doors.json")["inspection"]
    request = bytes.fromhex(told["request"])
    approvers = {name: keys.parse_public(bytes.fromhex(key)) for name, key in told["approvers"].items()}
    approvals = [bytes.fromhex(one) for one in told["approvals"]]

    def granted(data):
        return inspection.authorise(data, approvals, approvers=approvers, host="server-1", used=0, now=NOW)

    assert granted(request).approvers == ("A. Ahn", "B. Berg")
    assert granted(request).digest.hex() == told["digest"]
    for place in range(len(request)):
        changed = bytearray(request)
        changed[place] ^= 1
        with pytest.raises(MoorlineError):
            granted(bytes(changed))
    assert first_column("host-inspection.md") == set(inspection.InspectionRequest.__dataclass_fields__)


def test_the_measurement_of_the_page_refutes_what_the_page_says():
    told = example("host-doors.json")["distance"]
    mark = told["landmark"]
    known = {
        mark["name"]: distance.Landmark(
            place=distance.parse_place(mark["place"]), key=keys.parse_public(bytes.fromhex(mark["key"]))
        )
    }
    data = bytes.fromhex(told["measurement"])
    made = distance.parse_verified(data, known, host="server-1", answering=bytes(32), now=NOW, max_age_s=60)
    found = distance.judge(distance.parse_place(told["claimed"]), [made], known)
    assert found.standing is distance.Standing.REFUTED
    assert round(found.bounds[0].at_most_m / 1000, 1) == told["at_most_km"]
    assert found.bounds[0].claimed_m > 8_000_000
    assert first_column("distance-measurement.md") == set(distance.Measurement.__dataclass_fields__)
