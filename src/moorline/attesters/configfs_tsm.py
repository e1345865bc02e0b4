"""Reports from the Linux kernel: configfs-tsm, one interface for SNP, TDX and CCA (Documentation/ABI/testing/configfs-tsm).

1. A directory of our own is made below /sys/kernel/config/tsm/report; the kernel fills it with attributes.
2. 64 bytes go to `inblob`; `outblob` and `auxblob` are read, then `provider`.
3. `generation` counts writes. It must be the one after our write, before and after reading: a report that somebody else's
   write to the same directory changed is thrown away and asked for again.
4. The directory is removed.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
from pathlib import Path
from typing import Final

from moorline.attesters.reports import Report, require_report_data
from moorline.errors import Unavailable

KERNEL_PATH: Final = Path("/sys/kernel/config/tsm/report")
_ATTEMPTS: Final = 5


class ConfigfsTsmReports:
    """A `ReportSource` over the kernel's interface below `path`. Needs the right to make a directory there."""

    def __init__(self, path: Path = KERNEL_PATH) -> None:
        self._path = path

    @classmethod
    def here(cls) -> ConfigfsTsmReports:
        """The kernel's interface of this guest; raises Unavailable("report.no_source") if it has none."""
        if not KERNEL_PATH.is_dir():
            raise Unavailable(
                "report.no_source",
                "this guest has neither simulated silicon nor the kernel's report interface",
                expected=KERNEL_PATH,
                remedy="run in a confidential guest, with configfs mounted and the guest driver loaded",
            )
        return cls()

    def report(self, report_data: bytes) -> Report:
        """A report over 64 bytes. Raises Unavailable("report.kernel" | "report.contended")."""
        require_report_data(report_data)
        entry = self._path / f"moorline-{secrets.token_hex(8)}"
        try:
            entry.mkdir()
            try:
                return self._read(entry, report_data)
            finally:
                with contextlib.suppress(OSError):
                    entry.rmdir()
        except OSError as error:
            raise Unavailable(
                "report.kernel",
                "the kernel gave no report",
                got=errno.errorcode.get(error.errno or 0, type(error).__name__),
                remedy="look at the kernel's log for the guest driver (sev-guest, tdx-guest)",
            ) from None

    def _read(self, entry: Path, report_data: bytes) -> Report:
        for _ in range(_ATTEMPTS):
            before = self._generation(entry)
            (entry / "inblob").write_bytes(report_data)
            outblob = (entry / "outblob").read_bytes()
            auxblob = self._auxblob(entry)
            if self._generation(entry) == before + 1:
                return Report(provider=(entry / "provider").read_text("ascii").strip(), outblob=outblob, auxblob=auxblob)
        raise Unavailable("report.contended", "somebody else keeps writing to our report entry", got=f"{_ATTEMPTS} attempts")

    @staticmethod
    def _generation(entry: Path) -> int:
        try:
            return int((entry / "generation").read_text("ascii"))
        except ValueError:
            raise Unavailable("report.kernel", "the kernel's generation counter is not a number") from None

    @staticmethod
    def _auxblob(entry: Path) -> bytes:
        """The host's certificates; a provider without any has no such attribute, a host without any leaves it empty."""
        try:
            return (entry / "auxblob").read_bytes()
        except FileNotFoundError:
            return b""
