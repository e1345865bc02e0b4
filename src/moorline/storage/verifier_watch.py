"""Who watches which part of the fleet: leases of the processes of one verifier, in the database they share.

Hosts (and receivers of events) fall into PARTS by their name. What must be done about each of them without being asked, such
as finding out that it fell silent, is done by the process that holds its part; what a host asks, any process answers.

A process lives as long as its beat goes up. No clock is compared between machines: who watched another's beat stand still
for a whole lease, by its own clock that never goes back, calls it dead by that very beat, and its parts are free. So a
process that was only slow and beat meanwhile is not called dead, and one that comes back too late finds its parts taken.

Parts are shared evenly among the processes that are `ready`; one that is not (it has not been up long enough to blame a
host for silence) takes part only while nobody is.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.storage.transactions import retried, writing

PARTS: Final = 64
_WATCHERS: Final = sa.table("watchers", sa.column("process"), sa.column("beat"), sa.column("ready"))
_WATCHED: Final = sa.table("watched", sa.column("part"), sa.column("process"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a process learnt by its beat: the beats of the others, by process, and the parts it holds from now on."""

    others: Mapping[str, int]
    parts: frozenset[int]


def part_of(name: str) -> int:
    """The part of the fleet that a host or receiver falls into."""
    return zlib.crc32(name.encode()) % PARTS


@retried
class Watchers:
    """The processes of one verifier. Every method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def beat(self, process: str, *, ready: bool, dead: Mapping[str, int]) -> Beat:
        """Live on, take what is free up to a fair share, and give back what is more.

        `dead` are processes whose beat has stood still at this number for a whole lease.
        """
        with writing(self._engine) as connection:
            for name, stood_at in dead.items():
                gone = sa.delete(_WATCHERS).where(_WATCHERS.c.process == name, _WATCHERS.c.beat == stood_at)
                connection.execute(gone)
            living = _renewed(connection, process, ready=ready)
            held = _shared(connection, process, living)
        others = {name: beat for name, (beat, _) in living.items() if name != process}
        return Beat(others=others, parts=held)

    def leave(self, process: str) -> None:
        """Stop watching: what this process held is free at once."""
        with writing(self._engine) as connection:
            connection.execute(sa.delete(_WATCHERS).where(_WATCHERS.c.process == process))
            connection.execute(sa.delete(_WATCHED).where(_WATCHED.c.process == process))


def _renewed(connection: sa.Connection, process: str, *, ready: bool) -> dict[str, tuple[int, bool]]:
    """Beat and readiness of every living process, once this one has beaten."""
    living = {row.process: (int(row.beat), bool(row.ready)) for row in connection.execute(sa.select(_WATCHERS))}
    mine = living[process][0] + 1 if process in living else 1
    values = {"process": process, "beat": mine, "ready": ready}
    if process in living:
        connection.execute(sa.update(_WATCHERS).where(_WATCHERS.c.process == process).values(values))
    else:
        connection.execute(sa.insert(_WATCHERS).values(values))
    living[process] = (mine, ready)
    return living


def _shared(connection: sa.Connection, process: str, living: Mapping[str, tuple[int, bool]]) -> frozenset[int]:
    """The parts this process holds, once they are shared among the living."""
    owners = {int(row.part): row.process for row in connection.execute(sa.select(_WATCHED))}
    sharing = [name for name, (_, ready) in living.items() if ready] or list(living)
    share = -(-PARTS // len(sharing)) if process in sharing else 0
    mine = sorted(part for part, owner in owners.items() if owner == process)
    free = [part for part in range(PARTS) if owners.get(part) not in living]
    taken, surplus = free[: max(0, share - len(mine))], mine[share:]
    if taken:
        connection.execute(sa.delete(_WATCHED).where(_WATCHED.c.part.in_(taken)))
        connection.execute(sa.insert(_WATCHED), [{"part": part, "process": process} for part in taken])
    if surplus:
        connection.execute(sa.delete(_WATCHED).where(_WATCHED.c.part.in_(surplus)))
    return frozenset(mine[:share]) | frozenset(taken)
