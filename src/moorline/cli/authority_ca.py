"""`moor authority`: a longer life for an authority's CA certificate, in three steps, since the root is offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import acting, approvals, render
from moorline.errors import Refused

if TYPE_CHECKING:
    from cryptography import x509

    from moorline.ledger.transactions import RotateAuthorityKey


def renew_ca(
    by: acting.By,
    *,
    request: Annotated[Path | None, typer.Option(help="Write the request for the root's people to this file.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="Propose the certificate they made of it (PEM).")] = None,
    output: approvals.Output = None,
    valid_until: approvals.ValidUntil = None,
    quiet: render.Quiet = False,
    as_json: render.AsJson = False,
) -> None:
    """Renew this authority's CA certificate: --request first, then --certificate. A quorum must approve.

    Key and name stay, so that everything certified under it goes on to count. Afterwards moor authority take-keys puts the
    new certificate in place.
    """
    if (request is None) == (certificate is None):
        raise typer.BadParameter("give --request FILE, or --certificate FILE")
    if request is not None:
        _ask(by.absolute(), request, as_json=as_json)
    elif certificate is not None:
        action = _action(by.absolute(), certificate)
        says = f"renew the CA certificate of {action.name}"
        acting.propose(by, action, says, quiet=quiet, as_json=as_json, output=output, valid_until=valid_until)


def certify_ca(
    request: Annotated[Path, typer.Argument(help="What moor authority renew-ca --request wrote.")],
    root: Annotated[Path, typer.Option(help="The root's folder, which the genesis ceremony made.")],
    genesis: Annotated[Path, typer.Option(help="The ledger's genesis.cbor.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the certificate (PEM).")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Certify an authority's CA key again, where the root is. Compare the fingerprint with its people first."""
    from cryptography.hazmat.primitives import serialization

    from moorline.clock import SystemClock
    from moorline.ledger import ca_renewal

    now = SystemClock().now()
    made = ca_renewal.certify(render.read(request), genesis=render.read(genesis), root=root, now=now)
    render.new_file(output, made.public_bytes(serialization.Encoding.PEM))
    render.files(
        [output],
        as_json=as_json,
        then=[f"moor authority renew-ca --certificate {output} --by FOLDER"],
        authority=made.subject.rfc4514_string(),
        key=_fingerprint(made),
        not_after=made.not_valid_after_utc.isoformat(),
    )


def _ask(folder: Path, request: Path, *, as_json: bool) -> None:
    from moorline.ledger import ca_renewal
    from moorline.ledger.ceremony import load_authority

    render.new_file(request, ca_renewal.request(folder))
    render.files(
        [request],
        as_json=as_json,
        then=[f"where the root is: moor authority certify-ca {request} --root ROOT --genesis genesis.cbor --output FILE"],
        key=_fingerprint(load_authority(folder).ca.certificate),
    )


def _action(folder: Path, certificate: Path) -> RotateAuthorityKey:
    from moorline.clock import SystemClock
    from moorline.ledger import ca_renewal
    from moorline.ledger.ceremony import load_authority, load_next
    from moorline.ledger.transactions import RotateAuthorityKey
    from moorline.wire import keys

    if load_next(folder) is not None:
        raise Refused(
            "authority.rotation_pending",
            "this authority's next keys wait for their place",
            remedy="moor authority take-keys first: each proposal replaces the whole record",
        )
    genesis, now = render.read(folder / "genesis.cbor"), SystemClock().now()
    der = ca_renewal.keep(folder, render.read(certificate), genesis=genesis, now=now)
    found, record = load_authority(folder), approvals.authority(folder)
    return RotateAuthorityKey(
        name=found.name,
        certificate=der,
        transaction_key=keys.public_bytes(found.transaction.public_key()),
        checkpoint_key=found.checkpoint.public_key().public_bytes_raw(),
        address=record.address,
    )


def _fingerprint(certificate: x509.Certificate) -> str:
    import hashlib

    from moorline.ledger import issuance
    from moorline.wire import keys

    return hashlib.sha256(keys.public_bytes(issuance.public_key(certificate))).hexdigest()


def register(app: typer.Typer) -> None:
    """Put these commands under the noun."""
    app.command("renew-ca")(renew_ca)
    app.command("certify-ca")(certify_ca)
