"""Whether somebody opened the case (SEC009 6.5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import met, not_met
from moorline.attesters.probes.statements import stated
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation

_HWMON: Final = "/sys/class/hwmon"
CAPABILITIES: Final = ("phys.access_control",)


def probe(tree: Tree, now: int) -> Iterator[Observation]:
    """Chassis intrusion sensors; where there are none, a statement."""
    name = CAPABILITIES[0]
    sensors = [
        tree.read(f"{_HWMON}/{chip}/{file}")
        for chip in tree.names(_HWMON)
        for file in tree.names(f"{_HWMON}/{chip}")
        if file.startswith("intrusion") and file.endswith("_alarm")
    ]
    said = [sensor for sensor in sensors if sensor.ok and sensor.text in ("0", "1")]
    alarms = [sensor for sensor in said if sensor.text == "1"]
    if alarms:
        yield not_met(name, "the case was opened", *(sensor.shown() for sensor in alarms), value="alarm")
    elif said:
        yield met(name, f"{len(said)} intrusion sensors, no alarm", *(sensor.shown() for sensor in said))
    else:
        yield stated(tree, name, now) or not_met(
            name, "no intrusion sensor, and nobody stated anything", f"{_HWMON}: no intrusion*_alarm"
        )
