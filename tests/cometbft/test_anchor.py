"""Proofs under the CometBFT form of an anchored head: what a client of this engine believes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from apps import NAMES, NOW, retire_last
from heads import digest, head_after, header_at, signed

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.ledger import anchor, blocks, checkpoint
from moorline.ledger.blocks import Receipt
from moorline.ledger.engines.cometbft import receipts
from moorline.ledger.engines.cometbft.receipts import BlockSummary
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.proof import parse_bundle
from moorline.ledger.transactions import parse as parse_transaction
from moorline.wire import schema

KEYS = ["provider/alpha", "provider/beta"]


@pytest.fixture
async def admitted(app):
    await app.decided(app.admission(), by=NAMES[:2])
    app.node.take(head_after(app))
    return app


def now(app, after_s=1):
    return Instant(NOW + (app.chain.state.height + 1) * 10 + after_s)


def trust(app):
    return app.made.genesis.trust()


async def test_presence_and_absence_are_proven_with_the_trust_file_alone(admitted):
    """verifies that: header, commit, root and proof lead from four keys to a record, in one message of little size."""
    bundle = admitted.node.prove(KEYS)
    proven = verify_bundle(bundle, trust(admitted), now=now(admitted))
    assert proven.record("provider/alpha") == admitted.chain.state.get("provider/alpha")
    proven.absent("provider/beta")
    assert proven.height == admitted.chain.state.height
    assert len(admitted.node.prove(KEYS[:1])) <= 4096


def flipped(bundle, at):
    return bundle[:at] + bytes([bundle[at] ^ 1 << at % 8]) + bundle[at + 1 :]


async def test_a_flipped_bit_anywhere_is_refused(admitted):
    bundle = admitted.node.prove(KEYS[:1])
    for at in range(len(bundle)):
        with pytest.raises(MoorlineError):
            verify_bundle(flipped(bundle, at), trust(admitted), now=now(admitted))


async def test_a_flipped_bit_in_a_proof_of_absence_never_makes_a_lie_believed(admitted):
    """The path to an empty place proves every key absent that would lie there: another name may be proven, no false one."""
    bundle = admitted.node.prove(KEYS)
    for at in range(len(bundle)):
        bad = flipped(bundle, at)
        try:
            proven = verify_bundle(bad, trust(admitted), now=now(admitted))
        except MoorlineError:
            continue
        assert proven.height == admitted.chain.state.height
        for entry in parse_bundle(bad).records:
            assert entry.value == admitted.chain.state.get(entry.key), entry.key


async def test_stale_future_foreign_and_older_proofs_are_refused(admitted):
    bundle = admitted.node.prove(KEYS)
    for at, code in ((now(admitted, 31), "ledger.proof_stale"), (now(admitted, -7), "ledger.proof_from_future")):
        with pytest.raises(Refused, match=code):
            verify_bundle(bundle, trust(admitted), now=at)
    with pytest.raises(Refused, match="ledger.other_ledger"):
        verify_bundle(bundle, replace(trust(admitted), ledger_id=bytes(32)), now=now(admitted))
    head = anchor.parse(admitted.node.signed_note()).checkpoint
    with pytest.raises(Refused, match="ledger.rollback"):
        verify_bundle(bundle, trust(admitted), now=now(admitted), highest=replace(head, height=head.height + 1))
    with pytest.raises(NotAuthentic, match="ledger.fork"):
        verify_bundle(bundle, trust(admitted), now=now(admitted), highest=replace(head, root=bytes(32)))
    assert checkpoint.parse_body(head.body()) == head  # a client keeps it as it keeps the other form's


def of_another_round(good):
    return replace(good, signed=replace(good.signed, commit=replace(good.signed.commit, round=1)))


HEADS = {
    "two of four": (lambda app: head_after(app, by=NAMES[:2]), "ledger.quorum_missing"),
    "one twice": (lambda app: head_after(app, by=(*NAMES[:2], NAMES[1])), "ledger.signature_unknown"),
    "other validators": (
        lambda app: head_after(app, signing={name: app.made.genesis.trust().authorities[name] for name in NAMES[:3]}),
        "ledger.signature_unknown",
    ),
    "round changed": (
        lambda app: of_another_round(head_after(app)),
        "ledger.signature_invalid",
    ),
}


@pytest.mark.parametrize("name", HEADS)
async def test_a_head_that_no_quorum_signed_is_refused(admitted, name):
    make, code = HEADS[name]
    with pytest.raises(NotAuthentic, match=code):
        anchor.verify(make(admitted), trust(admitted).authorities, trust(admitted).quorum)
    with pytest.raises(NotAuthentic, match=code):
        admitted.node.take(make(admitted))


async def test_a_client_may_want_more_signatures_than_two_thirds(admitted):
    head = head_after(admitted, by=NAMES[:3])
    anchor.verify(head, trust(admitted).authorities, 3)
    with pytest.raises(NotAuthentic, match="ledger.quorum_missing"):
        anchor.verify(head, trust(admitted).authorities, 4)


async def test_a_form_that_is_none_is_malformed(admitted):
    good = head_after(admitted)
    for bad in (
        b"",
        b"moorline.ledger/",
        replace(good, form="other").encode(),
        replace(good, signed=replace(good.signed, header=replace(good.signed.header, app_hash=b"short"))).encode(),
        replace(good, signed=replace(good.signed, header=replace(good.signed.header, chain_id="x"))).encode(),
        good.encode() + b"\0",
    ):
        with pytest.raises(Malformed):
            anchor.parse(bad)
    assert anchor.parse(good.encode()) == good


async def test_a_change_of_authorities_is_carried_and_signed_by_the_old_set(admitted):
    """verifies that: a client that knows the first four believes the three that are left, on the old ones' word only."""
    app = admitted
    await app.decided(retire_last(), by=NAMES[:3])
    changed = app.chain.state.height
    old = dict(app.made.genesis.trust().authorities)
    left = app.chain.state.authority_set()
    app.node.take(head_after(app, signing=old))
    await app.block()
    last = head_after(app, signing=left, by=NAMES[:3])
    app.node.take(last)
    bundle = app.node.prove(["authority/authority-4"])
    proven = verify_bundle(bundle, trust(app), now=now(app))
    assert proven.height == app.chain.state.height
    # The three alone, without the old set's word for them:
    for spoiled in (
        head_after(app, height=changed + 1, signing=old, by=NAMES[:2]),
        head_after(app, height=changed + 1, signing=old, following={name: left[name] for name in NAMES[:2]}),
        head_after(app, height=changed + 1, signing=left, by=NAMES[:3]),
    ):
        app.store.keep_anchor(changed + 1, spoiled.encode())
        with pytest.raises(NotAuthentic):
            verify_bundle(app.node.prove(["authority/authority-4"]), trust(app), now=now(app))


# Receipts ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def received(app):
    """A transaction in a block of two, with its receipt."""
    data, found = app.proposal(app.admission())
    other = app.approval(found, NAMES[1])
    first = header_at(app, 1, transactions=[data, other])
    await app.block(data, other)
    app.node.take(signed(app, first))
    app.node.take(signed(app, header_at(app, 2, before=first)))
    return app, data, other


async def test_a_receipt_shows_its_transaction_in_the_block(received):
    app, data, other = received
    for one in (data, other):
        receipt = blocks.parse_receipt(app.node.receipt(parse_transaction(one).id))
        assert blocks.verify_receipt(receipt, one, trust(app)).height == 1
        with pytest.raises(NotAuthentic, match="merkle.not_included"):
            blocks.verify_receipt(receipt, data if one is other else other, trust(app))


async def test_a_receipt_that_was_changed_shows_nothing(received):
    app, data, _ = received
    good = blocks.parse_receipt(app.node.receipt(parse_transaction(data).id))
    summary = schema.decode(BlockSummary, good.header)

    def with_header(**changes):
        return replace(good, header=schema.encode(replace(summary, header=replace(summary.header, **changes))))

    bad = (
        replace(good, index=1),
        replace(good, height=2),
        replace(good, time_ms=good.time_ms + 1),
        replace(good, block_proof=()),
        replace(good, log_proof=(bytes(32),)),
        with_header(data_hash=receipts.transaction_leaf(data)),
        with_header(time_ns=summary.header.time_ns + 1_000_000),
        replace(good, note=signed(app, header_at(app, 2)).encode()),
        replace(good, note=signed(app, header_at(app, 2, before=summary.header), NAMES[:2]).encode()),
    )
    for one in bad:
        with pytest.raises(NotAuthentic):
            blocks.verify_receipt(one, data, trust(app))
    assert isinstance(good, Receipt)


# The page ----------------------------------------------------------------------------------------------------------------

SPEC = Path(__file__).parents[2] / "docs" / "spec"


def test_the_example_of_the_page_decodes_and_verifies():
    """verifies that: the header of a real CometBFT hashes to what CometBFT said, and its commit verifies."""
    example = json.loads((SPEC / "examples" / "anchor.json").read_text("utf-8"))
    found = anchor.parse(bytes.fromhex(example["anchor"]))
    authorities = {name: bytes.fromhex(key) for name, key in example["authorities"].items()}
    said = anchor.verify(found, authorities, 3)
    page = (SPEC / "ledger-anchor.md").read_text("utf-8")
    assert found.signed.header.hash().hex() == example["block_hash"]
    assert said.ledger_id.hex() == example["ledger_id"]
    for text in (example["block_hash"], said.state_root.hex(), found.signed.header.chain_id, said.ledger_id.hex()):
        assert text in page
    assert digest("x") != said.root
