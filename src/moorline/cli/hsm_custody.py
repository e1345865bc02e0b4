"""Custodians on the command line: make one's keys, approve what destroys or lets out, open one's share of a backup."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import acting, render
from moorline.errors import Malformed, Misconfigured

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, x25519

    from moorline.hsm.custody import Circle, Custodian

PUBLIC: Final = "custodian.cbor"
_SIGNING: Final = "signing.pem"
_SEALING: Final = "sealing.pem"
Custodians = Annotated[
    list[Path] | None,
    typer.Option("--custodian", help="A custodian's custodian.cbor; once for each. Without any, no backup."),
]
Quorum = Annotated[int, typer.Option("--quorum", help="How many custodians it takes.", min=2, max=10)]
Own = Annotated[Path, typer.Option("--custodian", envvar="MOOR_CUSTODIAN", help="The custodian's own directory.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `moor hsm`."""
    custodian = typer.Typer(no_args_is_help=True, help="People of whom a quorum approves, and opens backups.")
    app.add_typer(custodian, name="custodian")
    custodian.command("new")(new)
    app.command("approve")(approve)
    app.command("requests")(requests)


def new(
    name: Annotated[str, typer.Argument(help="The custodian's name.")],
    directory: Annotated[Path, typer.Option("--dir", help="Where the keys go; on a medium that only this person has.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Make a custodian's keys: one signs approvals, shares are sealed to the other."""
    from cryptography.hazmat.primitives.asymmetric import ec, x25519

    from moorline.hsm.custody import public_of
    from moorline.wire import schema

    signing, sealing = ec.generate_private_key(ec.SECP256R1()), x25519.X25519PrivateKey.generate()
    public = public_of(name, signing.public_key(), sealing.public_key())
    for file in (_SIGNING, _SEALING, PUBLIC):
        render.require_free(directory / file)  # all or nothing: half a custodian's keys are nobody's
    for file, pem in ((_SIGNING, _pem(signing)), (_SEALING, _pem(sealing))):
        render.new_file(directory / file, pem, mode=0o600)
    written = render.new_file(directory / PUBLIC, schema.encode(public))
    then = [f"give {written} to whoever sets the HSM up: moor hsm init --custodian FILE ... --quorum N"]
    render.files([written, directory / _SIGNING, directory / _SEALING], as_json=as_json, then=then)


def approve(
    request: Annotated[str, typer.Argument(help="The request's id (moor hsm requests).")],
    custodian: Own,
    broker: acting.Broker,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Approve, as a custodian, one request of this HSM. It says what is approved before it is signed."""
    import base64

    from moorline.clock import SystemClock
    from moorline.hsm import approvals
    from moorline.hsm.approvals import Request
    from moorline.wire import keys, schema

    listed: Any = _listed(broker)
    found = next((each for each in listed if each["request"] == request), None)
    if found is None:
        raise Malformed("approval.unknown", "there is no such request", got=request, remedy="moor hsm requests")
    # The request is decoded here: what is signed is what is shown, whatever the broker says about it.
    asked = schema.decode(Request, base64.b64decode(found["data"]))
    typer.echo(f"approving: {asked.operation.value} of {asked.target} at {asked.provider}/{asked.hsm}", err=True)
    signed = approvals.approve(
        asked, read_public(custodian / PUBLIC).name, keys.KeySigner(_signing(custodian)), SystemClock().now()
    )
    body = {"request": request, "signed": base64.b64encode(signed).decode("ascii")}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/approvals", body))
    render.facts(answer, as_json=as_json)


def requests(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show requests for approval, and who approved."""
    rows = [{name: value for name, value in each.items() if name != "data"} for each in _listed(broker)]
    columns = ("request", "operation", "target", "not_after", "approved_by", "used")
    render.table(rows, columns, key="requests", as_json=as_json, empty="no requests")


def circle_of(custodians: list[Path] | None, quorum: int) -> Circle | None:
    """The circle of these files; None without any. Raises Malformed("custody.circle")."""
    from moorline.hsm.custody import Circle

    if not custodians:
        return None
    circle = Circle(quorum=quorum, custodians=tuple(read_public(each) for each in custodians))
    circle.require_sane()
    return circle


def read_public(path: Path) -> Custodian:
    """A custodian's public file. Raises Malformed."""
    from moorline.hsm.custody import Custodian
    from moorline.wire import schema

    return schema.decode(Custodian, render.read(path), max_bytes=4096)


def sealing(directory: Path) -> x25519.X25519PrivateKey:
    """A custodian's key for shares. Raises Misconfigured("custody.key_unreadable")."""
    from cryptography.hazmat.primitives.asymmetric import x25519

    key = _private(directory / _SEALING)
    if not isinstance(key, x25519.X25519PrivateKey):
        raise Misconfigured("custody.key_unreadable", "this is no custodian's key", got=directory / _SEALING)
    return key


def _signing(directory: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _private(directory / _SIGNING)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Misconfigured("custody.key_unreadable", "this is no custodian's key", got=directory / _SIGNING)
    return key


def _private(path: Path) -> object:
    from cryptography.hazmat.primitives import serialization

    try:
        return serialization.load_pem_private_key(render.read(path), password=None)
    except (ValueError, TypeError) as error:
        raise Misconfigured(
            "custody.key_unreadable", "this is no custodian's key", got=f"{path}: {type(error).__name__}"
        ) from None


def _pem(key: ec.EllipticCurvePrivateKey | x25519.X25519PrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _listed(broker: Path) -> list[dict[str, Any]]:
    async def ask(client: Any) -> Any:  # noqa: ANN401 - HttpClient, imported late
        return await client.get_json("/v1/hsm/requests")

    found: list[dict[str, Any]] = acting.at_broker(broker, ask)["requests"]
    return found
