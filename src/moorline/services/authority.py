"""The process of one authority: its chain, the engine's part it plays, and an HTTPS interface.

Public routes: a transaction authenticates itself, and answers carry proofs. Routes between authorities take the client
certificate of the sequencer. The TLS key lives in memory, is certified for an hour under the authority's CA key, and is made
anew before that is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import structlog
from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response

from moorline.clock import Clock, Instant, SystemClock
from moorline.errors import Malformed, Misconfigured, MoorlineError, Refused
from moorline.ledger import blocks, ceremony, genesis, records
from moorline.ledger.ceremony import AuthorityKeys
from moorline.ledger.engines.cosigner import Cosigner
from moorline.ledger.engines.embedded import Peer, Proposal, Sequencer
from moorline.ledger.engines.node import Node, encode_status
from moorline.ledger.engines.node_state import AT_ONCE
from moorline.ledger.engines.office import Candidate, Office
from moorline.ledger.engines.verifiers import Verifiers
from moorline.ledger.genesis import Genesis
from moorline.ledger.tree import SUBTREE_BITS
from moorline.nfv import Role
from moorline.services import metrics
from moorline.services.comet_settings import CometSettings, ValidatorToken
from moorline.services.http import TlsIdentity, application, require, serve
from moorline.services.process import announce_ready
from moorline.storage import damage
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore
from moorline.wire import cbor, schema
from moorline.wire.certificates import dns_name
from moorline.wire.http import CBOR_TYPE, ClientIdentity, HttpClient

if TYPE_CHECKING:
    from moorline.ledger.engines.cometbft.node import CometNode, Consensus

TLS_RENEWAL_S: Final = 1800
PEER_TIMEOUT_S: Final = 3.0
SUBMIT_TIMEOUT_S: Final = 20.0
MAX_HEIGHT: Final = (1 << 53) - 1
MAX_EVIDENCE: Final = 100
SCRUB_PAUSE_S: Final = 0.002
# What the sequencer may send a cosigner; everybody else sends transactions.
BODY_CAP: Final = 2 * blocks.MAX_BLOCK_BYTES


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What an operator says: this authority is to sequence; `again`, in a new term, if it does already."""

    sequencer: str
    again: bool


class HttpPeer:
    """Another authority over HTTPS with this one's certificate; a client is made anew before its certificate ends."""

    def __init__(self, address: str, *, server_name: str, roots_pem: bytes, identity: Callable[[], TlsIdentity]) -> None:
        self.address = address
        self._server_name, self._roots_pem, self._identity = server_name, roots_pem, identity
        self._clients: dict[float, HttpClient] = {}
        self._closing: set[asyncio.Future[None]] = set()
        self._made = 0.0

    async def cosign(self, proposal: bytes) -> str:
        """Its signature line for an encoded proposal."""
        answer = await self._client(PEER_TIMEOUT_S).post_cbor("/v1/cosign", proposal)
        return answer.decode("utf-8", errors="replace")

    async def announce(self, committed: bytes) -> None:
        """Tell it of a committed block."""
        await self._client(PEER_TIMEOUT_S).post_cbor("/v1/blocks", committed)

    async def block(self, height: int) -> bytes:
        """Its committed block at a height."""
        return await self._client(PEER_TIMEOUT_S).get_bytes(f"/v1/blocks/{height}")

    async def note(self) -> bytes:
        """The note of its head."""
        return await self._client(PEER_TIMEOUT_S).get_bytes("/v1/checkpoint")

    async def submit(self, transaction: bytes) -> bytes:
        """Hand it a transaction."""
        return await self._client(SUBMIT_TIMEOUT_S).post_cbor("/v1/transactions?forwarded=true", transaction)

    async def manifest(self) -> bytes:
        """The manifest of its head."""
        return await self._client(SUBMIT_TIMEOUT_S).get_bytes("/v1/snapshot")

    async def chunk(self, first: int) -> bytes:
        """Records of its state from a subtree on."""
        return await self._client(SUBMIT_TIMEOUT_S).get_bytes(f"/v1/snapshot/{first}")

    async def standing(self) -> bytes:
        """Whom it follows."""
        return await self._client(PEER_TIMEOUT_S).get_bytes("/v1/term")

    async def promise(self, request: bytes) -> bytes:
        """Its operator's word and what it holds."""
        return await self._client(SUBMIT_TIMEOUT_S).post_cbor("/v1/words", request)

    def _client(self, timeout_s: float) -> HttpClient:
        if self._clients and time.monotonic() - self._made > TLS_RENEWAL_S:
            for client in self._clients.values():
                closing = asyncio.ensure_future(_close_later(client))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
            self._clients.clear()
        if timeout_s not in self._clients:
            shown = self._identity()
            self._clients[timeout_s] = HttpClient(
                f"https://{self.address}",
                server_name=self._server_name,
                roots_pem=self._roots_pem,
                identity=ClientIdentity(certificate_chain_pem=shown.chain_pem, private_key_pem=shown.key_pem),
                timeout_s=timeout_s,
            )
            self._made = time.monotonic()
        return self._clients[timeout_s]


async def _close_later(client: HttpClient) -> None:
    """Close when no request can be in flight any more."""
    await asyncio.sleep(SUBMIT_TIMEOUT_S)
    await client.aclose()


class Peers(Mapping[str, Peer]):
    """The other authorities in force, at the addresses the ledger has for them: admission and retirement show at once."""

    def __init__(self, node: Node, identity: Callable[[], TlsIdentity]) -> None:
        self._node, self._identity = node, identity
        self._known: dict[str, HttpPeer] = {}

    def __getitem__(self, name: str) -> Peer:
        record = records.parse(records.AuthorityRecord, self._node.head.state.records[records.authority_key(name)])
        known = self._known.get(name)
        if known is None or known.address != record.address:
            known = self._known[name] = HttpPeer(
                record.address,
                server_name=server_name(self._node.genesis, name),
                roots_pem=ceremony.pem_of(self._node.genesis.roots),
                identity=self._identity,
            )
        return known

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._node.authorities() if name != self._node.name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


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


def server_name(found: Genesis, name: str) -> str:
    """The DNS name of an authority's TLS certificate."""
    return dns_name(ceremony.authority_id(found.consortium_domain, name))


def authority_app(node: Node | CometNode, engine: Office | Consensus) -> FastAPI:
    """The HTTPS interface of an authority (docs/reference/endpoints.md)."""

    def why_not() -> str | None:
        if isinstance(node, Node) and node.conduct.halted():
            return f"the ledger forked at height {node.conduct.halted()}"
        return None if node.note is not None else "no block has been signed yet"

    app = application("moorline authority", body_cap=BODY_CAP, ready=why_not)
    metrics.of_authority(app, node)
    _public_routes(app, node, engine)
    if isinstance(engine, Office):
        _embedded_routes(app, engine.node)
        _authority_routes(app, engine.node, engine)
        _own_routes(app, engine.node, engine)
    return app


def _public_routes(app: FastAPI, node: Node | CometNode, engine: Office | Consensus) -> None:
    @app.post("/v1/transactions")
    async def submit(
        request: Request, *, forwarded: Annotated[bool, Query(description="By an authority that does not sequence.")] = False
    ) -> Response:
        """Public: a transaction is signed by its sender. Answers with the receipt once a quorum signed."""
        data = await request.body()
        return _cbor(await (engine.submit(data, forwarded=forwarded) if isinstance(engine, Office) else engine.submit(data)))

    @app.get("/v1/proof")
    async def prove(
        key: Annotated[list[str], Query(max_length=64)],
        known: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$")] = None,
    ) -> Response:
        """Public: a proof bundle for the keys named, which proves itself.

        `known` is the digest of an authority set: changes before it are left out.
        """
        return _cbor(node.prove(key, known=None if known is None else bytes.fromhex(known)))

    @app.get("/v1/checkpoint")
    async def checkpoint() -> Response:
        """Public: the newest checkpoint, a signed note."""
        return Response(node.signed_note(), media_type="text/plain; charset=utf-8")

    @app.get("/v1/blocks/{height}")
    async def block(height: Annotated[int, PathParameter(ge=0, le=MAX_HEIGHT)]) -> Response:
        """Public: a block and its signed note."""
        return _cbor(node.committed(height))

    @app.get("/v1/ledger")
    async def ledger() -> Response:
        """Public: the genesis, who sequences, and how far this authority is."""
        return _cbor(encode_status(node))


def _embedded_routes(app: FastAPI, node: Node) -> None:
    @app.get("/v1/term")
    async def term() -> Response:
        """Public: who sequences in which term, by whose word, as this authority knows it."""
        return _cbor(node.conduct.standing())

    @app.get("/v1/evidence")
    async def evidence() -> Response:
        """Public: evidence that authorities lied, as far as this authority has it; each proves itself."""
        return _cbor(cbor.encode([one.body for one in node.store.evidence()[-MAX_EVIDENCE:]]))

    @app.get("/v1/snapshot")
    async def manifest() -> Response:
        """Public: the manifest of a snapshot of the head, which proves itself."""
        return _cbor(node.manifest())

    @app.get("/v1/snapshot/{first}")
    async def chunk(first: Annotated[int, PathParameter(ge=0, lt=1 << SUBTREE_BITS)]) -> Response:
        """Public: records of the state from a subtree on; a manifest says what they have to be."""
        return _cbor(node.chunk(first))


def _authority_routes(app: FastAPI, node: Node, office: Office) -> None:
    domain = node.genesis.consortium_domain

    def authority(request: Request) -> str:
        name: str = require(request, Role.AUTHORITY, trust_domain=domain).segments[-1]
        if name not in node.authorities():
            raise Refused("ledger.authority_unknown", "the caller is no authority in force", got=name)
        return name

    @app.post("/v1/cosign")
    async def cosign(request: Request) -> Response:
        """The sequencer only: a signature line for a block it proposes under its seal."""
        caller = authority(request)
        if caller != node.conduct.following.sequencer and node.conduct.following.term == node.conduct.word.term:
            await _asked_who_sequences(node, caller, await request.body())
        return Response(await office.cosign(await request.body()), media_type="text/plain; charset=utf-8")

    @app.post("/v1/blocks")
    async def announce(request: Request) -> Response:
        """Authorities only: a block that a quorum signed."""
        authority(request)
        await office.announce(await request.body())
        return _cbor(b"")

    @app.post("/v1/words")
    async def words(request: Request) -> Response:
        """Authorities only: the word of this authority's operator on who sequences, with what it holds, if it was given."""
        authority(request)
        return _cbor(node.promise(await request.body()))


async def _asked_who_sequences(node: Node, caller: str, body: bytes) -> None:
    """Whoever is not the sequencer known here may be that of a later term: its proposal then carries the certificate."""
    try:
        found = schema.decode(Proposal, body, max_bytes=BODY_CAP)
    except Malformed:
        found = None  # who may not propose is told that, whatever it sent
    if found is None or found.seal.name != caller or found.certificate is None:
        following = node.conduct.following
        raise Refused(
            "ledger.not_sequencer",
            "only the sequencer proposes blocks",
            expected=f"{following.sequencer} in term {following.term}",
            got=caller,
        )


def _own_routes(app: FastAPI, node: Node, office: Office) -> None:
    def own(request: Request) -> None:
        caller = require(request, Role.AUTHORITY, trust_domain=node.genesis.consortium_domain)
        if caller.segments != (node.name,):
            raise Refused("ledger.operator_only", "only this authority's own operator decides this", got=caller.segments[-1])

    @app.post("/v1/operator/promote")
    async def promote(request: Request) -> Response:
        """The authority's own key only: its operator's word on who sequences; the term it is for."""
        own(request)
        said = schema.decode(Promotion, await request.body())
        term = await office.promote(said.sequencer, again=said.again)
        return _cbor(cbor.encode({"term": term, "sequencer": said.sequencer}))

    @app.post("/v1/operator/resume")
    async def resume(request: Request) -> Response:
        """The authority's own key only: go on after a fork that halted it, because the consortium decided so."""
        own(request)
        node.conduct.halt(0)
        return _cbor(b"")


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
        "an authority lied", kind=finding.kind, height=finding.height, offenders=finding.offenders, forked=finding.forked
    )
    clock = SystemClock()
    verifiers = Verifiers()
    office = LoggingOffice(
        node,
        Peers(node, lambda: tls_identity(keys, found, clock)),
        snapshot_after=settings.snapshot_after,
        verifiers=verifiers,
    )
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


def _cbor(body: bytes) -> Response:
    return Response(body, media_type=CBOR_TYPE)
