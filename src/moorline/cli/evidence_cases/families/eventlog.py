"""Boot logs: TCG event logs and CC event logs, replayed, and compared with values from outside where the case has some."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from moorline.cli.evidence_cases.case import Case
from moorline.cli.evidence_cases.compare import Facts
from moorline.errors import Malformed, Unavailable
from moorline.evidence import eventlog
from moorline.evidence.tpm_structures import ALG_SHA256, ALG_SHA384, HASH_NAMES
from moorline.rats import Finding
from moorline.verification.eventlog import replay, verify_boot

HINTS: Final = frozenset({"tcg-eventlog", "tcg-eventlog-b64", "ccel", "ccel-acpi-table"})
_NAMES: Final = {**HASH_NAMES, 0x12: "sm3_256"}
_BANKS: Final = {name: bank for bank, name in _NAMES.items()}
_LOCALITY: Final = b"StartupLocality\x00"


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    if case.mode == "policy":
        raise Unavailable("material.policy_unsupported", "no policy is defined for a log by itself")
    entry = next(entry for entry in case.evidence if entry.hint != "ccel-acpi-table")
    for table in case.all_of("ccel-acpi-table"):
        _acpi(table)
    log = eventlog.parse_event_log(log_bytes(entry.hint, case.read(entry.file)))
    facts.update(log_facts(log, ccel=entry.hint == "ccel"))
    for name, values in expected_pcrs(case).items():
        bank = _BANKS.get(name)
        if bank is None:
            raise Unavailable("material.unsupported", "values of an unknown bank", got=name)
        verify_boot(log, bank=bank, quoted=values, pcrs=sorted(values))
    return ()


def expected_pcrs(case: Case) -> dict[str, dict[int, bytes]]:
    """The input `expected_pcrs`: bank, index, value."""
    value = case.inputs.get("expected_pcrs", {})
    if not isinstance(value, dict):
        raise Malformed("case.inputs", "expected_pcrs is an object of banks")
    try:
        return {
            bank: {int(index): bytes.fromhex(digest) for index, digest in values.items()} for bank, values in value.items()
        }
    except (ValueError, TypeError, AttributeError):
        raise Malformed("case.inputs", "expected_pcrs holds values in hexadecimal by index") from None


def log_bytes(hint: str, data: bytes) -> bytes:
    """The log itself, whatever it is wrapped in."""
    if hint != "tcg-eventlog-b64":
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("eventlog.base64", "not base64") from None


def log_facts(log: eventlog.EventLog, *, ccel: bool) -> Facts:
    """What a log says, replayed in one bank: SHA-256 if it has that, else SHA-384, else its first."""
    facts: Facts = {
        "format": "ccel" if ccel else "crypto-agile" if log.crypto_agile else "sha1-legacy",
        "events": len(log.events),
        "banks": [_NAMES.get(bank, hex(bank)) for bank in log.banks],
    }
    if any(event.kind == eventlog.EV_NO_ACTION and event.data.startswith(_LOCALITY) for event in log.events):
        facts["startup_locality"] = log.startup_locality
    bank = next((chosen for chosen in (ALG_SHA256, ALG_SHA384) if chosen in log.banks), log.banks[0])
    values = replay(log, bank)
    if values:
        facts["pcrs"] = {_NAMES[bank]: {str(pcr): digest.hex() for pcr, digest in sorted(values.items())}}
        state = verify_boot(log, bank=bank, quoted=values, pcrs=sorted(values), variables_pcr=1 if ccel else 7)
        if state.secure_boot is not None:
            facts["secure_boot"] = state.secure_boot
    return facts


def _acpi(table: bytes) -> None:
    """The ACPI table beside a CC event log: it only says where the log lies, so its form is all there is to look at."""
    try:
        from moorline.evidence.ccel import parse_ccel_table
    except ModuleNotFoundError:
        raise Unavailable("material.unsupported", "this build does not read the CCEL ACPI table") from None
    parse_ccel_table(table)
