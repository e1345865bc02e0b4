"""Where this host stands: geographical, logical and jurisdictional, kept apart (SEC009 5.1.6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.attesters.probes.statements import stated
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation

_LLDP: Final = "/run/systemd/netif/lldp"
CAPABILITIES: Final = ("location.geo", "location.jurisdiction", "location.logical", "location.distance_bound")


def probe(tree: Tree, now: int) -> Iterator[Observation]:
    """The tag needs the TPM, the law people, the logical place a neighbour, and a bound on the distance landmarks."""
    if tree.names("/sys/class/tpm"):
        yield not_probed(
            "location.geo",
            "the tag lies in the TPM, and only its attestation key can show it to somebody else",
            command="moor host run (with [attestation] and a tag), and moor verifier run elsewhere",
        )
    else:
        yield not_met("location.geo", "no TPM that could hold a location tag", "/sys/class/tpm: no tpm0")
    jurisdiction = "location.jurisdiction"
    yield stated(tree, jurisdiction, now) or not_met(jurisdiction, "nobody stated the jurisdiction")
    neighbours = [f"{_LLDP}/{name}" for name in tree.names(_LLDP)]
    if neighbours:
        yield met("location.logical", f"{len(neighbours)} links with a neighbour", *neighbours[:8])
    else:
        yield stated(tree, "location.logical", now) or not_met(
            "location.logical", "no neighbour has introduced itself", f"{_LLDP}: absent or empty"
        )
    yield not_probed(
        "location.distance_bound", "round trips to landmarks take time, and landmarks", command="moor host locate"
    )
