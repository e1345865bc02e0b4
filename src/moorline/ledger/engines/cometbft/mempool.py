"""What may wait to be put in a block: transactions that would apply now, and of one sender only so many.

A transaction is judged against the committed state at the next height and the last block's time, by the rules of the state
machine; whether it applies in its block is judged again there. Only who signed validly counts as a sender, so nobody can
use up another's share.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moorline.errors import Unavailable
from moorline.ledger import records as r
from moorline.ledger import state as machine
from moorline.ledger import transactions
from moorline.ledger.draft import BlockContext
from moorline.ledger.state import Applied, Rejected, State
from moorline.ledger.verified import Verified

MAX_PENDING_PER_SENDER: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A transaction that waits: whose it is, and all that its outcome hung on when it was judged last."""

    id: bytes
    nonce_id: bytes
    valid_until: int
    sender: str
    read: frozenset[str]


class _Reads:
    """What was read of one state, so that many transactions that hang on the same records look them up once."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.authorities = r.parse(r.IndexRecord, state.records[r.AUTHORITIES_INDEX]).holders
        self._known: dict[str, bytes | None] = {}

    def get(self, key: str) -> bytes | None:
        if key not in self._known:
            self._known[key] = self.state.get(key)
        return self._known[key]


class _Watched:
    """A state that remembers what one transaction read of it."""

    def __init__(self, reads: _Reads) -> None:
        self._reads = reads
        self.read: set[str] = {r.AUTHORITIES_INDEX}

    def get(self, key: str) -> bytes | None:
        self.read.add(key)
        return self._reads.get(key)

    def nonce_used(self, nonce_id: bytes) -> bool:
        return self._reads.state.nonce_used(nonce_id)


class Mempool:
    """The admission rule of one node's mempool."""

    def __init__(self, verified: Verified | None = None) -> None:
        self._verified = verified
        self._reads: _Reads | None = None
        self._waiting: dict[bytes, Waiting] = {}
        self._digests: dict[bytes, bytes] = {}
        self._pending: Counter[str] = Counter()

    def judge(self, state: State, data: bytes) -> Applied | Rejected:
        """What would come of it in the next block. Changes nothing."""
        return self._judged(state, data)[0]

    def _judged(self, state: State, data: bytes) -> tuple[Applied | Rejected, frozenset[str]]:
        if self._reads is None or self._reads.state is not state:
            self._reads = _Reads(state)
        block = BlockContext(height=state.height + 1, time_ms=state.time_ms, authorities=self._reads.authorities)
        view = _Watched(self._reads)
        outcome = machine.apply(view, data, ledger_id=state.ledger_id, block=block, verified=self._verified)
        return outcome, frozenset(view.read)

    def admit(self, state: State, data: bytes) -> Applied | Rejected:
        """As `judge`, and counted against its sender: "ledger.sender_busy" for one with too many waiting."""
        outcome, read = self._judged(state, data)
        if isinstance(outcome, Rejected) or outcome.id in self._waiting:
            return outcome
        sender = transactions.parse(data).payload.sender
        name = f"{sender.kind} {sender.name}"
        if self._pending[name] >= MAX_PENDING_PER_SENDER:
            error = Unavailable(
                "ledger.sender_busy",
                "too many transactions of this sender are waiting",
                expected=f"<= {MAX_PENDING_PER_SENDER}",
                remedy="send it again when some of them are in a block",
            )
            return Rejected(code=error.code, problem=error.as_problem())
        self._waiting[outcome.id] = Waiting(
            id=outcome.id, nonce_id=outcome.nonce_id, valid_until=outcome.valid_until, sender=name, read=read
        )
        self._digests[hashlib.sha256(data).digest()] = outcome.id
        self._pending[name] += 1
        return outcome

    def still_fits(self, state: State, data: bytes, written: frozenset[str] | None) -> bool:
        """True if a transaction that waits need not be judged again after a block that wrote these keys.

        Its outcome is a function of what it read, of its nonce and of its last block: none of them changed. (And of block
        time, by which a certificate may have expired: then the proposal leaves it out.) Unknown bytes never fit.
        """
        known = self._waiting.get(self._digests.get(hashlib.sha256(data).digest(), b""))
        if known is None or written is None or known.read & written:
            return False
        return not state.nonce_used(known.nonce_id) and known.valid_until > state.height

    def waiting(self) -> frozenset[bytes]:
        """The ids of the transactions that wait."""
        return frozenset(self._waiting)

    def waits(self, transaction_id: bytes) -> bool:
        """Whether this one does."""
        return transaction_id in self._waiting

    def forget(self, transaction_ids: Iterable[bytes]) -> None:
        """They are in a block, or will never be."""
        gone = {one for one in transaction_ids if one in self._waiting}
        for one in gone:
            name = self._waiting.pop(one).sender
            self._pending[name] -= 1
            if not self._pending[name]:
                del self._pending[name]
        if gone:
            self._digests = {digest: found for digest, found in self._digests.items() if found not in gone}

    def clear(self) -> None:
        """CometBFT started anew, with an empty mempool."""
        self._waiting.clear()
        self._digests.clear()
        self._pending.clear()
