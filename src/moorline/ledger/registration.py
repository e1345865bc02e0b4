"""What an active provider does on its own: register, rotate, revoke, offer, accept, anchor.

Every record is under the provider's own name, so none of these rules can touch another provider's. What was revoked or
removed is never registered again under the same id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from moorline.errors import Conflict, Malformed, Refused
from moorline.ledger import issuance, records, revocations
from moorline.ledger import transactions as tx
from moorline.ledger.draft import Draft
from moorline.ledger.records import (
    AuditAnchorRecord,
    ContractRecord,
    ContractStatus,
    HsmRecord,
    IndexRecord,
    IssuingCaRecord,
    OrchestratorRecord,
    PlatformRecord,
    ProviderRecord,
    ReferenceValuesRecord,
    RevocationKind,
    ServiceRecord,
    Status,
)
from moorline.policy import conditions
from moorline.wire import keys

MAX_CA_CERTIFICATES: Final = 4
HSM_REVOKES: Final = (
    RevocationKind.INSTANCE,
    RevocationKind.DEVICE,
    RevocationKind.CERTIFICATE,
    RevocationKind.HOST,
    RevocationKind.LAUNCHER,
)
_Registered = TypeVar("_Registered", IssuingCaRecord, HsmRecord, OrchestratorRecord, ServiceRecord, PlatformRecord)


def perform(draft: Draft, provider: ProviderRecord, body: tx.ProviderBody) -> None:
    """The effect of a provider's transaction. The sender is authentic and active already."""
    _RULES[type(body)](draft, provider, body)


def _rotate_provider_key(draft: Draft, provider: ProviderRecord, body: tx.RotateProviderKey) -> None:
    at = draft.block.at
    issuance.provider(body.certificate, provider.trust_domain, draft.authority_certificates(), at)
    if body.certificate in provider.ca_certificates:
        raise Conflict("ledger.already_registered", "this CA certificate is registered already")
    counting = provider.ca_certificates_at(at)
    draft.claim_key(
        records.CONSORTIUM,
        issuance.spki(body.certificate),
        records.provider_key(provider.name),
        kept=tuple(issuance.spki(der) for der in counting),  # a longer-lived certificate of the same key
    )
    if body.retire_at <= at:
        raise Refused("ledger.retire_time", "the old key's retire time has passed", expected=f"> {at}", got=body.retire_at)
    kept = [
        (der, min(retire, body.retire_at) if retire else body.retire_at)
        for der, retire in zip(provider.ca_certificates, provider.retire_at, strict=True)
        if retire == 0 or at < retire
    ]
    if len(kept) >= MAX_CA_CERTIFICATES:
        raise Refused("ledger.too_many_keys", "too many CA certificates count at once", expected=MAX_CA_CERTIFICATES)
    changed = replace(
        provider,
        ca_certificates=(*(der for der, _ in kept), body.certificate),
        retire_at=(*(retire for _, retire in kept), 0),
    )
    draft.write(records.provider_key(provider.name), changed)
    draft.tell("provider_key_rotated", records.provider_key(provider.name))


def _register_issuing_ca(draft: Draft, provider: ProviderRecord, body: tx.RegisterIssuingCa) -> None:
    key = _new(draft, records.issuing_ca_key(provider.name, records.parse_name(body.id, "issuing CA")))
    issuance.issuing_ca(body.certificate, provider.ca_certificates_at(draft.block.at), draft.block.at)
    draft.claim_key(provider.name, issuance.spki(body.certificate), key)
    record = IssuingCaRecord(provider=provider.name, id=body.id, status=Status.ACTIVE, certificate=body.certificate)
    draft.write(key, record)
    draft.tell("issuing_ca_registered", key)


def _revoke_issuing_ca(draft: Draft, provider: ProviderRecord, body: tx.RevokeIssuingCa) -> None:
    _end(draft, IssuingCaRecord, records.issuing_ca_key(provider.name, body.id), Status.REVOKED)


def _register_hsm(draft: Draft, provider: ProviderRecord, body: tx.RegisterHsm) -> None:
    key = _new(draft, records.hsm_key(provider.name, records.parse_name(body.id, "HSM")))
    draft.write(key, _hsm(draft, provider, body, current=None))
    draft.tell("hsm_registered", key)


def _rotate_hsm(draft: Draft, provider: ProviderRecord, body: tx.RotateHsm) -> None:
    key = records.hsm_key(provider.name, body.id)
    current = _active(draft, HsmRecord, key)
    if body.bundle_sequence <= current.bundle_sequence:
        raise Conflict(
            "ledger.sequence",
            "the bundle sequence must rise",
            expected=f"> {current.bundle_sequence}",
            got=body.bundle_sequence,
        )
    draft.write(key, _hsm(draft, provider, body, current=current))
    draft.tell("hsm_rotated", key)


def _hsm(
    draft: Draft, provider: ProviderRecord, body: tx.RegisterHsm | tx.RotateHsm, *, current: HsmRecord | None
) -> HsmRecord:
    at = draft.block.at
    certified = issuance.hsm(
        body.certificate,
        trust_domain=provider.trust_domain,
        hsm_id=body.id,
        provider_cas=provider.ca_certificates_at(at),
        at=at,
    )
    if body.signing_public != certified:  # which was read just now
        _public_key(body.signing_public)
    records.parse_address(body.address, "an HSM's address")
    records.parse_url(body.est_url, "an enrolment URL")
    if not body.kem_public:
        raise Malformed("ledger.field_empty", "the KEM key is missing")
    # The certificate's key and the signing key may be one; neither may be a key that any record gave up.
    kept = () if current is None else (issuance.spki(current.certificate), current.signing_public)
    for spki in dict.fromkeys((certified, body.signing_public)):
        draft.claim_key(provider.name, spki, records.hsm_key(provider.name, body.id), kept=kept)
    return HsmRecord(
        provider=provider.name,
        id=body.id,
        status=Status.ACTIVE,
        certificate=body.certificate,
        address=body.address,
        est_url=body.est_url,
        kem_public=body.kem_public,
        signing_public=body.signing_public,
        bundle_sequence=body.bundle_sequence,
    )


def _revoke_hsm(draft: Draft, provider: ProviderRecord, body: tx.RevokeHsm) -> None:
    _end(draft, HsmRecord, records.hsm_key(provider.name, body.id), Status.REVOKED)


def _register_orchestrator(draft: Draft, provider: ProviderRecord, body: tx.RegisterOrchestrator) -> None:
    key = _new(draft, records.orchestrator_key(provider.name, records.parse_name(body.id, "orchestrator")))
    _public_key(body.public_key)
    draft.claim_key(provider.name, body.public_key, key)
    record = OrchestratorRecord(provider=provider.name, id=body.id, status=Status.ACTIVE, public_key=body.public_key)
    draft.write(key, record)
    draft.tell("orchestrator_registered", key)


def _revoke_orchestrator(draft: Draft, provider: ProviderRecord, body: tx.RevokeOrchestrator) -> None:
    _end(draft, OrchestratorRecord, records.orchestrator_key(provider.name, body.id), Status.REVOKED)


def _register_service(draft: Draft, provider: ProviderRecord, body: tx.RegisterService) -> None:
    key = _new(draft, records.service_key(provider.name, records.parse_name(body.name, "service")))
    draft.write(key, _service(draft, provider, body))
    draft.tell("service_registered", key)


def _update_service(draft: Draft, provider: ProviderRecord, body: tx.UpdateService) -> None:
    key = records.service_key(provider.name, body.name)
    _active(draft, ServiceRecord, key)
    draft.write(key, _service(draft, provider, body))
    draft.tell("service_updated", key)


def _service(draft: Draft, provider: ProviderRecord, body: tx.RegisterService | tx.UpdateService) -> ServiceRecord:
    records.parse_words(body.use_case, "a use case")
    most = draft.limit("service_packages")
    listed = len(body.packages)
    if listed > most:
        raise Refused(
            "ledger.too_many_packages", "the service lists too many packages", expected=most, got=len(body.packages)
        )
    for name in (*body.profiles, *body.callers):
        records.parse_name(name, "profile or caller")
    return ServiceRecord(
        provider=provider.name,
        name=body.name,
        status=Status.ACTIVE,
        use_case=body.use_case,
        packages=body.packages,
        profiles=body.profiles,
        callers=body.callers,
    )


def _remove_service(draft: Draft, provider: ProviderRecord, body: tx.RemoveService) -> None:
    _end(draft, ServiceRecord, records.service_key(provider.name, body.name), Status.REMOVED)


def _register_platform(draft: Draft, provider: ProviderRecord, body: tx.RegisterPlatform) -> None:
    key = _new(draft, records.platform_key(provider.name, records.parse_name(body.id, "platform")))
    if body.simulated and draft.parameter("simulated_allowed") != 1:
        raise Refused(
            "ledger.simulated_refused",
            "this ledger admits no simulated platforms",
            expected="genesis with simulated_allowed",
            remedy="register real hardware, or use a test ledger",
        )
    records.parse_words(body.product, "a product line")
    records.parse_words(body.location, "a location")
    record = PlatformRecord(
        provider=provider.name,
        id=body.id,
        status=Status.ACTIVE,
        chip_id=body.chip_id,
        product=body.product,
        ek_digest=body.ek_digest,
        location=body.location,
        tag_digest=body.tag_digest,
        simulated=body.simulated,
    )
    draft.write(key, record)
    draft.tell("platform_registered", key)
    if any(body.chip_id):  # an all-zero or empty chip id is a masked one and identifies nothing
        _index_chip(draft, key, body.chip_id)


def _index_chip(draft: Draft, key: str, chip_id: bytes) -> None:
    index_key = records.chip_index_key(hashlib.sha256(chip_id).hexdigest())
    index = draft.read(IndexRecord, index_key)
    holders = () if index is None else index.holders
    if holders:
        draft.tell("chip_registered_twice", key)
    draft.write(index_key, IndexRecord(holders=tuple(sorted({*holders, key}))))


def _revoke_platform(draft: Draft, provider: ProviderRecord, body: tx.RevokePlatform) -> None:
    _end(draft, PlatformRecord, records.platform_key(provider.name, body.id), Status.REVOKED)


def _register_reference_values(draft: Draft, provider: ProviderRecord, body: tx.RegisterReferenceValues) -> None:
    key = records.reference_values_key(provider.name, records.parse_name(body.id, "reference values"))
    records.parse_words(body.kind, "a kind of evidence")
    record = ReferenceValuesRecord(
        provider=provider.name, id=body.id, status=Status.ACTIVE, kind=body.kind, digest=body.digest
    )
    draft.write(key, record)
    draft.tell("reference_values_registered", key)


def _offer_access(draft: Draft, provider: ProviderRecord, body: tx.OfferAccess) -> None:
    key = _new(draft, records.contract_key(records.parse_name(body.contract, "contract")))
    _active(draft, ServiceRecord, records.service_key(provider.name, body.service))
    grantee = draft.read(ProviderRecord, records.provider_key(body.grantee))
    if grantee is None or grantee.status is not Status.ACTIVE:
        raise Refused("ledger.provider_unknown", "the grantee is no active provider", got=body.grantee)
    for profile in body.profiles:
        records.parse_name(profile, "profile")
    conditions.require_valid(body.conditions, max_bytes=draft.limit("conditions_bytes"))
    record = ContractRecord(
        id=body.contract,
        provider=provider.name,
        service=body.service,
        grantee=body.grantee,
        conditions=body.conditions,
        profiles=body.profiles,
        status=ContractStatus.OFFERED,
    )
    draft.write(key, record)
    draft.tell("access_offered", key)


def _accept_access(draft: Draft, provider: ProviderRecord, body: tx.AcceptAccess) -> None:
    key, contract = _contract(draft, body.contract)
    if contract.grantee != provider.name:
        raise Refused("ledger.not_yours", "only the grantee accepts an offer", expected=contract.grantee, got=provider.name)
    if contract.status is not ContractStatus.OFFERED:
        raise Conflict("ledger.contract_status", "the contract is not on offer", got=contract.status.value)
    draft.write(key, replace(contract, status=ContractStatus.ACCEPTED))
    draft.tell("access_accepted", key)


def _withdraw_access(draft: Draft, provider: ProviderRecord, body: tx.WithdrawAccess) -> None:
    key, contract = _contract(draft, body.contract)
    if provider.name not in (contract.provider, contract.grantee):
        raise Refused("ledger.not_yours", "only its two sides withdraw a contract", got=provider.name)
    if contract.status is ContractStatus.WITHDRAWN:
        raise Conflict("ledger.contract_status", "the contract is withdrawn already")
    draft.write(key, replace(contract, status=ContractStatus.WITHDRAWN))
    draft.tell("access_withdrawn", key)


def _contract(draft: Draft, contract_id: str) -> tuple[str, ContractRecord]:
    key = records.contract_key(contract_id)
    contract = draft.read(ContractRecord, key)
    if contract is None:
        raise Refused("ledger.record_unknown", "there is no such contract", got=contract_id)
    return key, contract


def _revoke(draft: Draft, provider: ProviderRecord, body: tx.Revoke) -> None:
    if body.kind is RevocationKind.VENDOR_ROOT:
        raise Refused("ledger.revocation_kind", "a vendor root is a quorum's to revoke", got=body.kind.value)
    revocations.revoke(draft, body.kind, provider.name, body.id)


def _anchor_log(draft: Draft, provider: ProviderRecord, body: tx.AnchorLog) -> None:
    key = records.audit_anchor_key(provider.name, records.parse_name(body.log, "log"))
    current = draft.read(AuditAnchorRecord, key)
    # A log that shrank, or changed under its size, is what an anchor is there to show.
    if current is not None and (body.size < current.size or (body.size == current.size and body.root != current.root)):
        raise Conflict("ledger.sequence", "an anchored log only grows", expected=f"> {current.size}", got=body.size)
    record = AuditAnchorRecord(
        provider=provider.name, log=body.log, size=body.size, root=body.root, time_ms=draft.block.time_ms
    )
    draft.write(key, record)
    draft.tell("log_anchored", key)


def _new(draft: Draft, key: str) -> str:
    if draft.get(key) is not None:
        raise Conflict("ledger.already_registered", "this id is, or was, registered", got=key, remedy="choose another id")
    return key


def _active(draft: Draft, kind: type[_Registered], key: str) -> _Registered:
    record = draft.read(kind, key)
    if record is None:
        raise Refused("ledger.record_unknown", "there is no such record", got=key)
    if record.status is not Status.ACTIVE:
        raise Conflict("ledger.record_not_active", "the record is not active", got=f"{key}: {record.status.value}")
    return record


def _end(draft: Draft, kind: type[_Registered], key: str, status: Status) -> None:
    draft.write(key, replace(_active(draft, kind, key), status=status))
    draft.tell(status.value, key)


def _public_key(der: bytes) -> None:
    try:
        keys.parse_public(der)
    except Malformed as error:
        raise Malformed("ledger.key_malformed", "a public key cannot be used", got=error.code) from None


_RULES: Final[Mapping[type, Callable[[Draft, ProviderRecord, Any], None]]] = {
    tx.RotateProviderKey: _rotate_provider_key,
    tx.RegisterIssuingCa: _register_issuing_ca,
    tx.RevokeIssuingCa: _revoke_issuing_ca,
    tx.RegisterHsm: _register_hsm,
    tx.RotateHsm: _rotate_hsm,
    tx.RevokeHsm: _revoke_hsm,
    tx.RegisterOrchestrator: _register_orchestrator,
    tx.RevokeOrchestrator: _revoke_orchestrator,
    tx.RegisterService: _register_service,
    tx.UpdateService: _update_service,
    tx.RemoveService: _remove_service,
    tx.RegisterPlatform: _register_platform,
    tx.RevokePlatform: _revoke_platform,
    tx.RegisterReferenceValues: _register_reference_values,
    tx.OfferAccess: _offer_access,
    tx.AcceptAccess: _accept_access,
    tx.WithdrawAccess: _withdraw_access,
    tx.Revoke: _revoke,
    tx.AnchorLog: _anchor_log,
}
