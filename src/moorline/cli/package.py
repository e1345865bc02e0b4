"""`moor package`: build, verify and measure function packages (ETSI SOL004; docs/spec/package.md)."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from moorline.cli import render

app = typer.Typer(no_args_is_help=True)

_YEAR_S: Final = 365 * 86400
_SAMPLE: Final = "records/function.py"
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@app.callback()
def package() -> None:
    """Build, verify and measure function packages."""


@app.command()
def publisher(
    name: Annotated[str, typer.Option(help="Common name of the publisher.")],
    certificate: Annotated[Path, typer.Option(help="Where to write the certificate (PEM).")],
    key: Annotated[Path, typer.Option(help="Where to write the private key (PEM, mode 0600).")],
    *,
    years: Annotated[int, typer.Option(min=1, max=10)] = 2,
    as_json: AsJson = False,
) -> None:
    """Make a publisher's key and self-signed certificate; it counts where somebody puts it into package_signers."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from moorline.clock import Instant, SystemClock, Validity
    from moorline.orchestration import package as packages

    now = SystemClock().now()
    private = ec.generate_private_key(ec.SECP256R1())
    validity = Validity(not_before=Instant(now - 60), not_after=Instant(now + years * _YEAR_S))
    made = packages.publisher_certificate(private, name=name, validity=validity, serial=secrets.randbits(63) | 1)
    key.touch(mode=0o600)
    key.write_bytes(
        private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    _say({"certificate": str(certificate), "sha256": made.fingerprint(hashes.SHA256()).hex()}, as_json=as_json)


@app.command()
def build(  # noqa: PLR0913 - one parameter an option
    function: Annotated[Path, typer.Argument(help="The function's code, one Python file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSAR to write.")],
    service: Annotated[str, typer.Option(help="Name of the service.")],
    provider: Annotated[str, typer.Option(help="Name of the provider.")],
    certificate: Annotated[Path, typer.Option(help="The publisher's certificate (PEM).")],
    key: Annotated[Path, typer.Option(help="The publisher's private key (PEM).")],
    *,
    use_case: Annotated[str, typer.Option(help="SEC009 use case, 4.1 to 4.7.")] = "4.7",
    jurisdiction: Annotated[str, typer.Option(help="Where it may run, such as EU or EU/DE.")] = "EU",
    version: Annotated[str, typer.Option("--package-version", help="Version of the package.")] = "1.0.0",
    memory_mib: Annotated[int, typer.Option(min=64, max=8192)] = 256,
    pids: Annotated[int, typer.Option(min=4, max=4096)] = 64,
    as_json: AsJson = False,
) -> None:
    """Build and sign a package."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    from moorline.clock import SystemClock
    from moorline.errors import Misconfigured
    from moorline.orchestration import descriptor
    from moorline.orchestration import package as packages

    private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise Misconfigured("package.publisher_key", "packages are signed with P-256 or RSA keys", got=key)
    described = descriptor.parse(
        descriptor.render(
            descriptor.Descriptor(
                service=service,
                provider=provider,
                version=version,
                use_case=use_case,
                jurisdiction=jurisdiction,
                memory_mib=memory_mib,
                pids=pids,
                artifact=descriptor.FUNCTION_FILE,
            )
        )
    )
    csar = packages.build(
        packages.PackageContent(descriptor=described, function=function.read_bytes(), release=SystemClock().now()),
        packages.Publisher(certificate=x509.load_pem_x509_certificate(certificate.read_bytes()), key=private),
    )
    output.write_bytes(csar)
    _say({"package": str(output), "digest": packages.package_digest(csar).hex(), "bytes": len(csar)}, as_json=as_json)


@app.command()
def verify(
    csar: Annotated[Path, typer.Argument(help="The package.")],
    signers: Annotated[Path, typer.Option(help="Certificates of trusted publishers or their CAs (PEM).")],
    *,
    as_json: AsJson = False,
) -> None:
    """Verify digests and signature of a package. Exit code 1 says that it does not hold."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from moorline.clock import SystemClock
    from moorline.orchestration import package as packages

    trusted = tuple(
        certificate.public_bytes(serialization.Encoding.DER)
        for certificate in x509.load_pem_x509_certificates(signers.read_bytes())
    )
    verified = packages.verify(csar.read_bytes(), signers=trusted, now=SystemClock().now())
    described = verified.descriptor
    _say(
        {
            "digest": verified.digest.hex(),
            "signer": verified.signer_name,
            "service": described.service,
            "provider": described.provider,
            "version": described.version,
            "use_case": described.use_case,
            "jurisdiction": described.jurisdiction,
            "files": {name: digest.hex() for name, digest in verified.files.items()},
        },
        as_json=as_json,
    )


@app.command()
def measure(
    *,
    csar: Annotated[Path | None, typer.Argument(help="A package, to show its digest too.")] = None,
    entry: Annotated[str, typer.Option(help="Entry module of the guest runtime.")] = "moorline.workload_agent",
    as_json: AsJson = False,
) -> None:
    """Show what a service's record on the ledger must allow: launch measurement of the guest runtime, package digest."""
    from moorline.orchestration import package as packages
    from moorline.simulators.guest_image import measure as measured

    facts: dict[str, Any] = {"entry": entry, "measurement": measured(entry).hex()}
    if csar is not None:
        facts["package"] = packages.package_digest(csar.read_bytes()).hex()
    _say(facts, as_json=as_json)


@app.command()
def digest(csar: Annotated[Path, typer.Argument(help="The package.")], *, as_json: AsJson = False) -> None:
    """Print the digest by which a package is named, hex."""
    from moorline.orchestration.package import package_digest

    found = package_digest(render.read(csar)).hex()
    typer.echo(json.dumps({"digest": found}) if as_json else found)


@app.command()
def example(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")], *, as_json: AsJson = False
) -> None:
    """Write the sample function, a small records service, to start from."""
    import moorline

    inside = Path(moorline.__file__).parent / "examples" / _SAMPLE
    source = inside if inside.exists() else Path(moorline.__file__).parents[2] / "examples" / _SAMPLE
    render.new_file(output, render.read(source))
    render.files([output], as_json=as_json, then=[f"moor package build {output} --output FILE ..."])


def _say(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for key, inner in value.items():
                typer.echo(f"  {inner}  {key}")
        else:
            typer.echo(f"{name:<{width}}  {value}")
