"""`moor hsm backup`: take a token's recoverable keys to a quorum of custodians, and put them into an empty token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import hsm_custody, render
from moorline.errors import Malformed

if TYPE_CHECKING:
    from moorline.hsm.custody import Locked, Share
    from moorline.wire.keys import PublicKey

app = typer.Typer(no_args_is_help=True, help="Back a token up to its custodians, and restore it.")
Shares = Annotated[list[Path], typer.Option("--share", help="A custodian's share (moor hsm backup share); once for each.")]
Identity = Annotated[Path, typer.Option("--hsm-certificate", help="The HSM's certificate, hsm.pem, from a trusted place.")]
Token = Annotated[Path, typer.Option("--dir", help="The token's directory. Its broker must be stopped.")]


@app.command()
def share(
    file: Annotated[Path, typer.Argument(help="custody.cbor of the token (to create), or a backup (to restore).")],
    custodian: hsm_custody.Own,
    output: Annotated[Path, typer.Option(help="Where the share goes. It is a secret until it was used.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Open the own share of a custody record or backup, as a custodian."""
    from moorline.hsm.custody import take_share
    from moorline.wire import schema

    name = hsm_custody.read_public(custodian / hsm_custody.PUBLIC).name
    taken = take_share(_locked(file), name, hsm_custody.sealing(custodian))
    written = render.new_file(output, schema.encode(taken), mode=0o600)
    render.files([written], as_json=as_json, then=["bring it to the HSM, and destroy it afterwards"])


@app.command()
def create(
    directory: Token,
    identity: Identity,
    shares: Shares,
    output: Annotated[Path, typer.Option(help="The backup; a new file.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Back a token up. Takes a quorum of shares of its custody.cbor."""
    from moorline.clock import SystemClock
    from moorline.hsm import backup
    from moorline.hsm.token.softhsm import location_in

    with render.progress("wrapping keys in the token"):
        made = backup.create(
            location_in(directory), _shares(shares), output, now=SystemClock().now(), identity=_identity(identity)
        )
    render.facts(
        {
            "written": str(output),
            "keys": [each.label for each in made.keys],
            "not_included": list(made.not_included),
            "quorum": made.key.circle.quorum,
        },
        as_json=as_json,
        then="moor hsm backup verify, then keep it apart from the token",
    )


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The backup.")], identity: Identity, *, as_json: render.AsJson = False
) -> None:
    """Verify who signed a backup and that every quorum can open it. Exit code 1: it is not to be relied on."""
    from moorline.hsm import backup

    found = backup.verify(render.read(file), _identity(identity))
    render.facts(
        {
            "token": found.token,
            "at": found.created,
            "keys": [each.label for each in found.keys],
            "not_included": list(found.not_included),
            "quorum": found.key.circle.quorum,
            "custodians": [each.name for each in found.key.circle.custodians],
        },
        as_json=as_json,
    )


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="The backup.")],
    identity: Identity,
    shares: Shares,
    directory: Annotated[Path, typer.Option("--dir", help="Where the new token goes; must not exist.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Put the keys of a backup into a new, empty token. Takes a quorum of shares of the backup."""
    from moorline.hsm import backup

    with render.progress("unwrapping keys in the token"):
        location = backup.restore(render.read(file), _identity(identity), _shares(shares), directory)
    assert location.pin_file is not None
    then = [
        "name it in broker.toml (token_pin_file, softhsm_conf, custody) and start the broker",
        "moor hsm epoch: launching waits until an operator opens an epoch",
    ]
    render.files([location.pin_file], as_json=as_json, then=then)


def _locked(file: Path) -> Locked:
    from moorline.hsm import backup
    from moorline.hsm.backup import FILE_CAP, Backup
    from moorline.hsm.custody import Locked
    from moorline.wire import cose, schema

    data = render.read(file)
    try:
        return schema.decode(Locked, data, max_bytes=FILE_CAP)
    except Malformed:
        # A share is opened before anybody needs to believe the backup; who restores it verifies it.
        payload = cose.parse(backup.PURPOSE, data, max_bytes=FILE_CAP).payload
        return schema.decode(Backup, payload, max_bytes=FILE_CAP).key


def _shares(paths: list[Path]) -> list[Share]:
    from moorline.hsm.custody import parse_share

    return [parse_share(render.read(path)) for path in paths]


def _identity(path: Path) -> PublicKey:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from moorline.wire import keys

    try:
        certificate = x509.load_pem_x509_certificate(render.read(path))
    except ValueError:
        raise Malformed("cli.certificate", "the file is not a certificate in PEM", got=path) from None
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return keys.parse_public(certificate.public_key().public_bytes(serialization.Encoding.DER, spki))
