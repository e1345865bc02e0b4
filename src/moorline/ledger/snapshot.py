"""Snapshots: the state at one checkpoint, fetched piece by piece and believed only under a signed root. Pure.

A manifest is the head's note and block, what its log and its authorities' changes need, and hash and size of every subtree
of the state (at most 65,536; ledger.tree). `verify` holds it against the trust a reader has: the note by a quorum, the block
by the note, the subtrees' hashes by the state root. Then each subtree's records are held against its hash (`holds`), so who
sends them needs no trust, and pieces may come from several authorities and over several heads: of a newer manifest only
those subtrees are fetched whose hash is another. Nonces are not part of the state root; they follow from the blocks whose
transactions could still be repeated (parameter `valid_blocks`), which hang together by their hashes.

docs/spec/ledger-snapshot.md has the format with an example.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.ledger import blocks, checkpoint, light_client
from moorline.ledger.blocks import Block
from moorline.ledger.checkpoint import Checkpoint
from moorline.ledger.light_client import LedgerTrust
from moorline.ledger.places import SUBTREE_BITS
from moorline.ledger.proof import SetChange
from moorline.ledger.records import MAX_KEY_CHARS, MAX_RECORD_BYTES
from moorline.ledger.tree import Tree
from moorline.ledger.tree_nodes import Subtree
from moorline.wire import schema
from moorline.wire.schema import Size

VERSION: Final = 1
ENTRY_BYTES: Final = 2 + 32 + 6
MAX_MANIFEST_BYTES: Final = 14 << 20
MAX_CHUNK_BYTES: Final = 12 << 20
CHUNK_BYTES: Final = 1 << 20
"""About how large a piece is made; a single subtree may be larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`subtrees`: for each, in order, prefix (2 bytes), hash (32) and number of keys (6), big-endian."""

    version: int
    note: Annotated[bytes, Size(at_most=16 * 1024)]
    block: Annotated[bytes, Size(at_most=9 << 20)]
    edge: Annotated[bytes, Size(at_most=64 * 32)]
    changes: tuple[SetChange, ...]
    subtrees: Annotated[bytes, Size(at_most=ENTRY_BYTES << SUBTREE_BITS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record."""

    key: Annotated[str, Size(at_most=MAX_KEY_CHARS)]
    value: Annotated[bytes, Size(at_most=MAX_RECORD_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The records of all subtrees from `first` to `last`, both included."""

    first: int
    last: int
    records: tuple[Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A manifest that was verified: nothing in it but what a quorum signed."""

    checkpoint: Checkpoint
    block: Block
    manifest: Manifest
    subtrees: tuple[Subtree, ...]


def make(*, note: bytes, block: bytes, edge: bytes, changes: tuple[SetChange, ...], subtrees: Iterable[Subtree]) -> bytes:
    """The manifest of a head."""
    packed = b"".join(one.prefix.to_bytes(2, "big") + one.hash + one.keys.to_bytes(6, "big") for one in subtrees)
    return schema.encode(Manifest(version=VERSION, note=note, block=block, edge=edge, changes=changes, subtrees=packed))


def verify(data: bytes, trust: LedgerTrust) -> Verified:
    """The manifest, now known to be of a head that a quorum signed; not that it is the newest.

    Raises Malformed, NotAuthentic (`ledger.*`), Refused("ledger.other_ledger").
    """
    found = schema.decode(Manifest, data, max_bytes=MAX_MANIFEST_BYTES)
    if found.version != VERSION:
        raise _malformed("its version is unknown")
    note = checkpoint.parse_note(found.note)
    if note.checkpoint.ledger_id != trust.ledger_id:
        raise Refused("ledger.other_ledger", "the snapshot is of another ledger", got=note.checkpoint.ledger_id)
    authorities, quorum = light_client.set_in_force(found.changes, trust, before=note.checkpoint.height)
    signed = checkpoint.verify_note(note, authorities, quorum)
    block = blocks.parse(found.block)
    blocks.verify_body(block)
    if blocks.log_root(block.header, found.edge) != signed.root or block.header.state_root != signed.state_root:
        raise NotAuthentic("ledger.snapshot_invalid", "the snapshot's block is not the one that was signed")
    subtrees = _subtrees(found.subtrees)
    tree = Tree.stored(subtrees, _unread)
    if tree.root != signed.state_root:
        raise NotAuthentic(
            "ledger.snapshot_invalid",
            "the snapshot's subtrees do not lead to the signed state",
            expected=signed.state_root,
            got=tree.root,
        )
    return Verified(checkpoint=signed, block=block, manifest=found, subtrees=subtrees)


def chunk(first: int, read: Iterable[tuple[int, Sequence[tuple[str, bytes]]]]) -> bytes:
    """A piece from `first` on; `read` gives prefixes in order with their records, until the piece is large enough."""
    records: list[Entry] = []
    size, last = 0, first
    for prefix, found in read:
        records += [Entry(key=key, value=value) for key, value in found]
        size += sum(len(key) + len(value) for key, value in found)
        last = prefix
        if size >= CHUNK_BYTES:
            break
    else:
        last = (1 << SUBTREE_BITS) - 1
    return schema.encode(Chunk(first=first, last=last, records=tuple(records)))


def parse_chunk(data: bytes) -> Chunk:
    """A piece from its bytes; raises only Malformed. Its records are claims."""
    found = schema.decode(Chunk, data, max_bytes=MAX_CHUNK_BYTES)
    if not found.first <= found.last < 1 << SUBTREE_BITS:
        raise _malformed("a piece has subtrees in order")
    return found


def holds(subtree: Subtree, records: Mapping[str, bytes]) -> bool:
    """Whether these records are that subtree, all of it and nothing else."""
    return Tree().updated(records).all_subtrees() == [subtree]


def _subtrees(packed: bytes) -> tuple[Subtree, ...]:
    if len(packed) % ENTRY_BYTES:
        raise _malformed("its subtrees are cut short")
    found = tuple(
        Subtree(
            prefix=int.from_bytes(packed[at : at + 2], "big"),
            hash=packed[at + 2 : at + 34],
            keys=int.from_bytes(packed[at + 34 : at + ENTRY_BYTES], "big"),
        )
        for at in range(0, len(packed), ENTRY_BYTES)
    )
    prefixes = [one.prefix for one in found]
    if prefixes != sorted(set(prefixes)) or any(one.keys < 1 for one in found):
        raise _malformed("its subtrees come once, in order, none empty")
    return found


def _unread(prefix: int) -> list[tuple[str, bytes]]:
    message = f"subtree {prefix} of a manifest has no records"
    raise TypeError(message)


def _malformed(why: str) -> Malformed:
    return Malformed("ledger.snapshot_malformed", f"the snapshot cannot be read: {why}")
