"""Where an enclave gets its own attestation report from: one port, whatever the technology behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from moorline.errors import Malformed

REPORT_DATA_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """As configfs-tsm has it: `provider` names the format, `outblob` is the report, `auxblob` certificates or empty."""

    provider: str
    outblob: bytes
    auxblob: bytes


class ReportSource(Protocol):
    """Gives reports about the very guest that asks. Synchronous and quick: a report is a local request."""

    def report(self, report_data: bytes) -> Report:
        """A report over exactly 64 bytes. Raises Malformed("report.data_size") or Unavailable (`report.*`)."""
        ...


def require_report_data(report_data: bytes) -> None:
    """Raises Malformed("report.data_size") unless it is 64 bytes: a value that gets padded binds less than it seems."""
    if len(report_data) != REPORT_DATA_BYTES:
        raise Malformed("report.data_size", "report data is exactly 64 bytes", expected=64, got=len(report_data))


def report_source(environment: Mapping[str, str]) -> ReportSource:
    """The source that this guest has: the simulated silicon's descriptor if it inherited one, else configfs-tsm.

    Raises Unavailable("report.no_source") if there is neither.
    """
    from moorline.attesters.configfs_tsm import ConfigfsTsmReports
    from moorline.attesters.silicon import SiliconReports
    from moorline.wire.silicon import GUEST_REPORT_FD

    if GUEST_REPORT_FD in environment:
        return SiliconReports.from_environment(environment)
    return ConfigfsTsmReports.here()
