"""A proof bundle: what several keys hold at one checkpoint, in one message (docs/spec/ledger-proof-bundle.md).

`note` is the checkpoint with enough cosignatures, `tree` the part of the state tree that shows every key present or absent,
`records` the keys in order with their values (null: absent). `changes` leads from the authority set a client knows to the
one that signed: each is the checkpoint of a block that changed the set, signed by the set before it, and the set after it.
The encoding is deterministic, and there is one for each list of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.errors import Malformed
from moorline.ledger.checkpoint import authority_set_digest
from moorline.ledger.records import MAX_KEY_CHARS, MAX_RECORD_BYTES
from moorline.ledger.tree import Tree
from moorline.ledger.tree_proof import MAX_PROOF_BYTES
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Size

VERSION: Final = 1
MAX_BUNDLE_BYTES: Final = 64 * 1024
MAX_KEYS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SetChange:
    """A signed checkpoint after which `authorities` (name to raw Ed25519 key) is the set in force."""

    note: Annotated[bytes, Size(at_most=16 * 1024)]
    authorities: dict[str, Bytes32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A key and its value, or null if it is absent."""

    key: Annotated[str, Size(at_most=MAX_KEY_CHARS)]
    value: Annotated[bytes, Size(at_most=MAX_RECORD_BYTES)] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The message; untrusted until `light_client.verify_bundle`."""

    version: int
    note: Annotated[bytes, Size(at_most=16 * 1024)]
    changes: tuple[SetChange, ...]
    records: tuple[Entry, ...]
    tree: Annotated[bytes, Size(at_most=MAX_PROOF_BYTES)]


def changes_since(known: bytes | None, changes: Sequence[SetChange]) -> tuple[SetChange, ...]:
    """The changes that lead on from the set with this digest: those after the last that led to it, or all of them."""
    led = [index for index, change in enumerate(changes) if authority_set_digest(change.authorities) == known]
    return tuple(changes[led[-1] + 1 if led else 0 :])


def make_bundle(
    *,
    note: bytes,
    changes: tuple[SetChange, ...],
    tree: Tree,
    value_of: Callable[[str], bytes | None],
    keys: Iterable[str],
) -> bytes:
    """The bundle for `keys`, each once, in order. Raises Malformed("ledger.proof_too_large")."""
    wanted = sorted(set(keys))
    if len(wanted) > MAX_KEYS or any(len(key) > MAX_KEY_CHARS for key in wanted):
        raise Malformed("ledger.proof_too_large", "too many or too long keys for one bundle", expected=f"<= {MAX_KEYS}")
    bundle = schema.encode(
        Bundle(
            version=VERSION,
            note=note,
            changes=changes,
            records=tuple(Entry(key=key, value=value_of(key)) for key in wanted),
            tree=tree.prove(wanted),
        )
    )
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise Malformed(
            "ledger.proof_too_large",
            "the bundle is too large",
            expected=f"<= {MAX_BUNDLE_BYTES}",
            got=len(bundle),
            remedy="ask for fewer keys at once",
        )
    return bundle


def parse_bundle(data: bytes) -> Bundle:
    """A bundle from its bytes; raises only Malformed. Establishes nothing."""
    bundle = schema.decode(Bundle, data, max_bytes=MAX_BUNDLE_BYTES)
    keys = [entry.key for entry in bundle.records]
    if bundle.version != VERSION:
        raise Malformed("ledger.bundle_malformed", "unknown version of the bundle", expected=VERSION, got=bundle.version)
    if keys != sorted(set(keys)) or len(keys) > MAX_KEYS:
        raise Malformed("ledger.bundle_malformed", "keys come once, in order", expected=f"<= {MAX_KEYS}")
    return bundle
