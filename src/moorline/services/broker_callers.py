"""Who comes to a broker with a certificate of its own trust domain, beyond what TLS verified.

1. at `/v1/...` the issuing CA above the certificate counts now: it is one of this HSM's that does, or the ledger has it as
   an active one of this provider and it signed this certificate. So what a stolen issuing CA's key signs is refused from the
   next look at the ledger on (`revocation_poll_s`) after RevokeIssuingCa, although it chains to the root as well as ever;
2. where a device goes on with what it has (EST re-enrolment, CMP by certificate, keys without forward secrecy), the
   certificate is bit for bit one this HSM recorded when it made it, and not revoked. A thief of a CA's key makes
   certificates and records none, so 2 holds while 1 does not, and devices get their next certificate under the next CA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.x509.oid import NameOID
from fastapi import Request

from moorline.digest import same
from moorline.errors import Refused
from moorline.ledger import records, standing
from moorline.nfv import Role, SpiffeId
from moorline.services import http
from moorline.wire.certificates import parse_certificate, signed_by, spiffe_id_of

if TYPE_CHECKING:
    from moorline.services.broker import Broker


class Callers:
    """1, as a dependency of all routes. Raises Refused("http.issuing_ca") and what the ledger says where it is asked."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def __call__(self, request: Request) -> None:
        """Nothing, or a refusal."""
        der = http.peer_der(request)
        if der is None or not request.url.path.startswith("/v1/"):
            return
        leaf = parse_certificate(der)
        if _ours(self._broker, spiffe_id_of(leaf)):
            await self._require_above(leaf)

    async def _require_above(self, leaf: x509.Certificate) -> None:
        broker = self._broker
        if any(signed_by(leaf, one.certificate) for one in broker.ca.issuers.standing()):
            return
        provider, name = broker.settings.provider, _issuer_name(leaf)
        try:
            state = await broker.ledger.state(standing.issuing_ca_keys(provider, name))
            found = standing.active_issuing_ca(state, provider, name)
        except Refused as error:
            if error.code == "ledger.not_proven":
                raise
            raise _refused(name) from None
        if not signed_by(leaf, parse_certificate(found.certificate)):
            raise _refused(name)


def require_recorded(broker: Broker, der: bytes) -> str:
    """2. The serial number (hex). Raises Refused("est.certificate_unknown" | "est.certificate_revoked")."""
    serial = f"{parse_certificate(der).serial_number:x}"
    recorded = broker.revocations.certificate(serial)
    if recorded is None or not same(recorded, der):
        raise Refused("est.certificate_unknown", "this broker did not give out the certificate shown", got=serial)
    _, revoked = broker.revocations.find(serial)
    if revoked is not None:
        raise Refused("est.certificate_revoked", "the certificate shown was revoked", got=serial)
    return serial


def _ours(broker: Broker, named: SpiffeId) -> bool:
    """Of our domain, and made by an issuing CA: brokers' own TLS keys stand under the HSM identity."""
    return named.trust_domain == broker.settings.trust_domain and named.role is not Role.HSM


def _issuer_name(leaf: x509.Certificate) -> str:
    found = leaf.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return records.parse_name(str(found[0].value) if found else "", "issuing CA")


def _refused(name: str) -> Refused:
    return Refused(
        "http.issuing_ca",
        "the issuing CA above the certificate shown does not count any more",
        got=name,
        remedy="ask for a certificate under the issuing CA of now: moor device renew, moor hsm svid",
    )
