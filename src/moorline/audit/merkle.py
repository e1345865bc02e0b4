"""The Merkle tree of RFC 6962 (and RFC 9162): leaf hash `H(0x00 | data)`, inner hash `H(0x01 | left | right)`.

One module serves the ledger's log of blocks, the transactions of a block and the secure log. The standard fixes the hash
inputs, so our domain strings do not apply here. Functions over lists of leaf hashes build; `verify_*` trust nothing but the
roots they are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from moorline.errors import NotAuthentic

EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
HASH_BYTES: Final = 32
MAX_PROOF: Final = 64
_sha256: Final = hashlib.sha256  # the loops below run millions of times


def leaf_hash(data: bytes) -> bytes:
    """The hash of one entry (RFC 6962 2.1)."""
    return hashlib.sha256(b"\x00" + data).digest()


def inner_hash(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees (RFC 6962 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The Merkle tree hash of these leaf hashes; SHA-256 of nothing for none."""
    growing = Growing()
    for leaf in leaves:
        growing.append(leaf)
    return growing.root()


class Frontier:
    """The right edge of a tree: enough to append and to know the root, O(log n) in size. Immutable."""

    __slots__ = ("size", "subtrees")

    def __init__(self, size: int = 0, subtrees: tuple[bytes, ...] = ()) -> None:
        self.size = size
        self.subtrees = subtrees

    def appended(self, leaf: bytes) -> Frontier:
        """The frontier after one more leaf hash."""
        subtrees, carry, bits = list(self.subtrees), leaf, self.size
        while bits & 1:
            carry = inner_hash(subtrees.pop(), carry)
            bits >>= 1
        return Frontier(self.size + 1, (*subtrees, carry))

    def root(self) -> bytes:
        """The Merkle tree hash of everything appended."""
        if not self.subtrees:
            return EMPTY_ROOT
        result = self.subtrees[-1]
        for subtree in reversed(self.subtrees[:-1]):
            result = inner_hash(subtree, result)
        return result


class Growing:
    """As Frontier, grown in place: for millions of leaves that nobody wants to branch off from."""

    __slots__ = ("_subtrees", "size")

    def __init__(self) -> None:
        self.size = 0
        self._subtrees: list[bytes] = []

    def append(self, leaf: bytes) -> None:
        """Add a leaf hash."""
        subtrees, bits = self._subtrees, self.size
        while bits & 1:
            leaf = _sha256(b"\x01" + subtrees.pop() + leaf).digest()
            bits >>= 1
        subtrees.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """The Merkle tree hash of everything appended."""
        return self.frontier().root()

    def frontier(self) -> Frontier:
        """The same as it stands now."""
        return Frontier(self.size, tuple(self._subtrees))


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The audit path of leaf `index` (RFC 6962 2.1.1), nearest sibling first. `index` must be in range."""
    if not 0 <= index < len(leaves):
        message = f"leaf {index} of {len(leaves)}"
        raise IndexError(message)
    if len(leaves) == 1:
        return ()
    split = _split(len(leaves))
    if index < split:
        return (*inclusion_proof(leaves[:split], index), root(leaves[split:]))
    return (*inclusion_proof(leaves[split:], index - split), root(leaves[:split]))


def every_inclusion_proof(leaves: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """The audit paths of all leaves, in order, each subtree hashed once."""
    return _root_and_paths(leaves)[1] if leaves else []


def _root_and_paths(leaves: Sequence[bytes]) -> tuple[bytes, list[tuple[bytes, ...]]]:
    if len(leaves) == 1:
        return leaves[0], [()]
    split = _split(len(leaves))
    left, left_paths = _root_and_paths(leaves[:split])
    right, right_paths = _root_and_paths(leaves[split:])
    paths = [(*path, right) for path in left_paths] + [(*path, left) for path in right_paths]
    return inner_hash(left, right), paths


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> tuple[bytes, ...]:
    """The proof that the first `old_size` leaves are a prefix (RFC 6962 2.1.2). `old_size` is from 1 to the size."""
    if not 0 < old_size <= len(leaves):
        message = f"size {old_size} of {len(leaves)}"
        raise IndexError(message)
    return _subproof(leaves, old_size, whole=True)


def _subproof(leaves: Sequence[bytes], old_size: int, *, whole: bool) -> tuple[bytes, ...]:
    if old_size == len(leaves):
        return () if whole else (root(leaves),)
    split = _split(len(leaves))
    if old_size <= split:
        return (*_subproof(leaves[:split], old_size, whole=whole), root(leaves[split:]))
    return (*_subproof(leaves[split:], old_size - split, whole=False), root(leaves[:split]))


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected_root: bytes) -> None:
    """Raises NotAuthentic("merkle.not_included") unless `leaf` is number `index` of the tree (RFC 9162 2.1.3.2).

    It does not establish who signed the root.
    """
    if not 0 <= index < size or len(proof) > MAX_PROOF or any(len(node) != HASH_BYTES for node in proof):
        raise NotAuthentic("merkle.not_included", "the inclusion proof has an impossible shape", got=f"{index} of {size}")
    position, last, result = index, size - 1, leaf
    for node in proof:
        if last == 0:
            raise NotAuthentic("merkle.not_included", "the inclusion proof is too long")
        if position & 1 or position == last:
            result = inner_hash(node, result)
            while not position & 1 and position != 0:
                position, last = position >> 1, last >> 1
        else:
            result = inner_hash(result, node)
        position, last = position >> 1, last >> 1
    if last != 0 or result != expected_root:
        raise NotAuthentic(
            "merkle.not_included", "the inclusion proof leads to another root", expected=expected_root, got=result
        )


def verify_consistency(old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Raises NotAuthentic("merkle.not_consistent") unless the old tree is a prefix of the new (RFC 9162 2.1.4.2)."""
    nodes = _consistency_nodes(old_size, old_root, new_size, proof)
    if old_size == new_size:
        if len(nodes) != 1 or old_root != new_root:
            raise NotAuthentic("merkle.not_consistent", "two roots for one size", expected=old_root, got=new_root)
        return
    position, last = old_size - 1, new_size - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old_result = new_result = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            raise NotAuthentic("merkle.not_consistent", "the consistency proof is too long")
        if position & 1 or position == last:
            old_result, new_result = inner_hash(node, old_result), inner_hash(node, new_result)
            while not position & 1 and position != 0:
                position, last = position >> 1, last >> 1
        else:
            new_result = inner_hash(new_result, node)
        position, last = position >> 1, last >> 1
    if last != 0 or old_result != old_root or new_result != new_root:
        raise NotAuthentic(
            "merkle.not_consistent", "the old log is not the beginning of the new one", expected=new_root, got=new_result
        )


def _consistency_nodes(old_size: int, old_root: bytes, new_size: int, proof: Sequence[bytes]) -> list[bytes]:
    """The nodes to fold: an old tree that is a complete subtree is not repeated in the proof."""
    if not 0 < old_size <= new_size or len(proof) > 2 * MAX_PROOF or any(len(node) != HASH_BYTES for node in proof):
        raise NotAuthentic("merkle.not_consistent", "the consistency proof has an impossible shape")
    nodes = list(proof) if old_size & (old_size - 1) and old_size != new_size else [old_root, *proof]
    if not nodes:
        raise NotAuthentic("merkle.not_consistent", "the consistency proof is empty")
    return nodes


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << ((size - 1).bit_length() - 1)
