"""The examples of docs/spec are what the code says, byte for byte."""

import json
import re
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.ledger import blocks, checkpoint, genesis, proof, records, transactions, tree
from moorline.ledger.engines.node import Committed
from moorline.ledger.light_client import LedgerTrust, verify_bundle
from moorline.wire import schema

SPEC = Path(__file__).parents[2] / "docs" / "spec"
EXAMPLE = json.loads((SPEC / "examples" / "ledger.json").read_text("utf-8"))


def raw(name):
    return bytes.fromhex(EXAMPLE[name])


def page(name):
    return (SPEC / name).read_text("utf-8")


def shown(text, data):
    """Every hex string of the page, as far as it is written, is part of these bytes."""
    return [found for found in re.findall(r"h'([0-9a-f]{8,})…?'", text) if found not in data.hex()]


@pytest.fixture(scope="module")
def trust():
    found = LedgerTrust.parse(raw("trust"))
    assert found == genesis.parse(raw("genesis")).trust()
    assert found.ledger_id == raw("ledger_id")
    return found


def test_the_blocks_execute_again_from_the_genesis(trust):
    """verifies that: genesis and transactions alone give the state root and checkpoint on the pages."""
    head = blocks.genesis_head(genesis.parse(raw("genesis")))
    for one in EXAMPLE["blocks"]:
        block = blocks.parse(bytes.fromhex(one["block"]))
        assert blocks.encode(block).hex() == one["block"]
        head, _ = blocks.execute_again(head, block)
        note = checkpoint.parse_note(one["note"].encode())
        assert checkpoint.verify_note(note, trust.authorities, trust.quorum) == head.checkpoint()
        assert schema.encode(Committed(block=schema.encode(block), note=note.encode()))
    assert head.state.root.hex() == EXAMPLE["state_root"]
    assert EXAMPLE["state_root"] in page("ledger-state.md")
    indented = "\n".join(f"    {line}" if line else "" for line in EXAMPLE["blocks"][-1]["note"].splitlines())
    assert indented in page("ledger-checkpoint.md")
    assert shown(page("ledger-checkpoint.md"), bytes.fromhex(EXAMPLE["blocks"][-1]["block"])) == []


def test_the_transaction_reads_as_its_page_says():
    transaction = transactions.parse(raw("transaction"))
    assert transaction.id.hex() == EXAMPLE["transaction_id"]
    assert EXAMPLE["transaction_id"] in page("ledger-transactions.md")
    assert transaction.payload.kind == "RegisterReferenceValues"
    assert len(raw("transaction")) == 384
    assert shown(page("ledger-transactions.md"), raw("transaction")) == []


def test_every_body_and_its_codes_are_on_the_page():
    text = page("ledger-transactions.md")
    names = (*transactions.ACTIONS, *transactions.AUTHORITY_BODIES, *transactions.PROVIDER_BODIES)
    assert [name for name in names if f"`{name}" not in text] == []


def test_the_bundle_verifies_and_proves_what_its_page_says(trust):
    note = checkpoint.parse_note(EXAMPLE["blocks"][-1]["note"].encode())
    state = verify_bundle(raw("bundle"), trust, now=Instant(note.checkpoint.time + 1))
    assert records.parse(records.ReferenceValuesRecord, state.record("reference-values/alpha/firmware")).kind == "tpm"
    state.absent("provider/beta")
    parsed = proof.parse_bundle(raw("bundle"))
    assert parsed.tree == raw("tree_proof")
    text = page("ledger-proof-bundle.md")
    drawn = re.findall(r"^    +(0[0-3])(?: ([0-9a-f]{8})…)?(?: ([0-9a-f]{8})…)?", text, re.MULTILINE)
    assert "".join("".join(node) for node in drawn) == "".join(drawn_nodes(raw("tree_proof")))
    assert tree.key_digest("provider/beta").hex()[:8] in text
    assert shown(text, raw("bundle")) == []


def drawn_nodes(data):
    """Kind and the first four bytes of each hash, node by node."""
    while data:
        size = {0: 1, 1: 65, 2: 1, 3: 33}[data[0]]
        yield data[:1].hex() + "".join(data[at : at + 4].hex() for at in range(1, size, 32))
        data = data[size:]


def test_the_record_and_its_digests_are_on_the_page():
    block = proof.parse_bundle(raw("bundle")).records[-1]
    text = page("ledger-state.md")
    for part in (block.key, block.value.hex(), tree.key_digest(block.key).hex(), tree.value_digest(block.value).hex()):
        assert part in text


def test_the_receipt_proves_its_transaction(trust):
    receipt = blocks.parse_receipt(raw("receipt"))
    assert blocks.verify_receipt(receipt, raw("transaction"), trust).height == 2
