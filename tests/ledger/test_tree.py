"""The state tree: one root for one content, and proofs that cannot say anything else."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed, Refused
from moorline.ledger import tree
from moorline.ledger.tree import PartialTree, Tree

CONTENT = {f"provider/p{number}": f"value {number}".encode() for number in range(60)}


def test_the_root_depends_on_the_content_only():
    items = list(CONTENT.items())
    root = Tree().updated(CONTENT).root
    for seed in range(5):
        random.Random(seed).shuffle(items)
        partly = Tree()
        for key, value in items:
            partly = partly.updated({key: b"something else"}).updated({key: value})
        assert partly.root == root
    assert Tree().root == bytes(32)
    assert Tree().updated({**CONTENT, "provider/p1": b"changed"}).root != root


def test_older_roots_stay_readable():
    before = Tree().updated(CONTENT)
    proof = before.prove(["provider/p3"])
    after = before.updated({"provider/p3": b"new"})
    assert before.prove(["provider/p3"]) == proof
    assert PartialTree.parse(after.prove(["provider/p3"])).lookup("provider/p3") == tree.value_digest(b"new")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 60])
def test_present_and_absent_keys_are_proven_together(size):
    content = dict(list(CONTENT.items())[:size])
    whole = Tree().updated(content)
    keys = [*list(content)[:7], "provider/none", "hsm/none/none"]
    proof = PartialTree.parse(whole.prove(keys))
    assert proof.root == whole.root
    proof.exactly_for(keys)
    for key in keys:
        expected = tree.value_digest(content[key]) if key in content else None
        assert proof.lookup(key) == expected
    if size == 60:
        with pytest.raises(Refused, match="ledger.not_proven"):
            proof.lookup("provider/p50")
        with pytest.raises(Malformed, match="more or less"):
            proof.exactly_for(keys[:1])


def test_a_proof_is_short():
    whole = Tree().updated({f"key/{number}": b"x" for number in range(4096)})
    assert len(whole.prove(["key/7"])) < 33 * 24 + 65


@given(st.dictionaries(st.text(max_size=6), st.binary(max_size=6), max_size=20), st.lists(st.text(max_size=6), max_size=6))
def test_every_proof_of_any_content_reads_back(content, keys):
    whole = Tree().updated(content)
    proof = PartialTree.parse(whole.prove(keys))
    assert proof.root == whole.root
    proof.exactly_for(keys)
    for key in keys:
        assert proof.lookup(key) == (tree.value_digest(content[key]) if key in content else None)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_proof_or_malformed(data):
    try:
        PartialTree.parse(data)
    except Malformed as error:
        assert error.code == "ledger.proof_malformed"


@given(st.data())
def test_a_flipped_bit_changes_root_or_shape(data):
    whole = Tree().updated(CONTENT)
    keys = ["provider/p3", "provider/none"]
    proof = whole.prove(keys)
    bit = data.draw(st.integers(0, len(proof) * 8 - 1))
    changed = bytearray(proof)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        parsed = PartialTree.parse(bytes(changed))
        parsed.exactly_for(keys)
    except Malformed:
        return
    assert parsed.root != whole.root


def test_trees_that_no_writer_makes_are_malformed():
    leaf = b"\x01" + bytes(64)
    for odd in (b"", b"\x02\x00" + leaf, b"\x02" + leaf + b"\x00", b"\x02\x00\x00", leaf + b"\x00", b"\x04", b"\x02" * 300):
        with pytest.raises(Malformed, match="ledger.proof_malformed"):
            PartialTree.parse(odd)
