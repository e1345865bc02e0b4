"""The certificates that hosts enrolled with, and which of these hosts their TPMs' makers revoked since.

A chain is kept as it came: endorsement certificate first, then what the TPM brought along. It was verified when the host
enrolled, and is verified again against each new list of its maker. A host that enrolled before chains were kept has none
until its agent starts again: nothing is known of it then, and `chains` leaves it out.

Refusing a host takes its open challenges too: evidence of it that is being judged meanwhile then writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage import audit_store, verifier_events
from moorline.storage.verifier_rounds import CHALLENGES, HOSTS, table, withdrawal
from moorline.wire import schema
from moorline.wire.schema import Size

REVOKED: Final = "host.tpm_revoked"
_CHAINS: Final = table("ek_chains", "host", "certificates")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolledChain:
    """The chain of a host, endorsement certificate first, and when it enrolled with it."""

    certificates: tuple[bytes, ...]
    enrolled: Instant


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    certificates: Annotated[tuple[Annotated[bytes, Size(at_most=20 * 1024)], ...], Size(at_most=8)]


def packed(certificates: tuple[bytes, ...]) -> bytes:
    """A chain as it is kept."""
    return schema.encode(_Chain(certificates=certificates))


def keep(connection: sa.Connection, host: str, chain: bytes) -> None:
    """Keep the chain of a host, in the place of the one before; `chain` as of `packed`."""
    connection.execute(sa.delete(_CHAINS).where(_CHAINS.c.host == host))
    connection.execute(sa.insert(_CHAINS).values(host=host, certificates=chain))


def chains(connection: sa.Connection, *, since: Instant) -> dict[str, EnrolledChain]:
    """The chains of the hosts that enrolled at `since` or later and have one, by host."""
    query = sa.select(_CHAINS, HOSTS.c.enrolled).join(HOSTS, HOSTS.c.host == _CHAINS.c.host)
    found = {}
    for row in connection.execute(query.where(HOSTS.c.enrolled >= since)):
        kept = schema.decode(_Chain, bytes(row.certificates), max_bytes=1 << 18)
        found[row.host] = EnrolledChain(certificates=kept.certificates, enrolled=Instant(row.enrolled))
    return found


def refused(connection: sa.Connection) -> frozenset[str]:
    """The hosts whose TPM is revoked, as far as is written."""
    return frozenset(connection.execute(sa.select(HOSTS.c.host).where(HOSTS.c.refused.is_not(None))).scalars())


def judge(connection: sa.Connection, found: Mapping[str, bool], *, at: Instant) -> tuple[str, ...]:
    """Write down which hosts' TPMs are revoked; the hosts of which that is new, each told of once."""
    changed = []
    for host, revoked in found.items():
        before = HOSTS.c.refused.is_(None) if revoked else HOSTS.c.refused == REVOKED
        now = sa.update(HOSTS).where(HOSTS.c.host == host, before).values(refused=REVOKED if revoked else None)
        if connection.execute(now).rowcount != 1:
            continue
        changed.append(host)
        event = "tpm-revoked" if revoked else "tpm-not-revoked"
        audit_store.append(connection, verifier_events.AUDIT_DOMAIN, at=at, event=event, body={"host": host})
        if revoked:
            connection.execute(sa.delete(CHALLENGES).where(CHALLENGES.c.host == host))
            connection.execute(withdrawal(host, REVOKED))
            verifier_events.lost(connection, host, REVOKED, at=at)
    return tuple(changed)
