"""What the host handed over, against what the launch is bound to (PROTOCOLS.md 3; wire.guest).

Nothing of it is trusted. The launch fields are bound by HOST_DATA and the token, both judged by the broker; the function
itself hashes the package and the configuration it actually received and refuses a mismatch, before it does anything else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.digest import same
from moorline.errors import Malformed, MoorlineError, Refused
from moorline.ledger.light_client import LedgerTrust
from moorline.wire import guest, schema
from moorline.wire.launch import LaunchFields, parse_fields

MAX_PACKAGE_BYTES: Final = 64 << 20
MAX_SMALL_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A launch whose package and configuration are the ones its fields name. `token` is secret."""

    encoded_fields: bytes
    fields: LaunchFields
    token: bytes
    configuration: guest.FunctionConfiguration
    trust: LedgerTrust
    package: bytes


def read_launch(directory: Path) -> Launch:
    """The launch in the shared directory.

    Raises Malformed("workload.launch_unreadable"), Refused("workload.configuration_mismatch" | "workload.package_mismatch").
    It does not establish that anybody authorised the launch: the broker decides that from evidence and token.
    """
    try:
        launched = schema.decode(guest.FunctionLaunch, _read(directory / guest.LAUNCH_FILE, MAX_SMALL_BYTES))
        fields = parse_fields(launched.launch_fields)
    except MoorlineError as error:
        raise _unreadable(guest.LAUNCH_FILE, error.code) from None
    configuration_bytes = _read(directory / guest.CONFIGURATION_FILE, MAX_SMALL_BYTES)
    if not same(hashlib.sha256(configuration_bytes).digest(), fields.configuration_digest):
        raise Refused(
            "workload.configuration_mismatch",
            "the configuration is not the one this launch is bound to",
            expected=fields.configuration_digest,
            got=hashlib.sha256(configuration_bytes).digest(),
        )
    package = _read(directory / guest.PACKAGE_FILE, MAX_PACKAGE_BYTES)
    if not same(hashlib.sha256(package).digest(), fields.package_digest):
        raise Refused(
            "workload.package_mismatch",
            "the package is not the one this launch is bound to",
            expected=fields.package_digest,
            got=hashlib.sha256(package).digest(),
        )
    configuration = schema.decode(guest.FunctionConfiguration, configuration_bytes)
    trust = LedgerTrust.parse(configuration.trust)
    _agree(fields, configuration, trust)
    return Launch(
        encoded_fields=launched.launch_fields,
        fields=fields,
        token=launched.token,
        configuration=configuration,
        trust=trust,
        package=package,
    )


def _agree(fields: LaunchFields, configuration: guest.FunctionConfiguration, trust: LedgerTrust) -> None:
    """A configuration for another function, broker or ledger is none for this launch, whatever its digest."""
    bound = (fields.provider, fields.hsm, fields.service, fields.ledger_id)
    configured = (configuration.provider, configuration.hsm, configuration.service, trust.ledger_id)
    if bound != configured:
        raise Refused(
            "workload.configuration_mismatch",
            "the configuration names another provider, HSM, service or ledger than the launch",
            expected="/".join(bound[:3]),
            got="/".join(configured[:3]),
        )


def _read(path: Path, cap: int) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(cap + 1)
    except OSError as error:
        raise _unreadable(path.name, type(error).__name__) from None
    if len(data) > cap:
        raise _unreadable(path.name, f"more than {cap} bytes")
    return data


def _unreadable(name: str, why: str) -> Malformed:
    return Malformed("workload.launch_unreadable", f"the host did not hand over a readable {name}", got=why)
