"""Who may become which device: one-time codes, installers' accounts, manufacturers' identities, and what waits for a person.

Every way in ends in the same transaction (`enrol`): the applicant's right is looked at, the quota too, the certificate
is recorded and what it replaces is revoked, before anybody is answered. A one-time code binds to the key of its first
request (PROTOCOLS.md 7), so a retry passes and a thief does not. A server-side key that is asked for again revokes the
certificate it replaces, since nobody knows who has the first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Conflict, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_revocations import RevocationStore
from moorline.storage.broker_store import BrokerStore
from moorline.storage.steps import reached
from moorline.storage.transactions import retried

_SCRYPT: Final = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 32}
_POLL_S: Final = 30.0


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


_CODES: Final = _table("enrolment_codes", "device", "code_digest", "not_after", "key_digest")
_CODE_SECRETS: Final = _table("enrolment_code_secrets", "device", "sealed")
_FURTHER: Final = _table("further_certificates", "serial")
_DEVICES: Final = _table("devices", "device", "key_digest", "enrolled")
_CERTIFICATES: Final = _table("certificates", "serial", "spiffe_id", "not_after")
_ACCOUNTS: Final = _table("enrolment_accounts", "account", "salt", "digest", "prefix", "remaining", "not_after", "approval")
_MANUFACTURED: Final = _table("manufactured_devices", "issuer", "serial_number", "device")
_WAITING: Final = _table("waiting_enrolments", "device", "key_digest", "applicant", "state", "at")
_SERVER_KEYS: Final = _table("server_keys", "serial", "device")


class Waiting(StrEnum):
    """How far a person is with an enrolment that waits for one."""

    ASKED = "asked"
    APPROVED = "approved"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicant:
    """Who asks for a certificate, as far as the door could tell: exactly one of the ways is not None.

    `code_digest` for a one-time code; `account` for an installer whose password was right; `manufactured` for a verified
    IDevID (issuer, serial number); `renews` (serial number, hex) for the holder of a certificate of this very device.
    `further` asks for a certificate beside the one that is held, for another key: it stands for no renewal.
    """

    device: str
    code_digest: bytes | None = None
    account: str | None = None
    manufactured: tuple[str, str] | None = None
    renews: str | None = None
    further: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An installer's account: devices whose names begin with `prefix`, so many of them, until then."""

    account: str
    prefix: str
    remaining: int
    not_after: Instant
    approval: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingEnrolment:
    """An enrolment that waits for a person, or was decided by one."""

    device: str
    key_digest: bytes
    applicant: str
    state: Waiting
    at: Instant


@retried
class EnrolmentStore:
    """The broker's store, as far as enrolment of devices goes."""

    def __init__(self, store: BrokerStore, revocations: RevocationStore, *, quota: int) -> None:
        """`quota` is how many certificates of one device may be valid at the same time."""
        self._store, self._revocations, self._quota = store, revocations, quota

    # -- what people set up ------------------------------------------------------------------------------------------

    def open_account(self, account: Account, *, password: str, salt: bytes, at: Instant) -> None:
        """Make or replace an installer's account. The password is kept as scrypt with a salt."""
        digest = _stretched(password, salt)
        with self._store.transaction() as c:
            c.execute(sa.delete(_ACCOUNTS).where(_ACCOUNTS.c.account == account.account))
            values = {name: getattr(account, name) for name in Account.__dataclass_fields__}
            c.execute(sa.insert(_ACCOUNTS).values(**values, salt=salt, digest=digest))
            body = {"account": account.account, "prefix": account.prefix, "remaining": account.remaining}
            self._store.append_in(c, at, "enrolment-account", body)

    def expect_manufactured(self, *, issuer: str, serial_number: str, device: str, at: Instant) -> None:
        """Say which device a manufacturer's identity (802.1AR) is here. Raises Conflict("est.device_taken")."""
        with self._store.transaction() as c:
            named = c.execute(sa.select(_MANUFACTURED).where(_MANUFACTURED.c.device == device)).all()
            if any((row.issuer, row.serial_number) != (issuer, serial_number) for row in named):
                raise Conflict("est.device_taken", "another manufactured device has this name", got=device)
            where = (_MANUFACTURED.c.issuer == issuer, _MANUFACTURED.c.serial_number == serial_number)
            c.execute(sa.delete(_MANUFACTURED).where(*where))
            c.execute(sa.insert(_MANUFACTURED).values(issuer=issuer, serial_number=serial_number, device=device))
            body = {"device": device, "issuer": issuer, "serial_number": serial_number}
            self._store.append_in(c, at, "manufactured-device-expected", body)

    def set_code(self, device: str, *, code_digest: bytes, not_after: Instant, at: Instant) -> None:
        """Give a device one enrolment; an older code of it is void."""
        with self._store.transaction() as c:
            c.execute(sa.delete(_CODES).where(_CODES.c.device == device))
            c.execute(sa.insert(_CODES).values(device=device, code_digest=code_digest, not_after=not_after))
            self._store.append_in(c, at, "enrolment-code", {"device": device, "not_after": not_after})
        reached("broker.code.made")

    def keep_code_secret(self, device: str, sealed: bytes) -> None:
        """Keep a code under the token's wrapping key, for protocols that prove it without sending it (CMP)."""
        with self._store.transaction() as c:
            c.execute(sa.delete(_CODE_SECRETS).where(_CODE_SECRETS.c.device == device))
            c.execute(sa.insert(_CODE_SECRETS).values(device=device, sealed=sealed))

    def decide_waiting(self, device: str, *, approved: bool, at: Instant) -> None:
        """A person's word about an enrolment that waits. Raises Refused("est.nothing_waits")."""
        state = Waiting.APPROVED if approved else Waiting.REFUSED
        with self._store.transaction() as c:
            where = (_WAITING.c.device == device, _WAITING.c.state == Waiting.ASKED.value)
            if c.execute(sa.update(_WAITING).where(*where).values(state=state.value)).rowcount != 1:
                raise Refused("est.nothing_waits", "no enrolment of this device waits", got=device)
            self._store.append_in(c, at, f"enrolment-{state.value}", {"device": device})

    # -- at the door ---------------------------------------------------------------------------------------------------

    def account(self, name: str, password: str, *, at: Instant) -> Account:
        """The account whose password this is. Raises NotAuthentic("est.credentials")."""
        with self._store.reading() as c:
            row = c.execute(sa.select(_ACCOUNTS).where(_ACCOUNTS.c.account == name)).mappings().one_or_none()
        salt, digest = (bytes(row["salt"]), bytes(row["digest"])) if row is not None else (bytes(16), bytes(32))
        right = same(_stretched(password, salt), digest)  # also for a name that is not there: it takes as long
        if row is None or not right or at > row["not_after"]:
            raise NotAuthentic("est.credentials", "name or password is wrong, or the account has ended")
        return _account(row)

    def manufactured(self, issuer: str, serial_number: str) -> str:
        """The name here of a manufacturer's identity. Raises Refused("est.not_expected")."""
        with self._store.reading() as c:
            where = (_MANUFACTURED.c.issuer == issuer, _MANUFACTURED.c.serial_number == serial_number)
            row = c.execute(sa.select(_MANUFACTURED).where(*where)).mappings().one_or_none()
        if row is None:
            raise Refused(
                "est.not_expected",
                "this provider does not expect this manufactured device",
                got=f"{serial_number} of {issuer}",
                remedy="moor hsm expect-device",
            )
        return str(row["device"])

    def code_secret(self, device: str, *, at: Instant) -> tuple[bytes, bytes]:
        """(digest, sealed) of a device's code. Raises Refused("est.code_invalid") if there is none in force."""
        with self._store.reading() as c:
            row = c.execute(sa.select(_CODES).where(_CODES.c.device == device)).mappings().one_or_none()
            kept = c.execute(sa.select(_CODE_SECRETS).where(_CODE_SECRETS.c.device == device)).mappings().one_or_none()
        if row is None or kept is None or at > row["not_after"]:
            raise _no_code()
        return bytes(row["code_digest"]), bytes(kept["sealed"])

    def holds(self, device: str, serial: str, trust_domain: str) -> bool:
        """Whether a certificate was given out to this device."""
        with self._store.reading() as c:
            row = c.execute(sa.select(_CERTIFICATES.c.spiffe_id).where(_CERTIFICATES.c.serial == serial)).scalar()
        return row == f"spiffe://{trust_domain}/device/{device}"

    def require_renews(self, serial: str) -> None:
        """Raises Refused("est.further_certificate") for one that was given beside another, for another key."""
        with self._store.reading() as c:
            found = c.execute(sa.select(_FURTHER.c.serial).where(_FURTHER.c.serial == serial)).first()
        if found is not None:
            raise Refused(
                "est.further_certificate",
                "a certificate given beside the device's own stands for no renewal",
                got=serial,
                remedy="ask with the certificate of the device's own key",
            )

    def enrol(
        self, applicant: Applicant, *, key_digest: bytes, issued: Issued, at: Instant, server_key: bool = False
    ) -> None:
        """Use the applicant's right for a key and record the certificate.

        Raises Refused (`est.code_used` with an alarm, `est.account_exhausted`, `est.not_expected`, `est.refused`),
        NotAuthentic("est.code_invalid"), and Unavailable: `est.quota` when too many certificates of the device are valid,
        `est.waiting` while a person has not decided.
        """
        refusal: MoorlineError | None = None
        with self._store.transaction() as c:
            refusal = self._admit(c, applicant, key_digest, at) or self._over_quota(c, issued.spiffe_id, at)
            if refusal is None:
                if server_key:
                    self._supersede(c, applicant.device, at)
                    c.execute(sa.insert(_SERVER_KEYS).values(serial=issued.serial, device=applicant.device))
                if applicant.further:
                    c.execute(sa.insert(_FURTHER).values(serial=issued.serial))
                else:
                    c.execute(sa.delete(_DEVICES).where(_DEVICES.c.device == applicant.device))
                    values = {"device": applicant.device, "key_digest": issued.key_digest, "enrolled": at}
                    c.execute(sa.insert(_DEVICES).values(**values))
                self._store.insert_certificate_in(c, issued)
                event = "device-enrolled" if applicant.renews is None else "device-reenrolled"
                self._store.append_in(c, at, event, {"device": applicant.device, "serial": issued.serial})
        if refusal is not None:
            raise refusal
        reached("broker.device.enrolled")

    def waiting(self) -> tuple[WaitingEnrolment, ...]:
        """What waits for a person, or was decided by one, oldest first."""
        with self._store.reading() as c:
            rows = c.execute(sa.select(_WAITING).order_by(_WAITING.c.at)).mappings()
            return tuple(WaitingEnrolment(**{**row, "state": Waiting(row["state"])}) for row in rows)

    # -- steps inside the transaction ----------------------------------------------------------------------------------

    def _admit(self, c: sa.Connection, who: Applicant, key_digest: bytes, at: Instant) -> MoorlineError | None:
        if who.code_digest is not None:
            return self._use_code(c, who.device, who.code_digest, key_digest, at)
        if who.account is not None:
            return self._use_account(c, who.account, who.device, key_digest, at)
        if who.manufactured is not None:
            return self._use_manufactured(c, who.manufactured, who.device, at)
        known = c.execute(sa.select(_DEVICES.c.device).where(_DEVICES.c.device == who.device)).first()
        if known is None:
            return Refused("est.device_unknown", "this device was not enrolled here", got=who.device)
        return None

    def _use_code(
        self, c: sa.Connection, device: str, digest: bytes, key_digest: bytes, at: Instant
    ) -> MoorlineError | None:
        row = c.execute(sa.select(_CODES).where(_CODES.c.device == device)).mappings().one_or_none()
        if row is None or not same(bytes(row["code_digest"]), digest) or at > row["not_after"]:
            return _no_code()
        if row["key_digest"] is None or bytes(row["key_digest"]) == key_digest:
            c.execute(sa.update(_CODES).where(_CODES.c.device == device).values(key_digest=key_digest))
            return None
        says = "an enrolment code was used again with another key"
        first, second = f"{device} {bytes(row['key_digest']).hex()}", f"{device} {key_digest.hex()}"
        self._store.alarm_in(c, at, "est.code_used", says, first, second)
        return Refused(
            "est.code_used",
            "the enrolment code was used with another key",
            remedy="ask the provider for a new code, and find out who used this one",
        )

    def _use_account(
        self, c: sa.Connection, account: str, device: str, key_digest: bytes, at: Instant
    ) -> MoorlineError | None:
        row = c.execute(sa.select(_ACCOUNTS).where(_ACCOUNTS.c.account == account)).mappings().one_or_none()
        if row is None or at > row["not_after"]:
            return NotAuthentic("est.credentials", "name or password is wrong, or the account has ended")
        if not device.startswith(row["prefix"]):
            return Refused("est.other_device", "this account does not enrol such devices", expected=f"{row['prefix']}...")
        mine = sa.select(_WAITING).where(_WAITING.c.device == device)
        asked = c.execute(mine).mappings().one_or_none()
        if asked is not None and bytes(asked["key_digest"]) == key_digest:
            return _undecided(Waiting(asked["state"]))
        known = c.execute(sa.select(_DEVICES.c.key_digest).where(_DEVICES.c.device == device)).scalar()
        if asked is not None or known is not None:
            # An installer's password is no right over a device that has its identity already.
            return Refused("est.device_known", "this device is enrolled already, or waits with another key", got=device)
        if row["remaining"] < 1:
            return Refused("est.account_exhausted", "this account enrolled as many devices as it may", got=account)
        left = int(row["remaining"]) - 1
        c.execute(sa.update(_ACCOUNTS).where(_ACCOUNTS.c.account == account).values(remaining=left))
        state = Waiting.ASKED if row["approval"] else Waiting.APPROVED
        values = {"device": device, "key_digest": key_digest, "applicant": account, "state": state.value, "at": at}
        c.execute(sa.insert(_WAITING).values(**values))
        self._store.append_in(c, at, "enrolment-asked", {"device": device, "account": account, "state": state.value})
        return _undecided(state)

    def _use_manufactured(
        self, c: sa.Connection, identity: tuple[str, str], device: str, at: Instant
    ) -> MoorlineError | None:
        where = (_MANUFACTURED.c.issuer == identity[0], _MANUFACTURED.c.serial_number == identity[1])
        row = c.execute(sa.select(_MANUFACTURED).where(*where)).mappings().one_or_none()
        if row is None or row["device"] != device:
            return Refused("est.not_expected", "this provider does not expect this manufactured device", got=device)
        # The identity is for life, its use is a new beginning: what the device had before is superseded.
        spiffe = sa.select(_CERTIFICATES.c.spiffe_id).where(_CERTIFICATES.c.spiffe_id.like(f"%/device/{device}")).limit(1)
        named = c.execute(spiffe).scalar()
        if named is not None:
            self._revocations.revoke_name_in(c, str(named), reason="superseded", at=at)
        return None

    def _over_quota(self, c: sa.Connection, spiffe_id: str, at: Instant) -> MoorlineError | None:
        ends = sa.select(_CERTIFICATES.c.not_after).where(
            _CERTIFICATES.c.spiffe_id == spiffe_id, _CERTIFICATES.c.not_after >= at
        )
        found = sorted(int(row.not_after) for row in c.execute(ends))
        if len(found) < self._quota:
            return None
        return Unavailable(
            "est.quota",
            "this device has as many valid certificates as it may",
            expected=f"< {self._quota}",
            got=len(found),
            remedy="use the certificate you have; ask again when one has ended",
            retry_after_s=max(1.0, float(found[0] - at)),
        )

    def _supersede(self, c: sa.Connection, device: str, at: Instant) -> None:
        for row in c.execute(sa.select(_SERVER_KEYS.c.serial).where(_SERVER_KEYS.c.device == device)).all():
            self._revocations.revoke_in(c, str(row.serial), reason="superseded", at=at)


def _stretched(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode("utf-8"), salt=salt, **_SCRYPT)


def _account(row: sa.RowMapping) -> Account:
    return Account(**{name: row[name] for name in Account.__dataclass_fields__})


def _undecided(state: Waiting) -> MoorlineError | None:
    if state is Waiting.APPROVED:
        return None
    if state is Waiting.REFUSED:
        return Refused("est.refused", "the provider refused this enrolment")
    return Unavailable("est.waiting", "a person has to approve this enrolment", retry_after_s=_POLL_S)


def _no_code() -> NotAuthentic:
    return NotAuthentic(
        "est.code_invalid",
        "the enrolment code is unknown, of another device or expired",
        remedy="ask the provider for a new code",
    )
