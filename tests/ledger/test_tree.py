"""The state tree: one root for one content, and proofs that cannot say anything else."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.digest import tagged
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.ledger import nonces, places, subtrees
from moorline.ledger.partial_tree import PartialTree
from moorline.ledger.tree import Tree

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
    assert PartialTree.parse(after.prove(["provider/p3"])).lookup("provider/p3") == places.value_digest(b"new")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 60])
def test_present_and_absent_keys_are_proven_together(size):
    content = dict(list(CONTENT.items())[:size])
    whole = Tree().updated(content)
    keys = [*list(content)[:7], "provider/none", "hsm/none/none"]
    proof = PartialTree.parse(whole.prove(keys))
    assert proof.root == whole.root
    proof.exactly_for(keys)
    for key in keys:
        expected = places.value_digest(content[key]) if key in content else None
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
        assert proof.lookup(key) == (places.value_digest(content[key]) if key in content else None)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_proof_or_malformed(data):
    try:
        PartialTree.parse(data)
    except Malformed as error:
        assert error.code == "ledger.proof_malformed"


@settings(deadline=None)
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


# Stored trees ----------------------------------------------------------------------------------------------------------


def naive_root(content):
    """The root by its definition, over the whole content, with nothing shared or stored."""
    ordered = sorted((places.key_digest(key), places.value_digest(value)) for key, value in content.items())

    def of(found, depth):
        if not found:
            return bytes(32)
        if len(found) == 1:
            return hashlib.sha256(tagged("state-leaf") + found[0][0] + found[0][1]).digest()
        halves = [[one for one in found if one[0][depth >> 3] >> (7 - (depth & 7)) & 1 == bit] for bit in (0, 1)]
        return hashlib.sha256(tagged("state-inner") + of(halves[0], depth + 1) + of(halves[1], depth + 1)).digest()

    return of(ordered, 0)


class Storage:
    """What a database keeps of a tree: records by subtree, and each subtree's hash."""

    def __init__(self):
        self.records, self.subtrees, self.packs, self.read = {}, {}, {}, 0

    def put(self, whole, writes):
        for key, value in writes.items():
            self.records.setdefault(places.subtree_of(places.key_digest(key)), {})[key] = value
        self.subtrees.update({one.prefix: one for one in whole.subtrees(writes)})
        self.packs.update(whole.packed(writes))

    def pack(self, prefix):
        return self.packs.get(prefix)

    def record(self, place):
        of_subtree = self.records.get(places.subtree_of(place), {}).items()
        return next((one for one in of_subtree if places.key_digest(one[0]) == place), None)

    def source(self, prefix):
        self.read += 1
        return list(self.records.get(prefix, {}).items())

    def opened(self):
        return Tree.stored([self.subtrees[prefix] for prefix in sorted(self.subtrees)], self.source, self)


KEYS = st.text(alphabet="abc", max_size=4)


# Keys of two subtrees, which then have many.
CROWDED = st.sampled_from(["99555", "105380", "142526", "149863", "239805", "325860", "84162", "178522", "199967", "232828"])


@settings(deadline=None)
@given(st.lists(st.dictionaries(KEYS | CROWDED, st.binary(max_size=3), max_size=8), max_size=8), st.data())
def test_a_stored_tree_is_the_naive_model_whatever_was_written_reopened_or_let_go(steps, data):
    """verifies that: root, values, size, absence and proofs are those of a plain dictionary, in memory or not."""
    whole, content, storage, older = Tree(), {}, Storage(), []
    for writes in steps:
        older.append((whole, dict(content)))
        whole = whole.updated(writes)
        content.update(writes)
        storage.put(whole, writes)
        if data.draw(st.booleans()):
            whole = storage.opened() if data.draw(st.booleans()) else whole.released(storage.source, storage)
            older.clear()  # what was read from storage is of one state only
        assert whole.root == naive_root(content)
        assert (len(whole), dict(whole)) == (len(content), content)
        wanted = [*content, "absent"]
        proof = PartialTree.parse(whole.prove(wanted))
        assert [proof.lookup(key) for key in wanted] == [*map(places.value_digest, content.values()), None]
        assert whole.get("absent") is None
        assert [whole.subtree(one.prefix) for one in whole.all_subtrees()] == whole.all_subtrees()
    for before, held in older:
        assert (before.root, dict(before)) == (naive_root(held), held)


def test_a_stored_tree_reads_only_where_it_is_asked_and_believes_nothing_damaged():
    content = {f"revocation/device/alpha/d{number}": b"x%d" % number for number in range(3000)}
    storage, whole = Storage(), Tree().updated(content)
    storage.put(whole, content)
    opened = storage.opened()
    assert (opened.root, len(opened), storage.read) == (whole.root, 3000, 0)
    assert opened.get("revocation/device/alpha/d7") == b"x7"
    assert storage.read == 1
    after = opened.updated({"revocation/device/alpha/new": b"1"})
    assert after.root == whole.updated({"revocation/device/alpha/new": b"1"}).root
    assert storage.read <= 2
    key = "revocation/device/alpha/d9"
    storage.records[places.subtree_of(places.key_digest(key))][key] = b"changed"
    with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
        opened.get(key)
    del storage.records[places.subtree_of(places.key_digest(key))][key]
    with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
        opened.prove([key])


def test_a_packed_subtree_is_read_along_one_path_and_believed_nowhere():
    """verifies that: one record of many is read; whatever bit of pack or record is changed, nothing false is answered."""
    names = ["99555", "105380", "142526", "149863", "239805", "325860"]
    content = {name: name.encode() for name in names}
    storage, whole = Storage(), Tree().updated(content)
    storage.put(whole, content)
    (prefix, pack), *others = storage.packs.items()
    assert (others, storage.opened().get("99555"), storage.read) == ([], b"99555", 0)
    subtrees.verify_pack(storage.subtrees[prefix], pack)
    for bit in range(8 * len(pack)):
        changed = bytearray(pack)
        changed[bit >> 3] ^= 1 << (bit & 7)
        storage.packs[prefix] = bytes(changed)
        with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
            subtrees.verify_pack(storage.subtrees[prefix], bytes(changed))
        for name in names[:2]:
            try:
                assert storage.opened().get(name) == content[name]
            except NotAuthentic as error:
                assert error.code == "ledger.state_damaged"
    storage.packs[prefix] = pack[:-1]
    with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
        storage.opened().get("99555")
    storage.packs[prefix] = pack
    storage.records[prefix]["99555"] = b"changed"
    assert storage.opened().get("105380") == b"105380"
    with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
        storage.opened().get("99555")
    del storage.packs[prefix]  # as an old version left it
    with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
        storage.opened().get("105380")


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.binary(min_size=1, max_size=2), st.integers(1, 9), max_size=6), max_size=12))
def test_nonces_are_a_dictionary_that_forgets_by_height(steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonces, "_RECENT", 5)
        found, plain = nonces.Nonces.of({}, height=0), {}
        for height, used in enumerate(steps, start=1):
            lives = {nonce: height + more for nonce, more in used.items() if nonce not in plain}
            found = found.after(height, lives)
            plain = {nonce: until for nonce, until in {**plain, **lives}.items() if until > height}
            assert (dict(found), len(found)) == (plain, len(plain))
            assert all((nonce in found) == (nonce in plain) for nonce in used)
