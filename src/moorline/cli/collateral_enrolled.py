"""Whose TPM makers' lists to fetch: of TPMs that a verifier enrolled, or that a file shows; and by which roots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moorline.cli import collateral_options as options
from moorline.errors import NotAuthentic

if TYPE_CHECKING:
    from moorline.verification.tpm_identity import TpmAnchor
    from moorline.verification.tpm_revocation import ListPoint

Chain = tuple[bytes, ...]


def tpm_anchors(enrolled: Path | None, roots: list[Path] | None) -> tuple[TpmAnchor, ...]:
    """The vendors' roots, those of the command line, and those of a verifier's settings. Raises Misconfigured."""
    shown = options.anchors_of(None, None, roots).tpm
    if enrolled is None:
        return shown
    from moorline.ledger.light_client import LedgerTrust
    from moorline.services import settings, verifier_anchors, verifier_settings
    from moorline.services import verifier_files as files

    configured = settings.load(verifier_settings.VerifierSettings, enrolled)
    trust = LedgerTrust.parse(files.read(configured.ledger_trust))
    theirs = verifier_anchors.read_anchors(configured, trust).tpm
    return (*theirs, *(one for one in shown if one not in theirs))


def chains_of(enrolled: Path | None, shown: Sequence[Path]) -> list[Chain]:
    """Chains of TPMs, endorsement certificate first: of all hosts of a verifier, and of files."""
    from cryptography.hazmat.primitives.serialization import Encoding

    found = [tuple(one.public_bytes(Encoding.DER) for one in options.certificates(path)) for path in shown]
    if enrolled is None:
        return found
    from moorline.services import settings, verifier_settings
    from moorline.storage.verifier_store import VerifierStore

    configured = settings.load(verifier_settings.VerifierSettings, enrolled)
    store = VerifierStore.open(configured.database_url or configured.database)
    try:
        return [*found, *(one.certificates for one in store.ek_chains().values())]
    finally:
        store.close()


def list_points_of(chains: Sequence[Chain], anchors: tuple[TpmAnchor, ...]) -> list[ListPoint]:
    """Where the lists about these chains are. Raises NotAuthentic("ek.anchor_unknown") where none leads to an anchor."""
    from moorline.verification.tpm_identity import endorsement_path
    from moorline.verification.tpm_revocation import list_points

    paths = [path for chain in chains if (path := endorsement_path(chain, anchors=anchors)) is not None]
    if chains and not paths:
        raise NotAuthentic(
            "ek.anchor_unknown",
            "no path leads from these TPMs to a configured maker",
            expected=f"one of {len(anchors)} anchors",
            remedy="--tpm-root with the maker's root certificate",
        )
    return [point for path in paths for point in list_points(path)]
