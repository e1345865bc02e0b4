"""Revoked certificates of one broker: what the ledger said, and what this broker decided and tells the ledger.

A revocation decided here (a server-side key that was fetched again, a device that reported its key lost) is intended in one
transaction with its cause and counts for CRL and OCSP from then on; `height` is None until the ledger has it too. A CRL
number is spent before the CRL is signed, so that a crash loses a number and never repeats one; it never falls behind the
time, so that a database restored from yesterday goes on above what it gave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.storage.broker_store import BrokerStore
from moorline.storage.steps import reached
from moorline.storage.transactions import retried

CRL_NUMBER: Final = "crl-number"
_PAGE: Final = 500
_REVOKED: Final = sa.table(
    "revoked_certificates",
    *(sa.column(name) for name in ("serial", "spiffe_id", "not_after", "at", "reason", "data", "height")),
)
_FACTS: Final = sa.table("facts", sa.column("name"), sa.column("value"))
_CERTIFICATES: Final = sa.table("certificates", *(sa.column(name) for name in ("serial", "spiffe_id", "not_after")))
_DERS: Final = sa.table("certificates", sa.column("serial"), sa.column("der"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A certificate by serial number (hex), with its name and end."""

    serial: str
    spiffe_id: str
    not_after: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """A revoked certificate. `reason` is a name of `x509.ReasonFlags`; `height` None while the ledger is not told yet."""

    serial: str
    spiffe_id: str
    not_after: Instant
    at: Instant
    reason: str
    data: bytes | None
    height: int | None


@retried
class RevocationStore:
    """The broker's store, as far as revoked certificates go."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store

    def unexpired(self, now: Instant) -> Iterator[tuple[Named, ...]]:
        """Pages of certificates that have not expired and are not revoked here."""
        after = ""
        while True:
            with self._store.reading() as c:
                query = (
                    sa.select(_CERTIFICATES)
                    .where(_CERTIFICATES.c.not_after >= now, _CERTIFICATES.c.serial > after)
                    .where(_CERTIFICATES.c.serial.not_in(sa.select(_REVOKED.c.serial)))
                    .order_by(_CERTIFICATES.c.serial)
                    .limit(_PAGE)
                )
                page = tuple(Named(**row) for row in c.execute(query).mappings())
            if not page:
                return
            yield page
            after = page[-1].serial

    def learn(self, found: tuple[Revoked, ...]) -> None:
        """Keep what the ledger says; what is known already stays as it is."""
        if not found:
            return
        with self._store.transaction() as c:
            for one in found:
                if c.execute(sa.select(_REVOKED.c.serial).where(_REVOKED.c.serial == one.serial)).first() is None:
                    _insert(c, one)
                    self._store.append_in(c, one.at, "certificate-revoked", {"serial": one.serial, "by": "ledger"})

    def revoke(self, serial: str, *, reason: str, at: Instant) -> None:
        """Intend the revocation of a certificate of this broker; nothing happens if it is revoked already.

        Raises Refused("revocation.unknown_certificate").
        """
        with self._store.transaction() as c:
            self.revoke_in(c, serial, reason=reason, at=at)
        reached("broker.certificate.revoked")

    def revoke_in(self, c: sa.Connection, serial: str, *, reason: str, at: Instant) -> None:
        """The same inside a transaction that has another cause."""
        row = c.execute(sa.select(_CERTIFICATES).where(_CERTIFICATES.c.serial == serial)).mappings().one_or_none()
        if row is None:
            raise Refused("revocation.unknown_certificate", "this broker gave out no such certificate", got=serial)
        if c.execute(sa.select(_REVOKED.c.serial).where(_REVOKED.c.serial == serial)).first() is not None:
            return
        _insert(c, Revoked(**row, at=at, reason=reason, data=None, height=None))
        body = {"serial": serial, "spiffe_id": row["spiffe_id"], "reason": reason, "by": "broker"}
        self._store.append_in(c, at, "certificate-revoked", body)

    def revoke_name_in(self, c: sa.Connection, spiffe_id: str, *, reason: str, at: Instant) -> int:
        """Revoke every certificate of a name that has not expired; how many."""
        query = sa.select(_CERTIFICATES.c.serial).where(
            _CERTIFICATES.c.spiffe_id == spiffe_id,
            _CERTIFICATES.c.not_after >= at,
            _CERTIFICATES.c.serial.not_in(sa.select(_REVOKED.c.serial)),
        )
        serials = [str(row.serial) for row in c.execute(query)]
        for serial in serials:
            self.revoke_in(c, serial, reason=reason, at=at)
        return len(serials)

    def pending(self) -> tuple[Revoked, ...]:
        """What the ledger does not have yet, oldest first."""
        return self._where(_REVOKED.c.height.is_(None))

    def sign(self, serial: str, data: bytes | None) -> None:
        """Keep the transaction that is going to be submitted, or drop one that can be no more."""
        with self._store.transaction() as c:
            c.execute(sa.update(_REVOKED).where(_REVOKED.c.serial == serial).values(data=data))
        reached("broker.certificate_revocation.signed")

    def committed(self, serial: str, *, height: int, at: Instant) -> None:
        """The ledger has it, at this height or before."""
        with self._store.transaction() as c:
            c.execute(sa.update(_REVOKED).where(_REVOKED.c.serial == serial).values(height=height, data=None))
            self._store.append_in(c, at, "certificate-revocation-committed", {"serial": serial, "height": height})
        reached("broker.certificate_revocation.committed")

    def listed(self, *, expired_after: Instant, of: Callable[[bytes], bool] | None = None) -> tuple[Revoked, ...]:
        """Everything revoked that a CRL still names: certificates that end at `expired_after` or later.

        `of` says of a certificate (DER) whether it is of the CA whose CRL it is; without it, all are listed.
        """
        found = self._where(_REVOKED.c.not_after >= expired_after)
        if of is None:
            return found
        ders = {one.serial: self.certificate(one.serial) for one in found}
        return tuple(one for one in found if (der := ders[one.serial]) is not None and of(der))

    def on_ledger_since(self, height: int, *, after: str, limit: int) -> tuple[Revoked, ...]:
        """What the ledger has above a height, and at it above a serial number; by height and serial number."""
        with self._store.reading() as c:
            later = sa.and_(_REVOKED.c.height == height, _REVOKED.c.serial > after)
            query = sa.select(_REVOKED).where(sa.or_(_REVOKED.c.height > height, later))
            rows = c.execute(query.order_by(_REVOKED.c.height, _REVOKED.c.serial).limit(limit)).mappings()
            return tuple(Revoked(**row) for row in rows)

    def find(self, serial: str, *, of: Callable[[bytes], bool] | None = None) -> tuple[bool, Revoked | None]:
        """Whether this broker gave the certificate out, and its revocation if there is one.

        With `of`, a certificate (DER) of which it says no counts as one that was not given out.
        """
        with self._store.reading() as c:
            row = c.execute(sa.select(_REVOKED).where(_REVOKED.c.serial == serial)).mappings().one_or_none()
        der = self.certificate(serial)
        if der is None or (of is not None and not of(der)):
            return False, None
        return True, None if row is None else Revoked(**row)

    def certificate(self, serial: str) -> bytes | None:
        """A certificate (DER) this broker gave out; None if it did not."""
        with self._store.reading() as c:
            der = c.execute(sa.select(_DERS.c.der).where(_DERS.c.serial == serial)).scalar()
        return None if der is None else bytes(der)

    def next_crl_number(self, now: Instant) -> int:
        """A number greater than any before, also than those of a newer database that was lost."""
        with self._store.transaction() as c:
            known = c.execute(sa.select(_FACTS.c.value).where(_FACTS.c.name == CRL_NUMBER)).scalar()
            number = max(int(known or 0) + 1, int(now))
            self._store.set_fact_in(c, CRL_NUMBER, number)
        reached("broker.crl.numbered")
        return number

    def _where(self, condition: sa.ColumnElement[bool]) -> tuple[Revoked, ...]:
        with self._store.reading() as c:
            query = sa.select(_REVOKED).where(condition).order_by(_REVOKED.c.at, _REVOKED.c.serial)
            return tuple(Revoked(**row) for row in c.execute(query).mappings())


def _insert(c: sa.Connection, one: Revoked) -> None:
    c.execute(sa.insert(_REVOKED).values(**{name: getattr(one, name) for name in Revoked.__dataclass_fields__}))
