"""SGX quotes from inside a Gramine enclave: pseudo-files below /dev/attestation (Gramine manual, Attestation).

1. `attestation_type` must be `dcap`: another kind, or none, gives no quote that is verified here.
2. 64 bytes go to `user_report_data`; `quote` is read. Gramine makes the quote when the file is opened.
3. What is read is a quote, and holds the bytes that were written: another thread of the same enclave may have written
   others.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from moorline.attesters.reports import Report, require_report_data
from moorline.digest import same
from moorline.errors import Malformed, Unavailable
from moorline.evidence.sgx_quote import parse_sgx_quote

GRAMINE_PATH: Final = Path("/dev/attestation")


class GramineReports:
    """A `ReportSource` over Gramine's pseudo-files below `path`."""

    def __init__(self, path: Path = GRAMINE_PATH) -> None:
        self._path = path

    def report(self, report_data: bytes) -> Report:
        """A quote over 64 bytes. Raises Unavailable("report.gramine" | "report.gramine_type" | "report.contended")."""
        require_report_data(report_data)
        try:
            kind = (self._path / "attestation_type").read_text("ascii").strip()
            if kind != "dcap":
                raise Unavailable(
                    "report.gramine_type",
                    "this enclave does not attest with DCAP",
                    expected="dcap",
                    got=kind,
                    remedy='set sgx.remote_attestation = "dcap" in the manifest',
                )
            (self._path / "user_report_data").write_bytes(report_data)
            quote = (self._path / "quote").read_bytes()
        except (OSError, UnicodeDecodeError) as error:
            number = error.errno if isinstance(error, OSError) else None
            raise Unavailable(
                "report.gramine", "Gramine gave no quote", got=errno.errorcode.get(number or 0, type(error).__name__)
            ) from None
        if not same(_report_data(quote), report_data):
            raise Unavailable(
                "report.contended", "the quote is over other report data than was written", got="another writer"
            )
        return Report(provider="gramine_dcap", outblob=quote, auxblob=b"")


def _report_data(quote: bytes) -> bytes:
    try:
        return parse_sgx_quote(quote).report.report_data
    except Malformed as error:
        raise Unavailable("report.gramine", "what Gramine gave is no quote", got=error.code) from None
