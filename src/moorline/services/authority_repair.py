"""Repairing one authority: its damaged database is set aside, and a new one filled from the others, verified throughout.

Evidence, terms and marks are carried over where they can still be read. What was signed is not: a database that lost a page
may have lost that, so the next height is left to the others (engines.conduct), and a sequencer waits to be promoted again.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from moorline.clock import SystemClock
from moorline.errors import Conflict, Misconfigured, MoorlineError
from moorline.ledger import ceremony, checkpoint, genesis
from moorline.ledger.engines.cosigner import Cosigner
from moorline.ledger.engines.node import Node
from moorline.services.authority import Settings, database_url, own_keys, tls_identity
from moorline.services.authority_peers import Peers, server_name
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore, StoredEvidence, StoredTerm
from moorline.wire.http import HttpClient

_SQLITE: Final = "sqlite:///"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What was done: the height reached, where the damaged database is now, what of it was carried over."""

    height: int
    moved: Path | None
    kept: list[str]


async def repair(settings: Settings) -> Repaired:
    """Raises Conflict("ledger.authority_running"), Misconfigured("ledger.not_repairable"), or what the others say."""
    keys = ceremony.load_authority(settings.directory)
    found = genesis.parse((settings.directory / "genesis.cbor").read_bytes())
    await _stopped(settings, found)
    if settings.cometbft is not None:
        from moorline.services import authority_cometbft_repair

        return await authority_cometbft_repair.repair(settings, keys, found)
    url = database_url(settings)
    file = sqlite_file(url)
    terms, evidence, marks, kept = _readable(url, file)
    moved = aside(file)
    store = LedgerStore(open_database(url, "ledger"))
    try:
        for term in terms:
            store.put_term(term)
        for one in evidence:
            store.keep_evidence(one)
        for name, value in marks:
            store.set_mark(name, value)
        node = Node(
            name=settings.name, genesis=found, key=keys.checkpoint, store=store, now_ms=lambda: time.time_ns() // 1_000_000
        )
        own_keys(keys, settings, node)
        peers = Peers(node, lambda: tls_identity(keys, found, SystemClock()))
        first, *others = peers
        cosigner = Cosigner(
            node, peers[first], others={name: peers[name] for name in others}, snapshot_after=settings.snapshot_after
        )
        await cosigner.follow()
        node.conduct.forget_signatures_up_to(checkpoint.parse_note(node.signed_note()).checkpoint.height + 1)
        node.conduct.forget_terms()
        return Repaired(height=node.head.state.height, moved=moved, kept=kept)
    finally:
        store.close()


async def _stopped(settings: Settings, found: genesis.Genesis) -> None:
    client = HttpClient(
        f"https://{settings.listen}",
        server_name=server_name(found, settings.name),
        roots_pem=ceremony.pem_of(found.roots),
        timeout_s=2.0,
    )
    try:
        async with client:
            await client.get_bytes("/v1/ledger")
    except MoorlineError:
        return
    raise Conflict("ledger.authority_running", "this authority is running", got=settings.listen, remedy="stop it first")


def sqlite_file(url: str) -> Path:
    """The file of a database. Raises Misconfigured("ledger.not_repairable") for one that is no file."""
    if not url.startswith(_SQLITE):
        raise Misconfigured(
            "ledger.not_repairable",
            "this repairs SQLite files; another database has tools of its own",
            got=url.partition(":")[0],
        )
    return Path(url.removeprefix(_SQLITE))


def aside(file: Path) -> Path | None:
    """Move a database and what SQLite keeps beside it, or a folder, away; where to, or None if there is none."""
    if not file.exists():
        return None
    moved = file.with_name(f"{file.name}.damaged-{time.time_ns() // 1_000_000}")
    for suffix in ("-wal", "-shm", ""):
        part = file.with_name(file.name + suffix)
        if part.exists():
            part.rename(moved.with_name(moved.name + suffix))
    return moved


def _readable(url: str, file: Path) -> tuple[list[StoredTerm], list[StoredEvidence], list[tuple[str, int]], list[str]]:
    """What can be read of a damaged database, table by table."""
    terms: list[StoredTerm] = []
    evidence: list[StoredEvidence] = []
    marks: list[tuple[str, int]] = []
    kept: list[str] = []
    if not file.exists():
        return terms, evidence, marks, kept
    store = LedgerStore(sa.create_engine(url))
    with contextlib.suppress(MoorlineError, sa.exc.DBAPIError):  # it is damaged: what is missing of it is said
        terms = store.terms()
        kept.append("terms")
    with contextlib.suppress(MoorlineError, sa.exc.DBAPIError):
        evidence = store.evidence()
        kept.append("evidence")
    with contextlib.suppress(MoorlineError, sa.exc.DBAPIError):
        marks = [one for one in store.marks() if one[0] != "taking_over"]
        kept.append("marks")
    store.close()
    return terms, evidence, marks, kept
