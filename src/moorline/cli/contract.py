"""`moor contract`: what one provider lets devices of another do. It counts once both sides signed it on the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moorline.cli import acting, render
from moorline.errors import Refused

if TYPE_CHECKING:
    from moorline.ledger.records import ContractRecord

app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The contract's id on the ledger.")]


@app.callback()
def contract() -> None:
    """Offer, accept, withdraw and show contracts between providers."""


@app.command()
def offer(
    name: Name,
    provider: acting.As,
    service: Annotated[str, typer.Option(help="The offering provider's service.")],
    to: Annotated[str, typer.Option("--to", help="The provider whose devices may use it.")],
    *,
    conditions: Annotated[
        Path | None, typer.Option(help="Conditions in Cedar; all devices of that provider if left out.")
    ] = None,
    profile: Annotated[list[str] | None, typer.Option(help="A channel profile; may be repeated. tls if left out.")] = None,
    as_json: render.AsJson = False,
) -> None:
    """Offer devices of another provider the use of a service."""
    from moorline.ledger.transactions import OfferAccess
    from moorline.nfv import parse_name

    parse_name(to, "provider")
    text = _all_devices_of(to) if conditions is None else _conditions(conditions)
    height = acting.provider(provider).send(
        OfferAccess(contract=name, service=service, grantee=to, conditions=text, profiles=tuple(profile or ("tls",)))
    )
    render.facts(
        {"contract": name, "offered to": to, "height": height, "conditions": text},
        as_json=as_json,
        then=f"{to} accepts: moor contract accept {name} --as DIR",
    )


@app.command()
def accept(name: Name, provider: acting.As, *, as_json: render.AsJson = False) -> None:
    """Accept what another provider offered."""
    from moorline.ledger.transactions import AcceptAccess

    height = acting.provider(provider).send(AcceptAccess(contract=name))
    render.facts({"contract": name, "accepted": True, "height": height}, as_json=as_json)


@app.command()
def withdraw(name: Name, provider: acting.As, *, as_json: render.AsJson = False) -> None:
    """End a contract; either side may. Connections under it end within the ledger's proof age."""
    from moorline.ledger.transactions import WithdrawAccess

    height = acting.provider(provider).send(WithdrawAccess(contract=name))
    render.facts({"contract": name, "withdrawn": True, "height": height}, as_json=as_json)


@app.command()
def show(name: Name, provider: acting.As, *, as_json: render.AsJson = False) -> None:
    """Show a contract, proven by a quorum of authorities."""
    found = _record(acting.provider(provider), name)
    render.facts(_facts(found), as_json=as_json)


@app.command()
def test(
    name: Name,
    provider: acting.As,
    device: Annotated[str, typer.Option(help="The device's name at the provider that accepted.")],
    *,
    as_json: render.AsJson = False,  # noqa: PT028 - a command called test, not a test
) -> None:
    """Say whether the contract would let a device in now. Exit code 1: no. It looks at no certificate and no revocation."""
    from moorline.cli.ledger_contract import judged, question_now

    found = judged(acting.provider(provider), name, question_now(device), None)
    if not found["allowed"]:
        raise Refused("contract.denied", "the contract does not let this device in", got=found["why"])
    render.facts({"device": device, "allowed": True, "rule": found["why"]}, as_json=as_json)


def _record(acts: acting.Provider, name: str) -> ContractRecord:
    from moorline.ledger import records

    key = records.contract_key(name)
    return records.parse(records.ContractRecord, acts.prove(key).record(key))


def _facts(found: ContractRecord) -> dict[str, Any]:
    return {
        "contract": found.id,
        "status": found.status.value,
        "provider": found.provider,
        "service": found.service,
        "grantee": found.grantee,
        "profiles": list(found.profiles),
        "conditions": found.conditions,
    }


def _conditions(path: Path) -> str:
    """A text that the ledger and the engine both take; it says here already what would be wrong."""
    from moorline.hsm.authorisation import require_engine_takes
    from moorline.policy.conditions import MAX_BYTES, require_valid

    text = render.read(path).decode("utf-8", errors="replace")
    require_valid(text, max_bytes=MAX_BYTES)
    require_engine_takes(text)
    return text


def _all_devices_of(grantee: str) -> str:
    return (
        f'permit(principal, action == Moorline::Action::"connect", resource) when {{ principal.provider == "{grantee}" }};'
    )
