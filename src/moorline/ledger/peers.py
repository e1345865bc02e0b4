"""A verified chain and a proven state, taken together: the peer is who the ledger says, and in good standing now.

A chain says who certified whom, the ledger says who still counts (PROTOCOLS.md 1: a chain is necessary and never
sufficient). Here the two are tied: the CA that signed the peer's certificate is byte for byte the one registered, its
provider's CA certificate is one that still counts, and the trust domain is the provider's. Names come out of the
certificates, and mean something only because the ledger's records under these names hold the same certificates. Pure.
"""

from __future__ import annotations

from moorline.errors import NotAuthentic, Refused
from moorline.ledger import standing
from moorline.ledger.light_client import ProvenState
from moorline.ledger.records import ContractRecord, HsmRecord, ServiceRecord
from moorline.nfv import Role
from moorline.verification.chains import VerifiedChain


def hsm_peer(state: ProvenState, chain: VerifiedChain, *, provider: str, hsm: str) -> HsmRecord:
    """The record of HSM `hsm` of `provider`, whose registered certificate issued the peer's TLS certificate.

    Raises Refused(`ledger.*`) and NotAuthentic("ledger.peer_mismatch" | "ledger.peer_role").
    """
    _role(chain, Role.HSM, 1)
    if chain.spiffe_id.segments[0] != hsm:
        raise _mismatch("HSM", hsm, chain.spiffe_id.segments[0])
    record = standing.active_hsm(state, provider, hsm)
    _registered(state, chain, provider, record.certificate)
    return record


def device_keys(chain: VerifiedChain) -> tuple[str, ...]:
    """The keys a device's own proof bundle must hold, for `device_peer` to take it."""
    _role(chain, Role.DEVICE, 1)
    return standing.device_keys(
        provider=chain.provider_name,
        issuing_ca=chain.issuer_name,
        device=chain.spiffe_id.segments[0],
        serial=chain.serial,
    )


def device_peer(state: ProvenState, chain: VerifiedChain) -> str:
    """The name of the device's provider; the device, its certificate, issuing CA and provider are in good standing.

    Says nothing about what the device may do: that is the contract's. Raises as `hsm_peer`.
    """
    _role(chain, Role.DEVICE, 1)
    provider = chain.provider_name
    authority = standing.standing_device(
        state,
        provider=provider,
        issuing_ca=chain.issuer_name,
        device=chain.spiffe_id.segments[0],
        serial=chain.serial,
    )
    _registered(state, chain, provider, authority.certificate)
    return provider


def instance_keys(chain: VerifiedChain) -> tuple[str, ...]:
    """The keys a function's own proof bundle must hold, besides those of contracts, for `instance_peer` to take it."""
    _role(chain, Role.SERVICE, 2)
    service, instance = chain.spiffe_id.segments
    return standing.instance_keys(
        provider=chain.provider_name,
        issuing_ca=chain.issuer_name,
        service=service,
        instance=instance,
        serial=chain.serial,
    )


def instance_peer(state: ProvenState, chain: VerifiedChain) -> tuple[str, ServiceRecord]:
    """The provider's name and the service record of a function instance in good standing. Raises as `hsm_peer`."""
    _role(chain, Role.SERVICE, 2)
    service, instance = chain.spiffe_id.segments
    provider = chain.provider_name
    authority, record = standing.standing_instance(
        state,
        provider=provider,
        issuing_ca=chain.issuer_name,
        service=service,
        instance=instance,
        serial=chain.serial,
    )
    _registered(state, chain, provider, authority.certificate)
    return provider, record


def contract_between(state: ProvenState, contract: str, *, provider: str, service: str, grantee: str) -> ContractRecord:
    """The contract in force, if it is the one between these two about this service.

    Raises Refused("ledger.contract_not_active" | "ledger.contract_other"). Its Cedar conditions are still to be decided.
    """
    named = standing.contract_named(state, contract)
    found = (provider, service, grantee) if named is None else (named.provider, named.service, named.grantee)
    if found != (provider, service, grantee):
        raise Refused(
            "ledger.contract_other",
            f"contract {contract} is about something else",
            expected=f"{provider} grants {service} to {grantee}",
            got="{} grants {} to {}".format(*found),
        )
    return standing.active_contract(state, contract)


def _role(chain: VerifiedChain, role: Role, segments: int) -> None:
    if chain.spiffe_id.role is not role or len(chain.spiffe_id.segments) != segments:
        raise NotAuthentic("ledger.peer_role", "the peer is of another kind", expected=role.value, got=str(chain.spiffe_id))


def _registered(state: ProvenState, chain: VerifiedChain, provider: str, issuer: bytes) -> None:
    owner = standing.active_provider(state, provider)
    if owner.trust_domain != chain.spiffe_id.trust_domain:
        raise _mismatch("trust domain", owner.trust_domain, chain.spiffe_id.trust_domain)
    if chain.provider not in owner.ca_certificates_at(state.time):
        raise _mismatch("provider certificate", "one registered and not retired", chain.provider_name)
    if chain.issuer != issuer:
        raise _mismatch("issuing certificate", "the one registered", chain.issuer_name)


def _mismatch(what: str, expected: str, got: str) -> NotAuthentic:
    return NotAuthentic(
        "ledger.peer_mismatch", f"the peer's {what} is not the one on the ledger", expected=expected, got=got
    )
