"""`moor authority`: one ledger node, and what the people behind it decide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import acting, approvals, authority_ca, authority_decisions, authority_signer, render, running
from moorline.errors import Malformed, NotAuthentic

if TYPE_CHECKING:
    from cryptography import x509

    from moorline.services.authority import Settings

app = typer.Typer(no_args_is_help=True)


@app.callback()
def authority() -> None:
    """Run a ledger node, certify and admit providers."""


@app.command()
def run(config: running.Config, *, background: running.Background = False) -> None:
    """Run an authority until it is told to stop (SIGTERM)."""

    def serve() -> int:
        from moorline.services import authority as service
        from moorline.services import process

        found = _settings(config)
        return process.run("authority", lambda log: service.run(found, log))

    running.start(config, background=background, serve=serve, words=["authority", "run", "--config", str(config)])


@app.command()
def issue(
    request: Annotated[Path, typer.Argument(help="request.pem of a provider (moor init provider).")],
    by: acting.By,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the provider's chain (PEM).")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Certify a provider's key, constrained to its trust domain. It counts for nothing until the provider is admitted."""
    from cryptography.hazmat.primitives import serialization

    from moorline.clock import SystemClock
    from moorline.ledger.ceremony import issue_provider, load_authority
    from moorline.wire import keys

    asked = _request(render.read(request))
    name, trust_domain = _asked_names(asked)
    folder = load_authority(by.absolute())
    public = keys.parse_public(
        asked.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    made = issue_provider(folder.ca, public, name=name, trust_domain=trust_domain, now=SystemClock().now())
    chain = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (made, folder.ca.certificate))
    render.new_file(output, chain)
    render.files(
        [output],
        as_json=as_json,
        then=[f"moor provider admit --certificate {output} --by {by}"],
        provider=name,
        trust_domain=trust_domain,
    )


@app.command()
@approvals.proposes
def admit(
    folder: Annotated[Path, typer.Argument(help="The joining authority's folder (moor init authority).")],
    address: Annotated[str, typer.Option(help="Where it serves, address:port.")],
) -> approvals.Decision:
    """Propose to admit another authority. A quorum must approve."""
    from cryptography.hazmat.primitives import serialization

    from moorline.ledger.ceremony import load_authority
    from moorline.ledger.transactions import AdmitAuthority
    from moorline.wire import keys

    found = load_authority(folder.absolute())
    action = AdmitAuthority(
        name=found.name,
        certificate=found.ca.certificate.public_bytes(serialization.Encoding.DER),
        transaction_key=keys.public_bytes(found.transaction.public_key()),
        checkpoint_key=found.checkpoint.public_key().public_bytes_raw(),
        address=address,
    )
    says = f"admit authority {found.name}"
    return action, says


@app.command()
def show(by: acting.By, *, as_json: render.AsJson = False) -> None:
    """Show the ledger as this authority's folder knows it, and how far it is."""
    import asyncio

    from moorline.ledger.ceremony import endpoints
    from moorline.ledger.genesis import parse

    found = parse(render.read(by / "genesis.cbor"))

    async def height() -> int:
        async with acting.ledger_client(by / "genesis.cbor") as client:
            return (await client.checkpoint()).height

    facts = {
        "ledger": found.ledger_id.hex(),
        "consortium": found.consortium_domain,
        "authorities": [one.name for one in found.authorities],
        "at": [one.url for one in endpoints(found)],
        "sequencer": found.sequencer,
        "simulated hardware": found.simulated_allowed,
        "proofs are good for (s)": found.parameters.max_age_s,
        "height": asyncio.run(height()),
    }
    render.facts(facts, as_json=as_json)


def _settings(config: Path) -> Settings:
    from moorline.services import authority as service
    from moorline.services import settings

    return settings.load(service.Settings, config, service="authority")


def _request(pem: bytes) -> x509.CertificateSigningRequest:
    from cryptography import x509

    try:
        asked = x509.load_pem_x509_csr(pem)
    except ValueError:
        raise Malformed("provider.request_malformed", "the file is not a certificate request") from None
    if not asked.is_signature_valid:
        raise NotAuthentic("provider.request_signature", "the request is not signed by the key it asks for")
    return asked


def _asked_names(asked: x509.CertificateSigningRequest) -> tuple[str, str]:
    """Name and trust domain that a request asks for."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    from moorline.nfv import parse_domain, parse_name

    try:
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        domain = names.get_values_for_type(x509.DNSName)[0]
        name = str(asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (x509.ExtensionNotFound, IndexError, ValueError):
        raise Malformed(
            "provider.request_malformed",
            "the request names no provider",
            expected="a common name and one DNS name",
            remedy="make it with moor init provider",
        ) from None
    return parse_name(name, "provider"), parse_domain(domain, "trust domain")


authority_decisions.register(app)
authority_ca.register(app)
app.command()(authority_signer.signer_key)
running.register(app, check=_settings)
