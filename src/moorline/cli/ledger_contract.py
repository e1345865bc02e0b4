"""`moor ledger contract`: what a contract would say to a device, judged as both parties' HSMs judge it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from moorline.cli import acting, render
from moorline.errors import EXIT_REFUSED, Malformed, Refused

if TYPE_CHECKING:
    from moorline.clock import Instant
    from moorline.hsm.authorisation import AccessDecision
    from moorline.ledger.light_client import ProvenState
    from moorline.ledger.records import ContractRecord

NO_PFS: Final = "no-pfs"
"""The profile without a key agreement (wire.nopfs.PROFILE); named here, for a command line starts without the wire."""

app = typer.Typer(no_args_is_help=True, help="Try out what a contract would say.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Who asks, over which session, when."""

    device: str
    profile: str
    post_quantum: bool
    at: Instant


@app.callback()
def contract() -> None:
    """Try out what a contract would say."""


@app.command("test")
def would_let_in(
    name: Annotated[str, typer.Argument(help="The contract's id on the ledger.")],
    provider: acting.As,
    device: Annotated[str, typer.Option(help="The device's name at the provider that accepted.")],
    *,
    profile: Annotated[str, typer.Option(help="The channel profile of the session.")] = "tls",
    post_quantum: Annotated[bool, typer.Option(help="Whether the session's keys are agreed with ML-KEM too.")] = True,
    at: Annotated[str | None, typer.Option(help="When, such as 2027-01-31T08:00:00Z; now if left out.")] = None,
    conditions: Annotated[
        Path | None, typer.Option(help="Judge this text in place of the contract's own: before it is offered, say.")
    ] = None,
    as_json: render.AsJson = False,
) -> None:
    """Would this device be let in, and why? Exit code 1: no. The ledger is taken as a quorum proves it now."""
    tls = profile != NO_PFS
    asked = Question(device=device, profile=profile, post_quantum=post_quantum and tls, at=_instant(at))
    text = None if conditions is None else render.read(conditions).decode("utf-8", errors="replace")
    found = judged(acting.provider(provider), name, asked, text)
    render.facts(found, as_json=as_json)
    if not found["allowed"]:
        raise typer.Exit(EXIT_REFUSED)


def question_now(device: str) -> Question:
    """A device that comes now, over TLS as our own ends speak it."""
    return Question(device=device, profile="tls", post_quantum=True, at=_instant(None))


def judged(acts: acting.Provider, name: str, asked: Question, text: str | None) -> dict[str, Any]:
    """The answer: whether, by which rule or for want of what, and by which policies of the contract."""
    from moorline.policy.conditions import MAX_BYTES, require_valid

    named = _contract(acts, name)
    terms = named.conditions if text is None else text
    policies = require_valid(terms, max_bytes=MAX_BYTES)
    try:
        decision = _decided(acts, named, terms, asked)
    except Refused as refusal:  # what the ledger says comes before any condition
        return {"contract": name, "device": asked.device, "allowed": False, "why": str(refusal), "policies": []}
    lines = {one.id: f"{one.id} ({one.effect}, line {one.line})" for one in policies}
    return {
        "contract": name,
        "device": asked.device,
        "allowed": decision.allowed,
        "why": ", ".join(lines.get(one, one) for one in decision.policies) or decision.rule,
        "policies": list(decision.policies),
    }


def _decided(acts: acting.Provider, named: ContractRecord, terms: str, asked: Question) -> AccessDecision:
    from moorline.ledger import records
    from moorline.nfv import Role, SpiffeId
    from moorline.services import contract_decision
    from moorline.services.contract_decision import Wish

    key = records.provider_key(named.grantee)
    domain = records.parse(records.ProviderRecord, acts.prove(key).record(key)).trust_domain
    wish = Wish(
        device=SpiffeId(trust_domain=domain, role=Role.DEVICE, segments=(asked.device,)),
        device_provider=named.grantee,
        function_provider=named.provider,
        service=named.service,
        contract=named.id,
        profile=asked.profile,
        post_quantum=asked.post_quantum,
    )
    state = acts.prove(*contract_decision.wanted_keys(wish))
    return contract_decision.decided(state, wish, now=asked.at, conditions=terms)


def _contract(acts: acting.Provider, name: str) -> ContractRecord:
    from moorline.ledger import records

    key = records.contract_key(name)
    state: ProvenState = acts.prove(key)
    return records.parse(records.ContractRecord, state.record(key))


def _instant(at: str | None) -> Instant:
    from datetime import UTC, datetime

    from moorline.clock import Instant, SystemClock

    if at is None:
        return SystemClock().now()
    try:
        found = datetime.fromisoformat(at)
    except ValueError:
        raise Malformed("contract.time", "this is no time", expected="such as 2027-01-31T08:00:00Z", got=at) from None
    return Instant(int(found.replace(tzinfo=found.tzinfo or UTC).timestamp()))
