"""A certificate that TLS verified, as the ledger has it: who stands above it, and whether anybody revoked it. Pure.

For doors that see the leaf of a client's chain and no more. TLS has verified that the chain leads to a root of the
consortium under the name constraints of its provider. What is asked here is whether that still counts:

1. the provider is active, and the trust domain of the certificate is its own;
2. what stands above the certificate is the ledger's record of that name, active, and its key made the signature: an issuing
   CA, or the HSM for the TLS keys of its broker;
3. neither the certificate's serial number nor the device, instance or host it names is revoked;
4. the orchestrator it names is registered and active: RevokeOrchestrator ends what its certificate opens, whatever the
   certificate, and a certificate of an orchestrator that nobody registered opens nothing.

Who has all of it where nothing of this was asked is a thief with the key of a revoked issuing CA. What the caller may do is
for the door to say.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from moorline.errors import Malformed, Refused
from moorline.ledger import records, standing
from moorline.ledger.records import IndexRecord, RevocationKind
from moorline.ledger.standing import Proven
from moorline.nfv import Role, SpiffeId
from moorline.wire.certificates import parse_certificate, signed_by, spiffe_id_of

_NAMED: Final = {
    Role.DEVICE: (RevocationKind.DEVICE, 1),
    Role.SERVICE: (RevocationKind.INSTANCE, 2),
    Role.HOST: (RevocationKind.HOST, 1),
}
"""As what a role's name is revoked, and of how many segments it is; the last one is the id."""


def provider_of(state: Proven, trust_domain: str) -> str:
    """The provider that holds a trust domain (`records.trust_domain_index_key`). Raises Refused("ledger.no_such_domain")."""
    try:
        return records.parse(IndexRecord, state.record(records.trust_domain_index_key(trust_domain))).holders[0]
    except Refused as error:
        if error.code != "ledger.absent":
            raise
        raise Refused("ledger.no_such_domain", "no provider holds this trust domain", got=trust_domain) from None


def revoking_keys(provider: str, serial: str, spiffe_id: SpiffeId) -> tuple[str, ...]:
    """The keys under which a certificate (serial in hex), or what it names, can be revoked by its provider."""
    by_serial = records.revocation_key(RevocationKind.CERTIFICATE, provider, records.parse_id(serial, "serial number"))
    named = _named(spiffe_id)
    return (by_serial,) if named is None else (by_serial, records.revocation_key(named[0], provider, named[1]))


def keys(leaf: x509.Certificate, provider: str) -> tuple[str, ...]:
    """What `require_standing` needs. Raises Malformed for names that no certificate of ours has."""
    spiffe_id, above = spiffe_id_of(leaf), issuer_name(leaf)
    if spiffe_id.role is Role.HSM:
        return standing.hsm_keys(provider, above)
    revoking = revoking_keys(provider, standing.serial_id(leaf.serial_number), spiffe_id)
    registered = standing.orchestrator_keys(provider, _last(spiffe_id, 1)) if spiffe_id.role is Role.ORCHESTRATOR else ()
    return tuple(dict.fromkeys((*standing.issuing_ca_keys(provider, above), *revoking, *registered)))


def require_standing(state: Proven, leaf: x509.Certificate, provider: str) -> None:
    """1 to 4. Raises Refused(`ledger.*`); "ledger.issuer_other" where the record above is of another certificate."""
    spiffe_id, above = spiffe_id_of(leaf), issuer_name(leaf)
    if standing.active_provider(state, provider).trust_domain != spiffe_id.trust_domain:
        raise Refused("ledger.issuer_other", "the provider is of another trust domain", got=spiffe_id.trust_domain)
    if spiffe_id.role is Role.HSM:
        _require_signed(leaf, standing.active_hsm(state, provider, above).certificate)
        return
    _require_signed(leaf, standing.active_issuing_ca(state, provider, above).certificate)
    standing.not_revoked(state, RevocationKind.CERTIFICATE, provider, standing.serial_id(leaf.serial_number))
    named = _named(spiffe_id)
    if named is not None:
        standing.not_revoked(state, named[0], provider, named[1])
    if spiffe_id.role is Role.ORCHESTRATOR:
        standing.active_orchestrator(state, provider, _last(spiffe_id, 1))


def issuer_name(leaf: x509.Certificate) -> str:
    """The name, on the ledger, of what says it signed a certificate. Raises Malformed."""
    found = leaf.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return records.parse_name(str(found[0].value) if len(found) == 1 else "", "issuing CA")


def _named(spiffe_id: SpiffeId) -> tuple[RevocationKind, str] | None:
    """What a certificate names that can be revoked by itself, whatever certificate it shows."""
    if spiffe_id.role not in _NAMED:
        return None
    kind, count = _NAMED[spiffe_id.role]
    return kind, _last(spiffe_id, count)


def _last(spiffe_id: SpiffeId, count: int) -> str:
    if len(spiffe_id.segments) != count:
        raise Malformed("certificate.spiffe_id", "not a name that a certificate of this role has", got=str(spiffe_id))
    return spiffe_id.segments[-1]


def _require_signed(leaf: x509.Certificate, above: bytes) -> None:
    if not _signed(leaf, above):
        raise Refused("ledger.issuer_other", "the ledger has another certificate under the name of this one's issuer")


@lru_cache(maxsize=1024)  # of the same two certificates always the same; asked at every request
def _signed(leaf: x509.Certificate, above: bytes) -> bool:
    return signed_by(leaf, parse_certificate(above))
