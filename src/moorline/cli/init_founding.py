"""`moor init consortium|authority|provider`: who founds a ledger, and who joins one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from moorline.cli import acting, render

Directory = Annotated[Path, typer.Option("--dir", help="Its directory; made (0700) if it is not there.")]
Listen = Annotated[str, typer.Option(help="Where it serves, address:port.")]
Domain = Annotated[str, typer.Option(help="A DNS name that nobody else uses, such as consortium.test.")]
PAIR: Final = "NAME=ADDRESS:PORT"


def consortium(
    directory: Directory,
    domain: Domain,
    authority: Annotated[list[str], typer.Option(help=f"A founding authority, {PAIR}; repeat it. The first makes blocks.")],
    *,
    max_age_s: Annotated[int, typer.Option("--max-age", min=1, help="How old a ledger proof may be, in seconds.")] = 30,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Allow SIMULATED hardware, for ever. For tests only.")
    ] = False,
    as_json: render.AsJson = False,
) -> None:
    """Hold the genesis ceremony: a root, the founding authorities, the genesis, and the trust file for everybody."""
    from moorline.clock import SystemClock
    from moorline.ledger.ceremony import genesis_ceremony
    from moorline.ledger.genesis import Parameters

    addresses = dict(pair(text, "--authority") for text in authority)
    made = genesis_ceremony(
        directory,
        names=tuple(addresses),
        consortium_domain=domain,
        simulated_allowed=simulated,
        parameters=Parameters(max_age_s=max_age_s),
        addresses=addresses,
        now=SystemClock().now(),
    )
    folders = [directory / "authorities" / name for name in addresses]
    for folder in folders:
        _authority_file(folder, addresses[folder.name])
    render.files(
        [directory / name for name in ("genesis.cbor", "trust.cbor", "trust.toml", "roots.pem")] + folders,
        as_json=as_json,
        then=[
            f"take {directory / 'root'} offline, and give each authority its folder",
            f"moor authority run --config {folders[0] / 'authority.toml'}, and so for each",
        ],
        ledger=made.genesis.ledger_id.hex(),
        quorum=str(made.trust.quorum),
    )


def authority(
    directory: Directory,
    listen: Listen,
    genesis: Annotated[Path, typer.Option(help="The ledger's genesis.cbor.")],
    root: Annotated[Path, typer.Option(help="The root's folder, which the genesis ceremony made.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Make the folder of an authority that joins a running ledger, named as its directory. It must be admitted."""
    from moorline.clock import SystemClock
    from moorline.ledger.ceremony import join_authority

    join_authority(directory, genesis=render.read(genesis), root=root, address=listen, now=SystemClock().now())
    _authority_file(directory, listen)
    render.files(
        [directory / "authority.toml"],
        as_json=as_json,
        then=[
            f"moor authority admit {directory} --address {listen} --by FOLDER, and enough others approve",
            f"moor authority run --config {directory / 'authority.toml'}",
        ],
    )


def provider(
    directory: Directory,
    name: Annotated[str, typer.Option(help="Its name on the ledger.")],
    trust_domain: Domain,
    consortium: Annotated[
        Path, typer.Option(help="Directory with genesis.cbor, trust.cbor and roots.pem of the consortium.")
    ],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Make a provider: its key, its certificate request, and the consortium as it was given to it."""
    from moorline.hsm.provider import make_provider_key
    from moorline.nfv import parse_domain, parse_name
    from moorline.services import settings

    parse_name(name, "provider")
    parse_domain(trust_domain, "trust domain")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    given = directory / "consortium"
    configured = acting.ProviderSettings(
        name=name,
        trust_domain=trust_domain,
        key=directory / "provider.key.pem",
        certificate=directory / "provider.pem",
        genesis=given / "genesis.cbor",
        trust=given / "trust.cbor",
        roots=given / "roots.pem",
    )
    key = make_provider_key(configured.key)
    for file in ("genesis.cbor", "trust.cbor", "roots.pem"):
        render.new_file(given / file, render.read(consortium / file))
    request = render.new_file(directory / "request.pem", _certificate_request(key, name, trust_domain))
    settings.write_commented(configured, directory / acting.PROVIDER_FILE, head=f"Provider {name}.")
    render.files(
        [directory / acting.PROVIDER_FILE, configured.key, request],
        as_json=as_json,
        then=[
            f"an authority certifies it: moor authority issue {request} --by FOLDER --output {configured.certificate}",
            f"and proposes it: moor provider admit --certificate {configured.certificate} --by FOLDER",
        ],
    )


def pair(text: str, option: str) -> tuple[str, str]:
    """NAME=ADDRESS:PORT as an option has it. Raises typer.BadParameter."""
    from moorline.nfv import parse_name

    name, separator, address = text.partition("=")
    if not separator or ":" not in address:
        raise typer.BadParameter(f"{PAIR}, not {text}", param_hint=option)
    return parse_name(name, "name"), address


def _authority_file(folder: Path, listen: str) -> None:
    from moorline.services import settings
    from moorline.services.authority import Settings

    (folder / "authority.toml").unlink(missing_ok=True)  # the ceremony's own, without comments
    configured = Settings(name=folder.absolute().name, listen=listen, directory=folder)
    settings.write_commented(configured, folder / "authority.toml", head=f"Ledger authority {folder.name}.")


def _certificate_request(key: object, name: str, trust_domain: str) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    assert isinstance(key, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    names = x509.SubjectAlternativeName([x509.DNSName(trust_domain)])
    return builder.add_extension(names, critical=False).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
