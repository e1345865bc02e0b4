"""The life of a key: pre-active, active, retiring, retired, destroyed (NIST SP 800-57 part 1, 7), with the moment of each.

    PRE_ACTIVE --activate--> ACTIVE --(another is activated)--> RETIRING --retire--> RETIRED --destroy--> DESTROYED
        |                                                                                      ^
        +------------------------------------ destroy (never used) ----------------------------+

Of each role exactly one key is active, once one was activated. An active key does everything; a retiring one only what was
begun under it (opens what it sealed, stands above certificates it signed) until `retire_after`; a retired one nothing.
There is no way back.

Pure: time is an argument, rows come from and go to storage.hsm_store. Whether a quorum approved a destruction is
`approvals`' to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

from moorline.clock import Instant
from moorline.errors import Conflict, Refused
from moorline.storage.hsm_store import KeyRow


class State(StrEnum):
    """Of a key."""

    PRE_ACTIVE = "pre-active"
    ACTIVE = "active"
    RETIRING = "retiring"
    RETIRED = "retired"
    DESTROYED = "destroyed"


class Use(StrEnum):
    """What a key may be wanted for: something new, or what was begun under it."""

    NEW = "new"
    BEGUN = "begun"


_ALLOWED: Final = {State.ACTIVE: {Use.NEW, Use.BEGUN}, State.RETIRING: {Use.BEGUN}}


def may(row: KeyRow, use: Use) -> bool:
    """Whether a key in this state may be used so."""
    return use in _ALLOWED.get(State(row.state), frozenset())


def adopted(role: str, label: str, now: Instant, certificate: bytes | None = None) -> KeyRow:
    """A key that was there before states were kept: active."""
    return KeyRow(label=label, role=role, state=State.ACTIVE, created=now, active=now, certificate=certificate)


def next_label(rows: Sequence[KeyRow], role: str) -> str:
    """The name of the next key of a role; no name is used twice, also not a destroyed one's."""
    numbers = [int(row.label.partition("@")[2] or 1) for row in rows if row.role == role]
    return f"{role}@{max(numbers, default=1) + 1}"


def begun(rows: Sequence[KeyRow], role: str, now: Instant) -> KeyRow:
    """A new pre-active key. Raises Conflict("key.rotation_under_way") while another one waits."""
    waiting = [row.label for row in rows if row.role == role and row.state == State.PRE_ACTIVE]
    if waiting:
        raise Conflict(
            "key.rotation_under_way",
            "a key of this role waits for its activation",
            got=", ".join(waiting),
            remedy=f"moor hsm key activate {waiting[0]}, or have it destroyed",
        )
    return KeyRow(label=next_label(rows, role), role=role, state=State.PRE_ACTIVE, created=now)


def activated(
    rows: Sequence[KeyRow], label: str, now: Instant, *, overlap_s: int, certificate: bytes | None = None
) -> tuple[KeyRow, ...]:
    """The rows that change when a pre-active key becomes active; what was active begins to retire."""
    row = _of(rows, label)
    _require(row, State.PRE_ACTIVE)
    before = [each for each in rows if each.role == row.role and each.state == State.ACTIVE]
    ends = tuple(replace(each, state=State.RETIRING, retiring=now, retire_after=now + overlap_s) for each in before)
    return (*ends, replace(row, state=State.ACTIVE, active=now, certificate=certificate))


def retired(rows: Sequence[KeyRow], label: str, now: Instant) -> KeyRow:
    """A retiring key whose overlap is over. Raises Refused("key.overlap")."""
    row = _of(rows, label)
    _require(row, State.RETIRING)
    if row.retire_after is not None and now < row.retire_after:
        raise Refused(
            "key.overlap",
            "what was begun under this key can still be in use",
            expected=f">= {row.retire_after}",
            got=now,
            remedy="wait for the end of the overlap",
        )
    return replace(row, state=State.RETIRED, retired=now)


def destroyed(rows: Sequence[KeyRow], label: str, now: Instant) -> KeyRow:
    """A retired key, or one that never was active, is gone."""
    row = _of(rows, label)
    _require(row, State.RETIRED, State.PRE_ACTIVE)
    return replace(row, state=State.DESTROYED, destroyed=now)


def usable(rows: Sequence[KeyRow], role: str, use: Use) -> tuple[str, ...]:
    """Labels of a role for a use, the active one first."""
    found = [row for row in rows if row.role == role and may(row, use)]
    return tuple(row.label for row in sorted(found, key=lambda row: (row.state != State.ACTIVE, -(row.active or 0))))


def _of(rows: Sequence[KeyRow], label: str) -> KeyRow:
    for row in rows:
        if row.label == label:
            return row
    raise Refused("key.unknown", "no key of this name is kept account of", got=label, remedy="moor hsm key list")


def _require(row: KeyRow, *states: State) -> None:
    if row.state not in states:
        raise Conflict(
            "key.state",
            "the key is not in a state for this",
            expected=", ".join(states),
            got=row.state,
            remedy="moor hsm key list shows the states",
        )
