"""Who comes to a door with a client certificate: what TLS verified is a chain, and a chain alone is not enough.

At `/v1/...`, before a route is asked anything (`http.application`, callers):

1. whose trust domain it is: the own one's provider is configured, another one's is who holds it on the ledger;
2. what stands above the certificate, and the certificate itself, are in good standing (ledger.leaf_standing). So what the
   key of a stolen issuing CA signs is refused within `REUSE_PART` of max_age after RevokeIssuingCa, although it chains to
   the root as well as ever; so is a certificate that was revoked, or that names a device, instance or host that was;
3. proofs are used again for `REUSE_PART` of max_age. If the ledger cannot be asked, the last proof about this caller counts
   until it is max_age old. After that, and for callers nobody was asked about, there is no answer but Unavailable.

Who shows no certificate is none of this module's business: routes deny by default (`http.require`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from cryptography import x509
from fastapi import Request

from moorline.clock import Clock
from moorline.errors import Refused, Unavailable
from moorline.ledger import leaf_standing, records
from moorline.ledger.light_client import LedgerTrust, ProvenState
from moorline.services import http
from moorline.services.ledger_documents import Documents
from moorline.services.ledger_view import LedgerView, Prover
from moorline.wire.certificates import parse_certificate, spiffe_id_of

REUSE_PART: Final = 1 / 30
_PATIENCE_S: Final = 4.0
_PATIENCE_MAX_S: Final = 25.0
"""More than a client of the ledger waits for one silent authority before it asks the next, less than a request may take."""
_KEPT_MAX: Final = 4096
_ISSUER_GONE: Final = frozenset({"ledger.issuing_ca_not_active", "ledger.issuer_other", "ledger.issuer_retired"})


class Callers:
    """1 to 3, for all routes of one door. Owned by one event loop."""

    def __init__(self, ledger: LedgerView, *, provider: str, trust_domain: str, clock: Clock) -> None:
        self._ledger, self._max_age_s, self._clock = ledger, ledger.trust.max_age_s, clock
        self._provider, self._trust_domain = provider, trust_domain
        self._last: dict[tuple[str, ...], ProvenState] = {}

    async def __call__(self, request: Request) -> None:
        """Nothing, or a refusal: Refused("http.issuing_ca" | "ledger.*"), Unavailable("http.standing_unknown")."""
        der = http.peer_der(request)
        if der is None or not request.url.path.startswith("/v1/"):
            return
        await self.require_standing(parse_certificate(der))

    async def require_standing(self, leaf: x509.Certificate) -> None:
        """1 and 2. Raises as `__call__`."""
        provider = await self._provider_of(spiffe_id_of(leaf).trust_domain)
        state = await self._state(leaf_standing.keys(leaf, provider))
        try:
            leaf_standing.require_standing(state, leaf, provider)
        except Refused as error:
            if error.code not in _ISSUER_GONE:
                raise
            raise _issuer_gone(leaf_standing.issuer_name(leaf)) from None

    async def _provider_of(self, trust_domain: str) -> str:
        if trust_domain == self._trust_domain:
            return self._provider
        return leaf_standing.provider_of(await self._state((records.trust_domain_index_key(trust_domain),)), trust_domain)

    async def _state(self, keys: tuple[str, ...]) -> ProvenState:
        """3. Without a proof to fall back on it waits longer: one silent authority must not shut everybody out."""
        try:
            async with asyncio.timeout(_PATIENCE_S if self._last_young(keys) is not None else _PATIENCE_MAX_S):
                state = await self._ledger.state(keys)
        except (Unavailable, TimeoutError):
            return self._young(keys)
        except Refused as error:  # authorities that answer, and a ledger that stands still
            if error.code != "ledger.proof_stale":
                raise
            return self._young(keys)
        if len(self._last) >= _KEPT_MAX:
            self._last.clear()
        self._last[keys] = state
        return state

    def _last_young(self, keys: tuple[str, ...]) -> ProvenState | None:
        last = self._last.get(keys)
        return None if last is None or self._clock.now() - last.time > self._max_age_s else last

    def _young(self, keys: tuple[str, ...]) -> ProvenState:
        last = self._last_young(keys)
        if last is None:
            raise Unavailable(
                "http.standing_unknown",
                "the ledger was not seen lately, so nobody can say that the certificate shown still counts",
                expected=f"a proof within {self._max_age_s} s",
                remedy="ask again; if it stays so, see whether the ledger's authorities can be reached from here",
                retry_after_s=max(1.0, self._max_age_s * REUSE_PART),
            )
        return last


def view_for(prover: Prover, trust: LedgerTrust, kept: Documents, clock: Clock) -> LedgerView:
    """A view of the ledger that reuses proofs as long as 3 says."""
    return LedgerView(prover, trust, kept, clock, reuse_s=trust.max_age_s * REUSE_PART)


def _issuer_gone(name: str) -> Refused:
    return Refused(
        "http.issuing_ca",
        "the issuing CA above the certificate shown does not count any more",
        got=name,
        remedy="ask for a certificate under the issuing CA of now: moor device renew, moor hsm svid",
    )
