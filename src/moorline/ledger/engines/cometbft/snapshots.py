"""Snapshots: the state at one height, for an authority that begins late or lost its disk (docs/spec/cometbft-snapshot.md).

A snapshot is content chunks (records, then nonces), which are the same on every authority, and one last chunk, the
history: the changes of the authority set with the headers that prove them. The manifest, which travels as CometBFT's
snapshot metadata, names the digest of each content chunk; the snapshot's hash is the manifest's.

What is believed, and why:

  records    their root must be the app hash that CometBFT's light client verified;
  history    every change must be signed by a quorum of the set before, from the genesis to the set in the records;
  nonces     no root covers them, so f+1 other authorities, one honest one among them, must say over HTTPS that their
  snapshot of
             this height has the same hash. Believing one peer would let it have an old transaction applied again.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.ledger import anchor, checkpoint
from moorline.ledger import state as machine
from moorline.ledger.engines.cometbft.chain import AuthoritySet, Chain
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb
from moorline.ledger.genesis import Genesis
from moorline.ledger.state import State
from moorline.storage.consensus_store import ConsensusStore, StoredHead
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

FORMAT: Final = 1
KEPT: Final = 3
CHUNK_BYTES: Final = 1 << 20
MAX_CHUNK_BYTES: Final = 8 << 20
MAX_CHUNKS: Final = 16_384
K = TypeVar("K", str, bytes)
V = TypeVar("V", bytes, int)
_Confirm = Callable[[State, bytes], Awaitable[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a snapshot consists of: SHA-256 of each content chunk, in order."""

    version: int
    height: int
    time_ms: int
    chunks: Annotated[tuple[Bytes32, ...], Size(at_most=MAX_CHUNKS)]

    def encode(self) -> bytes:
        """Deterministic CBOR."""
        return schema.encode(self)

    @property
    def hash(self) -> bytes:
        """The snapshot's hash; 32 bytes."""
        return hashlib.sha256(self.encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordsChunk:
    """Keys and values in order."""

    keys: tuple[str, ...]
    values: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoncesChunk:
    """Nonce ids in order, with the last block their transactions could stand in."""

    nonces: tuple[Bytes32, ...]
    until: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentChunk:
    """Exactly one of the two."""

    records: RecordsChunk | None
    nonces: NoncesChunk | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """At `height` the set became `authorities`; `head` is the anchored head that says so."""

    height: int
    head: Annotated[bytes, Size(at_most=anchor.MAX_ANCHOR_BYTES)]
    authorities: dict[str, Bytes32]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The last chunk."""

    changes: tuple[Change, ...]


class Snapshots:
    """The snapshots of one authority: those in its folder, and one that is being restored."""

    def __init__(self, directory: Path, chain: Chain, store: ConsensusStore, confirm: _Confirm) -> None:
        self._directory, self._chain, self._store, self._confirm = directory, chain, store, confirm
        self._restoring: _Restoring | None = None
        self.on_restored: Callable[[], None] = lambda: None

    # Giving -----------------------------------------------------------------------------------------------------------

    def write(self, state: State) -> None:
        """Write the snapshot of a state, oldest ones go. Safe to run beside the chain: a state never changes."""
        target = self._directory / str(state.height)
        making = self._directory / f".{state.height}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        digests = []
        for index, data in enumerate(content(state)):
            (making / str(index)).write_bytes(data)
            digests.append(hashlib.sha256(data).digest())
        (making / str(len(digests))).write_bytes(schema.encode(History(changes=self._changes(state.height))))
        manifest = Manifest(version=FORMAT, height=state.height, time_ms=state.time_ms, chunks=tuple(digests))
        (making / "manifest").write_bytes(manifest.encode())
        with contextlib.suppress(OSError):  # there already: written before a crash
            making.rename(target)
        for old in sorted(self._heights())[:-KEPT]:
            shutil.rmtree(self._directory / str(old), ignore_errors=True)

    def manifest(self, height: int) -> Manifest | None:
        """The manifest of a snapshot that this authority made."""
        try:
            return schema.decode(Manifest, (self._directory / str(height) / "manifest").read_bytes())
        except (OSError, Malformed):
            return None

    def listed(self) -> list[pb.Snapshot]:
        """Those whose history is complete, as CometBFT wants them."""
        found = (self.manifest(height) for height in sorted(self._heights(), reverse=True))
        return [
            pb.Snapshot(height=one.height, format=FORMAT, chunks=len(one.chunks) + 1, hash=one.hash, metadata=one.encode())
            for one in found
            if one is not None
        ]

    def chunk(self, height: int, form: int, index: int) -> bytes:
        """A chunk; empty if there is none."""
        if form != FORMAT:
            return b""
        try:
            return (self._directory / str(height) / str(index)).read_bytes()
        except OSError:
            return b""

    def _heights(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        return [int(path.name) for path in self._directory.iterdir() if path.name.isdecimal()]

    def _changes(self, height: int) -> tuple[Change, ...]:
        found = []
        for at, authorities in self._store.set_changes():
            head = self._store.anchor(at + 1)
            if at <= height and head is not None:
                after = schema.decode(AuthoritySet, authorities).authorities
                found.append(Change(height=at, head=head, authorities=after))
        return tuple(found)

    # Taking -----------------------------------------------------------------------------------------------------------

    def offered(self, snapshot: pb.Snapshot, app_hash: bytes) -> pb.ResponseOfferSnapshot:
        """ACCEPT what makes sense: nothing of it is believed yet."""
        answer = pb.ResponseOfferSnapshot
        if snapshot.format != FORMAT:
            return answer(result=answer.REJECT_FORMAT)
        try:
            manifest = schema.decode(Manifest, snapshot.metadata)
        except Malformed:
            return answer(result=answer.REJECT)
        fits = (
            manifest.version == FORMAT
            and manifest.height == snapshot.height
            and manifest.hash == snapshot.hash
            and snapshot.chunks == len(manifest.chunks) + 1
        )
        if not fits or self._chain.state.height:
            return answer(result=answer.REJECT)
        self._restoring = _Restoring(manifest, app_hash)
        return answer(result=answer.ACCEPT)

    async def applied(self, index: int, data: bytes, sender: str) -> pb.ResponseApplySnapshotChunk:
        """Take a chunk; a wrong one is fetched again from somebody else. With the last one the state is judged and taken."""
        answer = pb.ResponseApplySnapshotChunk
        restoring = self._restoring
        if restoring is None:
            return answer(result=answer.ABORT)
        try:
            restoring.take(index, data)
        except MoorlineError:
            return answer(result=answer.RETRY, refetch_chunks=[index], reject_senders=[sender])
        if restoring.missing():
            return answer(result=answer.ACCEPT)
        self._restoring = None
        try:
            await self._finish(restoring)
        except MoorlineError:
            return answer(result=answer.REJECT_SNAPSHOT)
        return answer(result=answer.ACCEPT)

    async def _finish(self, restoring: _Restoring) -> None:
        genesis = self._chain.genesis
        state = restoring.state(genesis)
        history = restoring.history()
        verify_history(history, genesis, state)
        confirmed = await self._confirm(state, restoring.manifest.hash)
        needed = checkpoint.tolerated_faults(len(state.authority_set())) + 1
        if confirmed < needed:
            raise NotAuthentic(
                "ledger.snapshot_unconfirmed", "too few authorities have this snapshot", expected=needed, got=confirmed
            )
        self._store.restore(
            StoredHead(height=state.height, time_ms=state.time_ms, app_hash=state.root, body=None),
            records=state.records,
            nonces=state.nonces,
            set_changes=[(one.height, schema.encode(AuthoritySet(authorities=one.authorities))) for one in history.changes],
            anchors={one.height + 1: one.head for one in history.changes},
        )
        self._chain.adopt(state)
        self.on_restored()


class _Restoring:
    """The chunks of one snapshot as they come."""

    def __init__(self, manifest: Manifest, app_hash: bytes) -> None:
        self.manifest, self._app_hash = manifest, app_hash
        self._chunks: dict[int, bytes] = {}

    def take(self, index: int, data: bytes) -> None:
        """Keep a chunk; raises NotAuthentic("ledger.snapshot_invalid") unless the manifest names it, or Malformed."""
        digests = self.manifest.chunks
        if len(data) > MAX_CHUNK_BYTES or index > len(digests):
            raise NotAuthentic("ledger.snapshot_invalid", "the chunk is none of this snapshot", got=index)
        if index < len(digests):
            if hashlib.sha256(data).digest() != digests[index]:
                raise NotAuthentic("ledger.snapshot_invalid", "the chunk is not the one the manifest names", got=index)
        else:
            schema.decode(History, data, max_bytes=MAX_CHUNK_BYTES)
        self._chunks[index] = data

    def missing(self) -> bool:
        return len(self._chunks) <= len(self.manifest.chunks)

    def history(self) -> History:
        return schema.decode(History, self._chunks[len(self.manifest.chunks)], max_bytes=MAX_CHUNK_BYTES)

    def state(self, genesis: Genesis) -> State:
        """Raises NotAuthentic("ledger.snapshot_invalid") unless the records lead to the app hash."""
        records: dict[str, bytes] = {}
        nonces: dict[bytes, int] = {}
        for index in range(len(self.manifest.chunks)):
            _unpacked(schema.decode(ContentChunk, self._chunks[index], max_bytes=MAX_CHUNK_BYTES), records, nonces)
        found = machine.restored(
            ledger_id=genesis.ledger_id,
            height=self.manifest.height,
            time_ms=self.manifest.time_ms,
            records=records,
            nonces=nonces,
        )
        if found.root != self._app_hash:
            raise NotAuthentic(
                "ledger.snapshot_invalid", "the records lead to another root", expected=self._app_hash, got=found.root
            )
        return found


def content(state: State) -> Iterator[bytes]:
    """The content chunks of a state, in order: the same bytes on every authority."""
    for pairs in _sliced(sorted(state.records.items())):
        records = RecordsChunk(keys=tuple(key for key, _ in pairs), values=tuple(value for _, value in pairs))
        yield schema.encode(ContentChunk(records=records, nonces=None))
    for found in _sliced((nonce, until) for nonce, until in sorted(state.nonces.items()) if until > state.height):
        nonces = NoncesChunk(nonces=tuple(nonce for nonce, _ in found), until=tuple(until for _, until in found))
        yield schema.encode(ContentChunk(records=None, nonces=nonces))


def verify_history(history: History, genesis: Genesis, state: State) -> None:
    """Returns if the changes lead from the genesis to the set of this state, each signed by a quorum of the set before.

    Raises NotAuthentic("ledger.snapshot_invalid", or as anchor.verify), Malformed.
    """
    trust = genesis.trust()
    authorities: Mapping[str, bytes] = trust.authorities
    height = 0
    for change in history.changes:
        head = anchor.parse(change.head)
        found = anchor.verify(head, authorities, checkpoint.quorum_of(len(authorities)))
        rises = height < found.height == change.height <= state.height
        if not rises or found.ledger_id != trust.ledger_id:
            raise NotAuthentic("ledger.snapshot_invalid", "a change of the authority set is out of place", got=change.height)
        if found.authorities != anchor.set_digest(head, change.authorities):
            raise NotAuthentic("ledger.snapshot_invalid", "a change of the authority set is not the one that was signed")
        authorities, height = change.authorities, change.height
    if dict(authorities) != state.authority_set():
        raise NotAuthentic("ledger.snapshot_invalid", "the history does not lead to the authorities of the state")


def _unpacked(chunk: ContentChunk, records: dict[str, bytes], nonces: dict[bytes, int]) -> None:
    if chunk.records is not None:
        records.update(zip(chunk.records.keys, chunk.records.values, strict=True))
    if chunk.nonces is not None:
        nonces.update(zip(chunk.nonces.nonces, chunk.nonces.until, strict=True))


def _sliced(pairs: Iterable[tuple[K, V]]) -> Iterator[list[tuple[K, V]]]:
    """In chunks of about CHUNK_BYTES."""
    found: list[tuple[K, V]] = []
    size = 0
    for key, value in pairs:
        found.append((key, value))
        size += len(key) + (len(value) if isinstance(value, bytes) else 8)
        if size >= CHUNK_BYTES:
            yield found
            found, size = [], 0
    if found:
        yield found
