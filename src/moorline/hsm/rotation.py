"""Rotation of the wrapping key: what seals goes to the new key at once, what was sealed is sealed again in the background.

`RotatingToken` stands before the real token and is used exactly as one. For the role `wrapping` it seals under the active
key and unseals under the active or a retiring one; everything else passes through. Several brokers learn of a rotation from
the database, at most REFRESH_S later; what one of them still seals under the old key meanwhile is found by the next pass.

`rewrap` walks all rows that hold something sealed. A row is changed only if it still holds what was read (compare and set),
so it can be killed anywhere, run twice, and run beside a working broker. The old key may retire when a pass found nothing
under it and nobody can be sealing under it any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from moorline.clock import Instant
from moorline.digest import tagged
from moorline.errors import Misconfigured, NotAuthentic
from moorline.hsm import lifecycle
from moorline.hsm.issuers import HeldCa
from moorline.hsm.keys import WRAPPING
from moorline.hsm.launch_keys import epoch_place, storage_place
from moorline.hsm.lifecycle import Use
from moorline.hsm.pool import entry_place
from moorline.hsm.token import KeyFacts, Token
from moorline.storage.hsm_store import HsmStore, KeyRow
from moorline.storage.sealed_rows import SealedRow, SealedRows
from moorline.storage.steps import reached

REFRESH_S: Final = 30.0
OVERLAP_S: Final = 120
"""A wrapping key retires at the earliest this long after its successor became active: longer than REFRESH_S."""


class RotatingToken:
    """A token (port.Token) whose wrapping key has generations."""

    def __init__(self, inner: Token, store: HsmStore) -> None:
        self.inner = inner
        self._store = store
        self._turn = threading.Lock()
        self._labels: tuple[str, ...] = ()
        self._read_at = -REFRESH_S
        self.refresh()

    def refresh(self) -> None:
        """Read from the database which keys are in use."""
        with self._turn:
            found = lifecycle.usable(self._store.key_rows(WRAPPING), WRAPPING, Use.BEGUN)
            self._labels = found or (WRAPPING,)
            self._read_at = time.monotonic()

    def labels(self) -> tuple[str, ...]:
        """Wrapping keys that may be under something, the active one first."""
        if time.monotonic() - self._read_at >= REFRESH_S:
            self.refresh()
        return self._labels

    def seal(self, label: str, plaintext: bytes, bound_to: bytes) -> bytes:
        """As the port says; under the active key of the role."""
        return self.inner.seal(self.labels()[0] if label == WRAPPING else label, plaintext, bound_to)

    def unseal(self, label: str, sealed: bytes, bound_to: bytes) -> bytes:
        """As the port says; under the active key of the role or a retiring one."""
        if label != WRAPPING:
            return self.inner.unseal(label, sealed, bound_to)
        try:
            return self._unsealed(sealed, bound_to)
        except NotAuthentic:
            self.refresh()  # another broker may have rotated meanwhile
            return self._unsealed(sealed, bound_to)

    def _unsealed(self, sealed: bytes, bound_to: bytes) -> bytes:
        refused: NotAuthentic | None = None
        for label in self.labels():
            try:
                return self.inner.unseal(label, sealed, bound_to)
            except NotAuthentic as error:
                refused = error
        assert refused is not None
        raise refused

    # -- everything else passes through ---------------------------------------------------------------------------------

    def random(self, size: int) -> bytes:
        """As the port says."""
        return self.inner.random(size)

    def generate_ec_key(self, label: str, *, derive: bool = False, recoverable: bool = False) -> bytes:
        """As the port says."""
        return self.inner.generate_ec_key(label, derive=derive, recoverable=recoverable)

    def ec_point(self, label: str) -> bytes:
        """As the port says."""
        return self.inner.ec_point(label)

    def ecdsa(self, label: str, digest: bytes) -> bytes:
        """As the port says."""
        return self.inner.ecdsa(label, digest)

    def agree(self, label: str, peer_point: bytes, into: str) -> None:
        """As the port says."""
        self.inner.agree(label, peer_point, into)

    def generate_wrapping_key(self, label: str, *, recoverable: bool = False) -> None:
        """As the port says."""
        self.inner.generate_wrapping_key(label, recoverable=recoverable)

    def import_mac_key(self, label: str, value: bytes) -> None:
        """As the port says."""
        self.inner.import_mac_key(label, value)

    def mac(self, label: str, message: bytes) -> bytes:
        """As the port says."""
        return self.inner.mac(label, message)

    def has_secret(self, label: str) -> bool:
        """As the port says."""
        return self.inner.has_secret(label)

    def has_key(self, label: str) -> bool:
        """As the port says."""
        return self.inner.has_key(label)

    def destroy_secret(self, label: str) -> None:
        """As the port says."""
        self.inner.destroy_secret(label)

    def destroy_key(self, label: str) -> None:
        """As the port says."""
        self.inner.destroy_key(label)

    def inspect(self) -> tuple[KeyFacts, ...]:
        """As the port says."""
        return self.inner.inspect()

    def counter(self, label: str) -> int:
        """As the port says."""
        return self.inner.counter(label)

    def advance(self, label: str) -> int:
        """As the port says."""
        return self.inner.advance(label)

    def close(self) -> None:
        """As the port says."""
        self.inner.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One walk over all rows: how many were sealed again, were so already, changed under us, or open under no key."""

    sealed_again: int = 0
    already: int = 0
    changed: int = 0
    unreadable: int = 0

    @property
    def complete(self) -> bool:
        """Whether nothing was found under another key than the active one."""
        return not (self.sealed_again or self.changed or self.unreadable)


def rewrap(token: RotatingToken, rows: SealedRows, *, provider: str) -> Pass:
    """Seal everything under the active wrapping key. Safe to kill, to repeat, and to run beside a working broker."""
    token.refresh()
    active, *older = token.labels()
    counts = dict.fromkeys(("sealed_again", "already", "changed", "unreadable"), 0)
    for row in _all(rows):
        place = _place(row, provider)
        counts[_one(token.inner, rows, row, place, active, older)] += 1
    return Pass(**counts)


def _all(rows: SealedRows) -> Iterator[SealedRow]:
    for table in rows.tables:
        after: tuple[object, ...] | None = None
        while batch := rows.batch(table, after):
            yield from batch
            after = batch[-1].key


def _one(token: Token, rows: SealedRows, row: SealedRow, place: bytes, active: str, older: list[str]) -> str:
    for label in (active, *older):
        try:
            plain = token.unseal(label, row.sealed, place)
        except NotAuthentic:
            continue
        if label == active:
            return "already"
        done = rows.replace(row, token.seal(active, plain, place))
        reached("hsm.rewrap.row")
        return "sealed_again" if done else "changed"
    return "unreadable"


_PLACES: Final[dict[str, Callable[[SealedRow, str], bytes]]] = {
    "pool": lambda row, _: entry_place(row.text("service"), row.text("profile"), row.bytes("public")),
    "launches": lambda row, _: entry_place(row.text("service"), row.text("profile"), row.bytes("public")),
    "epochs": lambda row, _: epoch_place(row.number("epoch")),
    "storage_keys": lambda row, provider: storage_place(
        provider, row.text("tenant"), row.text("service"), row.text("instance"), row.number("generation")
    ),
    "enrolment_code_secrets": lambda row, _: tagged("enrolment-code-secret", row.text("device").encode("ascii")),
}


def _place(row: SealedRow, provider: str) -> bytes:
    """What a row's content is bound to, as the room that sealed it says."""
    found = _PLACES.get(row.table)
    if found is None:
        raise Misconfigured("key.unknown_table", "nobody knows what rows of this table are bound to", got=row.table)
    return found(row, provider)


def require_done(done: Pass, label: str, now: Instant) -> None:
    """Raises NotAuthentic("key.still_in_use") unless a pass found nothing that needs an older key."""
    if not done.complete:
        raise NotAuthentic(
            "key.still_in_use",
            "something is still sealed under an older key, or under none that is known",
            expected=label,
            got=f"{done.sealed_again} sealed again, {done.changed} changed meanwhile, {done.unreadable} unreadable at {now}",
            remedy="run moor hsm key rewrap again; unreadable rows are named in no backup and stay unreadable",
        )


def in_force(rows: Sequence[KeyRow], role: str, certificate: x509.Certificate) -> HeldCa:
    """A role's active key and its certificate: what is recorded, or that of the settings where none was rotated yet."""
    for row in rows:
        if row.role == role and row.state == lifecycle.State.ACTIVE and row.certificate is not None:
            return held(row.label, row.certificate)
    return HeldCa(label=role, certificate=certificate)


def retiring(rows: Sequence[KeyRow], role: str) -> tuple[HeldCa, ...]:
    """A role's retiring keys with their certificates, the latest first."""
    found = [row for row in rows if row.role == role and row.state == lifecycle.State.RETIRING]
    found.sort(key=lambda row: -(row.active or 0))
    return tuple(held(row.label, row.certificate) for row in found if row.certificate is not None)


def held(label: str, certificate: bytes) -> HeldCa:
    """A key by its label, with its certificate (DER)."""
    return HeldCa(label=label, certificate=x509.load_der_x509_certificate(certificate))
