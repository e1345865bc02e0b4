"""What may wait to be put in a block: transactions that would apply now, and of one sender only so many.

A transaction is judged against the committed state at the next height and the last block's time, by the rules of the state
machine; whether it applies in its block is judged again there. Only who signed validly counts as a sender, so nobody can
use up another's share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from moorline.errors import Unavailable
from moorline.ledger import records as r
from moorline.ledger import state as machine
from moorline.ledger import transactions
from moorline.ledger.draft import BlockContext
from moorline.ledger.state import Applied, Rejected, State

MAX_PENDING_PER_SENDER: Final = 256


class Mempool:
    """The admission rule of one node's mempool."""

    def __init__(self) -> None:
        self._senders: dict[bytes, str] = {}
        self._pending: Counter[str] = Counter()

    def judge(self, state: State, data: bytes) -> Applied | Rejected:
        """What would come of it in the next block. Changes nothing."""
        names = r.parse(r.IndexRecord, state.records[r.AUTHORITIES_INDEX]).holders
        block = BlockContext(height=state.height + 1, time_ms=state.time_ms, authorities=names)
        return machine.apply(state, data, ledger_id=state.ledger_id, block=block)

    def admit(self, state: State, data: bytes) -> Applied | Rejected:
        """As `judge`, and counted against its sender: "ledger.sender_busy" for one with too many waiting."""
        outcome = self.judge(state, data)
        if isinstance(outcome, Rejected) or outcome.id in self._senders:
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
        self._senders[outcome.id] = name
        self._pending[name] += 1
        return outcome

    def waiting(self) -> frozenset[bytes]:
        """The ids of the transactions that wait."""
        return frozenset(self._senders)

    def forget(self, transaction_ids: Iterable[bytes]) -> None:
        """They are in a block, or will never be."""
        for one in transaction_ids:
            name = self._senders.pop(one, None)
            if name is not None:
                self._pending[name] -= 1
                if not self._pending[name]:
                    del self._pending[name]

    def clear(self) -> None:
        """CometBFT started anew, with an empty mempool."""
        self._senders.clear()
        self._pending.clear()
