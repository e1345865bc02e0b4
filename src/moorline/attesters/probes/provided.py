"""Capabilities that a service of this system shows, at another moment and about a function: no host can claim them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import not_met, not_probed
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation

_SERVICES: Final = {
    "cleanup.keys": ("the broker's token destroys the keys of a function", "moor vnf show"),
    "comms.mtls.endpoints": ("function and broker end their channels themselves", "moor device connect"),
    "provision.integrity": ("a function compares package and configuration with its launch", "moor package verify"),
    "provision.confidentiality": ("the broker releases secrets to an attested launch only", "moor vnf show"),
    "provision.otp": ("the broker takes a launch token once", "moor vnf show"),
}
_LOGS: Final = ("log.secure.confidential", "log.secure.entry_integrity", "log.secure.chain")
CAPABILITIES: Final = (*_SERVICES, *_LOGS)


def probe(tree: Tree) -> Iterator[Observation]:
    """Each with the service that shows it. The host agent keeps no secure log of its own; journald's sealing is not one."""
    for name, (says, command) in _SERVICES.items():
        yield not_probed(name, f"not the host's to show: {says}", command=command)
    sealed = any(
        file == "fss" for machine in tree.names("/var/log/journal") for file in tree.names(f"/var/log/journal/{machine}")
    )
    said = f"/var/log/journal: forward-secure sealing {'on' if sealed else 'off'}"
    for name in _LOGS:
        yield not_met(
            name,
            "root can write the host's log again, sealed or not; brokers, verifiers and orchestrators keep secure logs",
            said,
        )
