"""`moor enrolment`: which devices may enrol, and how; asked at the broker's admin socket. One-time codes: `moor hsm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moorline.cli import acting, render

app = typer.Typer(no_args_is_help=True)
Device = Annotated[str, typer.Argument(help="The device's name at this provider.")]


@app.callback()
def enrolment() -> None:
    """Say which devices may enrol, and how."""


@app.command()
def account(
    name: Annotated[str, typer.Argument(help="The account's name, such as crew-1.")],
    broker: acting.Broker,
    *,
    prefix: Annotated[str, typer.Option(help="It enrols devices whose names begin so.")],
    devices: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    days: Annotated[int, typer.Option(min=1, max=366, help="How long it is good.")] = 1,
    approval: Annotated[bool, typer.Option("--approval", help="A person approves each device first.")] = False,
    as_json: render.AsJson = False,
) -> None:
    """Open an installer's account, or replace one. The password is shown this once."""
    body = {"name": name, "prefix": prefix, "devices": devices, "ttl_s": days * 24 * 3600, "approval": approval}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/enrolment-accounts", body))
    render.facts(answer, as_json=as_json, then="simpleenroll with HTTP Basic; the CSR's common name names the device")


@app.command()
def expect(
    device: Device,
    broker: acting.Broker,
    *,
    certificate: Annotated[Path, typer.Option(help="The manufacturer's certificate of the device (IDevID), PEM.")],
    as_json: render.AsJson = False,
) -> None:
    """Expect a manufactured device: it enrols with its manufacturer's certificate at the bootstrap address."""
    body = {"device": device, "certificate": render.read(certificate).decode("ascii", errors="replace")}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/expected-devices", body))
    render.facts(answer, as_json=as_json)


@app.command()
def waiting(broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Show enrolments that wait for a person, and those a person decided."""
    answer: Any = acting.at_broker(broker, lambda client: client.get_json("/v1/enrolments"))
    columns = ("device", "applicant", "state", "at", "key")
    render.table(answer["enrolments"], columns, key="enrolments", as_json=as_json, empty="nothing waits")


@app.command()
def approve(device: Device, broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Let an enrolment that waits go on; the device gets its certificate when it asks again."""
    _decide(device, broker, approved=True, as_json=as_json)


@app.command()
def refuse(device: Device, broker: acting.Broker, *, as_json: render.AsJson = False) -> None:
    """Refuse an enrolment that waits."""
    _decide(device, broker, approved=False, as_json=as_json)


def _decide(device: str, broker: Path, *, approved: bool, as_json: bool) -> None:
    body = {"device": device, "approved": approved}
    answer: Any = acting.at_broker(broker, lambda client: client.post_json("/v1/enrolments/decide", body))
    render.facts(answer, as_json=as_json)
