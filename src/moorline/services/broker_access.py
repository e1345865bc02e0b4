"""The operation `device.authorise`: a device, a service, a contract, and what the ledger says of all of them now."""

from __future__ import annotations

from moorline.errors import Refused
from moorline.hsm.authorisation import AccessFacts, decide_access
from moorline.ledger import records, standing
from moorline.ledger.records import ContractRecord, RevocationKind
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.services.broker import Broker
from moorline.services.broker_role import require_not_revoked, revocable_keys
from moorline.wire.session import AuthoriseDeviceCall, AuthoriseDeviceReply


async def authorise_device(broker: Broker, asked: AuthoriseDeviceCall) -> AuthoriseDeviceReply:
    """A decision; a "no" is an answer, not an error. Raises only if the question is malformed or the ledger is silent.

    That the device holds the key of its certificate is for the function to know: it ended the TLS connection.
    """
    device = SpiffeId.parse(asked.device)
    contract = parse_name(asked.contract, "contract")
    provider = broker.settings.provider
    bundle, state = await broker.ledger.proven((records.contract_key(contract),))
    try:
        grantee = records.parse(ContractRecord, state.record(records.contract_key(contract))).grantee
        revocable = ((RevocationKind.DEVICE, grantee, device.segments[0]),)
        keys = standing.contract_keys(contract, provider=provider, service=asked.service, grantee=grantee)
        bundle, state = await broker.ledger.proven((*keys, *revocable_keys(revocable)))
        found = standing.active_contract(state, contract)
        if (found.provider, found.service, found.grantee) != (provider, asked.service, grantee):
            raise Refused("access.other_contract", "the contract is about another service", got=found.service)
        owner = standing.active_provider(state, grantee)
        if owner.trust_domain != device.trust_domain or device.role is not Role.DEVICE:
            raise Refused("access.not_granted", "the contract grants nothing to this caller", got=asked.device)
        require_not_revoked(state, revocable)
    except Refused as refusal:
        return AuthoriseDeviceReply(allowed=False, rule=refusal.code, bundle=bundle)
    service = standing.active_service(state, provider, asked.service)
    facts = AccessFacts(
        device=asked.device,
        device_provider=grantee,
        device_trust_domain=device.trust_domain,
        device_name=device.segments[0],
        provider=provider,
        service=asked.service,
        use_case=service.use_case,
        profiles=service.profiles,
        contract=contract,
        now=broker.clock.now(),
    )
    decision = decide_access(found.conditions, facts)
    return AuthoriseDeviceReply(allowed=decision.allowed, rule=decision.rule, bundle=bundle)
