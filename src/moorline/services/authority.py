"""The process of one authority: its chain, the engine's part it plays, and an HTTPS interface (services.authority_routes).

The TLS key lives in memory, is certified for an hour under the authority's CA key, and is made
anew before that is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
from fastapi import FastAPI

from moorline.clock import Clock, Instant, SystemClock
from moorline.errors import Misconfigured, MoorlineError
from moorline.ledger import ceremony, genesis
from moorline.ledger.ceremony import AuthorityKeys
from moorline.ledger.engines.cosigner import Cosigner
from moorline.ledger.engines.embedded import Sequencer
from moorline.ledger.engines.node import Node
from moorline.ledger.engines.node_state import AT_ONCE
from moorline.ledger.engines.office import Candidate, Office
from moorline.ledger.engines.verifiers import Verifiers
from moorline.ledger.genesis import Genesis
from moorline.ledger.places import SUBTREE_BITS
from moorline.services.authority_peers import TLS_RENEWAL_S, Peers
from moorline.services.authority_routes import authority_app
from moorline.services.comet_settings import CometSettings, ValidatorToken
from moorline.services.http import TlsIdentity, serve
from moorline.services.process import announce_ready
from moorline.storage import damage
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore

if TYPE_CHECKING:
    from moorline.ledger.engines.cometbft.node import CometNode, Consensus

SCRUB_PAUSE_S: Final = 0.002
COLLECT_AFTER: Final = 200_000
"""Objects made and not yet ended before Python looks for those that only hold each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """authority.toml. `directory` holds what the ceremony wrote; `database` is a URL, SQLite in there if left out."""

    name: str
    """The authority's name, as the genesis or its admission has it."""
    listen: str
    """Where it serves, address:port; the address the ledger has for it must lead here."""
    directory: Path
    """Folder with what the ceremony wrote: genesis.cbor, ca.pem and three private keys (0600)."""
    database: str | None = None
    """SQLAlchemy URL of its database; SQLite in `directory` if left out."""
    cometbft: CometSettings | None = None
    """For the CometBFT engine; the embedded engine if left out."""
    validator_token: ValidatorToken | None = None
    """For the CometBFT engine: where the validator's key is; the checkpoint key in `directory` if left out."""
    snapshot_after: int = 2000
    """With an empty database: how many blocks behind it takes a snapshot from the others instead of executing all blocks."""


class LoggingSequencer(Sequencer):
    """A sequencer that says who did not sign, and why."""

    def on_refusal(self, name: str, error: MoorlineError) -> None:
        """Logged: one authority that refuses is a finding, not an outage."""
        structlog.get_logger().warning("no cosignature", authority=name, **error.as_problem())


class LoggingCosigner(Cosigner):
    """A cosigner that says what keeps it from following."""

    def on_trouble(self, error: MoorlineError) -> None:
        """Logged: a fork shows here, with what was expected and what was got."""
        structlog.get_logger().warning("cannot follow the sequencer", **error.as_problem())


class LoggingCandidate(Candidate):
    """A candidate that says whose word is missing."""

    def on_trouble(self, error: MoorlineError) -> None:
        """Logged, as often as it asks."""
        structlog.get_logger().warning("not sequencing yet", **error.as_problem())


class LoggingOffice(Office):
    """An office whose parts log."""

    def _sequencer(self) -> Sequencer:
        structlog.get_logger().info("sequencing", term=self.node.conduct.following.term)
        return LoggingSequencer(self.node, self._peers, verifiers=self._verifiers)

    def _cosigner(self, sequencer: str) -> Cosigner:
        structlog.get_logger().info("cosigning", sequencer=sequencer, term=self.node.conduct.word.term)
        others = {name: self._peers[name] for name in self._peers if name != sequencer}
        return LoggingCosigner(
            self.node,
            self._peers[sequencer],
            others=others,
            snapshot_after=self._snapshot_after,
            verifiers=self._verifiers,
        )

    def _candidate(self) -> Candidate:
        structlog.get_logger().info("gathering words", term=self.node.conduct.word.term)
        return LoggingCandidate(self.node, self._peers)


async def run(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Run an authority until cancelled."""
    keys = ceremony.load_authority(settings.directory)
    found = genesis.parse((settings.directory / "genesis.cbor").read_bytes())
    if settings.cometbft is not None:
        await _run_cometbft(settings, log, keys, found)
        return
    damage.judge(database_url(settings))
    store = LedgerStore(open_database(database_url(settings), "ledger"))
    try:
        await _run(settings, log, keys, found, store)
    finally:
        store.close()


async def _run(
    settings: Settings, log: structlog.stdlib.BoundLogger, keys: AuthorityKeys, found: Genesis, store: LedgerStore
) -> None:
    following = ceremony.load_next(settings.directory)
    node = Node(
        name=settings.name,
        genesis=found,
        key=keys.checkpoint,
        next_key=None if following is None else following.checkpoint,
        store=store,
        now_ms=_now_ms,
    )
    own_keys(keys, settings, node)
    node.on_evidence = lambda finding: log.error(
        "an authority lied",
        kind=finding.kind,
        height=finding.height,
        offenders=finding.offenders,
        forked=finding.forked,
        fault=finding.fault,
    )
    clock = SystemClock()
    verifiers = Verifiers()
    office = LoggingOffice(
        node,
        Peers(node, lambda: tls_identity(keys, found, clock)),
        snapshot_after=settings.snapshot_after,
        verifiers=verifiers,
    )
    collect_rarely()
    log.info("authority", name=settings.name, height=node.head.state.height, ledger=found.ledger_id.hex())
    tasks = {
        asyncio.ensure_future(office.run()),
        asyncio.ensure_future(_serve(settings, authority_app(node, office), keys, found, clock)),
        asyncio.ensure_future(_scrub(node)),
    }
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await verifiers.close()


def collect_rarely() -> None:
    """A block makes tens of thousands of objects that stay, in no cycle: to look through them all the time finds nothing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 20)


async def _scrub(node: Node) -> None:
    """Verify the whole of a large state once, slowly, while serving. A part that is damaged ends this process, and is named.

    A small one was verified when it was opened.
    """
    if len(node.head.state.tree) > AT_ONCE:
        for prefix in range(1 << SUBTREE_BITS):
            if node.scrub(prefix):
                await asyncio.sleep(SCRUB_PAUSE_S)
    await asyncio.Event().wait()


async def _run_cometbft(settings: Settings, log: structlog.stdlib.BoundLogger, keys: AuthorityKeys, found: Genesis) -> None:
    from moorline.services import authority_cometbft

    clock = SystemClock()

    async def serve_clients(node: CometNode, engine: Consensus, add_routes: Callable[[FastAPI], None]) -> None:
        app = authority_app(node, engine)
        add_routes(app)
        await _serve(settings, app, keys, found, clock)

    await authority_cometbft.run(settings, log, keys, found, serve_clients)


async def _serve(settings: Settings, app: FastAPI, keys: AuthorityKeys, found: Genesis, clock: Clock) -> None:
    announced = False

    def ready(address: str) -> None:
        nonlocal announced
        if not announced:
            announce_ready("authority", name=settings.name, address=address)
            announced = True

    while True:  # each round has a certificate of its own; connections in flight end with their round
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TLS_RENEWAL_S):
                await serve(
                    app,
                    listen=settings.listen,
                    identity=tls_identity(keys, found, clock),
                    client_roots_pem=ceremony.pem_of(found.roots),
                    ready=ready,
                )
                return


def own_keys(keys: AuthorityKeys, settings: Settings, node: Node) -> None:
    """Raises Misconfigured("ledger.authority_folder") if the checkpoint key is not the one the ledger has."""
    known = node.authorities().get(settings.name)
    # Who was admitted later, or begins with an empty database after a rotation, knows its own record when it has caught up.
    if known is None or node.note is None:
        return
    following = ceremony.load_next(settings.directory)
    held = [keys.checkpoint, *(() if following is None else (following.checkpoint,))]
    if known not in {one.public_key().public_bytes_raw() for one in held}:
        raise Misconfigured(
            "ledger.authority_folder",
            "the checkpoint key in the folder is not this authority's",
            got=settings.name,
            remedy="start it with the keys the ledger has for it; after a rotation, once it has caught up, the new ones",
        )


def tls_identity(keys: AuthorityKeys, found: Genesis, clock: Clock) -> TlsIdentity:
    """A TLS key of this hour, certified under the authority's."""
    now = Instant(clock.now())
    chain_pem, key_pem = ceremony.tls_identity(keys, found.consortium_domain, now=now)
    return TlsIdentity(chain_pem=chain_pem, key_pem=key_pem)


def database_url(settings: Settings) -> str:
    """Where the database is, an SQLAlchemy URL."""
    return settings.database or f"sqlite:///{(settings.directory / 'ledger.db').absolute()}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
