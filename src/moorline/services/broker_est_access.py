"""Who stands at the EST door: what they show becomes an `Applicant`, or a refusal that costs the guesser time.

1. a TLS client certificate of the own domain's devices (re-enrolment, RFC 7030 3.3.2): not expired, not revoked, neither
   on the ledger nor by this broker, and bit for bit one that this broker recorded when it made it (broker_callers);
2. at the bootstrap door only, a manufacturer's certificate (IEEE 802.1AR IDevID): its chain to a configured root is TLS's
   business, its issuer and serial number name the device this provider expects;
3. HTTP Basic (RFC 7030 3.2.3): `device:code` with a one-time code, or `name@trust domain:password` of an installer's
   account, who enrols the device that the CSR's common name names.

Wrong passwords and codes are counted by name and address; after a few, nothing of that pair is looked at for a while.
Another address is not locked out by it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID
from fastapi import Request

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.nfv import Role, parse_name
from moorline.services import http
from moorline.services.broker import Broker
from moorline.services.broker_callers import require_recorded
from moorline.services.broker_enrolment import code_digest
from moorline.storage.broker_enrolments import Applicant

_TRIES: Final = 10
_FORGET_S: Final = 60
_REMEMBERED: Final = 4096
_WRONG: Final = frozenset({"est.credentials", "est.code_invalid"})


class Attempts:
    """Failed attempts by (name, address), bounded: the oldest are forgotten first."""

    def __init__(self) -> None:
        self._failed: OrderedDict[tuple[str, str], list[Instant]] = OrderedDict()

    def require_patience(self, who: tuple[str, str], now: Instant) -> None:
        """Raises Unavailable("est.too_many_attempts") after ten failures within a minute."""
        recent = [at for at in self._failed.get(who, []) if now - at < _FORGET_S]
        if len(recent) >= _TRIES:
            raise Unavailable(
                "est.too_many_attempts",
                "too many wrong codes or passwords under this name from this address",
                remedy="wait, and check the code",
                retry_after_s=float(_FORGET_S - (now - recent[0])),
            )

    def failed(self, who: tuple[str, str], now: Instant) -> None:
        """Count one."""
        recent = [at for at in self._failed.pop(who, []) if now - at < _FORGET_S]
        self._failed[who] = [*recent, now][-_TRIES:]
        while len(self._failed) > _REMEMBERED:
            self._failed.popitem(last=False)

    def succeeded(self, who: tuple[str, str]) -> None:
        """Forget what was counted."""
        self._failed.pop(who, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """HTTP Basic (RFC 7617), untrusted."""

    name: str
    secret: str


class Door:
    """One EST door of a broker. `bootstrap` is the one where manufacturers' certificates count, and no others."""

    def __init__(self, broker: Broker, attempts: Attempts, *, bootstrap: bool) -> None:
        self._broker, self._attempts = broker, attempts
        self.bootstrap = bootstrap

    async def applicant(self, request: Request, subject: str | None) -> tuple[Applicant, tuple[str, str] | None]:
        """Who asks to be enrolled, and under which (name, address) failures count. Raises NotAuthentic("est.unauthorised").

        `subject` is the CSR's common name; it counts for installers' accounts only.
        """
        if self.bootstrap:
            return await asyncio.to_thread(self._manufactured, request), None
        credentials = basic(request.headers.get("authorization"))
        if credentials is None:
            raise NotAuthentic(
                "est.unauthorised",
                "enrolment needs the device's one-time code or an installer's account",
                remedy="HTTP Basic: device name and code",
            )
        who = (credentials.name[:64], request.client.host if request.client is not None else "")
        now = self._broker.clock.now()
        self._attempts.require_patience(who, now)
        try:
            return await asyncio.to_thread(self._by_credentials, credentials, subject), who
        except MoorlineError as error:
            self.tell(who, error)
            raise

    async def holder(self, request: Request) -> Applicant:
        """The device whose certificate TLS verified (RFC 7030 4.2.2). Raises as http.require, and Refused."""
        if self.bootstrap:
            raise Refused(
                "est.bootstrap_only", "this door enrols and does not re-enrol", remedy="use the broker's own EST address"
            )
        caller = http.require(request, Role.DEVICE, trust_domain=self._broker.settings.trust_domain)
        serial = await asyncio.to_thread(require_recorded, self._broker, http.peer_der(request) or b"")
        await asyncio.to_thread(self._broker.enrolments.require_renews, serial)
        return Applicant(device=caller.segments[0], renews=serial)

    def tell(self, who: tuple[str, str] | None, outcome: MoorlineError | None) -> None:
        """How an attempt ended: a wrong code or password is counted, a right one forgives."""
        if who is None:
            return
        if outcome is None:
            self._attempts.succeeded(who)
        elif outcome.code in _WRONG:
            self._attempts.failed(who, self._broker.clock.now())

    def _by_credentials(self, credentials: Credentials, subject: str | None) -> Applicant:
        if "@" not in credentials.name:
            device = parse_name(credentials.name, "device")
            return Applicant(device=device, code_digest=code_digest(device, credentials.secret))
        account = self._broker.enrolments.account(credentials.name, credentials.secret, at=self._broker.clock.now())
        if subject is None:
            raise Malformed("est.no_subject", "an installer's request names its device as the CSR's common name")
        return Applicant(device=parse_name(subject, "device"), account=account.account)

    def _manufactured(self, request: Request) -> Applicant:
        certificate = http.peer_certificate(request)
        identity = manufactured_identity(certificate)
        return Applicant(device=self._broker.enrolments.manufactured(*identity), manufactured=identity)


def manufactured_identity(certificate: x509.Certificate) -> tuple[str, str]:
    """Issuer (RFC 4514) and serial number attribute of an IDevID (802.1AR-2018 8.6). Raises Malformed("est.not_idevid")."""
    found = certificate.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
    if len(found) != 1 or not isinstance(found[0].value, str):
        raise Malformed("est.not_idevid", "a manufacturer's certificate has one serialNumber in its subject", got=len(found))
    return certificate.issuer.rfc4514_string(), found[0].value


def basic(header: str | None) -> Credentials | None:
    """Name and secret of HTTP Basic (RFC 7617); None if there are none. Raises Malformed("est.credentials_malformed")."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, separator, secret = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise Malformed("est.credentials_malformed", "the HTTP Basic credentials cannot be read") from None
    return Credentials(name=name, secret=secret) if separator else None
