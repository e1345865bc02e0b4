"""Why keys were released or withheld, for every broker process over the database, and after a restart.

The newest decision of each identity and session; none older than a week, and so many at most. They are an explanation for
people, no evidence: what counts stands in the secure log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage.broker_store import BrokerStore
from moorline.storage.transactions import retried

KEPT_S: Final = 7 * 24 * 3600
KEPT: Final = 100_000
SHOWN: Final = 100
_DECISIONS: Final = sa.table(
    "decisions",
    sa.column("number", sa.BigInteger),
    sa.column("identity", sa.String),
    sa.column("session", sa.String),
    sa.column("instance", sa.String),
    sa.column("at", sa.BigInteger),
    sa.column("body", sa.LargeBinary),
)
_AT_ONCE: Final = 100
# Made once: a statement that is built anew costs several times what it costs to run, and each new session is a decision.
_OF_THESE: Final = sa.select(_DECISIONS.c.identity, _DECISIONS.c.session, _DECISIONS.c.number).where(
    _DECISIONS.c.identity.in_(sa.bindparam("identities", expanding=True))
)
_FORGET: Final = sa.delete(_DECISIONS).where(_DECISIONS.c.number.in_(sa.bindparam("numbers", expanding=True)))
_FORGET_OLD: Final = sa.delete(_DECISIONS).where(
    sa.or_(_DECISIONS.c.at < sa.bindparam("before"), _DECISIONS.c.number <= sa.bindparam("up_to"))
)
_KEEP: Final = sa.insert(_DECISIONS)
_NEWEST: Final = sa.select(sa.func.max(_DECISIONS.c.number))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDecision:
    """One decision. `body` is the explanation as people are shown it, JSON; nothing in it is secret."""

    identity: str
    session: str
    instance: str
    at: Instant
    body: bytes


@retried
class DecisionStore:
    """The broker's store, as far as explanations go."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store

    def keep(self, made: Sequence[StoredDecision], *, at: Instant) -> None:
        """Keep these, in this order, each in place of the one before of its identity and session; forget what is old."""
        with self._store.transaction() as c:
            latest: dict[tuple[str, str], StoredDecision] = {}
            for one in made:
                latest.pop((one.identity, one.session), None)
                latest[one.identity, one.session] = one
            for first in range(0, len(latest), _AT_ONCE):
                some = list(latest.values())[first : first + _AT_ONCE]
                names = {"identities": sorted({one.identity for one in some})}
                known = {(row.identity, row.session): row.number for row in c.execute(_OF_THESE, names)}
                numbers = [known[one.identity, one.session] for one in some if (one.identity, one.session) in known]
                if numbers:
                    c.execute(_FORGET, {"numbers": numbers})
                c.execute(
                    _KEEP, [{name: getattr(one, name) for name in StoredDecision.__dataclass_fields__} for one in some]
                )
            newest = c.execute(_NEWEST).scalar() or 0
            c.execute(_FORGET_OLD, {"before": at - KEPT_S, "up_to": newest - KEPT})

    def about(self, name: str) -> tuple[bytes, ...]:
        """Explanations about an instance, an identity, or sessions with this in their names; newest first, at most SHOWN."""
        found = sa.or_(
            _DECISIONS.c.identity == name,
            _DECISIONS.c.instance == name,
            _DECISIONS.c.session.contains(name, autoescape=True),
        )
        query = sa.select(_DECISIONS.c.body).where(found).order_by(_DECISIONS.c.number.desc()).limit(SHOWN)
        with self._store.reading() as c:
            return tuple(c.execute(query).scalars())
