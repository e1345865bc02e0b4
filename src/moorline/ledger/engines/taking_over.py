"""Taking over a state from others: when the disk was lost, or the way through all blocks is too long (ledger.snapshot).

Pieces are fetched under a manifest that was verified against a quorum's signature, and each is held against its hash before
it is stored. The head moves on meanwhile: a piece that has changed is left for the next round, which takes a newer manifest
and fetches only what differs. Then come the blocks whose transactions could still be repeated, back from the head by their
hashes. Not before all is there does the database have a head.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from moorline.errors import MoorlineError, NotAuthentic, Unavailable
from moorline.ledger import blocks, checkpoint, light_client, records, snapshot, transactions
from moorline.ledger.engines.node import AuthoritySet, Committed, Node
from moorline.ledger.engines.proposal import Peer
from moorline.ledger.parameters import PARAMETERS
from moorline.ledger.places import key_digest, subtree_of
from moorline.ledger.snapshot import Verified
from moorline.ledger.transactions import nonce_id_of
from moorline.ledger.tree import Tree
from moorline.ledger.tree_nodes import Subtree
from moorline.storage.ledger_store import StateWrites, StoredBlock
from moorline.wire import schema

_IDLE_ROUNDS: Final = 5
_MAX_COMMITTED: Final = 10 << 20


async def take_over(node: Node, peers: Sequence[Peer]) -> None:
    """Give the empty database of `node` the newest state that a peer has. Raises what the last peer said."""
    node.store.set_mark("taking_over", 1)
    refusal: MoorlineError | None = None
    for peer in peers:
        try:
            verified = await _state(node, peer)
            await _blocks(node, peer, verified)
        except MoorlineError as error:
            refusal = error
            continue
        node.conduct.forget_signatures_up_to(verified.checkpoint.height + 1)
        node.store.set_mark("taking_over", 0)
        node.reload()
        return
    raise refusal or Unavailable("ledger.no_peers", "there is no authority to take the state over from")


async def _state(node: Node, peer: Peer) -> Verified:
    trust, idle = node.genesis.trust(), 0
    held = {prefix: (digest, keys) for prefix, digest, keys in node.store.subtrees()}
    while idle < _IDLE_ROUNDS:
        verified = snapshot.verify(await peer.manifest(), trust)
        newest = {one.prefix: (one.hash, one.keys) for one in verified.subtrees}
        stale = [prefix for prefix, have in held.items() if newest.get(prefix) != have]
        node.store.clear_state(stale)
        for prefix in stale:
            del held[prefix]
        missing = [one for one in verified.subtrees if one.prefix not in held]
        if not missing:
            return verified
        before = len(held)
        await _fetch(node, peer.chunk, missing, held)
        idle = 0 if len(held) > before else idle + 1
    raise Unavailable("ledger.snapshot_moving", "the state changes faster than it can be fetched", remedy="try again later")


async def _fetch(
    node: Node,
    chunk: Callable[[int], Awaitable[bytes]],
    missing: Sequence[Subtree],
    held: dict[int, tuple[bytes, int]],
) -> None:
    at = 0
    while at < len(missing):
        piece = snapshot.parse_chunk(await chunk(missing[at].prefix))
        found: dict[int, dict[str, bytes]] = {}
        for entry in piece.records:
            found.setdefault(subtree_of(key_digest(entry.key)), {})[entry.key] = entry.value
        written: dict[bytes, tuple[str, bytes]] = {}
        subtrees: dict[int, tuple[bytes, int]] = {}
        end = max(piece.last, missing[at].prefix)
        while at < len(missing) and missing[at].prefix <= end:
            one = missing[at]
            at += 1
            content = found.get(one.prefix, {})
            if snapshot.holds(one, content):  # else it has changed since, or the peer lies: the next round shows
                subtrees[one.prefix] = held[one.prefix] = (one.hash, one.keys)
                written.update({key_digest(key): (key, value) for key, value in content.items()})
        node.store.put_state(StateWrites(records=written, subtrees=subtrees, nonces={}))


async def _blocks(node: Node, peer: Peer, verified: Verified) -> None:
    """The blocks up to the head whose nonces still count, and the head."""
    height, block = verified.checkpoint.height, verified.block
    manifest = verified.manifest
    stored = [_stored(Committed(block=manifest.block, note=manifest.note, edge=manifest.edge, seal=None), manifest.edge)]
    nonces = _nonces(block, height)
    below, lowest = height - 1, max(1, height - _valid_blocks(node, verified))
    while below >= lowest:
        committed = schema.decode(Committed, await peer.block(below), max_bytes=_MAX_COMMITTED)
        older = blocks.parse(committed.block)
        _linked(older, block, committed, verified, node)
        stored.append(_stored(committed, committed.edge or b""))
        nonces |= _nonces(older, height)
        block, below = older, below - 1
    changes = [
        (
            checkpoint.parse_note(one.note).checkpoint.height,
            one.note,
            schema.encode(AuthoritySet(authorities=one.authorities)),
        )
        for one in manifest.changes
    ]
    node.store.put_state(StateWrites(records={}, subtrees={}, nonces=nonces))
    node.store.put_heads(stored, changes=changes)


def _valid_blocks(node: Node, verified: Verified) -> int:
    """For how many blocks back a transaction could still be repeated, as the state that was taken over has it."""
    tree = Tree.stored(verified.subtrees, lambda prefix: node.store.records(prefix, prefix))
    value = tree.get(records.parameter_key("valid_blocks"))
    initial = PARAMETERS["valid_blocks"].initial
    return initial if value is None else max(initial, records.parse(records.ParameterRecord, value).value)


def _linked(older: blocks.Block, newer: blocks.Block, committed: Committed, verified: Verified, node: Node) -> None:
    """The block is the one before, and its note and edge are those of it."""
    blocks.verify_body(older)
    note = checkpoint.parse_note(committed.note)
    authorities, quorum = light_client.set_in_force(
        tuple(one for one in verified.manifest.changes if _height(one.note) < older.header.height),
        node.genesis.trust(),
        before=older.header.height,
    )
    signed = checkpoint.verify_note(note, authorities, quorum)
    if (
        blocks.digest(older.header) != newer.header.previous
        or signed.height != older.header.height
        or blocks.log_root(older.header, committed.edge or b"") != signed.root
    ):
        raise NotAuthentic("ledger.snapshot_invalid", "a block does not lead to the one after it", got=older.header.height)


def _height(note: bytes) -> int:
    return checkpoint.parse_note(note).checkpoint.height


def _stored(committed: Committed, edge: bytes) -> tuple[StoredBlock, list[tuple[bytes, int]]]:
    block = blocks.parse(committed.block)
    found = StoredBlock(
        height=block.header.height,
        body=committed.block,
        note=committed.note,
        leaf=blocks.leaf_of(block.header),
        edge=edge,
        seal=committed.seal,
    )
    parsed = [transactions.parse(data) for data in block.transactions]
    return found, [(one.id, one.payload.valid_until) for one in parsed]


def _nonces(block: blocks.Block, height: int) -> dict[bytes, int]:
    payloads = [transactions.parse(data).payload for data in block.transactions]
    return {nonce_id_of(one): one.valid_until for one in payloads if one.valid_until > height}
