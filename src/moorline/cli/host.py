"""`moor host`: run the agent of a host, assess the host, and say where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import host_assess, host_inspect, host_locate, host_probe, host_suspect, render, running
from moorline.errors import Misconfigured

if TYPE_CHECKING:
    from moorline.services.host import HostSettings

app = typer.Typer(no_args_is_help=True)
app.add_typer(host_assess.app, name="assess")
app.add_typer(host_inspect.app, name="inspect")
app.add_typer(host_locate.app, name="locate")
app.add_typer(host_probe.app, name="probe")

_DAY_S: Final = 24 * 3600
Tcti = Annotated[str, typer.Option("--tcti", help="The host's TPM: swtpm:path=/path, device:/dev/tpmrm0.")]


@app.callback()
def host() -> None:
    """Run the agent of a host; assess a machine."""


@app.command()
def run(config: running.Config, *, background: running.Background = False) -> None:
    """Attest this host and start guests for its orchestrator until stopped."""

    def serve() -> int:
        from moorline.services import host as service
        from moorline.services import process

        loaded = _settings(config)
        return process.run("host", lambda log: service.run(loaded, log))

    running.start(config, background=background, serve=serve, words=["host", "run", "--config", str(config)])


@app.command()
def show(config: running.Config, *, as_json: render.AsJson = False) -> None:
    """Show this host: whether its agent runs, what its TPM is, and the last verdict its agent heard."""
    settings = _settings(config)
    found: dict[str, Any] = {"host": settings.id, "provider": settings.provider, "listen": settings.listen}
    found["agent"] = running.running(config)
    if settings.attestation is not None:
        found["ek_digest"] = ek_digest(settings.attestation.tcti).hex()
        found["verdict"] = _last_verdict(config.with_suffix(".log"))
    render.facts(found, as_json=as_json, then="moor vnf hosts shows what the verifier holds about it")


@app.command()
def tag(  # noqa: PLR0913 - each is a part of the tag
    name: Annotated[str, typer.Argument(help="The host's id on the ledger.")],
    tcti: Tcti,
    location: Annotated[str, typer.Option(help="The jurisdiction: region and country, such as EU/DE.")],
    key: Annotated[Path, typer.Option(help="The location signer's private key (PEM).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the signed tag.")],
    *,
    place: Annotated[
        str | None, typer.Option(metavar="LAT,LON[~Nkm]", help="The point, such as 50.1109,8.6821~1km.")
    ] = None,
    logical: Annotated[str | None, typer.Option(help="The place within your sites, such as fra1/hall2/row7/rack3.")] = None,
    days: Annotated[int, typer.Option(min=1, max=366, help="How long the tag is good.")] = 30,
    as_json: render.AsJson = False,
) -> None:
    """Say where a host stands: sign a location tag, and write its digest into the host's TPM."""
    from moorline.attesters.tpm import Tpm
    from moorline.clock import SystemClock
    from moorline.policy import distance, reference_values
    from moorline.services.orchestrator import load_signer

    if place is not None:
        distance.parse_place(place)
    made = reference_values.LocationTag(
        host=name,
        ek_digest=ek_digest(tcti),
        location=location,
        not_after=SystemClock().now() + days * _DAY_S,
        geographical=place,
        logical=logical,
    )
    signed = reference_values.sign_tag(made, load_signer(key))
    render.new_file(output, signed)
    with Tpm.open(tcti) as tpm:
        tpm.write_location(reference_values.tag_digest(signed))
    render.files([output], as_json=as_json, then=[f"moor provider register platform {name} --tag {output} ..."])


def ek_digest(tcti: str) -> bytes:
    """SHA-256 of the endorsement key's SubjectPublicKeyInfo, as a platform record names the TPM."""
    import hashlib

    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from moorline.attesters.tpm import Tpm

    with Tpm.open(tcti) as tpm:
        certificates = tpm.endorsement().certificates
    if not certificates:
        raise Misconfigured("host.no_endorsement", "the TPM holds no endorsement certificate", got=tcti)
    public = x509.load_der_x509_certificate(certificates[0]).public_key()
    spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


def _last_verdict(log: Path) -> str | None:
    """What the agent wrote last about its attestation, where it runs in the background."""
    if not log.exists():
        return None
    last = None
    for line in log.read_text("utf-8", errors="replace").splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("event") in ("attested", "not attested"):
            last = f"{said['event']} at {said.get('timestamp')}: {said.get('code') or said.get('status')}"
    return last


def _settings(config: Path) -> HostSettings:
    from moorline.services import host as service
    from moorline.services import settings

    return settings.load(service.HostSettings, config, service="host")


app.command()(host_suspect.suspect)
running.register(app, check=_settings)
