"""Is this the broker we were configured for? What a launcher or host asks of message 2 before any evidence leaves it.

1. The challenge names our ledger, provider and HSM.
2. The proof bundle in it holds under our ledger trust and is fresh; provider and HSM are active in it.
3. The TLS certificate chains to the consortium's roots, is that HSM's identity in that provider's trust domain, and was
   issued under exactly the HSM certificate the ledger lists.

The time used is the machine's own, which belongs to its host: a host can replay a broker's certificate and proof of the past
to its own guest, and gains nothing without that broker's TLS key of the time.
"""

from __future__ import annotations

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import NotAuthentic
from moorline.ledger import standing
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.nfv import Role, SpiffeId
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
    """The ledger state the broker proved. Raises NotAuthentic("broker.other" | `chain.*` ...) or Refused(`ledger.*`)."""
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
    record = standing.active_hsm(state, provider, hsm)
    owner = standing.active_provider(state, provider)
    # 3
    chain = verify_chain(certificates[0], certificates[1:], trust.roots, now)
    expected = SpiffeId(trust_domain=owner.trust_domain, role=Role.HSM, segments=(hsm,))
    if chain.spiffe_id != expected or not same(chain.issuer, record.certificate):
        raise NotAuthentic(
            "broker.other",
            "the broker's certificate is not under the HSM that the ledger lists",
            expected=expected,
            got=chain.spiffe_id,
        )
    return state
