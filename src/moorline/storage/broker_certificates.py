"""The certificates this broker signed, recorded before they are handed out: one transaction's steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage.compiled import insert_into

CERTIFICATES: Final = sa.table(
    "certificates", *(sa.column(name) for name in ("serial", "spiffe_id", "key_digest", "not_after", "der"))
)
_KEEP: Final = insert_into(CERTIFICATES)
_NEWEST: Final = (
    sa.select(CERTIFICATES)
    .where(CERTIFICATES.c.spiffe_id == sa.bindparam("of"))
    .order_by(CERTIFICATES.c.not_after.desc())
    .limit(1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A certificate this broker signed."""

    serial: str
    spiffe_id: str
    key_digest: bytes
    not_after: Instant
    der: bytes

    def row(self) -> dict[str, object]:
        """As it is stored."""
        return {name: getattr(self, name) for name in Issued.__dataclass_fields__}

    def entry(self) -> dict[str, object]:
        """As the secure log tells of it."""
        return {"spiffe_id": self.spiffe_id, "serial": self.serial, "not_after": self.not_after}


def insert(c: sa.Connection, *issued: Issued) -> None:
    """Remember certificates."""
    if issued:
        _KEEP.run(c, *(one.row() for one in issued))


def newest(c: sa.Connection, spiffe_id: str) -> Issued | None:
    """The one of an identity that is valid longest, or None."""
    row = c.execute(_NEWEST, {"of": spiffe_id}).mappings().one_or_none()
    return None if row is None else Issued(**row)


def valid(c: sa.Connection, at: Instant, limit: int) -> tuple[Issued, ...]:
    """Certificates that have not expired."""
    query = sa.select(CERTIFICATES).where(CERTIFICATES.c.not_after >= at).limit(limit)
    return tuple(Issued(**row) for row in c.execute(query).mappings())
