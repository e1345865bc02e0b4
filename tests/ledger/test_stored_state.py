"""The state as it lies in a database: read along one path where many keys crowd, and whatever is damaged there is named."""

import pytest
import sqlalchemy as sa

from moorline.errors import NotAuthentic
from moorline.ledger.engines import node_state
from moorline.ledger.tree import Tree
from moorline.ledger.tree_nodes import Subtree
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore

CROWD = ("99555", "105380", "142526", "149863", "239805", "325860")  # of one subtree


class Stored:
    """A store with a state in it, and the tree read from there."""

    def __init__(self, url):
        self.url, self.store = url, LedgerStore(open_database(url, "ledger"))
        self.whole = Tree()

    def put(self, content):
        self.whole = self.whole.updated(content)
        self.store.put_state(node_state.writes_of(self.whole, content, {}))

    def opened(self):
        state = node_state.StoredState(self.store, bytes(32))
        rows = [Subtree(prefix=prefix, hash=digest, keys=keys) for prefix, digest, keys in self.store.subtrees()]
        return state, Tree.stored(rows, state.read, state)

    def change(self, statement):
        engine = sa.create_engine(self.url)
        with engine.begin() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()


@pytest.fixture
def stored(database_url):
    found = Stored(database_url)
    found.put({name: name.encode() for name in (*CROWD, "alone")})
    yield found
    found.store.close()


def test_a_crowd_is_packed_as_it_is_written_and_goes_on_from_there(stored):
    """verifies that: a pack is there and is used, records are read one by one, and what is written next is the same."""
    (prefix,) = {one.prefix for one in stored.whole.all_subtrees() if one.keys > 1}
    assert stored.store.pack(prefix) is not None
    assert stored.store.pack(prefix ^ 1) is None
    state, tree = stored.opened()
    whole_reads = []
    state.read = whole_reads.append
    assert (tree.root, tree.get("142526"), tree.get("absent")) == (stored.whole.root, b"142526", None)
    assert whole_reads == []
    after = tree.updated({"142526": b"changed", "149863": b"too"})
    assert after.root == stored.whole.updated({"142526": b"changed", "149863": b"too"}).root
    assert after.packed(["142526"]) == stored.whole.updated({"142526": b"changed", "149863": b"too"}).packed(["142526"])
    assert tree.get("142526") == b"142526"
    assert state.scrub(tree, prefix) == len(CROWD)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE packs SET pack = (SELECT hash FROM subtrees LIMIT 1)",
        "UPDATE records SET value = (SELECT hash FROM subtrees LIMIT 1) WHERE key = '142526'",
        "DELETE FROM records WHERE key = '142526'",
    ],
)
def test_a_damaged_pack_or_record_of_a_crowd_is_named(stored, change):
    (prefix,) = {one.prefix for one in stored.whole.all_subtrees() if one.keys > 1}
    stored.change(change)
    state, tree = stored.opened()
    with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
        tree.get("142526")
    with pytest.raises(NotAuthentic, match="ledger.state_damaged"):
        state.scrub(tree, prefix)
    assert tree.get("alone") == b"alone"


def test_a_crowd_that_was_never_packed_is_read_whole_and_packed_when_written(stored):
    """verifies that: an old version's state, which has no packs, is the same; what is taken away takes its pack along."""
    (prefix,) = {one.prefix for one in stored.whole.all_subtrees() if one.keys > 1}
    stored.change("DELETE FROM packs")
    assert stored.opened()[1].get("99555") == b"99555"
    stored.put({"99555": b"new"})
    assert stored.store.pack(prefix) is not None
    assert stored.opened()[1].get("99555") == b"new"
    stored.store.clear_state([prefix])
    assert (stored.store.pack(prefix), stored.store.records(prefix, prefix)) == (None, [])
