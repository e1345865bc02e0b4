"""A state under change: what a rule reads and writes while one transaction is applied, and what comes of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from moorline.clock import Instant
from moorline.errors import Conflict
from moorline.ledger import records
from moorline.ledger.parameters import PARAMETERS
from moorline.ledger.records import AuthorityRecord, IndexRecord, ParameterRecord
from moorline.ledger.verified import Verified

R = TypeVar("R")


class View(Protocol):
    """Anything that can be asked what a key holds."""

    def get(self, key: str) -> bytes | None:
        """The value under `key`, or None."""
        ...

    def nonce_used(self, nonce_id: bytes) -> bool:
        """True if a transaction with this nonce id was applied."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockContext:
    """The block a transaction is to stand in; `authorities` is the set in force before it, counted against."""

    height: int
    time_ms: int
    authorities: tuple[str, ...]

    @property
    def at(self) -> Instant:
        """Block time in whole seconds."""
        return Instant(self.time_ms // 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, e.g. `provider_admitted` of `provider/alpha`."""

    kind: str
    subject: str


@dataclass(slots=True, kw_only=True)
class Draft:
    """Writes over a view, kept only if the whole transaction passes."""

    view: View
    ledger_id: bytes
    block: BlockContext
    verified: Verified | None = None
    writes: dict[str, bytes] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def get(self, key: str) -> bytes | None:
        """The value under `key` as this draft has it."""
        return self.writes[key] if key in self.writes else self.view.get(key)

    def nonce_used(self, nonce_id: bytes) -> bool:
        """As the view below."""
        return self.view.nonce_used(nonce_id)

    def read(self, kind: type[R], key: str) -> R | None:
        """The record under `key`, or None."""
        value = self.get(key)
        return None if value is None else records.parse(kind, value)

    def write(self, key: str, record: object) -> None:
        """Put a record."""
        self.writes[key] = records.encode(record)

    def tell(self, kind: str, subject: str) -> None:
        """Report an event."""
        self.events.append(Event(kind=kind, subject=subject))

    def parameter(self, name: str) -> int | None:
        """A parameter's value."""
        value = self.get(records.parameter_key(name))
        return None if value is None else records.parse(ParameterRecord, value).value

    def limit(self, name: str) -> int:
        """A parameter of `ledger.parameters`, as it was set or as it is at the start."""
        found = self.parameter(name)
        return PARAMETERS[name].initial if found is None else found

    def claim_key(self, registrant: str, spki: bytes, holder: str, *, kept: tuple[bytes, ...] = ()) -> None:
        """Let a public key belong to the record `holder` for good; `kept` are those it may name again.

        A key that was given up never signs again, under whatever name: raises Conflict("ledger.key_taken").
        """
        key = records.used_key_index_key(registrant, hashlib.sha256(spki).hexdigest())
        if spki in kept:
            return
        if self.get(key) is not None:
            raise Conflict(
                "ledger.key_taken",
                "this key is, or was, in use",
                expected="a key never registered before",
                got=key,
                remedy="make a new key",
            )
        self.write(key, IndexRecord(holders=(holder,)))

    def authority_names(self) -> tuple[str, ...]:
        """The authorities in force as of this draft."""
        index = self.read(IndexRecord, records.AUTHORITIES_INDEX)
        return () if index is None else index.holders

    def authority_certificates(self) -> tuple[bytes, ...]:
        """CA certificates of the authorities in force, DER."""
        found = (self.read(AuthorityRecord, records.authority_key(name)) for name in self.authority_names())
        return tuple(record.certificate for record in found if record is not None)

    def scratch(self) -> Draft:
        """A draft over this one, for trying something out."""
        return Draft(view=self, ledger_id=self.ledger_id, block=self.block)
