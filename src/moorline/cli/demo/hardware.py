"""The simulated hardware of the demo, made by a process of its own beside the first steps (RSA keys take seconds).

`python -m moorline.cli.demo.hardware DIRECTORY` makes manufacturers, chips and TPMs there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from moorline.clock import SystemClock
from moorline.simulators.manufacturer import create_manufacturer
from moorline.simulators.tpm import SimulatedTpm, SimulatedTpmManufacturer

MANAGEMENT: Final = "m0"
"""The machine of the launcher; it has silicon and no TPM."""
HOSTS: Final = ("h1", "h2", "h3", "h4")


def make(directory: Path) -> None:
    """Chips under `silicon/`, TPMs under `hosts/NAME/tpm`, their makers' anchors beside them."""
    now = SystemClock().now()
    chips = create_manufacturer(directory / "silicon", now=now)
    for name in (MANAGEMENT, *HOSTS):
        chips.make_chip(name, now=now)
    tpms = SimulatedTpmManufacturer.create(directory / "tpm-maker", now=now)
    for name in HOSTS:
        SimulatedTpm.manufacture(directory / "hosts" / name / "tpm", tpms)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
