"""Platform records as a verifier asks the ledger for them: proven, reused while proofs are young, many in one proof."""

from __future__ import annotations

from typing import Final

from moorline.clock import Clock, Instant
from moorline.errors import MoorlineError
from moorline.ledger import standing
from moorline.ledger.records import PlatformRecord, RevocationKind
from moorline.services.ledger_view import LedgerView

_IN_ONE_PROOF: Final = 16
"""Hosts whose records are proven together: an authority answers for 64 keys at once."""


class LedgerPlatforms:
    """Platform records from the ledger, proven, kept no longer than the ledger's proofs may be old; many in one proof."""

    def __init__(self, ledger: LedgerView, *, provider: str, clock: Clock) -> None:
        self._ledger, self._provider, self._clock = ledger, provider, clock
        self._known: dict[str, tuple[Instant, PlatformRecord]] = {}

    async def __call__(self, hosts: tuple[str, ...]) -> dict[str, PlatformRecord | MoorlineError]:
        """The active, unrevoked record of each host, or Refused (`ledger.*`), or Unavailable if no authority answers."""
        found: dict[str, PlatformRecord | MoorlineError] = {}
        wanted: list[str] = []
        now = self._clock.now()
        for host in hosts:
            known = self._known.get(host)
            if known is not None and now - known[0] <= self._ledger.trust.max_age_s:
                found[host] = known[1]
            else:
                self._known.pop(host, None)
                wanted.append(host)
        for start in range(0, len(wanted), _IN_ONE_PROOF):
            chosen = wanted[start : start + _IN_ONE_PROOF]
            try:
                found |= await self._proven(chosen)
            except MoorlineError as error:
                found |= dict.fromkeys(chosen, error)
        return found

    async def _proven(self, hosts: list[str]) -> dict[str, PlatformRecord | MoorlineError]:
        _, state = await self._ledger.proven(tuple(key for host in hosts for key in self._keys(host)))
        found: dict[str, PlatformRecord | MoorlineError] = {}
        for host in hosts:
            try:
                standing.not_revoked(state, RevocationKind.HOST, self._provider, host)
                record = standing.active_platform(state, self._provider, host)
            except MoorlineError as error:
                found[host] = error
            else:
                found[host] = record
                self._known[host] = (state.time, record)  # as many as the provider registered; aged by block time
        return found

    def _keys(self, host: str) -> tuple[str, ...]:
        return (
            *standing.platform_keys(self._provider, host),
            *standing.revocation_keys(RevocationKind.HOST, self._provider, host),
        )
