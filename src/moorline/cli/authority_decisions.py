"""`moor authority`: what authorities decide together about themselves, parameters and global revocations.

Every command that proposes takes `--output FILE`, and then nothing is sent: the file goes to whoever sends it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moorline.cli import acting, approvals, render
from moorline.errors import Misconfigured, MoorlineError, Refused

if TYPE_CHECKING:
    from moorline.ledger.blocks import Receipt
    from moorline.ledger.client import Submitter
    from moorline.ledger.transactions import Action

Name = Annotated[str, typer.Argument(help="The authority's name.")]


@approvals.proposes
def retire(
    name: Name,
) -> approvals.Decision:
    """Propose to retire an authority, for good. A quorum must approve."""
    from moorline.ledger.transactions import RetireAuthority

    return RetireAuthority(name=name), f"retire authority {name}"


@approvals.proposes
def set_parameter(
    name: Annotated[str, typer.Argument(help="The parameter, such as max_age_s.")],
    value: Annotated[int, typer.Argument(min=0, help="Its new value.")],
) -> approvals.Decision:
    """Propose to change a parameter of the ledger. A quorum must approve."""
    from moorline.ledger.transactions import SetParameter

    return SetParameter(name=name, value=value), f"set {name} to {value}"


@approvals.proposes
def revoke(
    kind: Annotated[str, typer.Argument(help="measurement, chip or vendor-root.")],
    identifier: Annotated[str, typer.Argument(help="Its digest, hex.")],
) -> approvals.Decision:
    """Propose to revoke a measurement, a chip or a vendor's root for everybody, for good. A quorum must approve."""
    from moorline.ledger.records import RevocationKind
    from moorline.ledger.transactions import RevokeGlobally

    kinds = [one.value for one in (RevocationKind.MEASUREMENT, RevocationKind.CHIP, RevocationKind.VENDOR_ROOT)]
    if kind not in kinds:
        raise typer.BadParameter(", ".join(kinds), param_hint="kind")
    return RevokeGlobally(kind=RevocationKind(kind), id=identifier), f"revoke {kind} {identifier}"


@approvals.proposes
def rotate_key(
    by: acting.By,
    *,
    address: Annotated[str | None, typer.Option(help="Where it serves, if that changes too; address:port.")] = None,
) -> approvals.Decision:
    """Make this authority's next transaction and checkpoint keys in its folder, and propose them. A quorum must approve.

    Until then the old ones count, from then on the new ones only. A node that is started now holds both and needs no other
    restart; afterwards moor authority take-keys puts the new ones in place.
    """
    from cryptography.hazmat.primitives import serialization

    from moorline.ledger import ca_renewal
    from moorline.ledger.ceremony import load_authority, make_next_keys
    from moorline.ledger.transactions import RotateAuthorityKey
    from moorline.wire import keys

    folder = by.absolute()
    if ca_renewal.kept(folder) is not None:
        raise Refused(
            "authority.rotation_pending",
            "this authority's next CA certificate waits for its place",
            remedy="moor authority take-keys first: each proposal replaces the whole record",
        )
    made = make_next_keys(folder)
    name = load_authority(folder).name
    known = address or approvals.authority(folder).address
    action = RotateAuthorityKey(
        name=name,
        certificate=made.ca.certificate.public_bytes(serialization.Encoding.DER),
        transaction_key=keys.public_bytes(made.transaction.public_key()),
        checkpoint_key=made.checkpoint.public_key().public_bytes_raw(),
        address=known,
    )
    return action, f"rotate the keys of {name}"


def take_keys(by: acting.By, *, as_json: render.AsJson = False) -> None:
    """Put the next keys in place of the old ones, once the ledger has them; the old ones are deleted."""
    from moorline.ledger import ca_renewal
    from moorline.ledger.ceremony import load_authority, load_next, take_next_keys

    folder = by.absolute()
    following, certificate = load_next(folder), ca_renewal.kept(folder)
    if following is None and certificate is None:
        raise Misconfigured(
            "authority.no_next_keys",
            "there are no next keys in this folder, and no next CA certificate",
            remedy="moor authority rotate-key makes keys, moor authority renew-ca a certificate",
        )
    found = approvals.authority(folder)
    if certificate is not None:
        _require_in_force(found.certificate == certificate)
        ca_renewal.take(folder)
    if following is None:
        facts = {"authority": load_authority(folder).name, "certificate": "the new one is in place"}
        render.facts(facts, as_json=as_json, then="give it to the providers below: it stands in their chains")
        return
    _require_in_force(found.checkpoint_key == following.checkpoint.public_key().public_bytes_raw())
    take_next_keys(folder)
    render.facts(
        {"authority": following.name, "keys": "the new ones are in place, the old ones deleted"},
        as_json=as_json,
        then="its node goes on; the next start reads the new keys",
    )


def _require_in_force(yes: bool) -> None:  # noqa: FBT001 - the one thing it is about
    if not yes:
        raise Refused(
            "authority.keys_not_in_force",
            "the ledger does not have the next keys, or the next CA certificate, yet",
            remedy="have enough authorities approve the proposal first",
        )


def review(
    proposal: Annotated[str, typer.Argument(help="A proposal's id, or a file with a signed proposal.")],
    by: acting.By,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Show what a proposal would do, and who approved it. A file's signature is verified; the ledger's answer is proven."""
    if Path(proposal).is_file():
        identifier, sender, action = approvals.read_proposal(by, Path(proposal))
        found: dict[str, Any] = {"proposal": identifier, "proposed by": sender, **approvals.shown(action)}
    else:
        found = _from_ledger(by, proposal)
    render.facts(found, as_json=as_json, then=f"moor authority approve {proposal} --by FOLDER")


def _from_ledger(by: Path, proposal: str) -> dict[str, Any]:
    from datetime import UTC, datetime

    from moorline.ledger import records, transactions

    key = records.proposal_key(proposal)
    state = approvals.proven(by, key, records.AUTHORITIES_INDEX)
    found = records.parse(records.ProposalRecord, state.record(key))
    in_force = records.parse(records.IndexRecord, state.record(records.AUTHORITIES_INDEX)).holders
    action: Action = transactions.parse_action(found.kind, found.action)
    return {
        "proposal": proposal,
        "proposed by": found.proposer,
        **approvals.shown(action),
        "status": found.status.value,
        "approved by": [name for name in found.approvals if name in in_force],
        "authorities in force": list(in_force),
        "expires": datetime.fromtimestamp(found.expires_ms / 1000, UTC).isoformat(timespec="seconds"),
    }


def approve(
    proposal: Annotated[str, typer.Argument(help="A proposal's id, or a file with a signed proposal.")],
    by: acting.By,
    *,
    output: approvals.Output = None,
    valid_until: approvals.ValidUntil = None,
    as_json: render.AsJson = False,
) -> None:
    """Approve a proposal; it takes effect in the block in which enough authorities approved."""
    from moorline.ledger.transactions import Approve

    identifier = approvals.read_proposal(by, Path(proposal))[0] if Path(proposal).is_file() else proposal
    if output is not None:
        signed = approvals.sign(by, Approve(proposal=identifier), valid_until)
        render.new_file(output, signed.data)
        facts = {"approval": identifier, "written to": str(output), "valid until block": signed.payload.valid_until}
        render.facts(facts, as_json=as_json, then="anybody sends it: moor authority submit FILE ... --by FOLDER")
        return

    async def approved(submitter: Submitter) -> int:
        return (await submitter.approve(identifier)).height

    render.facts({"approved": identifier, "height": acting.authority_sends(by, approved)}, as_json=as_json)


def submit(
    files: Annotated[list[Path], typer.Argument(help="Signed transactions, in the order in which they are to stand.")],
    by: acting.By,
    *,
    as_json: render.AsJson = False,
) -> None:
    """Send signed transactions that came as files. It takes no key: the folder says only where the ledger is."""
    import asyncio

    from moorline.ledger import transactions

    data = [render.read(path) for path in files]
    payloads = [transactions.parse(one).payload for one in data]

    async def sent() -> list[Receipt | MoorlineError | None]:
        outcomes: list[Receipt | MoorlineError | None] = []
        async with acting.ledger_client(by / "genesis.cbor") as client:
            # Together what one sender signed: the order of several senders' is kept by waiting.
            for _, group in itertools.groupby(zip(payloads, data, strict=True), key=lambda one: one[0].sender):
                outcomes += await client.submit_all([one for _, one in group])
                if any(isinstance(one, MoorlineError) for one in outcomes):
                    break
        return outcomes

    with render.progress("waiting for the quorum"):
        outcomes = asyncio.run(sent())
    rows: list[dict[str, Any]] = []
    for path, payload, outcome in zip(files, payloads, outcomes, strict=False):  # what follows a refusal is not sent
        height = outcome.height if outcome is not None and not isinstance(outcome, MoorlineError) else None
        rows.append({"file": str(path), "kind": payload.kind, "by": payload.sender.name, "height": height})
    render.table(rows, ("file", "kind", "by", "height"), key="submitted", as_json=as_json, empty="nothing was sent")
    for outcome in outcomes:
        if isinstance(outcome, MoorlineError):
            raise outcome


def register(app: typer.Typer) -> None:
    """Put these commands under a noun."""
    app.command("retire")(retire)
    app.command("set")(set_parameter)
    app.command("revoke")(revoke)
    app.command("rotate-key")(rotate_key)
    app.command("take-keys")(take_keys)
    app.command("review")(review)
    app.command("approve")(approve)
    app.command("submit")(submit)
