"""`moor ledger promote`, `resume` and `repair`: what the people behind one authority say and do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moorline.cli import acting, render, running
from moorline.errors import Refused

if TYPE_CHECKING:
    from moorline.services.authority import Settings


def register(app: typer.Typer) -> None:
    """Add the commands to the noun."""
    app.command()(promote)
    app.command()(resume)
    app.command()(repair)


def promote(
    authority: Annotated[str, typer.Argument(help="The authority that is to make the blocks.")],
    by: acting.By,
    *,
    again: Annotated[bool, typer.Option("--again", help="It sequenced already, and lost its database.")] = False,
    as_json: render.AsJson = False,
) -> None:
    """Say, for one authority, who makes the blocks from now on; it begins when a quorum of authorities was told so.

    For when the sequencer is gone, or is not to be trusted. From this word on the authority signs nothing of the sequencer
    before. Nothing that was acknowledged is lost, and the old sequencer follows the new one when it comes back.
    """
    from moorline.services.authority_routes import Promotion
    from moorline.wire import cbor, schema

    said = schema.encode(Promotion(sequencer=authority, again=again))
    found = cbor.decode(_told(by, "/v1/operator/promote", said))
    term = found.get("term") if isinstance(found, dict) else None
    render.facts(
        {"sequencer": authority, "term": term},
        as_json=as_json,
        then=f"moor ledger promote {authority}, at every other authority that can be reached, until a quorum was told",
    )


def resume(by: acting.By, *, as_json: render.AsJson = False) -> None:
    """Let an authority go on that halted because the ledger forked; the consortium has decided which history stands."""
    _told(by, "/v1/operator/resume", b"")
    render.facts({"resumed": True}, as_json=as_json)


def repair(config: running.Config, *, as_json: render.AsJson = False) -> None:
    """Replace a damaged database of a stopped authority by the state that the others have, verified.

    The damaged one is moved aside. Embedded engine: what this authority signed last may be forgotten with it, so it leaves
    the next block to the others; if it made the blocks, operators have to say again who does. CometBFT: the node's data go
    with the database, and all blocks come again from its peers.
    """
    import asyncio

    from moorline.services import authority_repair

    with render.progress("fetching the state from the other authorities"):
        done = asyncio.run(authority_repair.repair(_settings(config)))
    render.facts(
        {"repaired to height": done.height, "moved aside": str(done.moved) if done.moved else "nothing", "kept": done.kept},
        as_json=as_json,
        then=f"moor authority run --config {config}",
    )


def _told(by: Path, path: str, body: bytes) -> bytes:
    """The answer of the authority whose folder this is, to its own operator."""
    import asyncio

    from moorline.clock import SystemClock
    from moorline.ledger import ceremony, genesis
    from moorline.services.authority_peers import server_name
    from moorline.wire.http import ClientIdentity, HttpClient

    settings = _settings(by / "authority.toml")
    if settings.cometbft is not None:
        raise Refused(
            "ledger.consensus_decides",
            "under CometBFT everybody proposes in turn: nobody is promoted, and nothing halts by a word",
            got=settings.name,
        )
    keys = ceremony.load_authority(by.absolute())
    found = genesis.parse(render.read(by / "genesis.cbor"))
    chain, key = ceremony.tls_identity(keys, found.consortium_domain, now=SystemClock().now())

    async def answered() -> bytes:
        async with HttpClient(
            f"https://{settings.listen}",
            server_name=server_name(found, settings.name),
            roots_pem=ceremony.pem_of(found.roots),
            identity=ClientIdentity(certificate_chain_pem=chain, private_key_pem=key),
        ) as client:
            return await client.post_cbor(path, body)

    return asyncio.run(answered())


def _settings(config: Path) -> Settings:
    from moorline.services import authority, settings

    return settings.load(authority.Settings, config, service="authority")
