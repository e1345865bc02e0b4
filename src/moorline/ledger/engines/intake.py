"""What waits to be put into a block: fair among senders, so that one who floods waits for itself alone.

Each sender has a line of its own; blocks take from all lines in turn. A line holds `SENDER_ROOM` transactions, and all
lines together `ROOM`. Beyond `UNPROVEN_ROOM` a transaction only gets into a line if it would be applied as things stand: who
has no valid signature under a name cannot fill that name's line. What names no sender shares one line.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from moorline.errors import Malformed, Unavailable
from moorline.ledger import state as machine
from moorline.ledger import transactions
from moorline.ledger.draft import BlockContext
from moorline.ledger.state import Rejected, State
from moorline.ledger.verified import Verified

ROOM: Final = 10_000
SENDER_ROOM: Final = 2_000
UNPROVEN_ROOM: Final = 256
_NOBODY: Final = ""
_MOMENT_S: Final = 0.1


@dataclass(slots=True, eq=False)
class Waiting:
    """A transaction, its id and the sender it names (both empty if it cannot be read), and who waits for its receipt."""

    data: bytes
    id: bytes
    sender: str
    nonce_id: bytes
    valid_until: int
    receipt: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def may_stand(self, state: State) -> bool:
        """Whether it can be in the ledger already: its nonce was used, or it is so old that nonces do not tell any more."""
        return bool(self.id) and (self.valid_until <= state.height or state.nonce_used(self.nonce_id))


def waiting(data: bytes, verified: Verified | None = None) -> Waiting:
    """A transaction that came in. Call it in a running event loop."""
    try:
        found = transactions.parse(data) if verified is None else verified.parse(data)
    except Malformed:
        return Waiting(data, b"", _NOBODY, b"", 0)
    sender = found.payload.sender
    name = sender.name.partition("/")[0]  # an HSM counts as its provider
    kind = "authority" if sender.kind is transactions.SenderKind.AUTHORITY else "provider"
    return Waiting(data, found.id, f"{kind} {name}", found.nonce_id, found.payload.valid_until)


class Intake:
    """The lines. `state` gives the state that the next block will follow; `verified` remembers signatures for that block."""

    def __init__(self, state: Callable[[], State], verified: Verified | None = None) -> None:
        self._state = state
        self._verified = verified
        self._lines: dict[str, deque[Waiting]] = {}
        self._count = 0
        self._some = asyncio.Event()

    def put(self, waiting: Waiting) -> None:
        """Raises Unavailable("ledger.busy" | "ledger.sender_busy"), or what the state machine says of a transaction."""
        if self._count >= ROOM:
            raise Unavailable("ledger.busy", "too many transactions are waiting", remedy="send it again later")
        line = self._lines.get(waiting.sender, ())
        if len(line) >= UNPROVEN_ROOM:
            if len(line) >= SENDER_ROOM or waiting.sender == _NOBODY:
                raise Unavailable(
                    "ledger.sender_busy",
                    "too many transactions of this sender are waiting",
                    expected=f"<= {SENDER_ROOM}",
                    got=waiting.sender or "nobody",
                    remedy="wait for receipts before sending more",
                )
            self._would_apply(waiting.data)
        self.put_back(waiting)

    def put_back(self, waiting: Waiting) -> None:
        """Put what was taken and did not get into a block."""
        self._lines.setdefault(waiting.sender, deque()).append(waiting)
        self._count += 1
        self._some.set()

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._count == 0

    async def something(self) -> None:
        """Returns when something waits."""
        await self._some.wait()

    def take(self, most: int, most_bytes: int) -> list[Waiting]:
        """Up to so many, in turn from every line, until they are so large together."""
        taken: list[Waiting] = []
        size = 0
        while self._lines and len(taken) < most and size < most_bytes:
            if len(self._lines) == 1:  # nobody to take turns with
                ((sender, line),) = self._lines.items()
                while line and len(taken) < most and size < most_bytes:
                    taken.append(line.popleft())
                    size += len(taken[-1].data)
                if not line:
                    del self._lines[sender]
                break
            for sender in list(self._lines):
                line = self._lines[sender]
                waiting = line.popleft()
                if not line:
                    del self._lines[sender]
                taken.append(waiting)
                size += len(waiting.data)
                if len(taken) >= most or size >= most_bytes:
                    break
        self._count -= len(taken)
        if not self._lines:
            self._some.clear()
        return taken

    def close(self) -> None:
        """Tell everybody who waits that nothing will come of it here."""
        for line in self._lines.values():
            for waiting in line:
                if not waiting.receipt.done():
                    waiting.receipt.set_exception(
                        Unavailable("ledger.sequencer_changed", "this authority sequences no more", remedy="send it again")
                    )
        self._lines.clear()
        self._count = 0

    def _would_apply(self, data: bytes) -> None:
        state = self._state()
        context = BlockContext(
            height=state.height + 1, time_ms=state.time_ms + 1, authorities=tuple(sorted(state.authority_set()))
        )
        outcome = machine.apply(state, data, ledger_id=state.ledger_id, block=context, verified=self._verified)
        if isinstance(outcome, Rejected):
            raise outcome.error()


class Deadlines:
    """Ends waiting for receipts. One timer serves all that began to wait within a moment: thousands may in a second."""

    def __init__(self, error: Callable[[], Unavailable]) -> None:
        self._error = error
        self._began = -_MOMENT_S
        self._waiting: list[weakref.ref[asyncio.Future[bytes]]] = []

    def ends(self, receipt: asyncio.Future[bytes], seconds: float) -> None:
        """Let it have the error once so many seconds, or a moment more, have passed, if it has nothing else by then."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if now - self._began >= _MOMENT_S:
            self._began, self._waiting = now, []
            loop.call_later(seconds + _MOMENT_S, self._end, self._waiting)
        self._waiting.append(weakref.ref(receipt))  # almost all are answered, and forgotten, long before

    def _end(self, waiting: list[weakref.ref[asyncio.Future[bytes]]]) -> None:
        for one in waiting:
            receipt = one()
            if receipt is not None and not receipt.done():
                receipt.set_exception(self._error())
