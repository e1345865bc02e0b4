"""What a ledger promises its clients, on both engines, with real processes: none of these tests asks which one it is."""

import asyncio
import hashlib

import pytest
from apps import App

from moorline.errors import Conflict, Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import anchor, blocks, genesis, transactions
from moorline.ledger import state as machine
from moorline.ledger.engines.cometbft.receipts import CometBlock
from moorline.ledger.engines.node import Committed
from moorline.ledger.transactions import AnchorLog
from moorline.wire import schema

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


def log(size, name="hsm-1"):
    return AnchorLog(log=name, size=size, root=hashlib.sha256(f"{name} {size}".encode()).digest())


async def test_a_receipt_proves_that_the_transaction_stands(ledger):
    data = ledger.by_provider("alpha", log(1), await ledger.height())
    receipt = await ledger.submit(data)
    said = blocks.verify_receipt(receipt, data, ledger.made.trust)
    assert said.height == receipt.height
    with pytest.raises(NotAuthentic):
        blocks.verify_receipt(receipt, data + b"\0", ledger.made.trust)


async def test_whoever_has_a_receipt_finds_what_it_did_in_the_next_proof(ledger):
    """verifies that: reads follow one's own writes, at the authority that took them."""
    for size in (2, 3):
        receipt = await ledger.submit(ledger.by_provider("alpha", log(size), await ledger.height()), 1)
        proven = await ledger.proven("audit-anchor/alpha/hsm-1", number=1)
        assert proven.height >= receipt.height
        assert size.to_bytes(1, "big") in proven.record("audit-anchor/alpha/hsm-1")


async def test_presence_and_absence_are_proven_by_every_authority(ledger):
    receipt = await ledger.submit(ledger.by_provider("alpha", log(1, "other"), await ledger.height()))
    for number in (1, 2, 3, 4):
        for _ in range(100):
            proven = await ledger.proven("provider/alpha", "provider/nobody", number=number)
            if proven.height >= receipt.height:
                break
            await asyncio.sleep(0.05)
        assert proven.height >= receipt.height
        assert proven.record("provider/alpha")
        proven.absent("provider/nobody")
        with pytest.raises(Refused, match="ledger.not_proven"):
            proven.record("provider/gamma")


async def test_the_same_transaction_again_gives_its_receipt_again(ledger):
    """verifies that: once and at any authority, and also when it is sent twice at the same time."""
    height = await ledger.height()
    data = ledger.by_provider("alpha", log(10), height)
    first = await ledger.submit(data)
    for number in (1, 2, 3, 4):
        again = await ledger.submit(data, number)
        assert (again.height, again.index, again.transaction) == (first.height, first.index, first.transaction)
    twice = ledger.by_provider("alpha", log(11), height)
    receipts = await asyncio.gather(*(ledger.submit(twice, 1) for _ in range(6)))
    assert len({(one.height, one.index, one.transaction) for one in receipts}) == 1


async def test_a_rejection_says_which_rule_at_whatever_authority(ledger):
    height = await ledger.height()
    good = ledger.by_provider("alpha", log(20), height)
    used = transactions.parse(good).payload.nonce
    await ledger.submit(good)
    unsent = ledger.by_provider("alpha", log(21), height)
    cases = (
        (b"nonsense", Malformed, "ledger.transaction_malformed"),
        (unsent[:-1] + bytes([unsent[-1] ^ 1]), NotAuthentic, "ledger.signature_invalid"),
        (ledger.by_provider("alpha", log(21), height, ledger_id=bytes(32)), Refused, "ledger.other_ledger"),
        (ledger.by_provider("alpha", log(21), height, valid_until=0), Refused, "ledger.expired"),
        (ledger.by_provider("alpha", log(21), height, valid_until=height + 5000), Refused, "ledger.valid_too_long"),
        (ledger.by_provider("alpha", log(21), height, nonce=used), Conflict, "ledger.nonce_used"),
        (ledger.by_authority(1, transactions.Approve(proposal="00" * 32), height)[0], MoorlineError, "ledger."),
        (bytes(transactions.MAX_TRANSACTION_BYTES + 1), MoorlineError, "too_large"),
    )
    for data, kind, code in cases:
        for number in (1, 3):
            with pytest.raises(kind, match=code):
                await ledger.submit(data, number)


async def test_many_at_once_all_stand_and_each_has_its_receipt(ledger):
    height = await ledger.height()
    batch = [ledger.by_provider("alpha", log(size, f"log-{size}"), height) for size in range(1, 41)]
    async with ledger.client() as client:
        receipts = await asyncio.gather(*(client.submit(data) for data in batch))
    for data, receipt in zip(batch, receipts, strict=True):
        blocks.verify_receipt(receipt, data, ledger.made.trust)
    assert len({(one.height, one.index) for one in receipts}) == len(batch)


async def block_of(ledger, number, height):
    """Block time and transactions, and the head that follows, of either engine."""
    async with ledger.client(number) as client:
        data = await client._first(lambda one: one.get_bytes(f"/v1/blocks/{height}"))
    found = schema.decode(Committed, data, max_bytes=blocks.MAX_BLOCK_BYTES)
    head = anchor.parse(found.note)
    if isinstance(head, anchor.CometAnchor):
        body = schema.decode(CometBlock, found.block, max_bytes=blocks.MAX_BLOCK_BYTES)
        return body.header.time_ns // 1_000_000, body.transactions, head.checkpoint
    body = blocks.parse(found.block)
    return body.header.time_ms, body.transactions, head.checkpoint


async def test_the_blocks_lead_from_the_genesis_to_the_proven_root(ledger, tmp_path):
    """verifies that: transactions and block times alone give the root, in this process and under both engines' rules."""
    head = await ledger.height()
    found = [await block_of(ledger, 1, height) for height in range(1, head + 1)]
    genesis_ = genesis.parse(ledger.made.genesis.encode())
    state, embedded = machine.initial(genesis_), blocks.genesis_head(genesis_)
    app = App(tmp_path / "app", ledger.made)
    try:
        for time_ms, batch, said in found:
            state = machine.execute(state, batch, time_ms=time_ms).state
            assert state.root == said.state_root
            _, embedded, outcomes = blocks.make(embedded, batch, time_ms=time_ms)
            executed = app.chain.finalize(said.height, batch, time_ms=time_ms)
            app.chain.commit()
            assert embedded.state.root == executed.state.root == said.state_root
            assert len(outcomes) == len(batch)
    finally:
        app.close()
    assert any(batch for _, batch, _ in found)


async def caught_up(ledger, number, height):
    for _ in range(300):
        try:
            status = await ledger.status(number)
        except Unavailable:
            status = {"height": -1}
        if status["height"] >= height:
            return status
        await asyncio.sleep(0.1)
    pytest.fail(f"authority {number} stays at {status['height']} of {height}")


async def test_one_authority_dead_the_ledger_goes_on_and_it_catches_up(ledger):
    """verifies that: three of four go on; the fourth, killed, comes back to the same root."""
    await ledger.kill(4)
    for size in range(30, 33):
        receipt = await ledger.submit(ledger.by_provider("alpha", log(size), await ledger.height()), 1)
    await ledger.start(4)
    await caught_up(ledger, 4, receipt.height)
    proven = await ledger.proven("audit-anchor/alpha/hsm-1", number=1)
    for _ in range(300):
        try:
            theirs = await ledger.proven("audit-anchor/alpha/hsm-1", number=4)
        except MoorlineError:
            theirs = None
        if theirs is not None and theirs.checkpoint.state_root == proven.checkpoint.state_root:
            break
        await asyncio.sleep(0.1)
    assert theirs.record("audit-anchor/alpha/hsm-1") == proven.record("audit-anchor/alpha/hsm-1")


async def test_all_killed_and_started_again_nothing_is_lost(ledger):
    """verifies that: what had a receipt before a power cut is there afterwards, and the ledger goes on."""
    data = ledger.by_provider("alpha", log(50), await ledger.height())
    receipt = await ledger.submit(data)
    await ledger.kill(1, 2, 3, 4)
    await ledger.start(1, 2, 3, 4)
    again = await ledger.submit(data)
    assert (again.height, again.index) == (receipt.height, receipt.index)
    after = await ledger.submit(ledger.by_provider("alpha", log(51), again.height))
    assert after.height > receipt.height
