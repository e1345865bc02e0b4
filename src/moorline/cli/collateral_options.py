"""What the commands of `moor collateral` share: options, keys, anchors, and how an outcome is told."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import render
from moorline.clock import Instant, SystemClock, rendered
from moorline.errors import EXIT_REFUSED, EXIT_UNDECIDED, EXIT_YES, Misconfigured

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryptography import x509

    from moorline.storage.collateral_intake import Outcome
    from moorline.verification.collateral_judging import Anchors
    from moorline.wire.keys import PrivateKey, PublicKey

DAY_S: Final = 86400

Store = Annotated[
    Path,
    typer.Option("--store", envvar="MOOR_COLLATERAL", metavar="PATH", help="Folder of the store, or a file NAME.sqlite."),
]
At = Annotated[str | None, typer.Option("--at", metavar="TIME", help="Judge as of this time (RFC 3339) instead of now.")]
SnpAnchors = Annotated[
    Path | None, typer.Option("--snp-anchors", metavar="FILE", help="Trust these SIMULATED AMD roots too.")
]
IntelRoots = Annotated[
    list[Path] | None, typer.Option("--intel-root", metavar="FILE", help="Trust this root as a test root. Repeatable.")
]
TpmRoots = Annotated[
    list[Path] | None,
    typer.Option("--tpm-root", metavar="FILE", help="Trust this root of a maker of TPMs (DER or PEM). Repeatable."),
]
Evidence = Annotated[list[Path] | None, typer.Argument(metavar="EVIDENCE...", help="SNP reports, SGX or TDX quotes, raw.")]


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON."""
    judged = outcome.judged
    return {
        "item": str(outcome.name),
        "result": outcome.taken.value,
        "evaluation": None if judged is None else judged.evaluation,
        "issued": None if judged is None else rendered(judged.issued),
        "expires": None if judged is None else rendered(judged.validity.not_after),
        "root": None if judged is None else judged.root.value,
        "error": None if outcome.error is None else outcome.error.as_problem(),
    }


def outcome_line(outcome: Outcome) -> str:
    """An outcome for people."""
    line = f"{outcome.taken.value:<10} {outcome.name}"
    if outcome.error is not None:
        return f"{line}\n           {outcome.error}"
    assert outcome.judged is not None  # an outcome without error was judged
    return f"{line}  until {rendered(outcome.judged.validity.not_after)}"


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """1 if anything was refused, else 2 if anything could not be had or judged, else 0."""
    results = {outcome.taken.value for outcome in outcomes}
    if "refused" in results:
        return EXIT_REFUSED
    return EXIT_UNDECIDED if "undecided" in results else EXIT_YES


def anchors_of(snp_anchors: Path | None, intel_roots: list[Path] | None, tpm_roots: list[Path] | None = None) -> Anchors:
    """The vendors' roots, and those that are named: AMD's and Intel's as test roots, makers of TPMs as hardware."""
    from cryptography.hazmat.primitives.serialization import Encoding

    from moorline.rats import EvidenceRoot
    from moorline.verification.anchors import parse_anchor_file, production_anchors
    from moorline.verification.collateral_judging import Anchors
    from moorline.verification.intel_pck import configured_anchors, production_intel_anchors
    from moorline.verification.tpm_identity import TpmAnchor, vendor_anchors

    snp, intel = production_anchors(), production_intel_anchors()
    if snp_anchors is not None:
        snp = snp.plus(parse_anchor_file(render.read(snp_anchors)))
    if intel_roots:
        intel = intel.plus(configured_anchors([render.read(path) for path in intel_roots]))
    makers = [one for path in tpm_roots or [] for one in certificates(path)]
    tpm = [TpmAnchor(certificate=one.public_bytes(Encoding.DER), root=EvidenceRoot.HARDWARE) for one in makers]
    return Anchors(snp=snp, intel=intel, tpm=(*vendor_anchors(), *tpm))


def certificates(path: Path) -> list[x509.Certificate]:
    """The certificates in a file, DER or PEM. Raises Misconfigured("collateral.certificate")."""
    from cryptography import x509

    data = render.read(path)
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return x509.load_pem_x509_certificates(data)
        return [x509.load_der_x509_certificate(data)]
    except ValueError:
        raise Misconfigured(
            "collateral.certificate",
            "not a certificate in DER or PEM",
            got=path,
            remedy="name a file of certificates: one in DER, or PEM blocks",
        ) from None


def instant(at: str | None) -> Instant:
    """The time that is named, or now. Raises Misconfigured("collateral.time")."""
    if at is None:
        return SystemClock().now()
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise Misconfigured("collateral.time", "a time is RFC 3339 with its zone", got=at)
    return Instant(int(moment.timestamp()))


def private_key(path: Path) -> PrivateKey:
    """A private key in a file. Raises Misconfigured("collateral.key")."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(render.read(path), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise Misconfigured("collateral.key", "not a private key in PEM without a password", got=path)
    return key


def public_key(path: Path) -> PublicKey:
    """A public key in a file. Raises Misconfigured("collateral.key")."""
    from cryptography.hazmat.primitives import serialization

    from moorline.wire.keys import parse_public

    try:
        key = serialization.load_pem_public_key(render.read(path))
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError):
        raise Misconfigured("collateral.key", "not a public key in PEM", got=path) from None
    return parse_public(der)
