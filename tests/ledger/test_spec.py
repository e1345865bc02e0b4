"""The examples of docs/spec are what the code says, byte for byte."""

import json
import re
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.hsm.authorisation import require_engine_takes
from moorline.ledger import blocks, checkpoint, evidence, genesis, places, proof, records, snapshot, state, transactions
from moorline.ledger.engines.node import Committed
from moorline.ledger.light_client import LedgerTrust, verify_bundle
from moorline.ledger.parameters import PARAMETERS
from moorline.ledger.tree import Tree
from moorline.policy import conditions
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


def test_one_transaction_of_every_kind_does_what_the_page_says():
    """verifies that: the history executes from its genesis, and after it each kind writes and tells what its row says."""
    found = json.loads((SPEC / "examples" / "ledger-transactions.json").read_text("utf-8"))
    after = state.initial(genesis.parse(bytes.fromhex(found["genesis"])))
    for one in found["history"]:
        done = state.execute(after, [bytes.fromhex(one["transaction"])], time_ms=one["time_ms"])
        assert isinstance(done.outcomes[0], state.Applied)
        after = done.state
    assert after.root.hex() == found["state_root"]
    text, kinds = page("ledger-transactions.md"), set()
    for case in found["cases"]:
        data = bytes.fromhex(case["transaction"])
        done = state.execute(after, [data], time_ms=found["time_ms"])
        (outcome,) = done.outcomes
        assert isinstance(outcome, state.Applied), case["kind"]
        assert sorted(outcome.writes) == case["writes"]
        assert [event.kind for event in outcome.events] == case["events"]
        assert done.state.root.hex() == case["state_root"]
        body = transactions.parse(data).body
        kinds.add(body.kind if isinstance(body, transactions.Propose) else type(body).__name__)
        assert f"| `{case['kind']}` | {case['sender']} | " in text
    assert kinds == {*transactions.ACTIONS, "Approve", *transactions.PROVIDER_BODIES}


def test_the_parameters_on_the_page_are_those_there_are():
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) to (\d+) \| (\d+|as the genesis says) \|", page("ledger-transactions.md"), re.MULTILINE
    )
    assert {name: (int(low), int(high)) for name, low, high, _ in rows} == {
        name: (one.low, one.high) for name, one in PARAMETERS.items()
    }
    assert {name: int(initial) for name, _, _, initial in rows if initial.isdigit()} == {
        name: one.initial for name, one in PARAMETERS.items() if name != "max_age_s"
    }


def test_the_conditions_on_their_page_are_taken_and_complete():
    text = page("contract-conditions.md")
    (example,) = re.findall(r"^```cedar\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [one.id for one in conditions.require_valid(example, max_bytes=4096)] == ["office-hours", "no-test-devices"]
    require_engine_takes(example)
    for names in conditions.ATTRIBUTES.values():
        assert [name for name in names if f"`{name}`" not in text] == []


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
    assert places.key_digest("provider/beta").hex()[:8] in text
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
    for part in (block.key, block.value.hex(), places.key_digest(block.key).hex(), places.value_digest(block.value).hex()):
        assert part in text


def test_the_receipt_proves_its_transaction(trust):
    receipt = blocks.parse_receipt(raw("receipt"))
    assert blocks.verify_receipt(receipt, raw("transaction"), trust).height == 2


EMBEDDED = json.loads((SPEC / "examples" / "ledger-embedded.json").read_text("utf-8"))


def test_the_evidence_names_who_its_page_says():
    data, trust = bytes.fromhex(EMBEDDED["evidence"]), LedgerTrust.parse(bytes.fromhex(EMBEDDED["trust"]))
    finding = evidence.verify(data, trust)
    assert (finding.kind.value, finding.height, finding.offenders, finding.forked) == ("heads", 2, ("authority-2",), False)
    assert shown(page("ledger-evidence.md").partition("## One thing")[0], data) == []


def test_every_misconduct_names_who_its_page_says():
    found = json.loads((SPEC / "examples" / "ledger-misconduct.json").read_text("utf-8"))
    trust = LedgerTrust.parse(bytes.fromhex(found.pop("trust")))
    offenders = {"invalid-block": "authority-1", "duplicate-vote": "authority-3", "clock-off": "authority-4"}
    assert {kind: evidence.verify(bytes.fromhex(data), trust).offenders for kind, data in found.items()} == {
        kind: (name,) for kind, name in offenders.items()
    }
    text = page("ledger-evidence.md").partition("## One thing")[2].partition("## A block")[0]
    assert shown(text, bytes.fromhex(found["duplicate-vote"])) == []
    assert all(f"`{kind}`" in text for kind in found)


def test_the_block_of_the_page_is_executed_again_and_breaks_the_rule_it_says():
    found = json.loads((SPEC / "examples" / "ledger-wrong-execution.json").read_text("utf-8"))
    data, trust = bytes.fromhex(found["wrong-execution"]), LedgerTrust.parse(bytes.fromhex(found["trust"]))
    finding = evidence.verify(data, trust)
    assert (finding.offenders, finding.fault) == (("authority-1",), "ledger.parameter_bounds")
    text = page("ledger-evidence.md").partition("## A block, executed again")[2]
    assert shown(text, data) == []
    assert f"`{finding.fault}`" in text


def test_the_snapshot_verifies_and_its_piece_is_what_the_manifest_says():
    data, trust = bytes.fromhex(EMBEDDED["manifest"]), LedgerTrust.parse(bytes.fromhex(EMBEDDED["trust"]))
    found = snapshot.verify(data, trust)
    assert found.checkpoint.height == 2
    assert shown(page("ledger-snapshot.md"), data) == []
    piece = snapshot.parse_chunk(bytes.fromhex(EMBEDDED["piece"]))
    content = {entry.key: entry.value for entry in piece.records}
    assert Tree().updated(content).all_subtrees() == list(found.subtrees)
    assert "provider/alpha" in content
