"""Typed, conservative reading of a proven state: what is active now, and which keys prove it.

Each `active_*` returns the record or raises. It raises Refused("ledger.<what>_not_active") if the record is proven absent
or is there with any other status, and Refused("ledger.not_proven") if the proof says nothing about a key it needs: silence
never counts. Nothing is active under a provider that is not. Each has a `*_keys` twin, so that prover and verifier agree on
the keys of a bundle. A certificate chain must be verified as well; a record alone authenticates nobody.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol, TypeVar

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.ledger import records
from moorline.ledger.records import (
    ContractRecord,
    ContractStatus,
    HsmRecord,
    IssuingCaRecord,
    OrchestratorRecord,
    PlatformRecord,
    ProviderRecord,
    ReferenceValuesRecord,
    RevocationKind,
    ServiceRecord,
    Status,
)
from moorline.wire.certificates import parse_certificate, signed_by

R = TypeVar("R")


class Proven(Protocol):
    """A state of which some keys are proven present or absent; `light_client.ProvenState` is one."""

    @property
    def time(self) -> Instant:
        """Block time of the state."""
        ...

    def record(self, key: str) -> bytes:
        """The value under `key`; raises Refused("ledger.absent" | "ledger.not_proven")."""
        ...

    def absent(self, key: str) -> None:
        """Raises Refused("ledger.present" | "ledger.not_proven") unless `key` is proven absent."""
        ...


# Keys ------------------------------------------------------------------------------------------------------------------


def provider_keys(provider: str) -> tuple[str, ...]:
    """What `active_provider` needs."""
    return (records.provider_key(provider),)


def hsm_keys(provider: str, hsm: str) -> tuple[str, ...]:
    """What `active_hsm` needs."""
    return (*provider_keys(provider), records.hsm_key(provider, hsm))


def issuing_ca_keys(provider: str, issuing_ca: str) -> tuple[str, ...]:
    """What `active_issuing_ca` needs."""
    return (*provider_keys(provider), records.issuing_ca_key(provider, issuing_ca))


def orchestrator_keys(provider: str, orchestrator: str) -> tuple[str, ...]:
    """What `active_orchestrator` needs."""
    return (*provider_keys(provider), records.orchestrator_key(provider, orchestrator))


def service_keys(provider: str, service: str) -> tuple[str, ...]:
    """What `active_service` needs."""
    return (*provider_keys(provider), records.service_key(provider, service))


def platform_keys(provider: str, platform: str) -> tuple[str, ...]:
    """What `active_platform` needs."""
    return (*provider_keys(provider), records.platform_key(provider, platform))


def reference_values_keys(provider: str, values: str) -> tuple[str, ...]:
    """What `active_reference_values` needs."""
    return (*provider_keys(provider), records.reference_values_key(provider, values))


def contract_keys(contract: str, *, provider: str, service: str, grantee: str) -> tuple[str, ...]:
    """What `active_contract` needs: the contract, both providers, the service."""
    return (records.contract_key(contract), *service_keys(provider, service), *provider_keys(grantee))


def revocation_keys(kind: RevocationKind, registrant: str, revoked_id: str) -> tuple[str, ...]:
    """What `not_revoked` needs."""
    return (records.revocation_key(kind, registrant, revoked_id),)


def device_keys(*, provider: str, issuing_ca: str, device: str, serial: int) -> tuple[str, ...]:
    """What `standing_device` needs."""
    return (
        *issuing_ca_keys(provider, issuing_ca),
        *revocation_keys(RevocationKind.DEVICE, provider, device),
        *revocation_keys(RevocationKind.CERTIFICATE, provider, serial_id(serial)),
    )


def instance_keys(*, provider: str, issuing_ca: str, service: str, instance: str, serial: int) -> tuple[str, ...]:
    """What `standing_instance` needs."""
    return (
        *issuing_ca_keys(provider, issuing_ca),
        records.service_key(provider, service),
        *revocation_keys(RevocationKind.INSTANCE, provider, instance),
        *revocation_keys(RevocationKind.CERTIFICATE, provider, serial_id(serial)),
    )


def serial_id(serial: int) -> str:
    """A certificate's serial number as the id of its revocation: lower-case hex without leading zeros."""
    return f"{serial:x}"


# Standing --------------------------------------------------------------------------------------------------------------


def active_provider(state: Proven, provider: str) -> ProviderRecord:
    """The provider, or Refused("ledger.provider_not_active")."""
    record = _read(state, ProviderRecord, records.provider_key(provider))
    if record is None or record.status is not Status.ACTIVE or not record.ca_certificates_at(state.time):
        raise Refused(
            "ledger.provider_not_active",
            f"provider {provider} is not active on the ledger",
            expected=Status.ACTIVE.value,
            got="absent" if record is None else record.status.value,
            remedy="ask the consortium's authorities about its admission",
        )
    return record


def active_hsm(state: Proven, provider: str, hsm: str) -> HsmRecord:
    """The HSM, under an active provider and a CA certificate that still counts, or Refused("ledger.hsm_not_active")."""
    owner = active_provider(state, provider)
    record = _read(state, HsmRecord, records.hsm_key(provider, hsm))
    if record is None or record.status is not Status.ACTIVE:
        raise Refused(
            "ledger.hsm_not_active",
            f"HSM {hsm} of {provider} is not active on the ledger",
            expected=Status.ACTIVE.value,
            got="absent" if record is None else record.status.value,
        )
    _issued_by_active_ca(owner, record.certificate, state.time)
    return record


def active_issuing_ca(state: Proven, provider: str, issuing_ca: str) -> IssuingCaRecord:
    """The issuing CA, likewise, or Refused("ledger.issuing_ca_not_active")."""
    owner = active_provider(state, provider)
    record = _read(state, IssuingCaRecord, records.issuing_ca_key(provider, issuing_ca))
    if record is None or record.status is not Status.ACTIVE:
        raise Refused(
            "ledger.issuing_ca_not_active",
            f"issuing CA {issuing_ca} of {provider} is not active on the ledger",
            expected=Status.ACTIVE.value,
            got="absent" if record is None else record.status.value,
        )
    _issued_by_active_ca(owner, record.certificate, state.time)
    return record


def active_orchestrator(state: Proven, provider: str, orchestrator: str) -> OrchestratorRecord:
    """The orchestrator, or Refused("ledger.orchestrator_not_active")."""
    active_provider(state, provider)
    record = _read(state, OrchestratorRecord, records.orchestrator_key(provider, orchestrator))
    if record is None or record.status is not Status.ACTIVE:
        raise Refused(
            "ledger.orchestrator_not_active",
            f"orchestrator {orchestrator} of {provider} is not active on the ledger",
            expected=Status.ACTIVE.value,
            got="absent" if record is None else record.status.value,
        )
    return record


def active_service(state: Proven, provider: str, service: str) -> ServiceRecord:
    """The service, or Refused("ledger.service_not_active")."""
    active_provider(state, provider)
    record = _read(state, ServiceRecord, records.service_key(provider, service))
    if record is None or record.status is not Status.ACTIVE:
        raise Refused(
            "ledger.service_not_active",
            f"service {service} of {provider} is not active on the ledger",
            expected=Status.ACTIVE.value,
            got="absent" if record is None else record.status.value,
        )
    return record


def active_platform(state: Proven, provider: str, platform: str) -> PlatformRecord:
    """The platform, or Refused("ledger.platform_not_active"). Its content is what its provider vouches for."""
    active_provider(state, provider)
    record = _read(state, PlatformRecord, records.platform_key(provider, platform))
    if record is None or record.status is not Status.ACTIVE:
        raise Refused(
            "ledger.platform_not_active",
            f"platform {platform} of {provider} is not active on the ledger",
            expected=Status.ACTIVE.value,
            got="absent" if record is None else record.status.value,
        )
    return record


def active_reference_values(state: Proven, provider: str, values: str) -> ReferenceValuesRecord:
    """The reference values' digest, or Refused("ledger.reference_values_not_active")."""
    active_provider(state, provider)
    record = _read(state, ReferenceValuesRecord, records.reference_values_key(provider, values))
    if record is None or record.status is not Status.ACTIVE:
        raise Refused(
            "ledger.reference_values_not_active",
            f"reference values {values} of {provider} are not active on the ledger",
            expected=Status.ACTIVE.value,
            got="absent" if record is None else record.status.value,
        )
    return record


def contract_named(state: Proven, contract: str) -> ContractRecord | None:
    """What stands under the name, in force or not, None if it is proven that nothing does."""
    return _read(state, ContractRecord, records.contract_key(contract))


def active_contract(state: Proven, contract: str) -> ContractRecord:
    """The accepted contract between two active providers over an active service, or Refused (`ledger.*_not_active`).

    Its Cedar conditions are still to be decided by whoever asks.
    """
    record = contract_named(state, contract)
    if record is None or record.status is not ContractStatus.ACCEPTED:
        raise Refused(
            "ledger.contract_not_active",
            f"contract {contract} is not in force",
            expected=ContractStatus.ACCEPTED.value,
            got="absent" if record is None else record.status.value,
        )
    active_service(state, record.provider, record.service)
    active_provider(state, record.grantee)
    return record


def not_revoked(state: Proven, kind: RevocationKind, registrant: str, revoked_id: str) -> None:
    """Raises Refused("ledger.revoked") if the thing is revoked, Refused("ledger.not_proven") if nobody showed it is not."""
    try:
        state.absent(records.revocation_key(kind, registrant, revoked_id))
    except Refused as error:
        if error.code != "ledger.present":
            raise
        raise Refused("ledger.revoked", f"{kind.value} {revoked_id} was revoked by {registrant}") from None


def standing_device(state: Proven, *, provider: str, issuing_ca: str, device: str, serial: int) -> IssuingCaRecord:
    """The active issuing CA of a device's certificate, with device and certificate proven not revoked."""
    record = active_issuing_ca(state, provider, issuing_ca)
    not_revoked(state, RevocationKind.DEVICE, provider, device)
    not_revoked(state, RevocationKind.CERTIFICATE, provider, serial_id(serial))
    return record


def standing_instance(
    state: Proven, *, provider: str, issuing_ca: str, service: str, instance: str, serial: int
) -> tuple[IssuingCaRecord, ServiceRecord]:
    """The active issuing CA and service of an instance, with instance and certificate proven not revoked."""
    authority = active_issuing_ca(state, provider, issuing_ca)
    record = active_service(state, provider, service)
    not_revoked(state, RevocationKind.INSTANCE, provider, instance)
    not_revoked(state, RevocationKind.CERTIFICATE, provider, serial_id(serial))
    return authority, record


def _read(state: Proven, kind: type[R], key: str) -> R | None:
    try:
        value = state.record(key)
    except Refused as error:
        if error.code != "ledger.absent":
            raise
        return None
    return records.parse(kind, value)


def _issued_by_active_ca(provider: ProviderRecord, der: bytes, at: Instant) -> None:
    """A provider that retired a key retired everything the key signed."""
    if not any(_issued_by(der, issuer) for issuer in provider.ca_certificates_at(at)):
        raise Refused("ledger.issuer_retired", f"{provider.name} retired the CA that signed this certificate")


@lru_cache(maxsize=256)
def _issued_by(der: bytes, issuer: bytes) -> bool:
    """Of the same two certificates always the same; asked at every session."""
    return signed_by(parse_certificate(der), parse_certificate(issuer))
