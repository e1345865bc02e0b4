"""What an attestation authority is made of: what it is told, trusts and asks, and where it writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from moorline.clock import Clock
from moorline.errors import MoorlineError
from moorline.ledger.records import PlatformRecord
from moorline.policy.reference_values import Reference
from moorline.services.host_appraisal import (
    Distance,
    Terms,
)
from moorline.storage.verifier_store import VerifierStore
from moorline.verification import tpm_identity
from moorline.verification.tpm_revocation import Revocation
from moorline.wire import keys

PlatformLookup = Callable[[tuple[str, ...]], Awaitable[Mapping[str, PlatformRecord | MoorlineError]]]
"""The active platform record of each of these hosts of this provider, or why there is none (`ledger.*`)."""

Sign = Callable[[tuple[bytes, ...]], Awaitable[tuple[bytes, ...]]]
"""ES256 over each message with the verifier's key, wherever it is: 64 bytes each, r | s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an authority is made of. `verifier` is its SPIFFE ID, `audience` its trust domain; `random` gives fresh bytes.

    `revocation` reads what is held of TPM makers' CRLs, at each enrolment.
    """

    verifier: str
    audience: str
    terms: Terms
    anchors: tuple[tpm_identity.TpmAnchor, ...]
    revocation: Callable[[], Revocation]
    simulated_allowed: bool
    reference: Reference
    signers: tuple[keys.PublicKey, ...]
    platforms: PlatformLookup
    sign: Sign
    store: VerifierStore
    clock: Clock
    random: Callable[[int], bytes]
    measured: Distance | None = None
    """What landmarks say about places that hosts claim, where landmarks are configured."""
