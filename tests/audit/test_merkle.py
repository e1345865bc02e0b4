"""RFC 6962 trees: vectors of the Certificate Transparency project, and every size up to a few dozen."""

import hashlib

import pytest

from moorline.audit import merkle
from moorline.errors import NotAuthentic

# The leaves and roots of certificate-transparency's merkletree tests, used by every CT implementation.
CT_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def leaves(count):
    return [merkle.leaf_hash(bytes([number])) for number in range(count)]


def test_the_roots_of_certificate_transparency():
    hashed = [merkle.leaf_hash(bytes.fromhex(leaf)) for leaf in CT_LEAVES]
    assert [merkle.root(hashed[: size + 1]).hex() for size in range(8)] == CT_ROOTS
    assert merkle.root([]) == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("size", range(1, 34))
def test_every_leaf_is_proven_and_nothing_else(size):
    """verifies that: each path leads to the root; another index, leaf, size or a changed node does not."""
    all_leaves = leaves(size)
    root = merkle.root(all_leaves)
    assert merkle.every_inclusion_proof(all_leaves) == [merkle.inclusion_proof(all_leaves, i) for i in range(size)]
    for index in range(size):
        proof = merkle.inclusion_proof(all_leaves, index)
        merkle.verify_inclusion(all_leaves[index], index, size, proof, root)
        for bad in (
            (merkle.leaf_hash(b"x"), index, size, proof),
            (all_leaves[index], size, size, proof),
            (all_leaves[index], index, size, (*proof, root)),
            *((all_leaves[index], index, size, proof[:-1]) for _ in proof[:1]),
            *((all_leaves[index], index, size, (bytes(32), *proof[1:])) for _ in proof[:1]),
        ):
            with pytest.raises(NotAuthentic, match="not_included"):
                merkle.verify_inclusion(*bad, root)


@pytest.mark.parametrize("size", range(1, 20))
def test_every_prefix_is_consistent_and_another_is_not(size):
    all_leaves = leaves(size)
    new = merkle.root(all_leaves)
    for old_size in range(1, size + 1):
        old = merkle.root(all_leaves[:old_size])
        proof = merkle.consistency_proof(all_leaves, old_size)
        merkle.verify_consistency(old_size, old, size, new, proof)
        for bad in (
            (old_size, bytes(32), size, new, proof),
            (old_size, old, size, bytes(32), proof),
            (old_size, old, size, new, (*proof, new)),
            (old_size, old, size, new, (b"short",)),
            (0, old, size, new, proof),
            *((old_size, old, size, new, proof[:-1]) for _ in proof[:1]),
        ):
            with pytest.raises(NotAuthentic, match="not_consistent"):
                merkle.verify_consistency(*bad)


def test_a_frontier_knows_the_root_after_every_append():
    frontier = merkle.Frontier()
    for size, leaf in enumerate(leaves(40)):
        proof = tuple(reversed(frontier.subtrees))
        frontier = frontier.appended(leaf)
        assert frontier.root() == merkle.root(leaves(size + 1))
        merkle.verify_inclusion(leaf, size, size + 1, proof, frontier.root())


def test_an_index_out_of_range_is_a_mistake_of_the_caller():
    with pytest.raises(IndexError):
        merkle.inclusion_proof(leaves(3), 3)
    with pytest.raises(IndexError):
        merkle.consistency_proof(leaves(3), 0)
