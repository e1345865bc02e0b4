"""`moor provider`: what authorities decide about a provider, and what a provider says about itself on the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from moorline.cli import acting, approvals, provider_changes, render
from moorline.errors import Malformed

app = typer.Typer(no_args_is_help=True)
register = typer.Typer(no_args_is_help=True, help="Put on the ledger what belongs to this provider.")
app.add_typer(register, name="register")
provider_changes.register(app)

_PRODUCTS: Final = ("Milan", "Genoa", "Turin")
Provider = Annotated[str, typer.Argument(help="The provider's name.")]
Tag = Annotated[Path, typer.Option(help="The host's signed location tag (moor host tag).")]


@app.callback()
def provider() -> None:
    """Admit and suspend providers; register what belongs to one."""


@app.command()
@approvals.proposes
def admit(
    certificate: Annotated[Path, typer.Option(help="The provider's chain (moor authority issue).")],
) -> approvals.Decision:
    """Propose, as an authority, to admit a provider. Enough others must approve."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from moorline.ledger.transactions import AdmitProvider

    own = x509.load_pem_x509_certificates(render.read(certificate))[0]
    name, domain = _names(own)
    action = AdmitProvider(name=name, trust_domain=domain, certificate=own.public_bytes(serialization.Encoding.DER))
    return action, f"admit {name} ({domain})"


@app.command()
@approvals.proposes
def suspend(
    name: Provider,
) -> approvals.Decision:
    """Propose, as an authority, to suspend a provider: nothing of it counts for anybody until it is reinstated."""
    from moorline.ledger.transactions import SuspendProvider

    action = SuspendProvider(name=name)
    return action, f"suspend {name}"


@app.command()
@approvals.proposes
def reinstate(
    name: Provider,
) -> approvals.Decision:
    """Propose, as an authority, to end a suspension."""
    from moorline.ledger.transactions import ReinstateProvider

    action = ReinstateProvider(name=name)
    return action, f"reinstate {name}"


@app.command()
@approvals.proposes
def remove(
    name: Provider,
) -> approvals.Decision:
    """Propose, as an authority, to remove a provider for good."""
    from moorline.ledger.transactions import RemoveProvider

    action = RemoveProvider(name=name)
    return action, f"remove {name}"


@app.command()
def show(
    acts: acting.As,
    *,
    name: Annotated[str | None, typer.Argument(help="Another provider; the acting one if left out.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Show a provider as the ledger has it, proven by a quorum of authorities. Exit code 1: it is not there."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from moorline.clock import rendered
    from moorline.ledger import records

    asker = acting.provider(acts)
    key = records.provider_key(name or asker.name)
    state = asker.prove(key)
    found = records.parse(records.ProviderRecord, state.record(key))
    certificates = [x509.load_der_x509_certificate(der) for der in found.ca_certificates]
    render.facts(
        {
            "provider": found.name,
            "trust_domain": found.trust_domain,
            "status": found.status.value,
            "certificates": [one.fingerprint(hashes.SHA256()).hex() for one in certificates],
            "valid until": [one.not_valid_after_utc.isoformat() for one in certificates],
            "height": state.height,
            "as of": rendered(state.time),
        },
        as_json=as_json,
    )


@register.command("hsm")
def register_hsm(
    request: Annotated[Path, typer.Argument(help="request.json, with hsm.pem and issuing-ca.pem beside it.")],
    acts: acting.As,
    *,
    sequence: Annotated[int, typer.Option(min=1, help="Sequence of its trust bundle; rises with each change.")] = 1,
    as_json: render.AsJson = False,
) -> None:
    """Register an HSM and its issuing CA."""
    from moorline.cli import hsm_request
    from moorline.ledger.transactions import RegisterHsm, RegisterIssuingCa

    asked = hsm_request.read(request)
    provider_changes.send(
        acts,
        f"registered HSM {asked.hsm} and issuing CA {asked.issuing_ca}",
        provider_changes.hsm_body(RegisterHsm, asked, request.parent / "hsm.pem", sequence),
        RegisterIssuingCa(id=asked.issuing_ca, certificate=provider_changes.der(request.parent / "issuing-ca.pem")),
        as_json=as_json,
    )


@register.command("issuing-ca")
def register_issuing_ca(
    identifier: Annotated[str, typer.Argument(help="Its id: the common name of its certificate.")],
    acts: acting.As,
    certificate: Annotated[Path, typer.Option(help="Its certificate (PEM).")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Register one more issuing CA."""
    from moorline.ledger.transactions import RegisterIssuingCa

    body = RegisterIssuingCa(id=identifier, certificate=provider_changes.der(certificate))
    provider_changes.send(acts, f"registered issuing CA {identifier}", body, as_json=as_json)


@register.command("orchestrator")
def register_orchestrator(
    identifier: Annotated[str, typer.Argument(help="The orchestrator's id.")],
    acts: acting.As,
    key: Annotated[Path, typer.Option(help="Public half of its intent key, PEM or DER.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Register the key with which an orchestrator signs launch intents."""
    from moorline.ledger.transactions import RegisterOrchestrator
    from moorline.services.key_files import load_public
    from moorline.wire import keys

    body = RegisterOrchestrator(id=identifier, public_key=keys.public_bytes(load_public(key)))
    provider_changes.send(acts, f"registered orchestrator {identifier}", body, as_json=as_json)


@register.command("reference-values")
def register_reference_values(
    identifier: Annotated[str, typer.Argument(help="The set's id on the ledger.")],
    acts: acting.As,
    file: Annotated[Path, typer.Option(help="The signed set (moor verifier sign-reference-values).")],
    *,
    kind: Annotated[str, typer.Option(help="What kind of evidence it is for.")] = "tpm",
    as_json: render.AsJson = False,
) -> None:
    """Register the digest of a set of reference values, so that others see what this provider accepts."""
    import hashlib

    from moorline.ledger.transactions import RegisterReferenceValues

    digest = hashlib.sha256(render.read(file)).digest()
    body = RegisterReferenceValues(id=identifier, kind=kind, digest=digest)
    provider_changes.send(acts, f"registered reference values {identifier}", body, as_json=as_json)


@register.command("platform")
def register_platform(  # noqa: PLR0913 - one parameter an option
    name: Annotated[str, typer.Argument(help="The host's id.")],
    acts: acting.As,
    tcti: Annotated[str, typer.Option(help="Its TPM: swtpm:path=/path, device:/dev/tpmrm0.")],
    tag: Tag,
    location: Annotated[str, typer.Option(help="Country and region, as the tag says.")],
    *,
    chip: Annotated[Path | None, typer.Option(help="Directory of its SIMULATED chip; the record says so.")] = None,
    chip_id: Annotated[str | None, typer.Option(help="Id of its real chip, hex; with --product.")] = None,
    product: Annotated[str | None, typer.Option(help="Product line of its real chip: Milan, Genoa or Turin.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Register a host: its TPM, where it stands, and its processor."""
    from moorline.cli.host import ek_digest
    from moorline.ledger.transactions import RegisterPlatform
    from moorline.policy.reference_values import tag_digest

    identifier, line = _chip(chip, chip_id, product)
    body = RegisterPlatform(
        id=name,
        chip_id=identifier,
        product=line,
        ek_digest=ek_digest(tcti),
        location=location,
        tag_digest=tag_digest(render.read(tag)),
        simulated=chip is not None,
    )
    provider_changes.send(acts, f"registered platform {name}", body, as_json=as_json)


@register.command("service")
def register_service(
    name: Annotated[str, typer.Argument(help="The service's name.")],
    acts: acting.As,
    package: Annotated[list[Path], typer.Option(help="A package that may run as this service; may be repeated.")],
    *,
    use_case: Annotated[str, typer.Option(help="SEC009 use case, 4.1 to 4.7.")] = "4.7",
    profile: Annotated[list[str] | None, typer.Option(help="A channel profile; may be repeated. tls if left out.")] = None,
    caller: Annotated[list[str] | None, typer.Option(help="A provider whose devices may call; may be repeated.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Register a service: which packages, under which guest measurement (this installation's), may run as it."""
    from moorline.ledger.transactions import RegisterService

    rules, measurement = provider_changes.packages(package)
    body = RegisterService(
        name=name, use_case=use_case, packages=rules, profiles=tuple(profile or ("tls",)), callers=tuple(caller or ())
    )
    provider_changes.send(acts, f"registered service {name}", body, as_json=as_json, measurement=measurement.hex())


def _chip(directory: Path | None, chip_id: str | None, product: str | None) -> tuple[bytes, str]:
    """Id and product line of a processor, SIMULATED or real."""
    if directory is not None and chip_id is None and product is None:
        from moorline.simulators.manufacturer import open_chip

        found = open_chip(directory)
        return found.chip_id, found.product.value
    if directory is not None or chip_id is None or product not in _PRODUCTS:
        raise typer.BadParameter(f"give --chip, or --chip-id and --product ({', '.join(_PRODUCTS)})")
    try:
        return bytes.fromhex(chip_id), product
    except ValueError:
        raise typer.BadParameter("a chip id is hex", param_hint="--chip-id") from None


def _names(own: Any) -> tuple[str, str]:  # noqa: ANN401 - x509.Certificate, imported late
    """Name and trust domain of a provider's certificate: its common name, and the one URI domain it is constrained to."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        permitted = own.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
        name = str(own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        domain = next(one.value for one in permitted if isinstance(one, x509.UniformResourceIdentifier))
    except (x509.ExtensionNotFound, IndexError, StopIteration, ValueError):
        raise Malformed(
            "provider.certificate_malformed",
            "the file is not a provider's certificate",
            expected="a common name, and one permitted URI domain",
            remedy="take the file that moor authority issue wrote",
        ) from None
    return name, domain
