"""What an authority of the CometBFT engine answers clients: the same as one of the embedded engine, with anchors for notes.

`follow` fetches the header of every block with its commit from the own CometBFT, verifies it against the authorities in
force before it, and keeps it. The header of block h+1 proves the state after block h; a transaction is acknowledged when its
state is proven, so whoever has a receipt finds in any later proof what it did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moorline.errors import Conflict, Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import anchor, checkpoint, evidence, misconduct, proof
from moorline.ledger.anchor import COMETBFT, CometAnchor
from moorline.ledger.batch import Outcome
from moorline.ledger.blocks import Receipt
from moorline.ledger.engines.cometbft.chain import AuthoritySet, Chain
from moorline.ledger.engines.cometbft.evidence import DuplicateVote, LightClientAttack
from moorline.ledger.engines.cometbft.header import Validator, address_of, authority_validators
from moorline.ledger.engines.cometbft.mempool import Mempool
from moorline.ledger.engines.cometbft.receipts import BlockSummary, CometBlock, paths
from moorline.ledger.engines.cometbft.rpc import Accusation, CometRpc
from moorline.ledger.engines.node import Committed, transaction_id_of
from moorline.ledger.finding import Finding, Kind
from moorline.ledger.genesis import Genesis
from moorline.ledger.state import Rejected, State
from moorline.ledger.transactions import MAX_TRANSACTION_BYTES
from moorline.ledger.transactions import parse as parse_transaction
from moorline.storage.consensus_store import ConsensusStore, StoredEvidence
from moorline.wire import schema

SUBMIT_DEADLINE_S: Final = 15.0
POLL_S: Final = 0.02
IDLE_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where this authority is; its state need not be proven yet."""

    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proven:
    """A state with the header that carries its root."""

    state: State
    anchor: bytes
    height: int


class CometNode:
    """One authority's view of the chain, for clients."""

    def __init__(self, *, name: str, genesis: Genesis, chain: Chain, store: ConsensusStore) -> None:
        self.name, self.genesis, self.store = name, genesis, store
        self._chain = chain
        self._proven: _Proven | None = None
        self._sets: list[tuple[int, dict[str, bytes]]] = []
        self._clocks_off = {
            name
            for one in store.evidence()
            if one.kind == Kind.CLOCK
            for name in evidence.verify(one.body, genesis.trust()).offenders
        }
        self.on_evidence: Callable[[Finding], None] = lambda _: None
        """Told of new evidence; a service logs it."""
        self.refresh()
        kept = store.last_anchor()
        if kept is not None:
            self._prove(anchor.parse(kept[1]))

    # Reading: as engines.node.Node ---------------------------------------------------------------------------------------

    @property
    def head(self) -> Head:
        """The committed state."""
        return Head(state=self._chain.state)

    @property
    def note(self) -> bytes | None:
        """The newest anchored head, or None."""
        return None if self._proven is None else self._proven.anchor

    def authorities(self) -> dict[str, bytes]:
        """The set in force."""
        return self._chain.state.authority_set()

    def signed_note(self) -> bytes:
        """The newest anchored head. Raises Unavailable("ledger.no_block_yet")."""
        return self._newest().anchor

    def prove(self, keys: Iterable[str], *, known: bytes | None = None) -> bytes:
        """A proof bundle at the newest anchored head, with changes of the set from the one with digest `known` on, or all.

        Raises Unavailable("ledger.no_block_yet").
        """
        proven = self._newest()
        return proof.make_bundle(
            note=proven.anchor,
            changes=proof.changes_since(known, self._changes_before(proven.height)),
            tree=proven.state.tree,
            value_of=proven.state.get,
            keys=keys,
        )

    def committed(self, height: int) -> bytes:
        """The encoded `Committed` at a height: a `CometBlock`, and the anchored head that follows it.

        Raises Refused("ledger.no_such_block").
        """
        block, after = self.store.anchor(height), self.store.anchor(height + 1)
        transactions = self._chain.transactions(height)
        if block is None or after is None or transactions is None:
            raise Refused("ledger.no_such_block", "this authority has no such block, or not yet its proof", got=height)
        body = CometBlock(header=_comet(block).signed.header, transactions=transactions)
        return schema.encode(Committed(block=schema.encode(body), note=after))

    def receipt(self, transaction_id: bytes) -> bytes | None:
        """The receipt of a transaction whose state is proven, or None."""
        where = self.store.transaction(transaction_id)
        if where is None:
            return None
        height, index = where
        block, after = self.store.anchor(height), self.store.anchor(height + 1)
        transactions = self._chain.transactions(height)
        if block is None or after is None or transactions is None:
            return None
        header = _comet(block).signed.header
        return schema.encode(
            Receipt(
                height=height,
                time_ms=header.time_ns // 1_000_000,
                transaction=transaction_id,
                note=after,
                header=schema.encode(BlockSummary(header=header, transactions=len(transactions))),
                index=index,
                block_proof=paths(transactions)[index],
                log_proof=(),
            )
        )

    # Evidence ----------------------------------------------------------------------------------------------------------

    def evidence(self) -> list[bytes]:
        """Evidence that authorities broke the rules, oldest first; each piece proves itself."""
        return [one.body for one in self.store.evidence()]

    def unproven(self) -> list[int]:
        """Heights of blocks that hold accusations which this authority has no evidence of yet."""
        known = {one.seen_at for one in self.store.evidence() if one.kind != Kind.CLOCK}
        return sorted({one.seen_at for one in self.store.misbehaviour()} - known)

    def keys(self) -> dict[bytes, bytes]:
        """The public keys of everybody who ever was an authority, by address."""
        return {address_of(key): key for _, authorities in self._sets for key in authorities.values()}

    def accuse(self, found: Accusation, *, seen_at: int) -> None:
        """Keep what a block holds against validators as evidence, if it names somebody."""
        if isinstance(found, DuplicateVote):
            self._keep(Kind.VOTES, found.encode(), before=found.height - 1, seen_at=seen_at)
            return
        own = self.store.anchor(found.signed.header.height)
        if own is None:
            return  # a header from before this authority's snapshot: others have it
        attack = LightClientAttack(
            common=self._validators(found.common_height),
            validators=self._validators(found.signed.header.height),
            others=found.validators.validators,
            one=_comet(own).signed,
            other=found.signed,
        )
        self._keep(Kind.ATTACK, attack.encode(), before=found.common_height - 1, seen_at=seen_at)

    def _validators(self, height: int) -> tuple[Validator, ...]:
        return authority_validators(self._set_for(height)).validators

    def _watch_clocks(self, found: CometAnchor, authorities: Mapping[str, bytes]) -> None:
        """Keep the first commit in which an authority's clock was far off."""
        height = found.signed.header.height
        new = set(misconduct.late_or_early(found, authorities)) - self._clocks_off
        if new:
            self._clocks_off |= new
            self._keep(Kind.CLOCK, found.encode(), before=height - 1, seen_at=height)

    def _keep(self, kind: Kind, body: bytes, *, before: int, seen_at: int) -> None:
        changes = tuple(self._changes_before(before))
        data = misconduct.encode(kind, body, ledger_id=self.genesis.ledger_id, changes=changes)
        try:
            finding = evidence.verify(data, self.genesis.trust())
        except MoorlineError:
            return  # it shows nobody's lie: amnesia, or a header that is not complete
        self.store.keep_evidence(
            StoredEvidence(id=evidence.identify(data), kind=kind.value, height=finding.height, seen_at=seen_at, body=data)
        )
        self.on_evidence(finding)

    # Following ---------------------------------------------------------------------------------------------------------

    def next_header(self) -> int | None:
        """The height of the next header that is to be fetched; None if there is none yet.

        Blocks before a snapshot are others' to show.
        """
        kept = self.store.last_anchor()
        return self.store.next_body(0 if kept is None else kept[0])

    def take(self, found: CometAnchor) -> None:
        """Keep the header of a block that this authority committed. Raises as anchor.verify."""
        height = found.signed.header.height
        authorities = self._set_for(height)
        anchor.verify(found, authorities, checkpoint.quorum_of(len(authorities)))
        self.store.keep_anchor(height, found.encode())
        self._watch_clocks(found, authorities)
        self._prove(found)

    def changed(self, height: int) -> None:
        """Remember the set that a committed block led to, if it changed it."""
        after = self._chain.state.authority_set()
        if after != self._sets[-1][1]:
            self._sets.append((height, after))

    def signing_key(self) -> bytes | None:
        """The public key with which this authority votes on the next block; None if it does not."""
        return self._set_for(self._chain.state.height + 1).get(self.name)

    def refresh(self) -> None:
        """Read the changes of the authority set anew: at the start, and after a snapshot."""
        self._sets = [(0, dict(self.genesis.trust().authorities)), *self._stored_sets()]

    def _set_for(self, height: int) -> Mapping[str, bytes]:
        """The set that signs the header of this height: in force after the block two before."""
        return next(found for at, found in reversed(self._sets) if at <= max(0, height - 2))

    def _prove(self, found: anchor.Anchor) -> None:
        head = found.checkpoint
        candidates = (self._chain.recent.get(head.height), self._chain.state)
        state = next((one for one in candidates if one is not None and one.root == head.state_root), None)
        if state is not None and isinstance(found, CometAnchor):
            self._proven = _Proven(state=state, anchor=found.encode(), height=head.height)

    def _newest(self) -> _Proven:
        if self._proven is None:
            raise Unavailable("ledger.no_block_yet", "no block has been signed yet", remedy="ask again shortly")
        return self._proven

    def _changes_before(self, height: int) -> list[proof.SetChange]:
        found = []
        for at, authorities in self._sets[1:]:
            head = self.store.anchor(at + 1)
            if at < height and head is not None:
                found.append(proof.SetChange(note=head, authorities=authorities))
        return found

    def _stored_sets(self) -> list[tuple[int, dict[str, bytes]]]:
        return [(height, dict(schema.decode(AuthoritySet, data).authorities)) for height, data in self.store.set_changes()]


class Consensus:
    """Brings transactions to CometBFT and waits for what comes of them."""

    def __init__(self, node: CometNode, chain: Chain, mempool: Mempool, rpc: CometRpc) -> None:
        self.node = node
        self._chain, self._mempool, self._rpc = chain, mempool, rpc
        self._waiting: dict[bytes, list[asyncio.Future[bytes]]] = {}
        self._committed = asyncio.Event()
        self._accused: set[int] = set()

    async def submit(self, transaction: bytes) -> bytes:
        """The receipt, once a quorum signed the state it led to. The same transaction again gives its receipt again.

        Raises what the state machine says (`ledger.*`), or Unavailable("ledger.quorum_unreachable" | "ledger.busy" |
        "ledger.sender_busy"): then it may still be applied later, and may be sent again as it is.
        """
        if len(transaction) > MAX_TRANSACTION_BYTES:
            raise Refused("ledger.transaction_too_large", "the transaction is too large", expected=MAX_TRANSACTION_BYTES)
        transaction_id = transaction_id_of(transaction)
        known = None if transaction_id is None else self.node.receipt(transaction_id)
        if known is not None:
            return known
        receipt = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(transaction_id or b"", []).append(receipt)
        try:
            await self._put(transaction, transaction_id)
            return await asyncio.wait_for(receipt, SUBMIT_DEADLINE_S)
        except TimeoutError:
            raise _unreachable() from None
        finally:
            waiting = self._waiting.get(transaction_id or b"", [])
            if receipt in waiting:
                waiting.remove(receipt)
            if not waiting:
                self._waiting.pop(transaction_id or b"", None)

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool = True) -> list[Outcome]:
        """As `submit` of each, one begun after the other; without `wait` None for each that CometBFT has taken."""
        if wait:
            done = await asyncio.gather(*map(self.submit, transactions), return_exceptions=True)
            return [_outcome(one) for one in done]
        found: list[Outcome] = []
        for one in transactions:
            try:
                await self._put(one, transaction_id_of(one))
            except MoorlineError as error:
                found.append(error)
            else:
                found.append(None)
        return found

    async def _put(self, transaction: bytes, transaction_id: bytes | None) -> None:
        if transaction_id is not None and self._is_on_its_way(transaction_id):
            return
        outcome = self._mempool.judge(self._chain.state, transaction)
        if isinstance(outcome, Rejected):
            raise outcome.error()
        try:
            await self._rpc.submit(transaction)
        except Conflict:
            # Committed between the two looks at the state: its receipt comes.
            if transaction_id is None or self.node.store.transaction(transaction_id) is None:
                raise

    def _is_on_its_way(self, transaction_id: bytes) -> bool:
        return self._mempool.waits(transaction_id) or self.node.store.transaction(transaction_id) is not None

    def committed(self, height: int, transactions: Iterable[bytes], *, accuses: bool = False) -> None:
        """Told by the chain of every committed block, and whether it accuses anybody."""
        if accuses:
            self._accused.add(height)
        self._mempool.forget(found for data in transactions if (found := transaction_id_of(data)) is not None)
        self.node.changed(height)
        self._committed.set()

    def rejected(self, transaction_id: bytes, error: MoorlineError) -> None:
        """Told by the application of a waiting transaction that will not stand in a block."""
        for receipt in self._waiting.get(transaction_id, []):
            if not receipt.done():
                receipt.set_exception(error)

    async def follow(self) -> None:
        """Fetch and keep headers for ever, and the evidence in their blocks."""
        self._accused = set(self.node.unproven())
        while True:
            height = self.node.next_header()
            if height is None:
                await self._gather()
                await self._news()
                continue
            try:
                signed = await self._rpc.signed_header(height)
                self.node.take(CometAnchor(form=COMETBFT, signed=signed))
            except Unavailable:
                await asyncio.sleep(POLL_S)  # CometBFT starts, or has not written it yet
                continue
            except NotAuthentic as error:
                self.on_trouble(error)
                await asyncio.sleep(IDLE_S)
                continue
            self._acknowledge(height - 1)

    async def _gather(self) -> None:
        """Get the evidence behind accusations in blocks whose headers are known."""
        for height in sorted(self._accused):
            try:
                for one in await self._rpc.accusations(height, self.node.keys()):
                    self.node.accuse(one, seen_at=height)
            except Unavailable:
                return  # CometBFT is not there, or not so far
            except Malformed as error:
                self.on_trouble(error)
            self._accused.discard(height)

    def on_trouble(self, error: MoorlineError) -> None:
        """Called when a header of the own CometBFT does not verify. Does nothing; a service logs it."""

    async def _news(self) -> None:
        self._committed.clear()
        try:
            async with asyncio.timeout(IDLE_S):
                await self._committed.wait()
        except TimeoutError:
            return

    def _acknowledge(self, height: int) -> None:
        if not self._waiting or height < 1:
            return
        for data in self._chain.transactions(height) or ():
            found = parse_transaction(data).id
            waiting = self._waiting.get(found)
            if not waiting:
                continue
            receipt = self.node.receipt(found)
            for one in waiting:
                if receipt is not None and not one.done():
                    one.set_result(receipt)


def _comet(data: bytes) -> CometAnchor:
    found = anchor.parse(data)
    assert isinstance(found, CometAnchor), "this engine keeps only its own form"
    return found


def _unreachable() -> Unavailable:
    return Unavailable(
        "ledger.quorum_unreachable",
        "no quorum of authorities agreed on a block in time",
        remedy="send the same transaction again when the authorities are back",
    )


def _outcome(done: bytes | BaseException) -> Outcome:
    if isinstance(done, bytes | MoorlineError):
        return done
    raise done
