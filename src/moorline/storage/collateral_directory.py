"""A folder of files as a collateral store, for machines that are offline and for people who want to look inside.

    <folder>/collateral.cbor      what is held, and the mark of every name there ever was; replaced as a whole
    <folder>/<kind>/<name>-<digest>.<ext>   one file an item, in the form its vendor gave it

A file is written before the index that names it, under a name of its own, and the one it replaces is removed after, so a
process that dies leaves the old state or the new one, and at most a file that nobody names. Writers take a lock on the
folder; readers take none, and look again where a writer was faster. Needs nothing beyond the standard library and CBOR.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from moorline.clock import Instant
from moorline.errors import Misconfigured
from moorline.storage import whole_files
from moorline.storage.collateral_store import (
    CollateralStore,
    ItemRecord,
    Put,
    StoredItem,
    hint_of,
    item_of,
    number_bytes,
    number_of,
    record_of,
)
from moorline.verification.collateral import ItemName, Mark, advance
from moorline.wire import schema
from moorline.wire.schema import Bytes32

INDEX: Final = "collateral.cbor"
_LOCK: Final = ".lock"
_EXTENSIONS: Final = {"cert-der": ".der", "chain-pem": ".pem", "crl-der": ".crl", "pcs-response-json": ".json"}
_MAX_INDEX: Final = 64 << 20
_READS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkRecord:
    """A mark as it is kept."""

    issued: int
    evaluation: int | None
    number: Annotated[bytes, schema.Size(at_most=21)] | None
    content: Bytes32 | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What stands in collateral.cbor."""

    version: int
    items: dict[str, ItemRecord]
    marks: dict[str, MarkRecord]


def is_store(path: Path) -> bool:
    """True if the folder holds a store, not just files."""
    return (path / INDEX).is_file()


class DirectoryStore(CollateralStore):
    """The store in a folder. Opening writes nothing; the folder is made with the first item."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> tuple[ItemName, ...]:
        """As the port says."""
        return tuple(sorted(ItemName.parse(name) for name in self._index().items))

    def get(self, name: ItemName) -> StoredItem | None:
        """As the port says. A file that is gone is an item that is not held."""
        for _ in range(_READS):
            record = self._index().items.get(str(name))
            found = None if record is None else self._read(name, record)
            if found is not None or record is None:
                return found
        return None

    def items(self) -> tuple[StoredItem, ...]:
        """As the port says, reading the index once."""
        records = sorted(
            ((ItemName.parse(name), record) for name, record in self._index().items.items()), key=lambda pair: pair[0]
        )
        return tuple(item for name, record in records if (item := self._read(name, record)) is not None)

    def mark(self, name: ItemName) -> Mark | None:
        """As the port says."""
        record = self._index().marks.get(str(name))
        return None if record is None else _mark(record)

    def put(self, item: StoredItem) -> Put:
        """As the port says."""
        with self._locked():
            index = self._index()
            text = str(item.name)
            held = index.marks.get(text)
            mark = advance(None if held is None else _mark(held), item.judged)
            digest = hashlib.sha256(item.data).digest()
            record = record_of(item, digest)
            before = index.items.get(text)
            whole_files.replace(self._file(item.name, digest), item.data)
            marks = {**index.marks, text: _mark_record(mark)}
            self._write(Index(version=1, items={**index.items, text: record}, marks=marks))
            self._remove_others(item.name, digest)
        return Put.UNCHANGED if before is not None and before.digest == record.digest else Put.STORED

    def drop(self, name: ItemName) -> None:
        """As the port says."""
        with self._locked():
            index = self._index()
            self._write(
                Index(
                    version=1,
                    items={text: record for text, record in index.items.items() if text != str(name)},
                    marks=index.marks,
                )
            )
            self._remove_others(name, None)

    def _read(self, name: ItemName, record: ItemRecord) -> StoredItem | None:
        try:
            data = self._file(name, record.digest).read_bytes()
        except FileNotFoundError:
            return None
        return item_of(record, data, hashlib.sha256(data).digest())

    def _file(self, name: ItemName, digest: bytes) -> Path:
        folder, stem, extension = self._place(name)
        return folder / f"{stem}-{digest.hex()[:16]}{extension}"

    def _remove_others(self, name: ItemName, digest: bytes | None) -> None:
        """Every file of `name` but the one with `digest`: what a replaced item and writers that died left behind."""
        folder, stem, extension = self._place(name)
        kept = None if digest is None else self._file(name, digest)
        for file in folder.glob(f"{stem}-{'?' * 16}{extension}"):
            if file != kept:
                file.unlink(missing_ok=True)

    def _place(self, name: ItemName) -> tuple[Path, str, str]:
        kind, _, rest = str(name).partition("/")
        return self._path / kind, rest.replace("/", "_"), _EXTENSIONS[hint_of(name.kind)]

    def _index(self) -> Index:
        try:
            data = (self._path / INDEX).read_bytes()
        except FileNotFoundError:
            return Index(version=1, items={}, marks={})
        index = schema.decode(Index, data, max_bytes=_MAX_INDEX)
        if index.version != 1:
            raise Misconfigured(
                "collateral.newer_store", "the store was made by a newer version", expected=1, got=index.version
            )
        return index

    def _write(self, index: Index) -> None:
        whole_files.replace(self._path / INDEX, schema.encode(index))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(self._path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _mark(record: MarkRecord) -> Mark:
    return Mark(
        issued=Instant(record.issued),
        evaluation=record.evaluation,
        number=number_of(record.number),
        content=record.content,
    )


def _mark_record(mark: Mark) -> MarkRecord:
    return MarkRecord(issued=mark.issued, evaluation=mark.evaluation, number=number_bytes(mark.number), content=mark.content)
