"""The chain as this authority's application has it: the committed state, and a block decided and not yet committed.

A block's life: *execute* (for PrepareProposal and ProcessProposal, remembered so that it is done once), *finalize* (it is
decided), *commit* (state, block and receipts' index durable in one transaction), and only then does CometBFT hear that
it is. After a crash in between, CometBFT gives the same block again: everything follows from committed state, block and
block time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from moorline.errors import Misconfigured, Refused
from moorline.ledger import state as machine
from moorline.ledger.engines.cometbft.header import address_of
from moorline.ledger.genesis import Genesis
from moorline.ledger.state import Applied, Executed, State
from moorline.ledger.verified import Verified
from moorline.storage.consensus_store import ConsensusStore, Misbehaviour, StoredHead
from moorline.storage.steps import reached
from moorline.wire import schema
from moorline.wire.schema import Bytes32

_REMEMBERED: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The transactions of a block, as they are stored."""

    transactions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthoritySet:
    """Names and raw validator keys."""

    authorities: dict[str, Bytes32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A block that consensus decided, executed."""

    transactions: tuple[bytes, ...]
    executed: Executed
    misbehaviour: tuple[Misbehaviour, ...]


class Chain:
    """One authority's state. No clock: the only time is the block's."""

    def __init__(self, *, genesis: Genesis, store: ConsensusStore) -> None:
        self.genesis = genesis
        self.store = store
        self.state = self._load()
        self.verified = Verified()
        self.last_writes: frozenset[str] | None = None
        self.decided: Decided | None = None
        self.recent: OrderedDict[int, State] = OrderedDict({self.state.height: self.state})
        self.on_commit: Callable[[Decided], None] = lambda _: None
        self._executed: OrderedDict[bytes, Executed] = OrderedDict()

    def execute(self, height: int, transactions: Sequence[bytes], *, time_ms: int) -> Executed:
        """What a block of these transactions would do now. Raises Refused("ledger.wrong_height") unless it is the next."""
        if height != self.state.height + 1:
            raise Refused("ledger.wrong_height", "the block is not the next", expected=self.state.height + 1, got=height)
        parts = (height.to_bytes(8, "big"), time_ms.to_bytes(8, "big"), *map(_digest, transactions))
        key = hashlib.sha256(b"".join(parts)).digest()
        known = self._executed.get(key)
        if known is None:
            known = machine.execute(self.state, transactions, time_ms=time_ms, verified=self.verified)
            self._executed[key] = known
            while len(self._executed) > _REMEMBERED:
                self._executed.popitem(last=False)
        return known

    def finalize(
        self, height: int, transactions: Sequence[bytes], *, time_ms: int, misbehaviour: Sequence[Misbehaviour] = ()
    ) -> Executed:
        """Take a decided block; `commit` follows."""
        executed = self.execute(height, transactions, time_ms=time_ms)
        self.decided = Decided(
            transactions=tuple(transactions), executed=executed, misbehaviour=tuple(map(self._named, misbehaviour))
        )
        reached("comet.block.finalized")
        return executed

    def commit(self) -> None:
        """Make the decided block durable. Raises Refused("ledger.nothing_decided")."""
        decided = self.decided
        if decided is None:
            raise Refused("ledger.nothing_decided", "there is no decided block to commit")
        after = decided.executed.state
        applied = [one for one in decided.executed.outcomes if isinstance(one, Applied)]
        writes = dict(after.records) if self.store.head() is None else _writes(applied)
        self.store.commit(
            StoredHead(
                height=after.height,
                time_ms=after.time_ms,
                app_hash=after.root,
                body=schema.encode(Body(transactions=decided.transactions)),
            ),
            writes=writes,
            nonces={one.nonce_id: one.valid_until for one in applied},
            transactions=[one.id for one in applied],
            authorities=self._changed(after),
            misbehaviour=decided.misbehaviour,
        )
        reached("comet.block.committed")
        self.adopt(after)
        self.last_writes = frozenset(key for one in applied for key in one.writes)
        self.decided = None
        self.on_commit(decided)

    def adopt(self, state: State) -> None:
        """Go on from this state, which is durable already."""
        self.state = state
        self._executed.clear()
        self.last_writes = None
        self.recent[state.height] = state
        while len(self.recent) > _REMEMBERED:
            self.recent.popitem(last=False)

    def transactions(self, height: int) -> tuple[bytes, ...] | None:
        """The transactions of a committed block; None if there is none, or it came with a snapshot."""
        stored = self.store.block(height)
        if stored is None or stored.body is None:
            return None
        return schema.decode(Body, stored.body, max_bytes=len(stored.body)).transactions

    def _changed(self, after: State) -> bytes | None:
        authorities = after.authority_set()
        changed = authorities != self.state.authority_set()
        return schema.encode(AuthoritySet(authorities=authorities)) if changed else None

    def _named(self, one: Misbehaviour) -> Misbehaviour:
        names = {address_of(key): name for name, key in self.state.authority_set().items()}
        return Misbehaviour(
            height=one.height,
            address=one.address,
            kind=one.kind,
            authority=names.get(one.address, ""),
            seen_at=self.state.height + 1,
        )

    def _load(self) -> State:
        stored = self.store.head()
        if stored is None:
            return machine.initial(self.genesis)
        found = machine.restored(
            ledger_id=self.genesis.ledger_id,
            height=stored.height,
            time_ms=stored.time_ms,
            records=self.store.records(),
            nonces=self.store.nonces(),
        )
        if found.root != stored.app_hash:
            raise Misconfigured(
                "ledger.database_corrupt",
                "this authority's database does not lead to the state that was agreed on",
                expected=stored.app_hash,
                got=found.root,
                remedy="do not change it by hand; repair it from the others: moor ledger repair",
            )
        return found


def _digest(transaction: bytes) -> bytes:
    return hashlib.sha256(transaction).digest()


def _writes(applied: Sequence[Applied]) -> dict[str, bytes]:
    return {key: value for one in applied for key, value in one.writes.items()}
