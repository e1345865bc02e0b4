"""`moor hsm key`: the lives of an HSM's keys: rotate, activate, retire, destroy."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moorline.cli import acting, hsm_request, render

app = typer.Typer(no_args_is_help=True, help="Keys of the HSM, their states and dates.")
Label = Annotated[str, typer.Argument(help="The key (moor hsm key list).")]
Request = Annotated[
    str | None, typer.Option("--request", help="The approved request; left out, one is made for the custodians.")
]
_TIMES = ("due", "created", "active", "retiring", "retire_after", "retired", "destroyed")
_COLUMNS = ("label", "role", "state", "waits_for", *_TIMES)


@app.command("list")
def list_keys(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show keys with their states and the moment each began, when a key is due, and what a begun one waits for."""

    async def ask(client: Any) -> Any:  # noqa: ANN401 - HttpClient, imported late
        return await client.get_json("/v1/hsm/keys")

    rows = acting.at_broker(broker, ask)["keys"]
    shown = rows if as_json else [_dated(row) for row in rows]
    render.table(shown, _COLUMNS, key="keys", as_json=as_json, empty="no keys are kept account of yet")


@app.command()
def rotate(
    role: Annotated[str, typer.Argument(help="wrapping, issuing-ca, hsm-identity, hsm-kem or verifier.")],
    broker: acting.Broker,
    *,
    issuing_ca: Annotated[str | None, typer.Option(help="Id of the new issuing CA on the ledger.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for what others need of the new key.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Begin a new key. A wrapping key is used at once; of others somebody must know first: ledger or relying parties.

    Asked again while a begun key waits, it is that key's files that are written.
    """
    if role != "wrapping" and output is None:
        raise typer.BadParameter("say where what others need goes: --output DIR")
    if role == "issuing-ca" and issuing_ca is None:
        raise typer.BadParameter("name the new issuing CA: --issuing-ca ID")
    before = None if output is None else _prepared(broker, output)  # before anything is made
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/keys/rotate", {"role": role}))
    if output is None or before is None:
        render.facts(_dated(answer), as_json=as_json, then="moor hsm key rewrap, then retire the old one")
        return
    found: Any = acting.at_broker(broker, lambda client: client.get_json("/v1/keys"))
    begun = _Begun(label=str(answer["label"]), public=answer["public_key"], found=found, output=output, broker=broker)
    files, then = _told(role, begun, before, issuing_ca)
    render.files(files, as_json=as_json, then=then, label=begun.label)


def _prepared(broker: Path, output: Path) -> hsm_request.HsmRequest:
    for name in (hsm_request.FILE, "hsm.pem", "issuing-ca.pem", "verifier.pem"):
        render.require_free(output / name)
    return hsm_request.read(broker / hsm_request.FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A begun key, and what the broker says of the keys in force."""

    label: str
    public: str
    found: dict[str, str]
    output: Path
    broker: Path

    def now(self, before: hsm_request.HsmRequest) -> hsm_request.HsmRequest:
        """The request of the keys in force: those of the first ceremony may be long gone."""
        found = self.found
        return replace(
            before,
            identity_key=found["identity"],
            issuing_ca_key=found["issuing_ca"],
            verifier_key=found["verifier"],
            kem_key=found["kem"],
        )

    def activate(self, certificate: Path | None = None) -> str:
        """The command that is last."""
        more = "" if certificate is None else f" --certificate {certificate}"
        return f"moor hsm key activate {self.label}{more} --broker {self.broker}"


def _told(role: str, begun: _Begun, before: hsm_request.HsmRequest, issuing_ca: str | None) -> tuple[list[Path], list[str]]:
    """Files for those who must know of the key first, and what is to be done with them, in order."""
    output = begun.output
    if role == "verifier":
        written = render.new_file(output / "verifier.pem", begun.found["verifier_pem"].encode("ascii"))
        return [written], [f"put {written} in the place of verifier_key at each orchestrator", begun.activate()]
    if role == "hsm-kem":
        request = render.new_file(output / hsm_request.FILE, replace(begun.now(before), kem_key=begun.public).render())
        certificate = render.new_file(output / "hsm.pem", begun.found["hsm_certificate"].encode("ascii"))
        return [request, certificate], [_update(request), begun.activate()]
    if role == "issuing-ca":
        changed = replace(begun.now(before), issuing_ca=issuing_ca or before.issuing_ca, issuing_ca_key=begun.public)
        request, certificate = render.new_file(output / hsm_request.FILE, changed.render()), output / "issuing-ca.pem"
        register = f"moor provider register issuing-ca {issuing_ca} --certificate {certificate} --as PROVIDER"
        return [request], [_certify(request), register, begun.activate(certificate)]
    request = render.new_file(output / hsm_request.FILE, replace(begun.now(before), identity_key=begun.public).render())
    return [request], [_certify(request), _update(request), begun.activate(output / "hsm.pem")]


def _certify(request: Path) -> str:
    return f"moor hsm certify {request} --as PROVIDER"


def _update(request: Path) -> str:
    return f"moor provider update hsm {request} --sequence N --as PROVIDER"


@app.command()
def activate(
    label: Label,
    broker: acting.Broker,
    certificate: Annotated[
        Path | None,
        typer.Option(help="The new key's certificate, PEM; the ledger has it already. None for hsm-kem and verifier."),
    ] = None,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Use a begun key from now on. The one before it retires, and what it signed stays good meanwhile."""
    pem = None if certificate is None else render.read(certificate).decode("ascii", "replace")
    body = {"label": label, "certificate": pem}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/keys/activate", body))
    render.facts(_dated(answer) if not as_json else answer, as_json=as_json)


@app.command()
def rewrap(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Seal everything again under the active wrapping key. Can be stopped and repeated at any time."""
    with render.progress("sealing again"):
        answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/keys/rewrap", {}))
    render.facts(answer, as_json=as_json)


@app.command()
def retire(label: Label, broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """End the use of a retiring key, when its overlap is over and nothing is sealed under it."""
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/keys/retire", {"label": label}))
    render.facts(_dated(answer) if not as_json else answer, as_json=as_json)


@app.command()
def destroy(label: Label, broker: acting.Broker, *, request: Request = None, as_json: render.AsJson = False) -> None:
    """Destroy a retired key. Takes a quorum of custodians: ask first, then again with the approved request."""
    body = {"label": label, "request": request}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/keys/destroy", body))
    said_next(answer, f"moor hsm key destroy {label}", as_json=as_json)


def said_next(answer: dict[str, Any], again: str, *, as_json: bool) -> None:
    """A request that waits for custodians, or what was done."""
    if as_json:
        typer.echo(json.dumps(answer))
        return
    waiting = answer.get("request")
    then = None if waiting is None else f"custodians: moor hsm approve {waiting}; then {again} --request {waiting}"
    render.facts(_dated(answer), as_json=False, then=then)


def _dated(row: dict[str, Any]) -> dict[str, Any]:
    from moorline.clock import Instant, rendered

    return {
        name: rendered(Instant(value)) if name in _TIMES and isinstance(value, int) else value for name, value in row.items()
    }
