"""The broker, and no other: what a launcher or host asks of message 2 before any evidence leaves it.

1. The challenge names our ledger, provider and HSM.
2. The proof bundle in it holds under our ledger trust and is fresh; provider and HSM are active in it.
3. The TLS certificate chains to the consortium's roots, is that HSM's identity in that provider's trust domain, and was
   issued under exactly the HSM certificate the ledger lists.

The time used is the machine's own, which belongs to its host: a host can replay a broker's certificate and proof of the past
to its own guest, and gains nothing without that broker's TLS key of the time.
"""

from __future__ import annotations

from moorline.clock import Instant
from moorline.errors import NotAuthentic
from moorline.ledger import peers
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.verification.chains import verify_chain
from moorline.wire.session import Challenge


def judge_broker(
    challenge: Challenge,
    certificates: tuple[bytes, ...],
    *,
    trust: LedgerTrust,
    provider: str,
    hsm: str,
    now: Instant,
) -> ProvenState:
    """The state the broker proved. Raises NotAuthentic("broker.other" or `chain.*`, `ledger.*`) or Refused(`ledger.*`)."""
    # 1
    if (challenge.ledger_id, challenge.provider, challenge.hsm) != (trust.ledger_id, provider, hsm):
        raise NotAuthentic(
            "broker.other",
            "this is not the broker we were configured for",
            expected=f"{provider}/{hsm}",
            got=f"{challenge.provider}/{challenge.hsm}",
        )
    # 2
    state = verify_bundle(challenge.bundle, trust, now=now)
    # 3
    chain = verify_chain(certificates[0], certificates[1:], trust.roots, now)
    peers.hsm_peer(state, chain, provider=provider, hsm=hsm)
    return state
