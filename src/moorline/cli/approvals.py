"""Decisions of several organisations, made apart: signed on the machine that holds the key, carried as files, sent by any.

A file holds one signed ledger transaction and nothing secret. Whoever is asked to approve reads from it, or from the ledger,
what would be done, and approves exactly that.
"""

from __future__ import annotations

import dataclasses
import inspect
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moorline.cli import render
from moorline.errors import Malformed, Unavailable

if TYPE_CHECKING:
    from moorline.ledger.genesis import Genesis
    from moorline.ledger.light_client import ProvenState
    from moorline.ledger.records import AuthorityRecord
    from moorline.ledger.transactions import Action, Body, Payload

    Decision = tuple[Action, str]
else:
    Decision = tuple
"""An action to propose, and words for it."""

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write the signed transaction to a file and send nothing: moor authority submit."),
]
ValidUntil = Annotated[
    int | None,
    typer.Option(help="Last block a file's transaction may stand in. The ledger is asked if left out."),
]
FILE_VALID_FOR_BLOCKS = 900
"""How many blocks a file has, within the ledger's own limit: people carry it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A signed transaction and its payload."""

    payload: Payload
    data: bytes


def genesis_of(folder: Path) -> Genesis:
    """The ledger of an authority's folder."""
    from moorline.ledger.genesis import parse

    return parse(render.read(folder / "genesis.cbor"))


def sign(folder: Path, body: Body, valid_until: int | None) -> Signed:
    """A transaction signed by the authority whose folder this is; asks the ledger for its height only if it must."""
    from moorline.ledger import transactions
    from moorline.ledger.ceremony import load_authority
    from moorline.ledger.transactions import Sender, SenderKind

    keys = load_authority(folder.absolute())
    payload = transactions.make(
        body,
        sender=Sender(kind=SenderKind.AUTHORITY, name=keys.name),
        ledger_id=genesis_of(folder).ledger_id,
        nonce=secrets.token_bytes(32),
        valid_until=height(folder) + FILE_VALID_FOR_BLOCKS if valid_until is None else valid_until,
    )
    return Signed(payload=payload, data=transactions.sign(payload, keys.signer()))


def height(folder: Path) -> int:
    """How far the ledger is, as an authority says. Raises Unavailable with what to do where nobody answers."""
    import asyncio

    from moorline.cli import acting

    async def asked() -> int:
        async with acting.ledger_client(folder / "genesis.cbor") as client:
            return (await client.checkpoint()).height

    try:
        return asyncio.run(asked())
    except Unavailable as error:
        raise Unavailable(
            "authority.height_unknown",
            "no authority says how far the ledger is",
            got=error.code,
            remedy="give --valid-until: the ledger's height now (moor authority show) plus some hundreds",
        ) from None


def proven(folder: Path, *keys: str) -> ProvenState:
    """What a quorum signed about these keys now."""
    import asyncio

    from moorline.cli import acting
    from moorline.clock import SystemClock
    from moorline.ledger.light_client import verify_bundle

    async def asked() -> bytes:
        async with acting.ledger_client(folder / "genesis.cbor") as client:
            return await client.prove(keys)

    return verify_bundle(asyncio.run(asked()), genesis_of(folder).trust(), now=SystemClock().now())


def read_proposal(folder: Path, path: Path) -> tuple[str, str, Action]:
    """Proposal id, proposer and action of a file, whose signature holds under the proposer's key as the ledger proves it.

    Without a network the keys of the genesis are taken. Raises NotAuthentic("approvals.not_signed") and Malformed.
    """
    from moorline.errors import NotAuthentic
    from moorline.ledger import transactions
    from moorline.ledger.transactions import Propose
    from moorline.wire import cose, keys

    found = transactions.parse(render.read(path))
    if not isinstance(found.body, Propose):
        raise Malformed("approvals.no_proposal", "the file holds another transaction", got=found.payload.kind)
    if found.payload.ledger_id != genesis_of(folder).ledger_id:
        raise NotAuthentic("approvals.other_ledger", "the proposal is for another ledger", got=found.payload.ledger_id)
    sender = found.payload.sender.name
    try:
        cose.verify(found.sign1, keys.parse_public(_transaction_key(folder, sender)))
    except NotAuthentic as error:
        raise NotAuthentic(
            "approvals.not_signed",
            f"the file was not signed by {sender}",
            got=error.code,
            remedy="ask its sender for the file again, another way",
        ) from None
    action = transactions.parse_action(found.body.kind, found.body.action)
    return transactions.proposal_id(found.payload), sender, action


def _transaction_key(folder: Path, name: str) -> bytes:
    from moorline.ledger import records

    try:
        state = proven(folder, records.authority_key(name))
    except Unavailable:
        founders = {one.name: one.transaction_key for one in genesis_of(folder).authorities}
        if name not in founders:
            raise
        return founders[name]
    return records.parse(records.AuthorityRecord, state.record(records.authority_key(name))).transaction_key


def shown(action: Action) -> dict[str, Any]:
    """An action for people: every field; certificates by subject, names they are confined to, end and fingerprint."""
    fields: dict[str, Any] = {"action": type(action).__name__}
    for field in dataclasses.fields(action):
        value = getattr(action, field.name)
        fields[field.name] = _certificate(value) if field.name == "certificate" else _plain(value)
    return fields


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


def _certificate(der: bytes) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from moorline.wire.certificates import parse_certificate

    found = parse_certificate(der)
    try:
        names = found.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
        confined = ", confined to " + ", ".join(sorted({str(one.value) for one in names}))
    except x509.ExtensionNotFound:
        confined = ""
    fingerprint = found.fingerprint(hashes.SHA256()).hex()
    until = found.not_valid_after_utc.date().isoformat()
    return f"{found.subject.rfc4514_string()}{confined}, until {until}, SHA-256 {fingerprint}"


def proposes(decide: Callable[..., Decision]) -> Callable[..., None]:
    """A command that proposes what `decide` makes of its arguments: an action, and words for it.

    Beside its own arguments it takes the options of every proposal: --by, --output, --valid-until, --quiet, --json.
    """
    from moorline.cli import acting

    own = list(inspect.signature(decide, eval_str=True).parameters.values())
    nothing, keyword = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    options = {"output": (Output, None), "valid_until": (ValidUntil, None), "quiet": (render.Quiet, False)}
    more = [
        inspect.Parameter(name, keyword, default=default, annotation=kind)
        for name, (kind, default) in {"by": (acting.By, nothing), **options, "as_json": (render.AsJson, False)}.items()
    ]
    asks_by = any(one.name == "by" for one in own)
    parameters = [*(one for one in own if one.name != "by"), *more]

    def command(**given: Any) -> None:  # noqa: ANN401 - what typer reads by the signature below
        chosen = {one.name: given.pop(one.name) for one in more}
        by = chosen.pop("by")
        action, says = decide(**given, **({"by": by} if asks_by else {}))
        acting.propose(by, action, says, **chosen)

    command.__doc__, command.__name__ = decide.__doc__, decide.__name__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def authority(folder: Path) -> AuthorityRecord:
    """What the ledger has of the authority whose folder this is, proven."""
    from moorline.ledger import records
    from moorline.ledger.ceremony import load_authority

    key = records.authority_key(load_authority(folder.absolute()).name)
    return records.parse(records.AuthorityRecord, proven(folder, key).record(key))
