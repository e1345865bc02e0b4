"""The provider's own door, devices: who may enrol and how, what waits for a person, which certificates are revoked."""

from __future__ import annotations

import asyncio
import base64
from typing import Final

from cryptography import x509
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from moorline.clock import Instant
from moorline.errors import Malformed
from moorline.nfv import parse_name
from moorline.services.broker import Broker
from moorline.services.broker_est_access import manufactured_identity
from moorline.services.broker_revocation import Lists
from moorline.storage.broker_enrolments import Account
from moorline.storage.broker_pairs import Pair

_SALT_BYTES: Final = 16
_PASSWORD_BYTES: Final = 15
_ACCOUNT_MAX_S: Final = 366 * 24 * 3600
_REASONS: Final = ("unspecified", "key_compromise", "affiliation_changed", "superseded", "cessation_of_operation")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RevokeRequest(_Request):
    """A certificate by serial number in hex, and why: a name of RFC 5280 5.3.1, words joined by _."""

    serial: str = Field(min_length=1, max_length=40)
    reason: str = "unspecified"


class AccountRequest(_Request):
    """An installer's account: may enrol `devices` devices whose names begin with `prefix`."""

    name: str
    prefix: str = Field(min_length=1, max_length=40)
    devices: int = Field(gt=0, le=1_000_000)
    ttl_s: int = Field(gt=0, le=_ACCOUNT_MAX_S)
    approval: bool = False


class ExpectedRequest(_Request):
    """A manufactured device (its IDevID certificate, PEM) and what it is called here."""

    device: str
    certificate: str


class DecisionRequest(_Request):
    """A person's word about an enrolment that waits."""

    device: str
    approved: bool


def add_routes(app: FastAPI, broker: Broker, lists: Lists) -> None:
    """Enrolment and revocation on the admin socket."""
    _enrolment_routes(app, broker)
    _revocation_routes(app, broker, lists)
    _pair_routes(app, broker)


def _pair_routes(app: FastAPI, broker: Broker) -> None:
    @app.get("/v1/pairs")
    async def pairs() -> dict[str, list[dict[str, object]]]:
        """Pair epochs with other HSMs, newest first, and what their peers told."""
        found = await asyncio.to_thread(broker.pairs.all)
        return {"pairs": [_pair(broker, one) for one in found]}


def _pair(broker: Broker, one: Pair) -> dict[str, object]:
    news = broker.pairs.news(one.provider, one.hsm)
    return {
        "provider": one.provider,
        "hsm": one.hsm,
        "epoch": one.epoch,
        "state": one.state.value,
        "transcript": None if one.transcript is None else one.transcript.hex(),
        "anchored_at_height": one.height,
        "at": one.at,
        "uses": one.uses,
        "revoked_by_peer": 0 if news is None else news.revoked,
        "contracts": [] if news is None else [name for name in news.contracts.split(",") if name],
    }


def _enrolment_routes(app: FastAPI, broker: Broker) -> None:
    @app.post("/v1/enrolment-accounts")
    async def account(asked: AccountRequest) -> dict[str, object]:
        """Open or replace an installer's account; the password is made here and shown once."""
        return await asyncio.to_thread(_account, broker, asked)

    @app.post("/v1/expected-devices")
    async def expected(asked: ExpectedRequest) -> dict[str, object]:
        """Expect a manufactured device by its certificate's issuer and serial number."""
        return await asyncio.to_thread(_expected, broker, asked)

    @app.get("/v1/enrolments")
    async def waiting() -> dict[str, list[dict[str, object]]]:
        """Enrolments that wait for a person, or were decided by one."""
        found = await asyncio.to_thread(broker.enrolments.waiting)
        rows: list[dict[str, object]] = [
            {"device": w.device, "key": w.key_digest.hex(), "applicant": w.applicant, "state": w.state.value, "at": w.at}
            for w in found
        ]
        return {"enrolments": rows}

    @app.post("/v1/enrolments/decide")
    async def decide(asked: DecisionRequest) -> dict[str, object]:
        """Approve or refuse an enrolment that waits."""
        device, now = parse_name(asked.device, "device"), broker.clock.now()
        await asyncio.to_thread(broker.enrolments.decide_waiting, device, approved=asked.approved, at=now)
        return {"device": device, "approved": asked.approved}


def _account(broker: Broker, asked: AccountRequest) -> dict[str, object]:
    name, now = parse_name(asked.name, "account"), broker.clock.now()
    password = base64.b32encode(broker.token.random(_PASSWORD_BYTES)).decode("ascii").lower()
    account = Account(
        account=f"{name}@{broker.settings.trust_domain}",
        prefix=asked.prefix,
        remaining=asked.devices,
        not_after=Instant(now + asked.ttl_s),
        approval=asked.approval,
    )
    broker.enrolments.open_account(account, password=password, salt=broker.token.random(_SALT_BYTES), at=now)
    return {"user": account.account, "password": password, "not_after": account.not_after}


def _expected(broker: Broker, asked: ExpectedRequest) -> dict[str, object]:
    device = parse_name(asked.device, "device")
    try:
        certificate = x509.load_pem_x509_certificate(asked.certificate.encode())
    except ValueError:
        raise Malformed("certificate.undecodable", "the text is not a certificate, PEM") from None
    issuer, serial_number = manufactured_identity(certificate)
    broker.enrolments.expect_manufactured(issuer=issuer, serial_number=serial_number, device=device, at=broker.clock.now())
    return {"device": device, "issuer": issuer, "serial_number": serial_number}


def _revocation_routes(app: FastAPI, broker: Broker, lists: Lists) -> None:

    @app.post("/v1/certificates/revoke")
    async def revoke(asked: RevokeRequest) -> dict[str, object]:
        """Revoke a certificate of this broker: at once in CRL and OCSP, and on the ledger."""
        if asked.reason not in _REASONS:
            raise Malformed("revocation.reason", "no such reason", expected=", ".join(_REASONS), got=asked.reason)
        reason = x509.ReasonFlags[asked.reason].name
        serial = asked.serial.lower().lstrip("0")
        await asyncio.to_thread(broker.revocations.revoke, serial, reason=reason, at=broker.clock.now())
        broker.revoking.set()
        return {"serial": serial, **await asyncio.to_thread(lists.facts)}

    @app.get("/v1/revocation")
    async def facts() -> dict[str, object]:
        """How far revocations are, and the bound within which one is seen everywhere."""
        return await asyncio.to_thread(lists.facts)
