"""Trust bundles of peer HSMs as they were accepted last: one transaction's steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.storage import broker_facts as facts

_PEERS: Final = sa.table(
    "peers", *(sa.column(name) for name in ("provider", "hsm", "at", "sequence", "transcript", "bundle"))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A peer HSM whose trust bundle was accepted, and the transcript both signed."""

    provider: str
    hsm: str
    at: Instant
    sequence: int
    transcript: bytes
    bundle: bytes


def record(c: sa.Connection, peer: Peer) -> None:
    """Keep a peer's bundle. Raises Refused("exchange.rollback") if its sequence is below the one kept."""
    where = (_PEERS.c.provider == peer.provider, _PEERS.c.hsm == peer.hsm)
    known = c.execute(sa.select(_PEERS.c.sequence).where(*where)).scalar()
    if known is not None and peer.sequence < known:
        raise Refused(
            "exchange.rollback",
            "the peer's trust bundle is older than the one kept",
            expected=f">= {known}",
            got=peer.sequence,
        )
    c.execute(sa.delete(_PEERS).where(*where))
    c.execute(sa.insert(_PEERS).values(**{name: getattr(peer, name) for name in Peer.__dataclass_fields__}))
    said = {"provider": peer.provider, "hsm": peer.hsm, "transcript": peer.transcript}
    facts.append(c, peer.at, "bundle-exchanged", said)


def all_of(c: sa.Connection) -> tuple[Peer, ...]:
    """All peers."""
    return tuple(Peer(**row) for row in c.execute(sa.select(_PEERS)).mappings().all())
