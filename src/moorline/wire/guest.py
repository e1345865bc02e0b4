"""What a host hands to a guest in its shared directory (/run/moor inside), and what the guest says back.

The host is not trusted with any of it: the configuration and the package are hashed by the measured guest and compared with
the launch fields, which the commitment in HOST_DATA and the token bind. Files, all written before the guest starts:

    launch.cbor     `FunctionLaunch` or `LauncherLaunch`
    config.cbor     `FunctionConfiguration` (functions); its SHA-256 is the configuration digest
    package.csar    the package as onboarded (functions); its SHA-256 is the package digest
    out-<name>      unix sockets the host relays to one destination each, `out-broker` always
    in              unix socket the guest listens on; the host relays its published TCP port to it
    status.jsonl    one JSON line an event, appended by the guest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from moorline.wire.schema import Bytes32, Size

SHARED_DIRECTORY: Final = "/run/moor"
LAUNCH_FILE: Final = "launch.cbor"
CONFIGURATION_FILE: Final = "config.cbor"
PACKAGE_FILE: Final = "package.csar"
BROKER_SOCKET: Final = "out-broker"
INBOUND_SOCKET: Final = "in"
STATUS_FILE: Final = "status.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionLaunch:
    """For `moorline.workload_agent`: the encoded launch fields and the one-time token over them."""

    launch_fields: Annotated[bytes, Size(at_most=4096)]
    token: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionConfiguration:
    """What the provider configures for a function. `trust` is an encoded ledger.LedgerTrust.

    `settings` are the application's own, as text. `max_age_s` bounds ledger proofs this function accepts.
    """

    trust: Annotated[bytes, Size(at_most=65536)]
    provider: str
    hsm: str
    service: str
    contracts: tuple[str, ...]
    max_age_s: int
    settings: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherLaunch:
    """For `moorline.services.launcher`: its ticket, and what it must know before it can trust anybody.

    HOST_DATA of a launcher is `digest.tagged_hash("launcher-configuration", <these bytes>)`.
    """

    ticket: Annotated[bytes, Size(at_most=8192)]
    trust: Annotated[bytes, Size(at_most=65536)]
    provider: str
    hsm: str
