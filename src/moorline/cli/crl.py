"""`moor crl`: certificate revocation lists of CAs whose keys are files (provider, authority, root), and reading any list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moorline.cli import render
from moorline.errors import Malformed, Misconfigured

app = typer.Typer(no_args_is_help=True)


@app.callback()
def crl() -> None:
    """Make revocation lists with a CA's key file, and read them. An issuing CA's own list is made by its broker."""


@app.command()
def make(
    certificate: Annotated[Path, typer.Option(help="The CA's certificate, PEM; the first of the file counts.")],
    key: Annotated[Path, typer.Option(help="The CA's private key, PEM.")],
    out: Annotated[Path, typer.Option(help="Where the list goes, PEM; must not be there yet.")],
    *,
    serial: Annotated[list[str] | None, typer.Option(help="A revoked serial number, hex; may be repeated.")] = None,
    hours: Annotated[int, typer.Option(min=1, max=24 * 366, help="How long the list holds.")] = 24,
    as_json: render.AsJson = False,
) -> None:
    """Sign a full list. Its number is the present second, so it is above that of every list this CA made before."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from moorline.clock import Instant, SystemClock, Validity
    from moorline.hsm import revocation
    from moorline.wire.certificates import Issuer

    try:
        issuer = Issuer(
            certificate=x509.load_pem_x509_certificates(render.read(certificate))[0],
            key=serialization.load_pem_private_key(render.read(key), password=None),  # type: ignore[arg-type]
        )
    except (ValueError, TypeError) as error:
        raise Misconfigured("crl.no_issuer", "certificate or key cannot be read", got=type(error).__name__) from None
    if issuer.certificate.public_key() != issuer.key.public_key():
        raise Misconfigured("crl.other_key", "the key is not the certificate's", remedy="name the key of this CA")
    now = SystemClock().now()
    revoked = tuple(
        revocation.RevokedCertificate(serial=_serial(one), at=now, reason=x509.ReasonFlags.unspecified)
        for one in serial or ()
    )
    validity = Validity(not_before=now, not_after=Instant(now + hours * 3600))
    made = revocation.crl(issuer, revoked, number=now, validity=validity, url=None)
    pem = x509.load_der_x509_crl(made).public_bytes(serialization.Encoding.PEM)
    render.files([render.new_file(out, pem)], as_json=as_json, then=["name it in crls_above of the broker's settings"])


@app.command("renew-root")
def renew_root(
    root: Annotated[Path, typer.Option(help="Folder with the present root: root.pem and root.key.pem.")],
    output: Annotated[Path, typer.Option(help="New folder for the next root and root-update.pem.")],
    *,
    years: Annotated[int, typer.Option(min=1, max=30, help="How long the next root lives.")] = 10,
    as_json: render.AsJson = False,
) -> None:
    """Make the next root, and certificates from the present one to it and back. Run it where the root key may exist."""
    import secrets

    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from moorline.clock import Instant, SystemClock, Validity
    from moorline.hsm import root_update
    from moorline.hsm.issuers import name_of
    from moorline.ledger.ceremony import key_pem, write_private
    from moorline.wire.certificates import Issuer, root_certificate

    try:
        present = x509.load_pem_x509_certificate(render.read(root / "root.pem"))
        key = serialization.load_pem_private_key(render.read(root / "root.key.pem"), password=None)
    except (ValueError, TypeError) as error:
        raise Misconfigured("crl.no_issuer", "certificate or key cannot be read", got=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or present.public_key() != key.public_key():
        raise Misconfigured("crl.other_key", "the key is not the certificate's", remedy="name the folder of this root")
    now = SystemClock().now()
    following = ec.generate_private_key(ec.SECP384R1())
    validity = Validity(not_before=now, not_after=Instant(now + years * 365 * 86400))
    made = root_certificate(following, name=name_of(present), validity=validity, serial=secrets.randbits(120))
    serials = (secrets.randbits(120), secrets.randbits(120))
    new = Issuer(certificate=made, key=following)
    update = root_update.introduce(Issuer(certificate=present, key=key), new, now=now, serials=serials)
    written = [
        render.new_file(output / "root.pem", made.public_bytes(serialization.Encoding.PEM)),
        render.new_file(output / "root-update.pem", update.pem()),
    ]
    write_private(output / "root.key.pem", key_pem(following))
    then = [f"name {written[1]} in root_update of each broker's settings; CMP clients are told of it"]
    render.files(written, as_json=as_json, then=then)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A list, DER or PEM.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Read a list: whose, which number, from when to when, whom it names. The signature is not judged here."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from moorline.hsm import revocation

    data = render.read(file)
    if data.lstrip().startswith(b"-----"):
        try:
            data = x509.load_pem_x509_crl(data).public_bytes(serialization.Encoding.DER)
        except ValueError:
            raise Malformed("crl.undecodable", "the file holds no CRL", got=file) from None
    found = revocation.parse_crl(data)
    ends = found.next_update_utc
    facts = {
        "issuer": found.issuer.rfc4514_string(),
        "number": revocation.crl_number(found),
        "at": int(found.last_update_utc.timestamp()),
        "next_update": None if ends is None else int(ends.timestamp()),
        "revoked": [f"{one.serial_number:x}" for one in found],
    }
    render.facts(facts, as_json=as_json)


def _serial(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise Malformed("crl.serial", "a serial number is hex", got=text) from None
