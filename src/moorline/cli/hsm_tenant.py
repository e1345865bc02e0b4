"""`moor hsm tenant`: tenants of the virtual HSM, each with a token of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moorline.cli import acting, hsm_key, render

app = typer.Typer(no_args_is_help=True, help="Tenants of the HSM, each with a token, door, quota and log of its own.")
Name = Annotated[str, typer.Argument(help="The tenant.")]
_MOST_UID = 2**32 - 2
_COLUMNS = ("name", "state", "served", "uid", "weight", "keys", "operations", "at", "socket")


@app.command("list")
def list_tenants(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show all tenants, also destroyed ones."""

    async def ask(client: Any) -> Any:  # noqa: ANN401 - HttpClient, imported late
        return await client.get_json("/v1/hsm/tenants")

    rows = acting.at_broker(broker, ask)["tenants"]
    render.table(rows, _COLUMNS, key="tenants", as_json=as_json, empty="no tenants; next: moor hsm tenant create")


@app.command()
def create(
    name: Name,
    broker: acting.Broker,
    uid: Annotated[int, typer.Option(min=0, max=_MOST_UID, help="The user (number) whose processes are the tenant.")],
    *,
    weight: Annotated[int, typer.Option(min=1, max=100, help="Share of the token when others want it too.")] = 1,
    keys: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many keys it may have.")] = 64,
    operations: Annotated[int, typer.Option(min=1, max=10**9, help="How many operations a minute it may ask for.")] = 60_000,
    as_json: render.AsJson = False,
) -> None:
    """Make a tenant with a token of its own, and open its socket."""
    body = {"name": name, "uid": uid, "weight": weight, "keys": keys, "operations": operations}
    with render.progress("making a token"):
        answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/hsm/tenants", body))
    render.facts({key: value for key, value in answer.items() if key != "proof"}, as_json=as_json)


@app.command()
def suspend(name: Name, broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Shut a tenant's socket; its keys stay."""
    render.facts(_post(broker, "suspend", {"name": name}), as_json=as_json)


@app.command()
def resume(name: Name, broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Open a suspended tenant's socket again."""
    render.facts(_post(broker, "resume", {"name": name}), as_json=as_json)


@app.command()
def rotate(name: Name, broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Give a tenant's token a new PIN. Its keys stay; it rotates those itself."""
    render.facts(_post(broker, "rotate", {"name": name}), as_json=as_json)


@app.command()
def destroy(
    name: Name,
    broker: acting.Broker,
    *,
    request: hsm_key.Request = None,
    proof: Annotated[Path | None, typer.Option(help="Write the signed record of the destruction here.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Destroy a tenant and its keys. Takes a quorum of custodians: ask first, then again with the approved request."""
    if proof is not None:
        render.require_free(proof)  # before the tenant is gone
    answer = _post(broker, "destroy", {"name": name, "request": request})
    if proof is not None and "proof" in answer:
        import base64

        render.new_file(proof, base64.b64decode(answer["proof"]))
    hsm_key.said_next(answer, f"moor hsm tenant destroy {name}", as_json=as_json)


def _post(broker: Path, what: str, body: dict[str, Any]) -> dict[str, Any]:
    answer: Any = acting.at_broker(broker, lambda client: client.post_json(f"/v1/hsm/tenants/{what}", body))
    found: dict[str, Any] = answer
    return found
