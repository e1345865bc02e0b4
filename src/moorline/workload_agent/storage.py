"""Sealed storage: the host keeps the bytes, sees sizes and times, and can neither read nor quietly change them.

Each record is AES-256-GCM under a key derived from the storage key that the broker releases to this function alone; its name
and version are authenticated with it, and its file name is a MAC of both. An index, sealed the same way, lists the version
and digest of every record; the index in memory is what counts while the function runs, so a record that the host puts back,
swaps or removes is noticed at the next read. What is NOT established: that the index found at the start is the latest one (a
host can put back the whole directory between two runs; PROTOCOLS.md 9 gives each stateful relaunch its digest), and that the
host keeps anything at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from moorline.digest import same, tagged, tagged_mac
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.wire import schema
from moorline.wire.schema import Bytes32

MAX_RECORD_BYTES: Final = 1 << 20
MAX_NAME_BYTES: Final = 256
MAX_RECORDS: Final = 4096
_INDEX: Final = "index"
_UNFINISHED: Final = ".new"
_NONCE: Final = 12
_INDEX_CAP: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    version: int
    digest: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    version: int
    entries: dict[str, _Entry]


class SealedStorage:
    """Named records, at most 4096 of 1 MiB each. Not for several threads: one event loop owns it."""

    def __init__(self, directory: Path, key: bytes) -> None:
        """Open or begin. Raises NotAuthentic("workload.storage_not_authentic") if what lies there is not ours."""
        self._directory = directory
        self._aead = AESGCM(_derived(key, b"seal"))
        self._naming = _derived(key, b"name")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._index = self._opened_index()

    def names(self) -> tuple[str, ...]:
        """The names of all records, sorted."""
        return tuple(sorted(self._index.entries))

    def put(self, name: str, data: bytes) -> None:
        """Store or replace a record. Raises Refused("workload.storage_full") or Malformed("workload.storage_name")."""
        _name(name)
        if len(data) > MAX_RECORD_BYTES or (len(self._index.entries) >= MAX_RECORDS and name not in self._index.entries):
            raise Refused(
                "workload.storage_full", "the record does not fit", expected=f"{MAX_RECORDS} of {MAX_RECORD_BYTES} bytes"
            )
        before = self._index.entries.get(name)
        version = self._index.version + 1
        sealed = self._seal(data, b"record", name.encode(), version)
        self._write(self._file(name, version), sealed)
        entry = _Entry(version=version, digest=hashlib.sha256(sealed).digest())
        self._advance(version, {**self._index.entries, name: entry})
        if before is not None:
            self._remove(self._file(name, before.version))

    def get(self, name: str) -> bytes:
        """A record as it was last put.

        Raises Refused("workload.storage_record_unknown"), NotAuthentic("workload.storage_not_authentic").
        """
        _name(name)
        entry = self._index.entries.get(name)
        if entry is None:
            raise Refused("workload.storage_record_unknown", "there is no record of this name")
        sealed = self._read(self._file(name, entry.version), MAX_RECORD_BYTES + 64)
        if sealed is None or not same(hashlib.sha256(sealed).digest(), entry.digest):
            raise _not_authentic("a record")
        return self._open(sealed, b"record", name.encode(), entry.version)

    def delete(self, name: str) -> None:
        """Forget a record. Raises Refused("workload.storage_record_unknown")."""
        _name(name)
        entry = self._index.entries.get(name)
        if entry is None:
            raise Refused("workload.storage_record_unknown", "there is no record of this name")
        rest = {other: kept for other, kept in self._index.entries.items() if other != name}
        self._advance(self._index.version + 1, rest)
        self._remove(self._file(name, entry.version))

    def _advance(self, version: int, entries: dict[str, _Entry]) -> None:
        index = _Index(version=version, entries=entries)
        self._write(_INDEX, self._seal(schema.encode(index), b"index", b"", 0))
        self._index = index

    def _opened_index(self) -> _Index:
        sealed = self._read(_INDEX, _INDEX_CAP)
        if sealed is None:
            if any(not left.name.endswith(_UNFINISHED) for left in self._directory.iterdir()):
                raise _not_authentic("the index is missing, records are not; the storage")
            begun = _Index(version=0, entries={})
            self._write(_INDEX, self._seal(schema.encode(begun), b"index", b"", 0))
            return begun
        return schema.decode(_Index, self._open(sealed, b"index", b"", 0), max_bytes=_INDEX_CAP)

    def _seal(self, data: bytes, kind: bytes, name: bytes, version: int) -> bytes:
        nonce = secrets.token_bytes(_NONCE)
        return nonce + self._aead.encrypt(nonce, data, _bound(kind, name, version))

    def _open(self, sealed: bytes, kind: bytes, name: bytes, version: int) -> bytes:
        if len(sealed) < _NONCE:
            raise _not_authentic(kind.decode())
        try:
            return self._aead.decrypt(sealed[:_NONCE], sealed[_NONCE:], _bound(kind, name, version))
        except InvalidTag:
            raise _not_authentic(f"the {kind.decode()}") from None

    def _file(self, name: str, version: int) -> str:
        return tagged_mac(self._naming, "storage-name", name.encode(), version.to_bytes(8, "big")).hex()

    def _write(self, file: str, data: bytes) -> None:
        """All of it or nothing, whatever happens in between."""
        beside = self._directory / f"{file}{_UNFINISHED}"
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(self._directory / file)

    def _read(self, file: str, cap: int) -> bytes | None:
        try:
            with (self._directory / file).open("rb") as stream:
                return stream.read(cap + 1)
        except OSError:
            return None

    def _remove(self, file: str) -> None:
        with contextlib.suppress(OSError):  # the host may have done so already; nothing rests on the file
            (self._directory / file).unlink()


def _bound(kind: bytes, name: bytes, version: int) -> bytes:
    return tagged("storage", kind, name, version.to_bytes(8, "big"))


def _derived(key: bytes, use: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=tagged("storage-key", use)).derive(key)


def _name(name: str) -> None:
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise Malformed("workload.storage_name", "a record's name is 1 to 256 bytes long", got=len(name.encode()))


def _not_authentic(what: str) -> NotAuthentic:
    return NotAuthentic(
        "workload.storage_not_authentic",
        f"{what} is not what this function last stored",
        remedy="the host changed the storage; restore it or start without",
    )
