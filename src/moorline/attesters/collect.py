"""Inside a guest: collect one report and leave it in the shared directory (`python -m moorline.attesters.collect`).

Reads `report_data.bin` (64 bytes), writes `outblob.bin` and `auxblob.bin` as configfs-tsm would give them. What it collects
is evidence about this collector and nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path

from moorline.attesters.reports import report_source
from moorline.wire.guest import SHARED_DIRECTORY


def main() -> None:
    """Collect one report."""
    shared = Path(SHARED_DIRECTORY)
    report = report_source(os.environ).report((shared / "report_data.bin").read_bytes())
    (shared / "outblob.bin").write_bytes(report.outblob)
    (shared / "auxblob.bin").write_bytes(report.auxblob)


if __name__ == "__main__":
    main()
