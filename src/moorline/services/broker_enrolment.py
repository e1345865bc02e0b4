"""Enrolment of devices, whatever the protocol: the one place where an applicant's right becomes a certificate.

EST (broker_est) and CMP (broker_cmp) authenticate in their own ways and hand an `Applicant` in. Here:

1. a device that is revoked on the ledger gets nothing, whatever else it shows;
2. the certificate is signed, and recorded in the transaction that uses the applicant's right (storage.broker_enrolments);
3. only then it leaves.

Codes are kept twice: hashed, for EST, and sealed under the token's wrapping key for CMP, where a code is proven by a MAC and
never sent.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.digest import same, tagged, tagged_hash
from moorline.errors import NotAuthentic
from moorline.hsm.issuing import Leaf, key_digest
from moorline.hsm.keys import WRAPPING
from moorline.hsm.pool import new_key
from moorline.ledger.records import RevocationKind
from moorline.nfv import Role, SpiffeId
from moorline.services.broker import Broker
from moorline.services.broker_role import issued, require_not_revoked, revocable_keys
from moorline.storage.broker_enrolments import Applicant
from moorline.wire import cms, keys
from moorline.wire.cms import Drawn

_CODE_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeHere:
    """A certificate with the private key that was made for it here (PKCS#8 DER), to be sent and forgotten."""

    leaf: Leaf
    private_key: bytes


def code_digest(device: str, code: str) -> bytes:
    """What the database keeps of an enrolment code for comparison."""
    return tagged_hash("enrolment-code", device.encode("ascii"), code.encode("utf-8"))


def new_code(broker: Broker, device: str, *, ttl_s: int) -> tuple[str, Instant]:
    """A one-time code for a device and when it ends; an earlier one of the device is void."""
    code = base64.b32encode(broker.token.random(_CODE_BYTES)).decode("ascii").rstrip("=").lower()
    now = broker.clock.now()
    not_after = Instant(now + ttl_s)
    broker.enrolments.keep_code_secret(device, broker.token.seal(WRAPPING, code.encode("ascii"), _place(device)))
    broker.enrolments.set_code(device, code_digest=code_digest(device, code), not_after=not_after, at=now)
    return code, not_after


def code_of(broker: Broker, device: str) -> str:
    """The code in force of a device, for a MAC over it. Raises NotAuthentic("est.code_invalid")."""
    digest, sealed = broker.enrolments.code_secret(device, at=broker.clock.now())
    code = broker.token.unseal(WRAPPING, sealed, _place(device)).decode("ascii")
    if not same(code_digest(device, code), digest):
        # The newer code's digest was not written yet, or the older one's secret is left: neither is a code in force.
        raise NotAuthentic("est.code_invalid", "no enrolment code of this device is in force")
    return code


async def require_standing(broker: Broker, device: str) -> None:
    """1. Raises Refused("ledger.revoked"), and what the ledger says when it cannot be asked."""
    revocable = ((RevocationKind.DEVICE, broker.settings.provider, device),)
    require_not_revoked(await broker.ledger.state(revocable_keys(revocable)), revocable)


async def enrol(broker: Broker, applicant: Applicant, public: keys.PublicKey) -> Leaf:
    """A certificate for the applicant's own key. Raises what storage.broker_enrolments raises."""
    await require_standing(broker, applicant.device)
    own = keys.public_bytes(public)
    return await asyncio.to_thread(_enrolled, broker, applicant, own, key_digest(own), server_key=False)


async def enrol_with_new_key(broker: Broker, applicant: Applicant, bound_to: keys.PublicKey) -> MadeHere:
    """A certificate for a key made here; `bound_to` is the key of the request, which a one-time code binds to.

    Asked again, another key is made and the certificate before it is revoked: who has the first answer cannot be known.
    """
    await require_standing(broker, applicant.device)
    return await asyncio.to_thread(_made, broker, applicant, bound_to)


def enveloped(broker: Broker, private_key: bytes, reader: ec.EllipticCurvePublicKey) -> bytes:
    """A private key (PKCS#8), signed by the issuing CA and encrypted to one key, as CMS (DER)."""
    signed = cms.signed_key_package(private_key, broker.ca.issuer, broker.ca.above)
    drawn = Drawn(ephemeral=new_key(broker.token), content_key=broker.token.random(32), iv=broker.token.random(16))
    return cms.enveloped(signed, reader, drawn)


def _made(broker: Broker, applicant: Applicant, bound_to: keys.PublicKey) -> MadeHere:
    key = new_key(broker.token)
    public = keys.public_bytes(key.public_key())
    leaf = _enrolled(broker, applicant, public, key_digest(keys.public_bytes(bound_to)), server_key=True)
    broker.revoking.set()
    return MadeHere(leaf=leaf, private_key=_pkcs8(key))


def _enrolled(broker: Broker, applicant: Applicant, public: bytes, bound_to: bytes, *, server_key: bool) -> Leaf:
    now = broker.clock.now()
    spiffe_id = SpiffeId(trust_domain=broker.settings.trust_domain, role=Role.DEVICE, segments=(applicant.device,))
    leaf = broker.ca.issue(public, spiffe_id, now)
    broker.enrolments.enrol(
        applicant, key_digest=bound_to, issued=issued(leaf, spiffe_id, public), at=now, server_key=server_key
    )
    return leaf


def _pkcs8(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _place(device: str) -> bytes:
    return tagged("enrolment-code-secret", device.encode("ascii"))
