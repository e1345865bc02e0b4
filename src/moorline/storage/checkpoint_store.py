"""Checkpoints of secure logs that a broker's HSM key signed, in the broker's database.

A checkpoint of another service's log is written into the broker's own log in the same transaction, so that whatever anchors
the broker's log anchors it too. `covered` says from which size of the broker's log on that is so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.audit.log import LogCheckpoint
from moorline.clock import Instant
from moorline.errors import Conflict
from moorline.storage import audit_store

CHECKPOINTED: Final = "log-checkpointed"
_CHECKPOINTS: Final = sa.table(
    "audit_checkpoints", *(sa.column(name) for name in ("log", "size", "root", "head", "at", "signed", "covered"))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCheckpoint:
    """A checkpoint of `log` and the COSE_Sign1 that says so."""

    log: str
    checkpoint: LogCheckpoint
    at: Instant
    signed: bytes


def newest(connection: sa.Connection, log: str) -> SignedCheckpoint | None:
    """The checkpoint signed last for a log, or None."""
    query = sa.select(_CHECKPOINTS).where(_CHECKPOINTS.c.log == log).order_by(_CHECKPOINTS.c.size.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return None if row is None else _loaded(row)


def record(
    connection: sa.Connection, made: SignedCheckpoint, *, after: LogCheckpoint | None, domain: str, foreign: bool
) -> None:
    """Keep a checkpoint that was judged to continue `after`; one of a foreign log becomes an entry of the own log.

    `domain` is that of the own log. Raises Conflict("audit.checkpoint_moved") if another was kept meanwhile.
    """
    known = newest(connection, made.log)
    if (None if known is None else known.checkpoint) != after:
        raise Conflict(
            "audit.checkpoint_moved", "another checkpoint of this log was signed meanwhile", got=made.log, remedy="ask again"
        )
    covered = made.checkpoint.size
    if foreign:
        body = {
            "log": made.log,
            "size": made.checkpoint.size,
            "root": made.checkpoint.root,
            "head": made.checkpoint.head,
        }
        covered = audit_store.append(connection, domain, at=made.at, event=CHECKPOINTED, body=body) + 1
    connection.execute(
        sa.insert(_CHECKPOINTS).values(
            log=made.log,
            size=made.checkpoint.size,
            root=made.checkpoint.root,
            head=made.checkpoint.head,
            at=made.at,
            signed=made.signed,
            covered=covered,
        )
    )


def covered(connection: sa.Connection, *, size: int, limit: int) -> dict[str, tuple[SignedCheckpoint, ...]]:
    """By log, the newest `limit` checkpoints that the first `size` entries of the own log cover, by rising size."""
    logs = connection.execute(sa.select(_CHECKPOINTS.c.log).where(_CHECKPOINTS.c.covered <= size).distinct())
    found: dict[str, tuple[SignedCheckpoint, ...]] = {}
    for (log,) in sorted(tuple(row) for row in logs):
        query = sa.select(_CHECKPOINTS).where(_CHECKPOINTS.c.log == log, _CHECKPOINTS.c.covered <= size)
        rows = connection.execute(query.order_by(_CHECKPOINTS.c.size.desc()).limit(limit)).all()
        found[log] = tuple(_loaded(row) for row in reversed(rows))
    return found


def _loaded(row: sa.Row[tuple[object, ...]]) -> SignedCheckpoint:
    return SignedCheckpoint(
        log=row.log,
        checkpoint=LogCheckpoint(size=row.size, root=bytes(row.root), head=bytes(row.head)),
        at=Instant(row.at),
        signed=bytes(row.signed),
    )
