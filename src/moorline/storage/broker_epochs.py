"""Launch epochs, the launchers admitted to them, and the sequence numbers leased to each: one transaction's steps.

A token is worth something while its epoch is accepted, its launcher stands and its number is leased (PROTOCOLS.md 3). No
transaction begins or ends here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.storage import broker_facts as facts
from moorline.storage.compiled import Compiled

_EPOCHS: Final = sa.table(
    "epochs", *(sa.column(name) for name in ("epoch", "opened", "not_after", "accept_until", "wrapped"))
)
_LAUNCHERS: Final = sa.table(
    "launchers",
    *(sa.column(name) for name in ("launcher", "ticket", "session", "measurement", "chip", "admitted", "revoked")),
)
_LEASES: Final = sa.table(
    "leases", *(sa.column(name) for name in ("launcher", "epoch", "first", "count", "not_after", "void"))
)
_NEWEST: Final = sa.select(_EPOCHS).order_by(_EPOCHS.c.epoch.desc()).limit(1)
_FIND: Final = Compiled(sa.select(_EPOCHS).where(_EPOCHS.c.epoch == sa.bindparam("number")))
_LEASES_OF: Final = Compiled(
    sa.select(_LEASES).where(_LEASES.c.launcher == sa.bindparam("by"), _LEASES.c.epoch == sa.bindparam("in"))
)
_STANDING: Final = (
    sa.select(_LEASES.c.launcher, _LEASES.c.epoch, _LEASES.c.first, _LEASES.c.count)
    .select_from(_LEASES.join(_EPOCHS, _EPOCHS.c.epoch == _LEASES.c.epoch))
    .join(_LAUNCHERS, _LAUNCHERS.c.launcher == _LEASES.c.launcher)
    .where(
        _LEASES.c.launcher.in_(sa.bindparam("launchers", expanding=True)),
        _LEASES.c.epoch.in_(sa.bindparam("epochs", expanding=True)),
        _LEASES.c.not_after >= sa.bindparam("now"),
        _LEASES.c.void == sa.false(),
        _EPOCHS.c.accept_until >= sa.bindparam("now"),
        _LAUNCHERS.c.revoked.is_(None),
    )
)


def covering(*now: sa.ColumnElement[int]) -> sa.Select[int]:
    """How many leases cover (launcher `by`, epoch `in`, sequence `number`), by each of these times."""
    return (
        sa.select(sa.func.count().label("leases"))
        .select_from(_LEASES.join(_EPOCHS, _EPOCHS.c.epoch == _LEASES.c.epoch))
        .join(_LAUNCHERS, _LAUNCHERS.c.launcher == _LEASES.c.launcher)
        .where(
            _LEASES.c.launcher == sa.bindparam("by"),
            _LEASES.c.epoch == sa.bindparam("in"),
            _LEASES.c.first <= sa.bindparam("number"),
            _LEASES.c.first + _LEASES.c.count > sa.bindparam("number"),
            _LEASES.c.void == sa.false(),
            _LAUNCHERS.c.revoked.is_(None),
            *(_LEASES.c.not_after >= each for each in now),
            *(_EPOCHS.c.accept_until >= each for each in now),
        )
    )


_LEASED: Final = Compiled(covering(sa.bindparam("now")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """A launch epoch. Tokens of it are accepted until `accept_until`; `wrapped` is its key under the token, or gone."""

    epoch: int
    opened: Instant
    not_after: Instant
    accept_until: Instant
    wrapped: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """A launcher as it was admitted; `launcher` is its id, 32 bytes."""

    launcher: bytes
    measurement: bytes
    chip: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Sequence numbers `first` to `first + count - 1` of one launcher in one epoch."""

    launcher: bytes
    epoch: int
    first: int
    count: int
    not_after: Instant
    void: bool

    def covers(self, sequence: int, now: Instant) -> bool:
        """Whether `sequence` is leased at `now`."""
        return not self.void and self.first <= sequence < self.first + self.count and now <= self.not_after


def open_epoch(
    c: sa.Connection, *, epoch: int, opened: Instant, not_after: Instant, grace_s: int, wrapped: bytes
) -> list[int]:
    """Open an epoch, close the others with grace, end a halt; the epochs of which nothing is accepted any more."""
    until = opened + grace_s
    c.execute(sa.update(_EPOCHS).where(_EPOCHS.c.accept_until > until).values(accept_until=until))
    c.execute(sa.update(_EPOCHS).values(wrapped=None))
    values = {"epoch": epoch, "opened": opened, "not_after": not_after, "accept_until": not_after + grace_s}
    c.execute(sa.insert(_EPOCHS).values(**values, wrapped=wrapped))
    facts.set_fact(c, facts.COUNTER, epoch)
    facts.set_fact(c, facts.HALTED, 0)
    facts.append(c, opened, "epoch-opened", {"epoch": epoch, "not_after": not_after})
    return [int(row.epoch) for row in c.execute(sa.select(_EPOCHS.c.epoch).where(_EPOCHS.c.accept_until < opened))]


def close_all(c: sa.Connection) -> None:
    """Close every epoch at once, without grace, and forget their keys."""
    c.execute(sa.update(_EPOCHS).values(accept_until=0, wrapped=None))


def void_leases(c: sa.Connection, launcher: bytes | None = None) -> None:
    """No lease is worth anything any more; with `launcher`, none of this one."""
    void = sa.update(_LEASES).values(void=True)
    c.execute(void if launcher is None else void.where(_LEASES.c.launcher == launcher))


def find(c: sa.Connection, number: int) -> Epoch | None:
    """An epoch by number."""
    row = _FIND.one(c, {"number": number})
    return None if row is None else Epoch(**row._asdict())


def newest(c: sa.Connection) -> Epoch | None:
    """The epoch opened last, open or not."""
    row = c.execute(_NEWEST).mappings().one_or_none()
    return None if row is None else Epoch(**row)


def admit_launcher(
    c: sa.Connection, *, launcher: bytes, ticket: bytes, measurement: bytes, chip: bytes, session: str, at: Instant
) -> bool:
    """Use a ticket for a launcher; False, with an alarm, if another launcher used it or this one was revoked."""
    row = c.execute(sa.select(_LAUNCHERS).where(_LAUNCHERS.c.ticket == ticket)).one_or_none()
    if row is None:
        values = {"launcher": launcher, "ticket": ticket, "measurement": measurement, "chip": chip}
        c.execute(sa.insert(_LAUNCHERS).values(**values, session=session, admitted=at))
        facts.append(c, at, "launcher-admitted", {"launcher": launcher, "ticket": ticket, "chip": chip})
        return True
    if row.launcher == launcher and row.revoked is None:
        return True
    says = "a launcher ticket was shown again by another launcher, or by a revoked one"
    facts.alarm(c, at, "launcher.ticket_used", says, row.session, session)
    return False


def launcher_active(c: sa.Connection, launcher: bytes) -> bool:
    """Whether this launcher was admitted and not revoked."""
    row = c.execute(sa.select(_LAUNCHERS.c.revoked).where(_LAUNCHERS.c.launcher == launcher)).one_or_none()
    return row is not None and row.revoked is None


def leasing(c: sa.Connection, at: Instant) -> tuple[Launcher, ...]:
    """Launchers, not revoked, whose numbers count at `at`."""
    found = (
        sa.select(_LAUNCHERS.c.launcher, _LAUNCHERS.c.measurement, _LAUNCHERS.c.chip)
        .select_from(_LAUNCHERS.join(_LEASES, _LEASES.c.launcher == _LAUNCHERS.c.launcher))
        .join(_EPOCHS, _EPOCHS.c.epoch == _LEASES.c.epoch)
        .where(
            _LAUNCHERS.c.revoked.is_(None),
            _LEASES.c.void == sa.false(),
            _LEASES.c.not_after >= at,
            _EPOCHS.c.accept_until >= at,
        )
        .distinct()
    )
    return tuple(Launcher(**row) for row in c.execute(found).mappings())


def revoke_launcher(c: sa.Connection, launcher: bytes, at: Instant) -> None:
    """Revoke a launcher and close every epoch: they share one key (PROTOCOLS.md 3). Raises Refused("launcher.unknown")."""
    done = c.execute(sa.update(_LAUNCHERS).where(_LAUNCHERS.c.launcher == launcher).values(revoked=at))
    if done.rowcount != 1:
        raise Refused("launcher.unknown", "no launcher of this id was admitted", got=launcher)
    void_leases(c, launcher)
    close_all(c)
    facts.append(c, at, "launcher-revoked", {"launcher": launcher})


def grant_lease(
    c: sa.Connection, *, launcher: bytes, epoch: int, count: int, not_after: Instant, counter: int, at: Instant
) -> Lease:
    """The next `count` sequence numbers of a launcher; the token's counter was advanced to `counter` before."""
    query = sa.select(sa.func.max(_LEASES.c.first + _LEASES.c.count)).where(
        _LEASES.c.launcher == launcher, _LEASES.c.epoch == epoch
    )
    first = int(c.execute(query).scalar() or 0)
    values = {"launcher": launcher, "epoch": epoch, "first": first, "count": count, "not_after": not_after}
    c.execute(sa.insert(_LEASES).values(**values, void=False))
    facts.set_fact(c, facts.COUNTER, counter)
    facts.append(c, at, "lease-granted", {"launcher": launcher, "epoch": epoch, "first": first, "count": count})
    return Lease(launcher=launcher, epoch=epoch, first=first, count=count, not_after=not_after, void=False)


def leases(c: sa.Connection, launcher: bytes, epoch: int) -> tuple[Lease, ...]:
    """All leases of a launcher in an epoch."""
    rows = _LEASES_OF.all(c, {"by": launcher, "in": epoch})
    return tuple(Lease(**{**row._asdict(), "void": bool(row.void)}) for row in rows)


def leased_all(c: sa.Connection, numbers: Sequence[tuple[bytes, int, int]], at: Instant) -> set[tuple[bytes, int, int]]:
    """Those of these (launcher, epoch, sequence) of which `leased` is true."""
    asked = {
        "now": at,
        "launchers": sorted({launcher for launcher, _, _ in numbers}),
        "epochs": sorted({epoch for _, epoch, _ in numbers}),
    }
    standing = [tuple(row) for row in c.execute(_STANDING, asked)]
    return {
        (launcher, epoch, number)
        for launcher, epoch, number in numbers
        if any(
            (launcher, epoch) == (by, within) and first <= number < first + count for by, within, first, count in standing
        )
    }


def leased(c: sa.Connection, *, launcher: bytes, epoch: int, sequence: int, at: Instant) -> bool:
    """Whether a standing lease of a standing launcher covers this number in an epoch that is accepted at `at`."""
    return bool(_LEASED.all(c, {"by": launcher, "in": epoch, "number": sequence, "now": at})[0].leases)
