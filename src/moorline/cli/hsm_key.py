"""`moor hsm key`: the lives of an HSM's keys: rotate, activate, retire, destroy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moorline.cli import acting, hsm_request, render

app = typer.Typer(no_args_is_help=True, help="Keys of the HSM, their states and dates.")
Label = Annotated[str, typer.Argument(help="The key (moor hsm key list).")]
Request = Annotated[
    str | None, typer.Option("--request", help="The approved request; left out, one is made for the custodians.")
]
_COLUMNS = ("label", "role", "state", "created", "active", "retiring", "retire_after", "retired", "destroyed")
_TIMES = _COLUMNS[3:]


@app.command("list")
def list_keys(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show keys with their states and the moment each began."""

    async def ask(client: Any) -> Any:  # noqa: ANN401 - HttpClient, imported late
        return await client.get_json("/v1/hsm/keys")

    rows = acting.at_broker(broker, ask)["keys"]
    shown = rows if as_json else [_dated(row) for row in rows]
    render.table(shown, _COLUMNS, key="keys", as_json=as_json, empty="no keys are kept account of yet")


@app.command()
def rotate(
    role: Annotated[str, typer.Argument(help="wrapping, issuing-ca or hsm-identity.")],
    broker: acting.Broker,
    *,
    issuing_ca: Annotated[str | None, typer.Option(help="Id of the new issuing CA on the ledger.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for the new request.json.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Begin a new key. A wrapping key is used at once; others are certified and registered by the provider first."""
    if role != "wrapping" and output is None:
        raise typer.BadParameter("say where the request goes: --output DIR")
    if role == "issuing-ca" and issuing_ca is None:
        raise typer.BadParameter("name the new issuing CA: --issuing-ca ID")
    before = None if output is None else hsm_request.read(broker / hsm_request.FILE)  # before anything is made
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/keys/rotate", {"role": role}))
    if output is None or before is None:
        render.facts(_dated(answer), as_json=as_json, then="moor hsm key rewrap, then retire the old one")
        return
    changed = (
        replace(before, issuing_ca=issuing_ca or before.issuing_ca, issuing_ca_key=answer["public_key"])
        if role == "issuing-ca"
        else replace(before, identity_key=answer["public_key"])
    )
    written = render.new_file(output / hsm_request.FILE, changed.render())
    then = [f"moor hsm certify {written} --as PROVIDER"]
    if role == "issuing-ca":
        certificate = output / "issuing-ca.pem"
        then.append(f"moor provider register issuing-ca {issuing_ca} --certificate {certificate} --as PROVIDER")
    else:
        certificate = output / "hsm.pem"
        then.append(f"moor provider update hsm {written} --sequence N --as PROVIDER")
    then.append(f"moor hsm key activate {answer['label']} --certificate {certificate} --broker {broker}")
    render.files([written], as_json=as_json, then=then, label=str(answer["label"]))


@app.command()
def activate(
    label: Label,
    broker: acting.Broker,
    certificate: Annotated[Path, typer.Option(help="The new key's certificate, PEM; the ledger has it already.")],
    *,
    as_json: render.AsJson = False,
) -> None:
    """Use a begun key from now on. The one before it retires, and what it signed stays good meanwhile."""
    body = {"label": label, "certificate": render.read(certificate).decode("ascii", "replace")}
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
