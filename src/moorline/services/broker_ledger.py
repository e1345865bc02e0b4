"""The ledger as one broker sees it: proofs fetched, verified, and never older than the newest it has seen."""

from __future__ import annotations

from typing import Protocol

from moorline.clock import Clock
from moorline.ledger.checkpoint import parse_body
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.storage.broker_store import BrokerStore

_HIGHEST = "highest-checkpoint"


class Prover(Protocol):
    """Somebody who hands out proof bundles; `ledger.client.LedgerClient` is one. What it says is verified here."""

    async def prove(self, keys: tuple[str, ...]) -> bytes:
        """A bundle about these keys."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class LedgerView:
    """Proofs for this broker and for those it serves. The newest checkpoint seen survives a restart."""

    def __init__(self, prover: Prover, trust: LedgerTrust, store: BrokerStore, clock: Clock) -> None:
        self._prover, self.trust, self._store, self._clock = prover, trust, store, clock
        kept = store.document(_HIGHEST)
        self._highest = None if kept is None else parse_body(kept.decode("ascii"))

    async def proven(self, keys: tuple[str, ...]) -> tuple[bytes, ProvenState]:
        """A bundle about these keys and what it proves. Raises what `verify_bundle` and the prover raise."""
        # What was seen before asking: answers to questions asked at the same time may come back in any order.
        highest = self._highest
        bundle = await self._prover.prove(tuple(dict.fromkeys(keys)))
        state = verify_bundle(bundle, self.trust, now=self._clock.now(), highest=highest)
        if self._highest is None or state.height > self._highest.height:
            self._store.set_document(_HIGHEST, state.checkpoint.body().encode("ascii"))
            self._highest = state.checkpoint
        return bundle, state

    async def aclose(self) -> None:
        """Close the prover."""
        await self._prover.aclose()

    async def state(self, keys: tuple[str, ...]) -> ProvenState:
        """What is proven about these keys now."""
        return (await self.proven(keys))[1]

    async def bundle(self, keys: tuple[str, ...]) -> bytes:
        """A bundle about these keys, for somebody else to verify."""
        return (await self.proven(keys))[0]
