"""Whom this service follows: it has everything these registrants revoked, so that one count answers for all their keys.

1. a registrant is followed from the first question about a key of its own on, while there are `_FOLLOWED_MAX` or fewer and
   room on the lists (`_LISTED_MAX` keys in all). About others, and where the ledger numbers nothing, it is asked key by
   key, until the service starts again
2. what is missing up to a proven count is fetched, proven (ledger.revocation_list), before anybody is answered. More than
   `_AT_ONCE` (a first start, a long silence) is fetched in the background, and it is asked key by key meanwhile
3. lists are stored, so that a restart goes on from there. A stored list that the ledger's digest is not of is dropped and
   fetched again, whoever changed it or put an older one back
4. what is on a list is shown by its own record's proof. Where that shows nothing, nothing is answered
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

import structlog

from moorline.errors import MoorlineError, NotAuthentic
from moorline.ledger import records
from moorline.ledger.light_client import ProvenState, unlisted
from moorline.ledger.records import IndexRecord, RevocationsRecord
from moorline.ledger.revocation_list import RevocationList
from moorline.services.ledger_documents import Documents, StoredRevocations

_LOG: Final = structlog.stdlib.get_logger("ledger")
_FOLLOWED_MAX: Final = 32
_LISTED_MAX: Final = 200_000
_AT_ONCE: Final = 60
"""As many numbers as fit into one proof."""

T = TypeVar("T")
Ask = Callable[[tuple[str, ...]], Awaitable[ProvenState]]


class _One:
    """A registrant that is followed. A list that is doubtful is touched by whose turn it is only."""

    def __init__(self, registrant: str, documents: Documents) -> None:
        self.listed, self.stored = RevocationList(registrant), StoredRevocations(documents, registrant)
        self.turn = asyncio.Lock()
        self.loaded = self.behind = False

    async def load(self) -> None:
        """3."""
        registrant, stored = self.listed.registrant, self.stored
        self.listed = await asyncio.to_thread(lambda: RevocationList(registrant, stored.load()))
        self.loaded = True

    def covers(self, found: RevocationsRecord, *, height: int) -> bool:
        """As the list does; one that came from the store and is not the ledger's is dropped (3)."""
        try:
            return self.loaded and self.listed.covers(found, height=height)
        except NotAuthentic:
            if not self.listed.doubtful:
                raise
        self.drop()
        return self.listed.covers(found, height=height)

    def drop(self) -> None:
        """3."""
        self.listed.forget()
        self.stored.forget()
        _LOG.error("stored revocations are not the ledger's", registrant=self.listed.registrant)


class Followed:
    """1 to 4, owned by one event loop. `ask` proves keys now, of no state older than any seen before it was called."""

    def __init__(self, documents: Documents, ask: Ask) -> None:
        self._documents, self._ask = documents, ask
        self._ones: dict[str, _One | None] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def aclose(self) -> None:
        """Stop what is being fetched."""
        for task in self._running:
            task.cancel()

    def split(self, keys: Sequence[str]) -> tuple[tuple[str, ...], Mapping[str, tuple[str, ...]]]:
        """What to ask about to answer for these keys, and which of them (by registrant) a count answers for.

        Of a registrant that was not met before both are asked, if one proof holds them: perhaps there is no count.
        """
        counted: dict[str, list[str]] = {}
        asked: dict[str, None] = {}
        for key in keys:
            registrant = _registrant(key)
            if registrant is None or not self._follows(registrant):
                asked[key] = None
                continue
            if registrant not in self._ones and len(keys) < _AT_ONCE:
                asked[key] = None
            counted.setdefault(registrant, []).append(key)
            asked[records.revocations_index_key(registrant)] = None
        return tuple(asked), {registrant: tuple(found) for registrant, found in counted.items()}

    def _follows(self, registrant: str) -> bool:
        if registrant not in self._ones:
            return len(self._ones) < _FOLLOWED_MAX
        one = self._ones[registrant]
        return one is not None and not one.behind

    async def answered(
        self, counted: Mapping[str, tuple[str, ...]], parts: Sequence[ProvenState], ask: Ask
    ) -> list[ProvenState]:
        """What is proven about the keys that a count answers for. `parts` were asked as `split` says, each by one bundle.

        `ask` says what has to be said by records. Raises as it, and NotAuthentic("ledger.revocations_differ").
        """
        shown, single, revoked = list[ProvenState](), list[str](), list[str]()
        for registrant, keys in counted.items():
            index_key = records.revocations_index_key(registrant)
            state = max((part for part in parts if part.tells(index_key)), key=lambda part: part.height)
            listed = await self._caught_up(registrant, state)
            if listed is None:
                single += (key for key in keys if not any(part.tells(key) for part in parts))
            else:
                revoked += (key for key in keys if key in listed)
                shown.append(unlisted(state, listed, [key for key in keys if key not in listed]))
        if single:
            shown.append(await ask(tuple(single)))
        if revoked:
            shown.append(await self._revoked(tuple(revoked), ask))
        return shown

    async def _revoked(self, keys: tuple[str, ...], ask: Ask) -> ProvenState:
        """4. A proof from before its revocation may have been kept: then it is asked now."""
        state = await ask(keys)
        if not all(map(state.has, keys)):
            state = await self._ask(keys)
            if not all(map(state.has, keys)):
                raise NotAuthentic("ledger.revocations_differ", "the ledger lists a revocation, and shows no record of it")
        return state

    async def _caught_up(self, registrant: str, state: ProvenState) -> RevocationList | None:
        """The list that covers the count in `state`; None if it is asked key by key (1, 2)."""
        found = _count(registrant, state)
        if registrant not in self._ones:
            self._ones[registrant] = _One(registrant, self._documents)
        one = self._ones[registrant]
        if found is None or one is None:
            self._ones[registrant] = None
            return None
        if not one.listed.doubtful and one.covers(found, height=state.height):
            return one.listed
        # Whoever asked may give up, and what was begun for him is finished all the same.
        return await asyncio.shield(self._run(self._catch_up(one, found, height=state.height)))

    def _run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # heard by who waits, if anybody does

    async def _catch_up(self, one: _One, found: RevocationsRecord, *, height: int) -> RevocationList | None:
        if one.behind:
            return None
        async with one.turn:
            if not one.loaded:
                await one.load()
            if one.covers(found, height=height):
                return one.listed
            missing = found.count - one.listed.count
            if self._listed() + missing > _LISTED_MAX:
                self._ones[one.listed.registrant] = None
                _LOG.warning("too many revocations to follow", registrant=one.listed.registrant, count=found.count)
                return None
            if missing <= _AT_ONCE:
                await self._extend(one, found, height=height)
                return one.listed
            if not one.behind:
                one.behind = True
                self._run(self._follow(one, found, height=height))
        return None

    def _listed(self) -> int:
        return sum(one.listed.count for one in self._ones.values() if one is not None)

    async def _follow(self, one: _One, found: RevocationsRecord, *, height: int) -> None:
        """2. What fails is begun again by the next question."""
        try:
            async with one.turn:
                await self._extend(one, found, height=height)
        except MoorlineError as error:
            _LOG.warning("revocations not fetched", registrant=one.listed.registrant, code=error.code)
        finally:
            one.behind = False

    async def _extend(self, one: _One, found: RevocationsRecord, *, height: int) -> None:
        """Fetch what is missing, and keep it once it is proven."""
        keys = await self._numbers(one.listed, found.count)
        try:
            one.listed.require_next(keys, found)
        except NotAuthentic:
            if not one.listed.doubtful:
                raise
            one.drop()
            keys = await self._numbers(one.listed, found.count)
            one.listed.require_next(keys, found)
        await asyncio.to_thread(one.stored.append, keys)
        one.listed.extend(keys, found, height=height)

    async def _numbers(self, listed: RevocationList, last: int) -> list[str]:
        """What stands under the numbers after the list, as far as something does."""
        keys: list[str] = []
        for start in range(listed.count, last, _AT_ONCE):
            numbers = range(start + 1, min(start + _AT_ONCE, last) + 1)
            wanted = tuple(records.numbered_revocation_index_key(listed.registrant, number) for number in numbers)
            state = await self._ask(wanted)
            if not all(map(state.has, wanted)):
                return keys
            keys += (key for one in wanted for key in records.parse(IndexRecord, state.record(one)).holders)
        return keys


def _registrant(key: str) -> str | None:
    """Whose revocation a key is of; None for every other key."""
    return key.split("/")[2] if key.startswith("revocation/") else None


def _count(registrant: str, state: ProvenState) -> RevocationsRecord | None:
    index_key = records.revocations_index_key(registrant)
    return records.parse(RevocationsRecord, state.record(index_key)) if state.has(index_key) else None
