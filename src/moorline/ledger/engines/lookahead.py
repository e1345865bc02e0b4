"""What has come in and is verified beside (engines.verifiers) before it gets in line for a block.

Only where many come in at once: a few are in their block sooner if their signatures are verified there. In what order
senders' transactions get into blocks is for the lines (engines.intake); here they stay for milliseconds, and a sender has no
more of them here than may stand in a line unproven.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from moorline.errors import MoorlineError, NotAuthentic
from moorline.ledger import state as machine
from moorline.ledger.engines.intake import UNPROVEN_ROOM, Intake, Waiting
from moorline.ledger.engines.verifiers import Verifiers
from moorline.ledger.state import State
from moorline.ledger.transactions import Transaction
from moorline.ledger.verified import Verified
from moorline.wire.cose import Sign1, VerifyingKey

FEW: Final = 16
MOST: Final = 200
"""How many are verified in one go: some 12 ms of a core, or less than it takes to put them into a block."""
ROOM: Final = 2048


class Lookahead:
    """In front of an intake. Without verifiers it takes nothing; while no block is made (`idle`), it verifies too."""

    def __init__(
        self,
        intake: Intake,
        verifiers: Verifiers | None,
        *,
        state: Callable[[], State],
        verified: Verified,
        idle: Callable[[], bool],
    ) -> None:
        self._intake, self._verifiers, self._state, self._verified, self._idle = intake, verifiers, state, verified, idle
        self._come: list[Waiting] = []
        self._senders: Counter[str] = Counter()
        self._verifying: asyncio.Task[None] | None = None
        self._sorting = False

    def takes(self, waiting: Waiting) -> bool:
        """Take it, unless there is nobody to verify it or no room; then the caller puts it in line."""
        if self._verifiers is None or not waiting.id or len(self._come) >= ROOM:
            return False
        if self._senders[waiting.sender] >= UNPROVEN_ROOM:
            return False
        self._senders[waiting.sender] += 1
        self._come.append(waiting)
        if not self._sorting:  # once all that came in with it are here
            self._sorting = True
            asyncio.get_running_loop().call_soon(self._sort)
        return True

    def close(self) -> None:
        """Put everything in line."""
        if self._verifying is not None:
            self._verifying.cancel()
        self._in_line(self._come)
        self._come = []

    def _sort(self) -> None:
        self._sorting = False
        if self._verifying is not None:
            return
        if len(self._come) >= FEW and self._verifiers is not None and self._verifiers.ready:
            self._verifying = asyncio.ensure_future(self._verify(self._verifiers))
        else:
            come, self._come = self._come, []
            self._in_line(come)

    async def _verify(self, verifiers: Verifiers) -> None:
        try:
            while self._come:
                batch, self._come = self._come[:MOST], self._come[MOST:]
                try:
                    if len(batch) >= FEW:
                        data = [waiting.data for waiting in batch]
                        await verify_beside(self._state(), data, self._verified, verifiers, alone=not self._idle())
                finally:
                    self._in_line(batch)
        finally:
            self._verifying = None

    def _in_line(self, batch: list[Waiting]) -> None:
        for waiting in batch:
            self._senders[waiting.sender] -= 1
            if not self._senders[waiting.sender]:
                del self._senders[waiting.sender]
            try:
                self._intake.put(waiting)
            except MoorlineError as error:
                if not waiting.receipt.done():
                    waiting.receipt.set_exception(error)


async def verify_beside(
    state: State, batch: Sequence[bytes], verified: Verified, verifiers: Verifiers, *, alone: bool = False
) -> None:
    """Have the signatures of these transactions verified under the keys the ledger has now, and remember those that hold.

    Unless the workers are left `alone` with it, this process takes its share: then it waits for nothing but the rest.
    """
    find = _keys_of(state)
    asked = [one for one in (_asked(find, data, verified) for data in batch) if one is not None and not verified.knows(*one)]
    mine = 0 if alone or not verifiers.ready else len(asked) // (verifiers.workers + 1)
    theirs = asyncio.ensure_future(verifiers.hold(asked[mine:]))
    await asyncio.sleep(0)  # until it is sent
    for sign1, key in asked[:mine]:
        with contextlib.suppress(NotAuthentic):
            verified.verify(sign1, key)
    for (sign1, key), holds in zip(asked[mine:], await theirs, strict=True):
        if holds:
            verified.remember(sign1, key)


def _keys_of(state: State) -> Callable[[Transaction], VerifyingKey | None]:
    """Finds the key that a transaction names, once a sender and key."""
    found: dict[tuple[str, str, bytes], VerifyingKey | None] = {}

    def find(transaction: Transaction) -> VerifyingKey | None:
        sender = transaction.payload.sender
        name = (sender.kind, sender.name, transaction.sign1.key_id)
        if name not in found:
            found[name] = machine.signing_key(state, transaction)
        return found[name]

    return find


def _asked(
    find: Callable[[Transaction], VerifyingKey | None], data: bytes, verified: Verified
) -> tuple[Sign1, VerifyingKey] | None:
    """A signature and the key it has to be by; None for what is judged without."""
    try:
        transaction = verified.parse(data)
        key = find(transaction)
    except MoorlineError:
        return None
    return None if key is None else (transaction.sign1, key)
