"""Hosts whose TPMs their makers revoke after they enrolled.

1. Whenever the store of makers' lists changes, the chains of all enrolled hosts are judged by the lists that are held now,
   each against the newest one of each authority above it; between changes, those of hosts that enrolled meanwhile.
2. A host in whose chain a certificate is revoked loses its verdict at once (`host.tpm_revoked`), and no evidence of it
   counts until a newer list of the same authority takes the certificate off again.
3. A list that has ended still revokes what it revokes. One that is missing or has ended takes no verdict away: an enrolled
   fleet does not go dark because nobody fetched a list (`moor collateral fetch --enrolled`); no new host enrols by it.

A chain that leads to no configured anchor any more is not judged here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from moorline.clock import Clock, Instant
from moorline.errors import MoorlineError
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.host_appraisal import SKEW_S
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.tpm_identity import TpmAnchor, revoked_above
from moorline.verification.tpm_revocation import Revocation

LOOK_EVERY_S: Final = 5.0
_LOG: Final = structlog.stdlib.get_logger("verifier")


class Makers:
    """What makers of TPMs say of hosts that are enrolled. `revocation` reads what is held of their lists, anew each time."""

    def __init__(
        self,
        store: VerifierStore,
        *,
        anchors: tuple[TpmAnchor, ...],
        revocation: Callable[[], Revocation],
        authority: AttestationAuthority,
        clock: Clock,
    ) -> None:
        self._store, self._anchors, self._revocation = store, anchors, revocation
        self._authority, self._clock = authority, clock
        self._crls: tuple[bytes, ...] = ()
        self._since = Instant(0)

    def look(self) -> tuple[str, ...]:
        """Numbers 1 and 2 of the module, once; the hosts of which something new was found out."""
        crls, now = self._revocation().crls, self._clock.now()
        since = self._since if crls == self._crls else Instant(0)
        chains = self._store.ek_chains(since=since)
        found = {host: revoked_above(one.certificates, anchors=self._anchors, crls=crls) for host, one in chains.items()}
        known = {host: revoked for host, revoked in found.items() if revoked is not None}
        changed = self._store.judge_makers(known, at=now)
        newest = max((one.enrolled for one in chains.values()), default=since)
        self._crls, self._since = crls, Instant(max(since, min(newest + 1, now - SKEW_S)))
        return changed

    async def keep(self) -> None:
        """Look every LOOK_EVERY_S, until cancelled. What cannot be read is said, and looked at again."""
        while True:
            try:
                changed = await asyncio.to_thread(self.look)
            except MoorlineError as error:
                _LOG.warning("lists of TPM makers", **error.as_problem())
            else:
                if changed:
                    _LOG.warning("a maker's list changed what is known of TPMs", hosts=list(changed))
                    self._authority.tell_readers()
            await asyncio.sleep(LOOK_EVERY_S)
