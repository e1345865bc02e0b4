"""The provider's own key, which is kept offline: it certifies HSMs and issuing CAs and signs launcher tickets.

It is a PEM file of mode 0600 here. It signs ledger transactions too; those are made by whoever runs the provider, with
moorline.ledger, which this room does not import.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, Validity
from moorline.digest import same
from moorline.errors import Misconfigured, NotAuthentic, Refused
from moorline.nfv import Role, SpiffeId
from moorline.wire import certificates, cose, keys, schema
from moorline.wire.session import LauncherTicket

if TYPE_CHECKING:
    from moorline.hsm.ceremony import HsmPublicKeys

TICKET_PURPOSE: Final = "launcher-ticket"
_TICKET_CAP: Final = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class HsmCertificates:
    """What the provider signs for one HSM."""

    hsm: x509.Certificate
    issuing_ca: x509.Certificate


def make_provider_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A new P-256 key in a new file; raises Misconfigured("provider.key_exists") rather than overwrite one."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Misconfigured("provider.key_exists", "there is a provider key already", got=path) from None
    with os.fdopen(descriptor, "wb") as out:
        out.write(pem)
    return key


def load_provider_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in a file; raises Misconfigured("provider.key_unreadable")."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise Misconfigured("provider.key_unreadable", "this is no provider key", got=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Misconfigured("provider.key_unreadable", "this is no EC key", got=type(key).__name__)
    return key


def certify_hsm(
    provider: certificates.Issuer,
    public: HsmPublicKeys,
    *,
    trust_domain: str,
    hsm: str,
    issuing_ca: str,
    address: str,
    validity: Validity,
    serials: tuple[int, int],
) -> HsmCertificates:
    """The HSM certificate, with the address of its session port, and the issuing CA certificate, both under the provider.

    The common name of the issuing CA is the id of its ledger record: whoever holds a chain knows which record to ask for.
    """
    identity = certificates.hsm_certificate(
        public.identity,
        spiffe_id=SpiffeId(trust_domain=trust_domain, role=Role.HSM, segments=(hsm,)),
        address=f"moor://{address}",
        issuer=provider,
        validity=validity,
        serial=serials[0],
    )
    issuing = certificates.issuing_ca_certificate(
        public.issuing_ca, name=issuing_ca, issuer=provider, validity=validity, serial=serials[1]
    )
    return HsmCertificates(hsm=identity, issuing_ca=issuing)


def sign_launcher_ticket(key: keys.PrivateKey, ticket: LauncherTicket) -> bytes:
    """A one-time ticket for one launcher of this measurement on this chip."""
    return cose.sign(TICKET_PURPOSE, schema.encode(ticket), keys.KeySigner(key))


def verify_launcher_ticket(
    data: bytes, provider_keys: tuple[keys.PublicKey, ...], *, ledger_id: bytes, provider: str, now: Instant
) -> LauncherTicket:
    """A ticket signed by one of the provider's registered keys, for this ledger and provider, not expired.

    Raises Malformed, NotAuthentic (`launcher.ticket_not_authentic`) or Refused (`launcher.ticket_expired`,
    `launcher.ticket_for_another`). It does not establish that the ticket is unused.
    """
    signed = cose.parse(TICKET_PURPOSE, data, max_bytes=_TICKET_CAP)
    signer = next((key for key in provider_keys if same(cose.key_id(key), signed.key_id)), None)
    if signer is None:
        raise NotAuthentic(
            "launcher.ticket_not_authentic", "the ticket is not signed by a key of this provider", got=signed.key_id
        )
    ticket = schema.decode(LauncherTicket, cose.verify(signed, signer), max_bytes=_TICKET_CAP)
    if ticket.ledger_id != ledger_id or ticket.provider != provider:
        raise Refused(
            "launcher.ticket_for_another",
            "the ticket is for another ledger or provider",
            expected=provider,
            got=ticket.provider,
        )
    if now > ticket.not_after:
        raise Refused("launcher.ticket_expired", "the ticket has expired", expected=f"<= {ticket.not_after}", got=now)
    return ticket
