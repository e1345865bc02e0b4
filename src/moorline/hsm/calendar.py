"""When keys are due, and what is to be done about it now. Pure: rows and time are arguments, nothing is done here.

| role | when it is due | later |
|---|---|---|
| `wrapping` | begun, which makes it the active one at once | what is sealed is sealed again, then the old one retires |
| `verifier` | begun `announce_s` before, so that relying parties learn of it; then activated | retires |
| `issuing-ca`, `hsm-identity`, `hsm-kem` | begun; the provider's offline key and the ledger come next | retires |

A retiring key retires when its overlap is over. Nothing is ever destroyed by calendar: that takes a quorum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.clock import Instant
from moorline.errors import Misconfigured
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA, KEM, VERIFIER, WRAPPING
from moorline.hsm.lifecycle import State
from moorline.storage.hsm_store import KeyRow

_LEAST_S: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Ages at which keys are replaced, seconds; a role that is left out is replaced by command only."""

    wrapping_s: int | None = None
    """Age at which a wrapping key is replaced."""
    verifier_s: int | None = None
    """Age at which the key that signs attestation results is replaced."""
    issuing_ca_s: int | None = None
    """Age at which a new issuing CA's key is made, for the provider to certify."""
    hsm_identity_s: int | None = None
    """Age at which a new HSM identity is made, for the provider to certify."""
    hsm_kem_s: int | None = None
    """Age at which a new KEM key is made, for the provider to register."""
    announce_s: int = 86_400
    """How long a verifier key is announced before it signs; relying parties fetch it meanwhile."""
    pair_s: int | None = None
    """Age at which a pair key with another HSM is replaced."""
    pair_keys: int | None = None
    """Keys for devices derived from one pair key before it is replaced."""
    every_s: int = 60
    """Seconds between two looks at the calendar."""

    def age_of(self, role: str) -> int | None:
        """The age of a role's keys; None: by command only."""
        found = {
            WRAPPING: self.wrapping_s,
            VERIFIER: self.verifier_s,
            ISSUING_CA: self.issuing_ca_s,
            HSM_IDENTITY: self.hsm_identity_s,
            KEM: self.hsm_kem_s,
        }
        return found.get(role)

    def require_sane(self) -> None:
        """Raises Misconfigured("rotation.settings")."""
        ages = {name: getattr(self, name) for name in self.__dataclass_fields__}
        wrong = [name for name, age in ages.items() if age is not None and age < _LEAST_S]
        if wrong:
            raise Misconfigured("rotation.settings", "an age is a positive number", got=", ".join(wrong))
        if self.verifier_s is not None and self.verifier_s <= self.announce_s:
            raise Misconfigured(
                "rotation.settings",
                "a verifier key would be due before it was announced",
                expected=f"verifier_s > announce_s ({self.announce_s})",
                got=self.verifier_s,
            )


class Deed(StrEnum):
    """What is to be done with a key, or with a role's next one."""

    BEGIN = "begin"
    ACTIVATE = "activate"
    REWRAP = "rewrap"
    RETIRE = "retire"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something that is due. `label` is empty where a role's next key is begun."""

    deed: Deed
    role: str
    label: str = ""


def due_at(row: KeyRow, policy: Rotation | None) -> Instant | None:
    """When an active key is due; None: by command only, or the key is not the active one."""
    age = None if policy is None else policy.age_of(row.role)
    if age is None or row.state != State.ACTIVE or row.active is None:
        return None
    return Instant(row.active + age)


def waits_for_the_provider(row: KeyRow) -> bool:
    """Whether a begun key cannot go on without the provider: certify it, register it, activate it."""
    return row.state == State.PRE_ACTIVE and row.role in (ISSUING_CA, HSM_IDENTITY, KEM)


def entries(rows: Sequence[KeyRow], policy: Rotation, now: Instant) -> tuple[Entry, ...]:
    """What is due now, in the order in which it is to be done. Doing it and asking again gives what is due next."""
    roles = tuple(dict.fromkeys(row.role for row in rows))
    return tuple(entry for role in roles for entry in _of_role([row for row in rows if row.role == role], policy, now))


def _of_role(rows: Sequence[KeyRow], policy: Rotation, now: Instant) -> Iterator[Entry]:
    for row in rows:
        if row.state == State.PRE_ACTIVE:
            yield from _begun(row, policy, now)
        elif row.state == State.RETIRING:
            yield from _retiring(row, now)
        elif row.state == State.ACTIVE and not any(one.state == State.PRE_ACTIVE for one in rows):
            due, ahead = due_at(row, policy), policy.announce_s if row.role == VERIFIER else 0
            if due is not None and now >= due - ahead:
                yield Entry(deed=Deed.BEGIN, role=row.role)


def _begun(row: KeyRow, policy: Rotation, now: Instant) -> Iterator[Entry]:
    if policy.age_of(row.role) is None:
        return  # begun by command, and a person's to go on with
    if row.role == WRAPPING:
        yield Entry(deed=Deed.BEGIN, role=row.role)  # one that died before it was activated goes on
    elif row.role == VERIFIER and now >= row.created + policy.announce_s:
        yield Entry(deed=Deed.ACTIVATE, role=row.role, label=row.label)


def _retiring(row: KeyRow, now: Instant) -> Iterator[Entry]:
    if row.role == WRAPPING:
        yield Entry(deed=Deed.REWRAP, role=row.role, label=row.label)
    if row.retire_after is not None and now >= row.retire_after:
        yield Entry(deed=Deed.RETIRE, role=row.role, label=row.label)
