"""What this machine can attest, collected into files that `inspect` and `appraise` know by their content."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moorline.attesters import nitro
from moorline.attesters.configfs_tsm import ConfigfsTsmReports
from moorline.attesters.gramine import GramineReports
from moorline.attesters.reports import Report, ReportSource
from moorline.errors import Misconfigured, MoorlineError
from moorline.evidence.tpm_envelopes import serialize_tpm2_tools_pcrs
from moorline.evidence.tpm_structures import HASH_NAMES

_TSM: Final = "sys/kernel/config/tsm/report"
_GRAMINE: Final = "dev/attestation"
_NSM: Final = "dev/nsm"
_TPM: Final = "dev/tpmrm0"
_LOGS: Final = {
    "boot.log": "sys/kernel/security/tpm0/binary_bios_measurements",
    "ima.txt": "sys/kernel/security/ima/ascii_runtime_measurements",
}
_CC_LOG: Final = "sys/firmware/acpi/tables/data/CCEL"
_NAMES: Final = {"sev_guest": "snp-report.bin", "tdx_guest": "tdx-quote.bin", "arm_cca_guest": "cca-token.cbor"}
_PCRS: Final = tuple(range(24))


@dataclass(kw_only=True)
class Collected:
    """What was written, over what, and what could not be had, with the reason."""

    nonce: bytes
    report_data: bytes
    files: list[str] = field(default_factory=list)
    without: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "files": self.files,
            "nonce": self.nonce.hex(),
            "report_data": self.report_data.hex(),
            "without": self.without,
        }

    def lines(self) -> list[str]:
        """For people."""
        written = [f"wrote {name}" for name in self.files] or ["nothing here attests anything that is known"]
        bound = [f"nonce        {self.nonce.hex()}", f"report data  {self.report_data.hex()}"] if self.files else []
        return [*written, *bound, *(f"no {name}: {why}" for name, why in self.without.items())]


def collect(out: Path, *, nonce: bytes, report_data: bytes, tcti: str | None, bank: str, root: Path) -> Collected:
    """Ask every source below `root`, and the TPM at `tcti`. A source that fails does not keep the others from being asked.

    Raises Misconfigured("evidence.store") if `out` is there already, and ("evidence.bank") for an unknown bank.
    """
    found = Collected(nonce=nonce, report_data=report_data)
    banks = {name: number for number, name in HASH_NAMES.items()}
    if bank not in banks:
        raise Misconfigured("evidence.bank", "no such PCR bank", expected=", ".join(sorted(banks)), got=bank)
    try:
        out.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise Misconfigured("evidence.store", "the folder cannot be made", got=f"{out}: {error.strerror}") from None
    where = tcti or (f"device:{root / _TPM}" if (root / _TPM).exists() else None)
    provider = _report(found, out, "configfs-tsm", root / _TSM, ConfigfsTsmReports(root / _TSM))
    if provider == "tdx_guest" and (root / _CC_LOG).is_file():
        _written(found, out, "ccel.bin", (root / _CC_LOG).read_bytes())
    _report(found, out, "gramine", root / _GRAMINE, GramineReports(root / _GRAMINE))
    _nitro(found, out, root / _NSM)
    if where is None:
        found.without["tpm"] = f"there is no {root / _TPM}, and no --tcti was given"
    else:
        _tpm(found, out, where, banks[bank], root)
    return found


def _report(found: Collected, out: Path, name: str, path: Path, source: ReportSource) -> str | None:
    if not path.is_dir():
        found.without[name] = f"there is no {path}"
        return None
    try:
        report = source.report(found.report_data)
    except MoorlineError as error:
        found.without[name] = str(error)
        return None
    _written(found, out, _file_name(report), report.outblob)
    if report.auxblob:
        _written(found, out, "certificate-table.bin", report.auxblob)
    return report.provider


def _file_name(report: Report) -> str:
    return "sgx-quote.bin" if report.provider == "gramine_dcap" else _NAMES.get(report.provider, "report.bin")


def _nitro(found: Collected, out: Path, path: Path) -> None:
    try:
        document = nitro.document(nonce=found.nonce, user_data=found.report_data, path=path)
    except MoorlineError as error:
        found.without["nitro"] = str(error)
        return
    _written(found, out, "nitro-document.cbor", document)


def _tpm(found: Collected, out: Path, tcti: str, bank: int, root: Path) -> None:
    try:
        from moorline.attesters.tpm import Tpm

        with Tpm.open(tcti) as tpm:
            key = tpm.attestation_key()
            quoted = tpm.quote(found.nonce, bank, _PCRS)
            # After the quote: a list may be ahead of it, never behind.
            logs = {name: (root / path).read_bytes() for name, path in _LOGS.items() if (root / path).is_file()}
    except MoorlineError as error:
        found.without["tpm"] = str(error)
        return
    _written(found, out, "ak.tpmt-public", key)
    _written(found, out, "quote.attest", quoted.attest)
    _written(found, out, "quote.signature", quoted.signature)
    _written(found, out, "quote.pcrs", serialize_tpm2_tools_pcrs(bank, quoted.pcrs))
    for name, data in logs.items():
        _written(found, out, name, data)


def _written(found: Collected, out: Path, name: str, data: bytes) -> None:
    (out / name).write_bytes(data)
    found.files.append(str(out / name))
