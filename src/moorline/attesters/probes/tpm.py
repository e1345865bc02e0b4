"""Whether there is a TPM 2.0, and whether it can be a real one (SEC009 6.17)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.hypervisor import guest_of
from moorline.attesters.probes.saying import met, not_met
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation
from moorline.rats import EvidenceRoot

CLASS: Final = "/sys/class/tpm"
CAPABILITIES: Final = ("root.tpm20.hardware", "root.tpm20.virtual")


def probe(tree: Tree) -> Iterator[Observation]:
    """The first TPM that the kernel shows.

    In a guest, or behind the kernel's proxy driver, it is virtual; else the kernel says hardware, which only the chain of
    its endorsement key can prove.
    """
    hardware, virtual = CAPABILITIES
    chips = [name for name in tree.names(CLASS) if name.startswith("tpm") and name[3:].isdecimal()]
    if not chips:
        for name in CAPABILITIES:
            yield not_met(name, "the kernel shows no TPM", f"{CLASS}: no tpm0")
        return
    chip = f"{CLASS}/{chips[0]}"
    version = tree.read(f"{chip}/tpm_version_major")
    if version.text != "2":
        for name in CAPABILITIES:
            yield not_met(name, "the TPM is not known to be a TPM 2.0", version.shown())
        return
    proxied = "vtpm" in tree.link(f"{chip}/device") or "vtpmx" in tree.link(chip)
    guest = guest_of(tree)
    if proxied or guest is not None:
        why = "it stands behind a software proxy" if proxied else f"this machine is a guest ({guest})"
        yield not_met(hardware, f"the TPM is virtual: {why}", version.shown())
        yield met(virtual, why, version.shown(), root=EvidenceRoot.VIRTUAL)
        return
    description = tree.read(f"{chip}/device/description")
    yield met(hardware, description.text or "TPM 2.0", version.shown(), description.shown())
    yield not_met(virtual, "the TPM does not look virtual", version.shown())
