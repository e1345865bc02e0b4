"""Several transactions in one request: each is answered as if it had come alone."""

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Conflict, Malformed, MoorlineError, Unavailable
from moorline.ledger import batch, blocks

from .test_engine import OTHERS, blank, engines, volatile  # noqa: F401 - fixtures

PAGE = Path(__file__).parents[2] / "docs" / "spec" / "ledger-batch.md"


def same(one, other):
    if isinstance(one, MoorlineError):
        return type(one) is type(other) and one.as_problem() == other.as_problem()
    return one == other


ERRORS = st.builds(
    lambda kind, words: kind("ledger.x", words, got=words), st.sampled_from([Conflict, Malformed, Unavailable]), st.text()
)


@given(st.lists(st.binary(max_size=9) | st.none() | ERRORS, max_size=5))
def test_what_came_of_each_survives_the_way(outcomes):
    """verifies that: receipts, errors of every kind with all they say, and what nobody waited for are told apart."""
    found = batch.parse_answers(batch.encode_answers(outcomes), len(outcomes))
    assert all(same(one, other) for one, other in zip(outcomes, found, strict=True))
    with pytest.raises(Malformed, match="ledger.batch_malformed"):
        batch.parse_answers(batch.encode_answers(outcomes), len(outcomes) + 1)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_batch_or_malformed(data):
    for read in (batch.parse, lambda data: batch.parse_answers(data, 1)):
        try:
            read(data)
        except Malformed:
            continue


@given(st.lists(st.integers(0, 70_000), max_size=20))
def test_many_are_split_into_batches_that_are_taken(sizes):
    """verifies that: nothing is lost or reordered, whatever the sizes, and every part is within the bounds."""
    many = [bytes(size) for size in sizes]
    parts = batch.split(many)
    assert [one for part in parts for one in part] == many
    assert all(batch.parse(batch.encode(part)) == tuple(part) for part in parts)
    assert len(batch.split([b""] * 600)) == 3


@pytest.mark.parametrize("odd", [[], [b""] * (batch.MAX_TRANSACTIONS + 1), [bytes(batch.MAX_BYTES)]])
def test_a_batch_is_bounded(odd):
    with pytest.raises(Malformed, match="ledger.batch_malformed"):
        batch.parse(batch.encode(odd))


async def test_each_is_answered_by_itself(engines):  # noqa: F811
    """verifies that: good ones have receipts that stand in order; forged, odd and repeated ones do not spoil them."""
    good = [engines.transaction() for _ in range(5)]
    forged = good[0][:-1] + bytes((good[0][-1] ^ 1,))
    async with engines.running() as running:
        found = await running.sequencer.submit_all([*good, engines.transaction(value=1), b"garbage", good[2], forged])
        receipts = [blocks.parse_receipt(one) for one in found[:5]]
        places = [(one.height, one.index) for one in receipts]
        assert places == sorted(places)
        assert [one.code for one in found[5:7]] == ["ledger.parameter_bounds", "ledger.transaction_malformed"]
        assert found[7] == found[2]
        assert await running.sequencer.submit_all(good) == found[:5]
        later = engines.transaction()
        assert await running.sequencer.submit_all([later], wait=False) == [None]
        assert blocks.parse_receipt(await running.sequencer.submit(later)).height > receipts[0].height


async def test_a_batch_has_no_more_room_than_its_transactions_one_by_one(engines, monkeypatch):  # noqa: F811
    """verifies that: beyond a sender's room the rest of its batch is told so, and others still get in."""
    from moorline.ledger.engines import intake

    monkeypatch.setattr(intake, "SENDER_ROOM", 8)
    monkeypatch.setattr(intake, "UNPROVEN_ROOM", 4)
    for name in OTHERS:
        engines.peers[name].away = True  # nothing leaves the lines yet
    found = await engines.sequencer.submit_all([engines.transaction() for _ in range(12)], wait=False)
    assert [one and one.code for one in found] == [None] * 8 + ["ledger.sender_busy"] * 4
    assert await engines.sequencer.submit_all([engines.transaction(sender="authority-3")], wait=False) == [None]
    engines.sequencer.close()
    await asyncio.sleep(0)
    engines.close()


def test_the_page_shows_a_batch_and_its_answers():
    """verifies that: the bytes on the page are what it says they are, and there is no other encoding of them."""
    text = PAGE.read_text("utf-8")
    shown = re.findall(r"^ {4}((?:[0-9a-f]+\n {4})*[0-9a-f]{20,})\n {6}", text, re.MULTILINE)
    first, second = ("".join(one.split()) for one in shown)
    assert batch.encode(batch.parse(bytes.fromhex(first))) == bytes.fromhex(first)
    receipt, error, taken = batch.parse_answers(bytes.fromhex(second), 3)
    assert (receipt, error.code, error.got, taken) == (b"rrrr", "ledger.transaction_malformed", "cose.not_sign1", None)
    assert batch.encode_answers([receipt, error, taken]).hex() == second
    assert all(f'"{said}"' in text for said in (error.got, error.code, error.says, error.expected))
    assert f"1 to {batch.MAX_TRANSACTIONS} " in text
