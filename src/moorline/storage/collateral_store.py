"""Where collateral is kept: one port, a folder of files or a database behind it, and one rule that no adapter can pass by.

Every item is judged (`verification.collateral_judging`) before it comes here; `put` compares it with the mark of its name
and moves both in one step, so that two processes that store at once cannot lead one name back. What stands in a store is not
believed for standing there: whoever appraises evidence verifies it again. A store only protects against old items that come
from outside; whoever may write to its files can empty it.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from moorline.clock import Instant, Validity
from moorline.errors import Malformed, Misconfigured
from moorline.rats import EvidenceRoot
from moorline.verification.collateral import ItemKind, ItemName, Judged, Mark, Need
from moorline.wire import schema
from moorline.wire.schema import Bytes32

_HINTS: Final = {
    ItemKind.SNP_VCEK: "cert-der",
    ItemKind.SNP_CHAIN: "chain-pem",
    ItemKind.SNP_CRL: "crl-der",
    ItemKind.INTEL_ROOT_CRL: "crl-der",
}
_DATABASES: Final = frozenset({".sqlite", ".db"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredItem:
    """An item with what was found when it was judged, where it came from, and when."""

    judged: Judged
    source: str
    fetched: Instant
    data: bytes

    @property
    def name(self) -> ItemName:
        """The item's name."""
        return self.judged.name


@dataclass(frozen=True, slots=True, kw_only=True)
class EndorsementFile:
    """An item as a file for appraisal: `hint` is its kind in the words of the case schema."""

    name: str
    hint: str
    data: bytes
    item: ItemName


class Put(StrEnum):
    """What became of an item that was not refused."""

    STORED = "stored"
    UNCHANGED = "unchanged"


class CollateralStore(abc.ABC):
    """The port. Adapters: `collateral_directory.DirectoryStore`, `collateral_sqlite.SqliteStore`."""

    @abc.abstractmethod
    def names(self) -> tuple[ItemName, ...]:
        """The names of all items held, sorted."""

    @abc.abstractmethod
    def get(self, name: ItemName) -> StoredItem | None:
        """The item, None if there is none. Raises Malformed("collateral.store_damaged") for one that was changed since."""

    @abc.abstractmethod
    def put(self, item: StoredItem) -> Put:
        """Hold `item` from now on. Raises Refused (`collateral.rollback`, `collateral.contradiction`), changing nothing."""

    @abc.abstractmethod
    def mark(self, name: ItemName) -> Mark | None:
        """How far `name` has come; None if it was never held."""

    @abc.abstractmethod
    def drop(self, name: ItemName) -> None:
        """Hold the item no longer; its mark stays."""

    def items(self) -> tuple[StoredItem, ...]:
        """Every item, by name."""
        return tuple(item for name in self.names() if (item := self.get(name)) is not None)

    def endorsements(self, needs: Iterable[Need]) -> tuple[EndorsementFile, ...]:
        """For each need the first of its items that is held. Not verified here, and perhaps out of date."""
        held = set(self.names())
        found: list[EndorsementFile] = []
        for need in needs:
            for name in need.items:
                item = self.get(name) if name in held else None
                if item is not None:
                    found.append(EndorsementFile(name=str(name), hint=hint_of(name.kind), data=item.data, item=name))
                    break
        return tuple(found)


def hint_of(kind: ItemKind) -> str:
    """The kind of file an item is."""
    return _HINTS.get(kind, "pcs-response-json")


def open_collateral(path: Path, *, create: bool) -> CollateralStore:
    """The store at `path`: a database if it ends in `.sqlite` or `.db`, otherwise a folder.

    Raises Misconfigured("collateral.no_store") if there is none and `create` is false.
    """
    if path.suffix in _DATABASES:
        if not create and not path.is_file():
            raise _no_store(path)
        from moorline.storage.collateral_sqlite import SqliteStore

        return SqliteStore(f"sqlite:///{path.absolute()}")
    from moorline.storage.collateral_directory import DirectoryStore, is_store

    if not create and not is_store(path):
        raise _no_store(path)
    return DirectoryStore(path)


def _no_store(path: Path) -> Misconfigured:
    return Misconfigured(
        "collateral.no_store",
        "there is no collateral store here",
        got=path,
        remedy="moor collateral fetch, or moor collateral import, makes one",
    )


# ---------------------------------------------------------------- records, the same in every adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecord:
    """All of a stored item but its bytes, as CBOR. `digest` is that of the bytes."""

    name: str
    issued: int
    not_before: int
    not_after: int
    evaluation: int | None
    number: Annotated[bytes, schema.Size(at_most=21)] | None
    content: Bytes32 | None
    root: EvidenceRoot
    endorses: str
    source: str
    fetched: int
    digest: Bytes32


def record_of(item: StoredItem, digest: bytes) -> ItemRecord:
    """The record of an item."""
    judged = item.judged
    return ItemRecord(
        name=str(judged.name),
        issued=judged.issued,
        not_before=judged.validity.not_before,
        not_after=judged.validity.not_after,
        evaluation=judged.evaluation,
        number=number_bytes(judged.number),
        content=judged.content,
        root=judged.root,
        endorses=judged.endorses,
        source=item.source,
        fetched=item.fetched,
        digest=digest,
    )


def item_of(record: ItemRecord, data: bytes, digest: bytes) -> StoredItem:
    """The item a record and its bytes make. Raises Malformed("collateral.store_damaged") if they do not belong together."""
    if digest != record.digest:
        raise Malformed(
            "collateral.store_damaged",
            "an item in the store is not the one that was stored",
            expected=record.digest,
            got=record.name,
            remedy="fetch or import it again",
        )
    judged = Judged(
        name=ItemName.parse(record.name),
        issued=Instant(record.issued),
        validity=Validity(not_before=Instant(record.not_before), not_after=Instant(record.not_after)),
        evaluation=record.evaluation,
        number=number_of(record.number),
        content=record.content,
        root=record.root,
        endorses=record.endorses,
    )
    return StoredItem(judged=judged, source=record.source, fetched=Instant(record.fetched), data=data)


def number_bytes(number: int | None) -> bytes | None:
    """A CRL number as bytes: it can be larger than any integer of CBOR or SQL."""
    return None if number is None else number.to_bytes((number.bit_length() + 7) // 8, "big")


def number_of(data: bytes | None) -> int | None:
    """The number `number_bytes` made this of."""
    return None if data is None else int.from_bytes(data, "big")
