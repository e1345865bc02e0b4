"""`moor provider`: what a provider changes, ends or revokes of what it has on the ledger, and its own key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from moorline.cli import acting, render
from moorline.errors import Misconfigured

if TYPE_CHECKING:
    from moorline.cli.hsm_request import HsmRequest
    from moorline.ledger.records import PackageRule
    from moorline.ledger.transactions import Body, RegisterHsm, RotateHsm

_Hsm = TypeVar("_Hsm", "RegisterHsm", "RotateHsm")
update = typer.Typer(no_args_is_help=True, help="Change what this provider has on the ledger.")
_OVERLAP_S: Final = 86400


def send(directory: Path, says: str, *bodies: Body, as_json: bool, **more: str) -> None:
    """Sign and submit as the provider whose directory this is, and say what was done."""
    height = acting.provider(directory).send(*bodies)
    found: dict[str, Any] = {"done": says, "height": height, **more}
    render.facts(found, as_json=as_json)


def der(path: Path) -> bytes:
    """The first certificate of a PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    return x509.load_pem_x509_certificate(render.read(path)).public_bytes(serialization.Encoding.DER)


def packages(paths: list[Path]) -> tuple[tuple[PackageRule, ...], bytes]:
    """Package rules under this installation's guest measurement, and that measurement."""
    from moorline.ledger.records import PackageRule
    from moorline.orchestration.package import package_digest
    from moorline.simulators.guest_image import measure

    with render.progress("measuring the guest runtime"):
        measurement = measure("moorline.workload_agent")
    found = (PackageRule(package_digest=package_digest(render.read(path)), measurement=measurement) for path in paths)
    return tuple(found), measurement


def hsm_body(kind: type[_Hsm], asked: HsmRequest, certificate: Path, sequence: int) -> _Hsm:
    """What an HSM asks its provider to put on the ledger."""
    from moorline.wire import keys

    public = asked.keys()
    return kind(
        id=asked.hsm,
        certificate=der(certificate),
        address=asked.sessions,
        est_url=f"https://{asked.https}/.well-known/est",
        kem_public=public.kem,
        signing_public=keys.public_bytes(public.identity),
        bundle_sequence=sequence,
    )


def revoke(
    kind: Annotated[
        str,
        typer.Argument(
            help="instance, device, certificate, host, launcher, measurement, chip; or issuing-ca, hsm, orchestrator, "
            "platform, service."
        ),
    ],
    identifier: Annotated[str, typer.Argument(help="Its name, serial number (hex) or digest (hex).")],
    acts: acting.As,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Revoke something of this provider for everybody. It is never taken back."""
    send(acts, f"revoked {kind} {identifier}", _ending(kind, identifier), as_json=as_json)


def _ending(kind: str, identifier: str) -> Body:
    from moorline.ledger import transactions as tx
    from moorline.ledger.records import RevocationKind

    ends: dict[str, Callable[[str], Body]] = {
        "issuing-ca": lambda found: tx.RevokeIssuingCa(id=found),
        "hsm": lambda found: tx.RevokeHsm(id=found),
        "orchestrator": lambda found: tx.RevokeOrchestrator(id=found),
        "platform": lambda found: tx.RevokePlatform(id=found),
        "service": lambda found: tx.RemoveService(name=found),
    }
    if kind in ends:
        return ends[kind](identifier)
    kinds = [each.value for each in RevocationKind if each is not RevocationKind.VENDOR_ROOT]
    if kind not in kinds:
        raise typer.BadParameter(", ".join((*kinds, *ends)), param_hint="kind")
    return tx.Revoke(kind=RevocationKind(kind), id=identifier)


def rotate_key(
    following: Annotated[
        Path,
        typer.Argument(help="Directory with the next key and its certificate (moor init provider)."),
    ],
    acts: acting.As,
    *,
    overlap_s: Annotated[
        int, typer.Option("--overlap", min=1, help="For how long the old key counts beside it; seconds.")
    ] = _OVERLAP_S,
    as_json: render.AsJson = False,
) -> None:
    """Let another key act for this provider. Until the overlap ends both count; what the old one signed ends with it."""
    from moorline.clock import SystemClock
    from moorline.ledger.transactions import RotateProviderKey

    old, new = acting.provider(acts), acting.provider(following)
    if (old.name, old.settings.trust_domain) != (new.name, new.settings.trust_domain):
        raise Misconfigured(
            "provider.other_provider", "the directory is another provider's", expected=old.name, got=new.name
        )
    retire_at = SystemClock().now() + overlap_s
    body = RotateProviderKey(certificate=der(new.settings.certificate), retire_at=retire_at)
    height = old.send(body)
    render.facts(
        {"done": f"{old.name} has another key", "not_after": retire_at, "height": height},
        as_json=as_json,
        then=f"certify and rotate HSMs and issuing CAs under it before then, as --as {following}",
    )


def anchor(
    log: Annotated[str, typer.Argument(help="The log's name.")],
    acts: acting.As,
    size: Annotated[int, typer.Option(min=0, help="How many entries it has.")],
    root: Annotated[str, typer.Option(help="Root over these entries (RFC 6962), hex.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Anchor a checkpoint of a log that this provider keeps: it can only grow from here."""
    from moorline.ledger.transactions import AnchorLog

    try:
        digest = bytes.fromhex(root)
    except ValueError:
        raise typer.BadParameter("a root is hex", param_hint="--root") from None
    send(acts, f"anchored {log} at {size}", AnchorLog(log=log, size=size, root=digest), as_json=as_json)


@update.command("hsm")
def update_hsm(
    request: Annotated[Path, typer.Argument(help="request.json, with hsm.pem beside it.")],
    acts: acting.As,
    sequence: Annotated[int, typer.Option(min=1, help="Sequence of its trust bundle: higher than before.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Give an HSM new keys, a new certificate or another address. The old ones end with this."""
    from moorline.cli import hsm_request
    from moorline.ledger.transactions import RotateHsm

    asked = hsm_request.read(request)
    body = hsm_body(RotateHsm, asked, request.parent / "hsm.pem", sequence)
    send(acts, f"rotated HSM {asked.hsm}", body, as_json=as_json)


@update.command("service")
def update_service(
    name: Annotated[str, typer.Argument(help="The service's name.")],
    acts: acting.As,
    package: Annotated[list[Path], typer.Option(help="A package that may run as it from now on; may be repeated.")],
    *,
    use_case: Annotated[str, typer.Option(help="SEC009 use case, 4.1 to 4.7.")] = "4.7",
    profile: Annotated[list[str] | None, typer.Option(help="A channel profile; may be repeated. tls if left out.")] = None,
    caller: Annotated[list[str] | None, typer.Option(help="A provider whose devices may call; may be repeated.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Replace what is registered of a service: packages, profiles, callers. What is not named ends."""
    from moorline.ledger.transactions import UpdateService

    rules, measurement = packages(package)
    body = UpdateService(
        name=name, use_case=use_case, packages=rules, profiles=tuple(profile or ("tls",)), callers=tuple(caller or ())
    )
    send(acts, f"updated service {name}", body, as_json=as_json, measurement=measurement.hex())


def register(app: typer.Typer) -> None:
    """Put these commands under the noun."""
    app.add_typer(update, name="update")
    app.command("revoke")(revoke)
    app.command("rotate-key")(rotate_key)
    app.command("anchor")(anchor)
