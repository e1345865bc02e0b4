"""One contract, one device, one session: whether ledger and conditions let them come together.

The same questions at whichever HSM, and at whoever tries a contract out (`moor ledger contract test`):

1. the contract is in force between the function's provider and the device's, about this service, and names the profile;
2. the service is registered with the profile, where the profile has to be (no-PFS);
3. the device is a device of the grantee's trust domain, and not revoked;
4. the contract's conditions, over facts that were proven, permit it now.
"""

from __future__ import annotations

from dataclasses import dataclass

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.hsm.authorisation import AccessDecision, AccessFacts, decide_access
from moorline.ledger import peers, standing
from moorline.ledger.light_client import ProvenState
from moorline.ledger.records import ContractRecord, RevocationKind, ServiceRecord
from moorline.nfv import Role, SpiffeId
from moorline.wire import nopfs


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Who wants to come to which service by which contract, and what the session is. Names are checked, not proven."""

    device: SpiffeId
    device_provider: str
    function_provider: str
    service: str
    contract: str
    profile: str
    post_quantum: bool


def wanted_keys(wish: Wish) -> tuple[str, ...]:
    """What `decided` needs proven."""
    parties = {"provider": wish.function_provider, "service": wish.service, "grantee": wish.device_provider}
    return (
        *standing.contract_keys(wish.contract, **parties),
        *standing.revocation_keys(RevocationKind.DEVICE, wish.device_provider, wish.device.segments[0]),
    )


def decided(state: ProvenState, wish: Wish, *, now: Instant, conditions: str | None = None) -> AccessDecision:
    """The conditions' answer, or `conditions` in their place.

    Raises Refused (`ledger.*`, "access.not_granted", "access.profile", "nopfs.not_allowed") where the ledger comes first.
    """
    contract = peers.contract_between(  # 1
        state, wish.contract, provider=wish.function_provider, service=wish.service, grantee=wish.device_provider
    )
    _require_profile(contract.profiles, wish.profile, "the contract does not allow this profile")
    service = standing.active_service(state, wish.function_provider, wish.service)
    if wish.profile == nopfs.PROFILE:  # 2
        _require_profile(service.profiles, wish.profile, "the service is not registered with this profile")
    owner = standing.active_provider(state, wish.device_provider)
    if wish.device.role is not Role.DEVICE or owner.trust_domain != wish.device.trust_domain:  # 3
        raise Refused("access.not_granted", "the contract grants nothing to this caller", got=str(wish.device))
    standing.not_revoked(state, RevocationKind.DEVICE, wish.device_provider, wish.device.segments[0])
    return decide_access(conditions or contract.conditions, _facts(wish, contract, service, now))  # 4


def _require_profile(allowed: tuple[str, ...], profile: str, says: str) -> None:
    if profile in allowed:
        return
    if profile == nopfs.PROFILE:
        raise Refused(
            "nopfs.not_allowed",
            says,
            expected=profile,
            got=", ".join(allowed),
            remedy="agree on a contract with --profile no-pfs, or connect with TLS",
        )
    raise Refused("access.profile", says, expected=profile, got=", ".join(allowed))


def _facts(wish: Wish, contract: ContractRecord, service: ServiceRecord, now: Instant) -> AccessFacts:
    return AccessFacts(
        device=str(wish.device),
        device_provider=wish.device_provider,
        device_trust_domain=wish.device.trust_domain,
        device_name=wish.device.segments[0],
        provider=wish.function_provider,
        service=wish.service,
        use_case=service.use_case,
        profiles=service.profiles,
        contract=contract.id,
        profile=wish.profile,
        post_quantum=wish.post_quantum,
        now=now,
    )
