"""The ledger as one service sees it: proofs fetched, verified, and never older than the newest it has seen.

Verified proofs are used again for `reuse_s` seconds, so that a revocation counts here at most that much later than it could
(the bound that counts for everybody, max_age, is thirty times as long). What sessions ask for while one question is on its
way is one question.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import islice
from operator import is_not
from typing import Final, Protocol

from moorline.clock import Clock
from moorline.ledger.checkpoint import Checkpoint, parse_body
from moorline.ledger.fetching import not_overtaken
from moorline.ledger.light_client import LedgerTrust, ProvenState, together, verify_bundle
from moorline.services.ledger_documents import Documents
from moorline.services.ledger_revocations import Followed

_HIGHEST = "highest-checkpoint"
_KEPT_MAX: Final = 4096
_KEPT_LOOKED_AT: Final = 256
"""From so many keys on, those that are too old are dropped: each session asks about a name that is not asked about again."""
_ASKED_MAX: Final = 48
_ASK_AHEAD: Final = 0.75
"""How old, of `reuse_s`, what is asked for all the time may be before it is asked again: nobody waits for that answer."""
_BUNDLES: Final = 4
"""A bundle for others is handed out for this many times as long: they judge its age themselves."""


class Prover(Protocol):
    """Somebody who hands out proof bundles; `ledger.client.LedgerClient` is one. What it says is verified here."""

    async def prove(self, keys: tuple[str, ...], *, height: int = 0) -> bytes:
        """A bundle about these keys; at this height, if anybody has it."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class LedgerView:
    """Proofs for this service and for those it serves. The newest checkpoint seen survives a restart."""

    def __init__(
        self,
        prover: Prover,
        trust: LedgerTrust,
        store: Documents,
        clock: Clock,
        *,
        reuse_s: float = 0.0,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prover, self.trust, self._store, self._clock = prover, trust, store, clock
        self._reuse_s, self._elapsed = reuse_s, elapsed
        self._kept: dict[str, tuple[float, ProvenState]] = {}
        self._joined: dict[tuple[str, ...], tuple[list[ProvenState], ProvenState]] = {}
        self._bundles: dict[tuple[str, ...], tuple[float, bytes]] = {}
        self._wanted: set[str] = set()
        self._used: set[str] = set()
        self._look_at = _KEPT_LOOKED_AT
        self._next: asyncio.Task[ProvenState] | None = None
        self._turn = asyncio.Lock()
        self._followed = Followed(store, self._proven_now)
        kept = store.document(_HIGHEST)
        self._highest = None if kept is None else parse_body(kept.decode("ascii"))

    async def proven(self, keys: tuple[str, ...]) -> tuple[bytes, ProvenState]:
        """A bundle about these keys and what it proves, asked now. Raises what `verify_bundle` and the prover raise."""
        # What was seen before asking: answers to questions asked at the same time may come back in any order.
        highest, asked = self._highest, tuple(dict.fromkeys(keys))

        async def fetched(height: int) -> tuple[bytes, ProvenState]:
            made = await self._prover.prove(asked, height=height)
            return made, verify_bundle(made, self.trust, now=self._clock.now(), highest=highest)

        bundle, state = await not_overtaken(fetched)
        if self._highest is None or state.height > self._highest.height:
            await asyncio.to_thread(self._keep, state.checkpoint)
            if self._highest is None or state.height > self._highest.height:
                self._highest = state.checkpoint
        return bundle, state

    def _keep(self, seen: Checkpoint) -> None:
        """Remember it, unless another process over the same database has kept a newer one."""
        kept = self._store.document(_HIGHEST)
        if kept is None or parse_body(kept.decode("ascii")).height < seen.height:
            self._store.set_document(_HIGHEST, seen.body().encode("ascii"))

    async def aclose(self) -> None:
        """Close the prover."""
        await self._followed.aclose()
        await self._prover.aclose()

    async def state(self, keys: tuple[str, ...]) -> ProvenState:
        """What is proven about these keys, asked within the last `reuse_s` seconds.

        That something is not revoked follows from how much its registrant revoked, where that is known (ledger_revocations).
        """
        asked, counted = self._followed.split(keys)
        parts = await self._parts(asked)
        state = self._together(asked, parts)
        return together((state, *await self._followed.answered(counted, parts, self._reused))) if counted else state

    async def _proven_now(self, keys: tuple[str, ...]) -> ProvenState:
        return (await self.proven(keys))[1]

    async def _reused(self, keys: tuple[str, ...]) -> ProvenState:
        return self._together(keys, await self._parts(keys))

    async def _parts(self, keys: tuple[str, ...]) -> list[ProvenState]:
        if self._reuse_s > 0:
            self._used.update(keys)
        now = self._elapsed()
        since = now - self._reuse_s
        held = {key: self._kept[key] for key in keys if key in self._kept and self._kept[key][0] > since}
        parts = list({id(state): state for _, state in held.values()}.values())
        missing = [key for key in dict.fromkeys(keys) if key not in held]
        if missing:
            parts.append(await self._asked(missing))
        elif min(asked for asked, _ in held.values()) < now - _ASK_AHEAD * self._reuse_s:
            self._ask_ahead(since)
        return parts

    def _together(self, keys: tuple[str, ...], parts: list[ProvenState]) -> ProvenState:
        """As `together`; the same one while the parts are."""
        joined = self._joined.get(keys)
        if joined is None or len(joined[0]) != len(parts) or any(map(is_not, joined[0], parts)):
            if len(self._joined) >= _KEPT_LOOKED_AT:
                self._joined.clear()
            joined = self._joined[keys] = parts, together(parts)
        return joined[1]

    def _ask_ahead(self, since: float) -> None:
        """What was asked for since the last time is asked again before it is too old, in one question nobody waits for."""
        if self._next is None and not self._turn.locked():
            used = (key for key in sorted(self._used) if key in self._kept and self._kept[key][0] > since)
            self._wanted.update(islice(used, _ASKED_MAX))
            self._used.clear()
            self._next = asyncio.ensure_future(self._ask_next())
            self._next.add_done_callback(_unheard)

    async def bundle(self, keys: tuple[str, ...]) -> bytes:
        """A bundle about these keys, for somebody else to verify."""
        return (await self.proven(keys))[0]

    async def own_bundle(self, keys: tuple[str, ...]) -> bytes:
        """As `bundle`, and the same one for a while: for what this broker shows to everybody."""
        kept = self._bundles.get(keys)
        if kept is None or kept[0] <= self._elapsed() - _BUNDLES * self._reuse_s:
            asked = self._elapsed()
            kept = self._bundles[keys] = (asked, await self.bundle(keys))
        return kept[1]

    async def _asked(self, keys: list[str]) -> ProvenState:
        if len(self._wanted) + len(keys) > _ASKED_MAX:
            return (await self.proven(tuple(keys)))[1]
        self._wanted.update(keys)
        if self._next is None:
            self._next = asyncio.ensure_future(self._ask_next())
        return await asyncio.shield(self._next)

    async def _ask_next(self) -> ProvenState:
        async with self._turn:
            keys, self._wanted, self._next = tuple(sorted(self._wanted)), set(), None
            asked = self._elapsed()
            _, state = await self.proven(keys)
        if self._reuse_s > 0:
            if max(len(self._kept), len(self._used)) > _KEPT_MAX:
                self._kept.clear()
                self._used.clear()
            self._kept.update(dict.fromkeys(keys, (asked, state)))
            self._drop_old()
        return state

    def _drop_old(self) -> None:
        if len(self._kept) >= self._look_at:
            since = self._elapsed() - self._reuse_s
            self._kept = {key: kept for key, kept in self._kept.items() if kept[0] > since}
            self._joined.clear()
            self._look_at = max(_KEPT_LOOKED_AT, 2 * len(self._kept))


def _unheard(task: asyncio.Task[ProvenState]) -> None:
    """A question nobody waits for may fail: whoever needs the answer asks again and is told."""
    if not task.cancelled():
        task.exception()
