"""`moor collateral add`: revocation lists that somebody fetched by hand, as most makers of TPMs publish theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import collateral_options as options
from moorline.cli import render
from moorline.errors import Malformed, NotAuthentic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography import x509

    from moorline.clock import Instant
    from moorline.storage.collateral_intake import Offered
    from moorline.verification.tpm_identity import TpmAnchor


def add(
    crls: Annotated[list[Path], typer.Argument(metavar="CRL...", help="Revocation lists of makers of TPMs, DER or PEM.")],
    *,
    store: options.Store,
    issuer: Annotated[
        list[Path] | None,
        typer.Option("--issuer", metavar="FILE", help="Certificates between CRL and root, DER or PEM. Repeatable."),
    ] = None,
    tpm_root: options.TpmRoots = None,
    at: options.At = None,
    as_json: render.AsJson = False,
) -> None:
    """Verify revocation lists of TPM makers, and store those that are authentic, current and not older than what was held.

    The authority that signed a list is one of --issuer, or a root. Each list is reported. Exit 1 if one was refused, 2 if
    one could not be judged.
    """
    from moorline.storage.collateral_intake import take
    from moorline.storage.collateral_store import open_collateral

    now = options.instant(at)
    anchors = options.anchors_of(None, None, tpm_root)
    between = [one for path in issuer or [] for one in options.certificates(path)]
    offered = [_offered(path, between, anchors.tpm, now) for path in crls]
    target = open_collateral(store, create=True)
    outcomes = [take(one, target, anchors=anchors, now=now) for one in offered]
    if as_json:
        typer.echo(json.dumps({"items": [options.outcome_row(one) for one in outcomes]}, indent=1))
    else:
        for outcome in outcomes:
            typer.echo(options.outcome_line(outcome))
    raise typer.Exit(options.exit_code(outcomes))


def _offered(path: Path, between: Sequence[x509.Certificate], anchors: Sequence[TpmAnchor], now: Instant) -> Offered:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from moorline.storage.collateral_intake import Offered
    from moorline.verification.collateral import ItemKind, ItemName
    from moorline.verification.collateral_judging import packed_crl
    from moorline.verification.tpm_identity import known_authorities
    from moorline.verification.tpm_revocation import is_by, item_subject, parse_tpm_crl

    data = render.read(path)
    if data.lstrip().startswith(b"-----BEGIN"):
        try:
            data = x509.load_pem_x509_crl(data).public_bytes(Encoding.DER)
        except ValueError:
            raise Malformed("ek.crl_malformed", "not a certificate revocation list", got=path) from None
    crl = parse_tpm_crl(data)
    known = [*between, *(one for anchor in anchors for one in known_authorities(anchor))]
    signer = next((one for one in known if is_by(crl, one)), None)
    if signer is None:
        raise NotAuthentic(
            "ek.crl_issuer",
            "the CRL is by no authority that was named",
            expected="--issuer with the certificate of its authority, or --tpm-root",
            got=crl.parsed.issuer.rfc4514_string(),
            remedy="get the authority's certificate from the maker, and compare the root's fingerprint by another way",
        )
    chain = "".join(one.public_bytes(Encoding.PEM).decode() for one in (signer, *(c for c in between if c != signer)))
    name = ItemName(kind=ItemKind.TPM_CRL, subject=item_subject(signer))
    return Offered(name=name, data=packed_crl(data, chain), source=path.name, fetched=now)
