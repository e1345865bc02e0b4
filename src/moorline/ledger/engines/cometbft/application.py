"""Our state machine as a CometBFT application: one method a request of ABCI 2.0.

What keeps authorities together: everything is a function of the committed state, the block's transactions and the
block's time, which is CometBFT's (the median of the validators' clocks). This module has no clock, socket or randomness.

  PrepareProposal   leaves out what would not apply, and what exceeds the bounds of a block
  ProcessProposal   refuses a block in which anything does not apply, or out of bounds: so a decided block applies as a whole
  FinalizeBlock     executes; the app hash is our state root; a change of authorities is one of validators (effective at H+2)
  Commit            in the database before it is answered; what a power cut takes away CometBFT gives again (Info)
  vote extensions   not used: ours are empty, and any other's that is not is refused
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from moorline.errors import Misconfigured, MoorlineError, Refused
from moorline.ledger.engines.cometbft.chain import Chain
from moorline.ledger.engines.cometbft.header import AUTHORITY_POWER, authority_validators, chain_id_of
from moorline.ledger.engines.cometbft.mempool import Mempool
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb
from moorline.ledger.engines.node import transaction_id_of
from moorline.ledger.state import Applied, Rejected
from moorline.storage.consensus_store import Misbehaviour

APP_VERSION: Final = 1
MAX_TRANSACTIONS: Final = 1000
OK: Final = 0
REJECTED: Final = 1
CODESPACE: Final = "moorline"
_FIELD_OVERHEAD: Final = 8
"""What a transaction takes in a block beside itself: tag and length, rounded up."""
_KINDS: Final = {pb.DUPLICATE_VOTE: "duplicate-vote", pb.LIGHT_CLIENT_ATTACK: "light-client-attack"}


class Snapshots(Protocol):
    """Where snapshots are kept and restored (snapshots.Snapshots)."""

    def listed(self) -> list[pb.Snapshot]:
        """Those that can be had."""
        ...

    def chunk(self, height: int, form: int, index: int) -> bytes:
        """A chunk; empty if there is none."""
        ...

    def offered(self, snapshot: pb.Snapshot, app_hash: bytes) -> pb.ResponseOfferSnapshot:
        """Whether to restore it."""
        ...

    async def applied(self, index: int, data: bytes, sender: str) -> pb.ResponseApplySnapshotChunk:
        """Take a chunk; the last one makes the state."""
        ...


class Application:
    """One authority's application. `on_rejected` is told of a waiting transaction that will not stand in a block."""

    def __init__(self, chain: Chain, mempool: Mempool, snapshots: Snapshots) -> None:
        self.chain, self.mempool, self._snapshots = chain, mempool, snapshots
        self.on_rejected: Callable[[bytes, MoorlineError], None] = lambda _id, _error: None
        self.on_refused: Callable[[bytes, int, str], None] = lambda _address, _height, _code: None
        """Told the address of whoever proposed a block that was refused, its height, and why."""

    async def answer(self, request: pb.Request) -> pb.Response:
        """The answer to any request but Flush, which is the transport's."""
        kind = request.WhichOneof("value")
        if kind == "apply_snapshot_chunk":
            asked = request.apply_snapshot_chunk
            return pb.Response(apply_snapshot_chunk=await self._snapshots.applied(asked.index, asked.chunk, asked.sender))
        method = _METHODS.get(kind or "")
        if kind is None or method is None:
            raise Refused("comet.request_unknown", "this is no request of ABCI 2.0", got=kind)
        response: pb.Response = method(self, getattr(request, kind))
        return response

    # Info and query -----------------------------------------------------------------------------------------------------

    def echo(self, request: pb.RequestEcho) -> pb.Response:
        """The same message."""
        return pb.Response(echo=pb.ResponseEcho(message=request.message))

    def info(self, _: pb.RequestInfo) -> pb.Response:
        """How far this application is: CometBFT gives it what it misses. A CometBFT that asks has just started."""
        self.mempool.clear()
        height = self.chain.state.height
        return pb.Response(
            info=pb.ResponseInfo(
                data="moorline",
                version="1",
                app_version=APP_VERSION,
                last_block_height=height,
                last_block_app_hash=self.chain.state.root if height else b"",
            )
        )

    def init_chain(self, request: pb.RequestInitChain) -> pb.Response:
        """Height 0. Raises Misconfigured("comet.other_genesis") unless CometBFT was set up for this very ledger."""
        genesis = self.chain.genesis
        expected = chain_id_of(genesis.ledger_id)
        if request.chain_id != expected or request.initial_height not in (0, 1):
            raise Misconfigured(
                "comet.other_genesis", "CometBFT's genesis is of another ledger", expected=expected, got=request.chain_id
            )
        mine = {one.public_key for one in authority_validators(self.chain.state.authority_set()).validators}
        if {one.pub_key.ed25519 for one in request.validators if one.power == AUTHORITY_POWER} != mine:
            raise Misconfigured("comet.other_genesis", "CometBFT's genesis has other validators than the ledger's")
        return pb.Response(init_chain=pb.ResponseInitChain(app_hash=self.chain.state.root))

    def query(self, request: pb.RequestQuery) -> pb.Response:
        """A record of the committed state, unproven: for operators. Clients ask for proofs over HTTPS."""
        state = self.chain.state
        value = state.get(request.data.decode("utf-8", errors="replace")) if request.path == "record" else None
        if value is None:
            return pb.Response(query=pb.ResponseQuery(code=REJECTED, codespace=CODESPACE, log="absent", height=state.height))
        return pb.Response(query=pb.ResponseQuery(code=OK, key=request.data, value=value, height=state.height))

    # Mempool --------------------------------------------------------------------------------------------------------------

    def check_tx(self, request: pb.RequestCheckTx) -> pb.Response:
        """Whether it may wait; asked again after each block about those that do."""
        again = request.type == pb.RECHECK
        if again and self.mempool.still_fits(self.chain.state, request.tx, self.chain.last_writes):
            return pb.Response(check_tx=pb.ResponseCheckTx(code=OK))
        judge = self.mempool.judge if again else self.mempool.admit
        outcome = judge(self.chain.state, request.tx)
        if isinstance(outcome, Applied):
            return pb.Response(check_tx=pb.ResponseCheckTx(code=OK))
        if again:
            self._leaves(request.tx, outcome)
        return pb.Response(
            check_tx=pb.ResponseCheckTx(code=REJECTED, codespace=CODESPACE, log=json.dumps(dict(outcome.problem)))
        )

    def _leaves(self, transaction: bytes, outcome: Rejected) -> None:
        found = transaction_id_of(transaction)
        if found is None:
            return  # admitted by another program: nobody here waits for it
        self.mempool.forget([found])
        self.on_rejected(found, outcome.error())

    # Consensus ------------------------------------------------------------------------------------------------------------

    def prepare_proposal(self, request: pb.RequestPrepareProposal) -> pb.Response:
        """Those of the waiting transactions that apply one after the other, within the bounds of a block."""
        batch, size = [], 0
        for transaction in request.txs[:MAX_TRANSACTIONS]:
            size += len(transaction) + _FIELD_OVERHEAD
            if size > request.max_tx_bytes:
                break
            batch.append(transaction)
        executed = self.chain.execute(request.height, batch, time_ms=_ms(request.time))
        kept = [data for data, outcome in zip(batch, executed.outcomes, strict=True) if isinstance(outcome, Applied)]
        return pb.Response(prepare_proposal=pb.ResponsePrepareProposal(txs=kept))

    def process_proposal(self, request: pb.RequestProcessProposal) -> pb.Response:
        """ACCEPT only a block within bounds in which every transaction applies."""
        wrong = self._wrong_with(request)
        if wrong is not None:
            self.on_refused(request.proposer_address, request.height, wrong)
        status = pb.ResponseProcessProposal.ACCEPT if wrong is None else pb.ResponseProcessProposal.REJECT
        return pb.Response(process_proposal=pb.ResponseProcessProposal(status=status))

    def _wrong_with(self, request: pb.RequestProcessProposal) -> str | None:
        """The code of what is wrong with a proposed block, or None."""
        if request.height != self.chain.state.height + 1:
            return "ledger.wrong_height"
        if len(request.txs) > MAX_TRANSACTIONS:
            return "ledger.block_malformed"
        executed = self.chain.execute(request.height, request.txs, time_ms=_ms(request.time))
        return next((one.code for one in executed.outcomes if isinstance(one, Rejected)), None)

    def extend_vote(self, _: pb.RequestExtendVote) -> pb.Response:
        """Nothing is added to votes."""
        return pb.Response(extend_vote=pb.ResponseExtendVote())

    def verify_vote_extension(self, request: pb.RequestVerifyVoteExtension) -> pb.Response:
        """Nothing is the only extension there is."""
        known = pb.ResponseVerifyVoteExtension
        status = known.REJECT if request.vote_extension else known.ACCEPT
        return pb.Response(verify_vote_extension=pb.ResponseVerifyVoteExtension(status=status))

    def finalize_block(self, request: pb.RequestFinalizeBlock) -> pb.Response:
        """Execute the decided block. Nothing is durable yet."""
        before = self.chain.state.authority_set()
        executed = self.chain.finalize(
            request.height,
            request.txs,
            time_ms=_ms(request.time),
            misbehaviour=[_misbehaviour(one) for one in request.misbehavior],
        )
        results = [pb.ExecTxResult(code=OK if isinstance(one, Applied) else REJECTED) for one in executed.outcomes]
        updates = _updates(before, executed.state.authority_set())
        return pb.Response(
            finalize_block=pb.ResponseFinalizeBlock(
                tx_results=results, validator_updates=updates, app_hash=executed.state.root
            )
        )

    def commit(self, _: pb.RequestCommit) -> pb.Response:
        """Durable when this is answered. CometBFT keeps all blocks."""
        self.chain.commit()
        return pb.Response(commit=pb.ResponseCommit(retain_height=0))

    # Snapshots ------------------------------------------------------------------------------------------------------------

    def list_snapshots(self, _: pb.RequestListSnapshots) -> pb.Response:
        """Those this authority can give to others."""
        return pb.Response(list_snapshots=pb.ResponseListSnapshots(snapshots=self._snapshots.listed()))

    def load_snapshot_chunk(self, request: pb.RequestLoadSnapshotChunk) -> pb.Response:
        """A chunk for another authority."""
        data = self._snapshots.chunk(request.height, request.format, request.chunk)
        return pb.Response(load_snapshot_chunk=pb.ResponseLoadSnapshotChunk(chunk=data))

    def offer_snapshot(self, request: pb.RequestOfferSnapshot) -> pb.Response:
        """Whether to begin from it; the app hash was verified by CometBFT's light client."""
        return pb.Response(offer_snapshot=self._snapshots.offered(request.snapshot, request.app_hash))


_METHODS: Final[dict[str, Callable[[Application, object], pb.Response]]] = {
    name: getattr(Application, name)
    for name in (
        "echo",
        "info",
        "init_chain",
        "query",
        "check_tx",
        "prepare_proposal",
        "process_proposal",
        "extend_vote",
        "verify_vote_extension",
        "finalize_block",
        "commit",
        "list_snapshots",
        "load_snapshot_chunk",
        "offer_snapshot",
    )
}


def _ms(time: Timestamp) -> int:
    return time.seconds * 1000 + time.nanos // 1_000_000


def _misbehaviour(one: pb.Misbehavior) -> Misbehaviour:
    kind = _KINDS.get(one.type, "unknown")
    return Misbehaviour(height=one.height, address=one.validator.address, kind=kind, authority="", seen_at=0)


def _updates(before: dict[str, bytes], after: dict[str, bytes]) -> Sequence[pb.ValidatorUpdate]:
    """Validators that come (one vote) and go (none), in the order of their keys, which is the same everywhere."""
    old, new = set(before.values()), set(after.values())
    changed = [(key, AUTHORITY_POWER) for key in new - old] + [(key, 0) for key in old - new]
    found = []
    for key, power in sorted(changed):
        update = pb.ValidatorUpdate(power=power)
        update.pub_key.ed25519 = key
        found.append(update)
    return found
