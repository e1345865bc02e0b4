"""What makes a device go on with the certificate it has, where neither chain nor ledger decide (services.callers has those).

At EST re-enrolment, CMP by certificate and keys without forward secrecy the certificate shown is bit for bit one that this
HSM recorded when it made it, and not revoked. A thief of an issuing CA's key makes certificates and records none; devices
get their next certificate under the next CA after the one above theirs was revoked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moorline.digest import same
from moorline.errors import Refused
from moorline.wire.certificates import parse_certificate

if TYPE_CHECKING:
    from moorline.services.broker import Broker


def require_recorded(broker: Broker, der: bytes) -> str:
    """The serial number (hex). Raises Refused("est.certificate_unknown" | "est.certificate_revoked")."""
    serial = f"{parse_certificate(der).serial_number:x}"
    recorded = broker.revocations.certificate(serial)
    if recorded is None or not same(recorded, der):
        raise Refused("est.certificate_unknown", "this broker did not give out the certificate shown", got=serial)
    _, revoked = broker.revocations.find(serial)
    if revoked is not None:
        raise Refused("est.certificate_revoked", "the certificate shown was revoked", got=serial)
    return serial
