"""A database of the first version with a ledger in it: opened, migrated and gone on with, on SQLite and on PostgreSQL."""

import importlib.util
import secrets
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

import moorline.storage
from moorline.clock import Instant
from moorline.ledger import blocks, checkpoint, transactions
from moorline.ledger.checkpoint import Note
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.transactions import Approve, RetireAuthority, Sender, SenderKind, SetParameter
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore

from .conftest import NAMES, NOW, consortium_at

FIRST_VERSION = Path(moorline.storage.__file__).parent / "migrations" / "ledger" / "versions" / "0001_initial.py"


def signed(made, name, body):
    payload = transactions.make(
        body,
        sender=Sender(kind=SenderKind.AUTHORITY, name=name),
        ledger_id=made.made.genesis.ledger_id,
        nonce=secrets.token_bytes(32),
        valid_until=60,
    )
    return transactions.sign(payload, made.authorities[name].signer()), payload


def node_over(made, url):
    return Node(
        name=NAMES[0],
        genesis=made.made.genesis,
        key=made.authorities[NAMES[0]].checkpoint,
        store=LedgerStore(open_database(url, "ledger")),
        now_ms=lambda: NOW * 1000,
    )


def add_block(made, node, batch):
    block, head, outcomes = blocks.make(node.head, batch, time_ms=node.head.state.time_ms + 1000)
    found = head.checkpoint()
    lines = [checkpoint.sign_note(found, name=NAMES[0], key=made.authorities[NAMES[0]].checkpoint)]
    lines += [
        checkpoint.cosign(found, name=name, key=made.authorities[name].checkpoint, now=Instant(NOW)) for name in NAMES[:3]
    ]
    note = Note(checkpoint=found, signatures=tuple(lines)).encode()
    node.commit(Committed(block=blocks.encode(block), note=note), head, outcomes)
    return [(one.id, one.valid_until) for one in outcomes]


def grown(made, url):
    """A ledger of three blocks, the second of which changes the authorities; its node, and the ids of its transactions."""
    node = node_over(made, url)
    ids = [add_block(made, node, [signed(made, NAMES[1], transactions.propose(SetParameter(name="max_age_s", value=9)))[0]])]
    retire, payload = signed(made, NAMES[0], transactions.propose(RetireAuthority(name=NAMES[3])))
    approvals = [signed(made, name, Approve(proposal=transactions.proposal_id(payload)))[0] for name in NAMES[1:3]]
    ids.append(add_block(made, node, [retire, *approvals]))
    ids.append(add_block(made, node, []))
    assert set(node.authorities()) == set(NAMES[:3])
    return node, ids


def of_first_version(node, ids, url):
    """The same ledger as the first version stored it."""
    engine = sa.create_engine(url)
    spec = importlib.util.spec_from_file_location("first_version", FIRST_VERSION)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changes = dict(node.store.set_changes())
    with engine.begin() as connection:
        with Operations.context(MigrationContext.configure(connection)):
            module.upgrade()
        connection.execute(sa.text("CREATE TABLE ledger_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
        connection.execute(sa.text("INSERT INTO ledger_version VALUES ('0001')"))
        for height, of_block in enumerate(ids, start=1):
            found = node.store.block(height)
            connection.execute(
                sa.text("INSERT INTO blocks VALUES (:height, :body, :note, :leaf, :authorities)"),
                {
                    "height": height,
                    "body": found.body,
                    "note": found.note,
                    "leaf": found.leaf,
                    "authorities": changes.get(found.note),
                },
            )
            for position, (one, _) in enumerate(of_block):
                row = {"id": one, "height": height, "position": position}
                connection.execute(sa.text("INSERT INTO transactions VALUES (:id, :height, :position)"), row)
        for key, value in node.store.records():
            connection.execute(sa.text("INSERT INTO records VALUES (:key, :value)"), {"key": key, "value": value})
        for nonce, until in node.store.nonces().items():
            connection.execute(sa.text("INSERT INTO nonces VALUES (:nonce, :until)"), {"nonce": nonce, "until": until})
        last = node.store.block(len(ids))
        connection.execute(
            sa.text("INSERT INTO signed VALUES (:height, :body, 'line')"), {"height": len(ids), "body": last.body}
        )
    engine.dispose()


def test_a_database_of_the_first_version_is_opened_with_everything_in_it(tmp_path, database_url):
    """verifies that: head, state, log, sets, receipts, nonces and what was signed are there after migration; the next block
    follows, and it opens again."""
    made = consortium_at(tmp_path / "consortium")
    old, ids = grown(made, f"sqlite:///{tmp_path / 'new.db'}")
    of_first_version(old, ids, database_url)
    node = node_over(made, database_url)
    try:
        assert node.head.checkpoint() == old.head.checkpoint()
        assert node.note == old.note
        assert dict(node.store.set_changes()) == dict(old.store.set_changes())
        assert node.store.nonces() == old.store.nonces()
        assert node.store.signed().height == 3
        for one in (one for of_block in ids for one in of_block):
            assert node.receipt(*one) == old.receipt(*one)
        assert node.prove(["parameter/max_age_s"]) == old.prove(["parameter/max_age_s"])
        add_block(made, node, [signed(made, NAMES[1], transactions.propose(SetParameter(name="max_age_s", value=8)))[0]])
        head = node.head.checkpoint()
    finally:
        node.store.close()
        old.store.close()
    again = node_over(made, database_url)
    assert again.head.checkpoint() == head
    again.store.close()


@pytest.mark.parametrize("table", ["records", "blocks"])
def test_a_damaged_database_of_the_first_version_is_refused(tmp_path, table):
    """verifies that: migration does not make a changed record or block good."""
    made = consortium_at(tmp_path / "consortium")
    old, ids = grown(made, f"sqlite:///{tmp_path / 'new.db'}")
    url = f"sqlite:///{tmp_path / 'old.db'}"
    of_first_version(old, ids, url)
    old.store.close()
    change = {
        "records": "UPDATE records SET value = x'a0' WHERE key = 'parameter/max_age_s'",
        "blocks": "UPDATE blocks SET leaf = zeroblob(32) WHERE height = 1",
    }
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(change[table]))
    engine.dispose()
    with pytest.raises(Exception, match=r"ledger\.") as caught:
        node_over(made, url)
    assert caught.value.code == "ledger.database_corrupt"
