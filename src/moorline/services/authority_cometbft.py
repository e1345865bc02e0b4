"""The process of one authority of the CometBFT engine: application, signer, HTTPS interface, and a CometBFT below.

Started in this order, each needed by the next: the application listens, CometBFT starts, the signer dials it, clients are
served. They end together: an authority whose CometBFT ended ends too, and whoever keeps services running starts both again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI
from fastapi import Path as PathParameter
from fastapi.responses import Response

from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.ledger import ceremony, records
from moorline.ledger.ceremony import AuthorityKeys
from moorline.ledger.engines.cometbft import home, signer
from moorline.ledger.engines.cometbft.abci import AbciServer
from moorline.ledger.engines.cometbft.application import Application
from moorline.ledger.engines.cometbft.chain import Chain, Decided
from moorline.ledger.engines.cometbft.header import address_of, chain_id_of
from moorline.ledger.engines.cometbft.mempool import Mempool
from moorline.ledger.engines.cometbft.node import CometNode, Consensus
from moorline.ledger.engines.cometbft.process import CometProcess, find
from moorline.ledger.engines.cometbft.rpc import CometRpc
from moorline.ledger.engines.cometbft.signer import SignedFile, Signer, SigningKey
from moorline.ledger.engines.cometbft.snapshots import Snapshots
from moorline.ledger.finding import Finding
from moorline.ledger.genesis import Genesis
from moorline.ledger.state import State
from moorline.storage import damage
from moorline.storage.consensus_store import ConsensusStore, open_consensus
from moorline.wire import cbor
from moorline.wire.certificates import dns_name
from moorline.wire.http import CBOR_TYPE, HttpClient

if TYPE_CHECKING:
    from pathlib import Path

    from moorline.hsm.token import LocalToken
    from moorline.services.authority import Settings
    from moorline.services.comet_settings import ValidatorToken

CONFIRM_TIMEOUT_S: Final = 5.0
YIELDS_BY: Final = 10
"""How much less urgent this process is than its CometBFT: one that waits for a processor delays every authority's block, and
until the thread that sends it runs, CometBFT (0.38: libs/timer) spins for each request to an application."""
MAX_HEIGHT: Final = (1 << 53) - 1
MAX_EVIDENCE: Final = 100


class LoggingConsensus(Consensus):
    """A consensus that says what its CometBFT showed it that does not verify."""

    def on_trouble(self, error: MoorlineError) -> None:
        """Logged: the own CometBFT, or this authority's database, is not what it should be."""
        structlog.get_logger().error("a header does not verify", **error.as_problem())


class _MemoryKey:
    """The checkpoint key of the authority's folder as a validator's key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    def public_bytes(self) -> bytes:
        """32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(message)


class TokenKey:
    """A validator's key that never leaves its token."""

    def __init__(self, token: LocalToken, label: str) -> None:
        self._token, self._label = token, label
        self._public = token.ed25519_public(label)

    def public_bytes(self) -> bytes:
        """32 bytes."""
        return self._public

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._token.ed25519(self._label, message)


async def run(
    settings: Settings,
    log: structlog.stdlib.BoundLogger,
    keys: AuthorityKeys,
    genesis: Genesis,
    serve: Callable[[CometNode, Consensus, Callable[[FastAPI], None]], Awaitable[None]],
) -> None:
    """Run an authority until cancelled. `serve` is the HTTPS interface of authority.py, given routes to add."""
    assert settings.cometbft is not None, "the caller looked"
    damage.judge(database_url(settings))
    store = open_consensus(database_url(settings))
    try:
        with held_keys(settings, keys) as held:
            await _Authority(settings, log, held, genesis, store).run(serve)
    finally:
        store.close()


class _Authority:
    """The parts of one authority, wired."""

    def __init__(
        self,
        settings: Settings,
        log: structlog.stdlib.BoundLogger,
        held: Sequence[SigningKey],
        genesis: Genesis,
        store: ConsensusStore,
    ) -> None:
        assert settings.cometbft is not None
        self._comet, self._log, self._genesis = settings.cometbft, log, genesis
        self._name = settings.name
        self._chain = Chain(genesis=genesis, store=store)
        self._snapshots = Snapshots(settings.directory / "snapshots", self._chain, store, self._confirmations)
        mempool = Mempool(self._chain.verified)
        self._application = Application(self._chain, mempool, self._snapshots)
        self._node = CometNode(name=settings.name, genesis=genesis, chain=self._chain, store=store)
        self._rpc = CometRpc(f"http://{self._comet.rpc}")
        self._consensus = LoggingConsensus(self._node, self._chain, mempool, self._rpc)
        self._chain.on_commit = self._committed
        self._node.on_evidence = self._found
        self._application.on_rejected = self._consensus.rejected
        self._application.on_refused = self._refused
        self._snapshots.on_restored = self._node.refresh
        self._signer = Signer(
            KeyRing(held, self._node.signing_key),
            chain_id=chain_id_of(genesis.ledger_id),
            state=SignedFile(settings.directory / "signed.json"),
        )
        self._writing: set[asyncio.Future[None]] = set()

    async def run(self, serve: Callable[[CometNode, Consensus, Callable[[FastAPI], None]], Awaitable[None]]) -> None:
        process = CometProcess(find(self._comet.program), self._comet.home)
        with _short(self._comet.home) as folder:
            listening = asyncio.Event()
            app = f"{folder}/{home.APP_SOCKET}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(app)  # noqa: PTH108 - a socket of the last run, by its short path
            server = AbciServer(self._application.answer, self._on_error)
            tasks = [
                asyncio.ensure_future(server.serve(app, listening.set)),
                asyncio.ensure_future(signer.serve(self._signer, f"{folder}/{home.SIGNER_SOCKET}", self._signer_trouble)),
            ]
            try:
                await listening.wait()
                self._log.info("authority", name=self._name, height=self._chain.state.height, engine="cometbft")
                await process.start(self._rpc)
                os.nice(YIELDS_BY)
                tasks += [
                    asyncio.ensure_future(self._consensus.follow()),
                    asyncio.ensure_future(self._watch(process)),
                    asyncio.ensure_future(serve(self._node, self._consensus, self._routes)),
                ]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await process.stop()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, *self._writing, return_exceptions=True)
                await self._rpc.aclose()

    async def _watch(self, process: CometProcess) -> None:
        status = await process.ended()
        raise Unavailable(
            "comet.ended", "CometBFT ended", got=f"status {status}: {process.last_words()}", remedy="read cometbft.log"
        )

    def _committed(self, decided: Decided) -> None:
        state = decided.executed.state
        self._consensus.committed(state.height, decided.transactions, accuses=bool(decided.misbehaviour))
        for one in decided.misbehaviour:
            self._log.error(
                "an authority broke the rules", authority=one.authority, kind=one.kind, height=one.height, seen=one.seen_at
            )
        every = self._comet.snapshot_every
        if every and state.height % every == 0:
            writing = asyncio.get_running_loop().run_in_executor(None, self._snapshots.write, state)
            self._writing.add(writing)
            writing.add_done_callback(self._written)

    def _refused(self, address: bytes, height: int, code: str) -> None:
        """Its word alone: a proposal that was refused reaches no application with its signature, so nothing proves it."""
        names = {address_of(key): name for name, key in self._chain.state.authority_set().items()}
        self._log.error(
            "an authority proposed a block that does not hold",
            authority=names.get(address, address.hex()),
            height=height,
            code=code,
        )

    def _found(self, finding: Finding) -> None:
        self._log.error(
            "an authority lied",
            kind=finding.kind,
            height=finding.height,
            offenders=finding.offenders,
            forked=finding.forked,
        )

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing.discard(writing)
        if not writing.cancelled() and writing.exception() is not None:
            self._log.error("a snapshot could not be written", error=str(writing.exception()))

    def _on_error(self, where: str, error: Exception) -> None:
        facts = error.as_problem() if isinstance(error, MoorlineError) else {"error": repr(error)}
        self._log.error("the application cannot answer CometBFT", request=where, **facts)

    def _signer_trouble(self, what: str) -> None:
        self._log.warning("the signer was hung up on", reason=what)

    def _routes(self, app: FastAPI) -> None:
        @app.get("/v1/evidence")
        async def evidence() -> Response:
            """Public: evidence that authorities lied, as far as this authority has it; each proves itself."""
            return Response(cbor.encode(self._node.evidence()[-MAX_EVIDENCE:]), media_type=CBOR_TYPE)

        @app.get("/v1/snapshots/{height}")
        async def snapshot(height: Annotated[int, PathParameter(ge=1, le=MAX_HEIGHT)]) -> Response:
            """Public: the manifest of this authority's snapshot of a height, for others to compare theirs with."""
            found = self._snapshots.manifest(height)
            if found is None:
                raise Refused("ledger.no_such_snapshot", "there is no snapshot of this height", got=height)
            return Response(found.encode(), media_type=CBOR_TYPE)

    async def _confirmations(self, state: State, digest: bytes) -> int:
        """How many other authorities of this state say that their snapshot of its height has this hash."""

        async def same(name: str) -> bool:
            record = records.parse(records.AuthorityRecord, state.records[records.authority_key(name)])
            server_name = server_name_of(self._genesis, name)
            async with HttpClient(
                f"https://{record.address}",
                server_name=server_name,
                roots_pem=ceremony.pem_of(self._genesis.roots),
                timeout_s=CONFIRM_TIMEOUT_S,
            ) as client:
                found = await client.get_bytes(f"/v1/snapshots/{state.height}")
            return hashlib.sha256(found).digest() == digest

        others = [name for name in state.authority_set() if name != self._name]
        answers = await asyncio.gather(*map(same, others), return_exceptions=True)
        return sum(answer is True for answer in answers)


def database_url(settings: Settings) -> str:
    """Where the database is, an SQLAlchemy URL."""
    return settings.database or f"sqlite:///{(settings.directory / 'consensus.db').absolute()}"


def server_name_of(genesis: Genesis, name: str) -> str:
    """The DNS name of an authority's TLS certificate."""
    return dns_name(ceremony.authority_id(genesis.consortium_domain, name))


class KeyRing:
    """The validator's keys: the one that signs is the one the ledger has for this authority at the next height.

    CometBFT asks for the public key after every block, so a rotation that a quorum decided takes effect in both by itself.
    An authority with no key in force is no validator, and shows its first.
    """

    def __init__(self, held: Sequence[SigningKey], in_force: Callable[[], bytes | None]) -> None:
        self._held, self._in_force = held, in_force

    def public_bytes(self) -> bytes:
        """32 bytes."""
        return self._current().public_bytes()

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._current().sign(message)

    def _current(self) -> SigningKey:
        wanted = self._in_force()
        return next((one for one in self._held if one.public_bytes() == wanted), self._held[0])


@contextlib.contextmanager
def held_keys(settings: Settings, keys: AuthorityKeys) -> Iterator[list[SigningKey]]:
    """All keys this authority may sign with: the one in its token, which is open meanwhile, its own and its next."""
    following = ceremony.load_next(settings.directory)
    held: list[SigningKey] = [_MemoryKey(keys.checkpoint)]
    if following is not None:
        held.append(_MemoryKey(following.checkpoint))
    if settings.validator_token is None:
        yield held
        return
    with open_validator_token(settings.validator_token) as token:
        yield [TokenKey(token, settings.validator_token.key), *held]


def open_validator_token(settings: ValidatorToken) -> LocalToken:
    """The token that holds, or is to hold, a validator's key."""
    from moorline.hsm.token import TokenLocation, open_token

    conf = settings.softhsm_conf
    return open_token(
        TokenLocation(
            module=settings.token_module,
            label=settings.token_label,
            pin_file=settings.token_pin_file,
            environment={} if conf is None else {"SOFTHSM2_CONF": str(conf.resolve())},
        )
    )


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A short path to a folder, for its sockets: the path of a unix socket has 107 bytes at most."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
