"""What a verifier's trust in hardware rests on: anchors of TPMs and processors, and revocation lists of TPM makers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed, Misconfigured
from moorline.ledger.light_client import LedgerTrust
from moorline.rats import EvidenceRoot
from moorline.services import verifier_files as files
from moorline.services.verifier_settings import VerifierSettings
from moorline.storage.collateral_intake import tpm_crls
from moorline.storage.collateral_store import open_collateral
from moorline.verification.anchors import AnchorSet, parse_anchor_file, production_anchors
from moorline.verification.tpm_identity import TpmAnchor, vendor_anchors
from moorline.verification.tpm_revocation import Revocation

_VENDOR: Final = "vendor"
_SIMULATED: Final = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """All anchors of one verifier, and whether the genesis lifts the cap of simulated ones."""

    tpm: tuple[TpmAnchor, ...]
    snp: AnchorSet
    simulated_allowed: bool


def read_anchors(configured: VerifierSettings, trust: LedgerTrust) -> Anchors:
    """The anchors that count. Raises Misconfigured (`verifier.anchors_*`) for unknown sets, or simulation not allowed."""
    unknown = set(configured.anchors) - {_VENDOR, _SIMULATED}
    if unknown or _VENDOR not in configured.anchors:
        raise Misconfigured(
            "verifier.anchors_unknown",
            "the anchor sets are vendor, and simulated",
            expected="vendor, simulated",
            got=configured.anchors,
        )
    simulated = _SIMULATED in configured.anchors
    if simulated and not trust.simulated_allowed:
        raise Misconfigured(
            "verifier.anchors_simulated",
            "this ledger's genesis does not allow simulated anchors",
            remedy='use anchors = ["vendor"]',
        )
    if not simulated and (configured.simulated_tpm_roots or configured.simulated_snp_roots):
        raise Misconfigured(
            "verifier.anchors_simulated",
            "simulated roots are listed but the set `simulated` is not",
            remedy='add "simulated" to anchors, or leave the roots out',
        )
    kinds = (
        (configured.tpm_hardware_roots, EvidenceRoot.HARDWARE),
        (configured.tpm_virtual_roots, EvidenceRoot.VIRTUAL),
        (configured.simulated_tpm_roots, EvidenceRoot.TEST),
    )
    between = tuple(files.certificate(path) for path in configured.tpm_intermediates)
    tpm = tuple(
        TpmAnchor(certificate=files.certificate(path), root=root, intermediates=between)
        for paths, root in kinds
        for path in paths
    )
    snp = production_anchors()
    for path in configured.simulated_snp_roots:
        snp = snp.plus(parse_anchor_file(files.read(path)))
    return Anchors(tpm=(*vendor_anchors(), *tpm), snp=snp, simulated_allowed=trust.simulated_allowed and simulated)


def revocation_reader(configured: VerifierSettings) -> Callable[[], Revocation]:
    """Reads what is held of TPM makers' CRLs, anew each time: a list that came in a minute ago counts.

    Raises Misconfigured("verifier.unknown_root" | "verifier.no_reason" | "collateral.no_store"), at once.
    """
    waived: dict[EvidenceRoot, str] = {}
    for root, reason in configured.tpm_crls_not_required.items():
        if root not in {EvidenceRoot.HARDWARE, EvidenceRoot.VIRTUAL, EvidenceRoot.TEST}:
            raise Misconfigured(
                "verifier.unknown_root", "not a kind of root", expected="hardware, virtual or test", got=root
            )
        if not reason.strip():
            raise Misconfigured("verifier.no_reason", "what is not required has a reason", got=root)
        waived[EvidenceRoot(root)] = reason
    path = configured.tpm_collateral
    store = None if path is None else open_collateral(path, create=False)

    def read() -> Revocation:
        try:
            return Revocation(crls=() if store is None else tpm_crls(store), not_required=waived)
        except Malformed as error:  # this verifier's own store, and not what a host sent
            raise Misconfigured(
                "verifier.collateral_damaged",
                "the collateral store holds what nobody put there",
                got=f"{path}: {error.code}",
                remedy="import the lists again (moor collateral import)",
            ) from None

    return read
