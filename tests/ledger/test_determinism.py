"""The same transactions give the same state in any process, whatever its hash seed, locale, time zone or year."""

import os
import subprocess
import sys

import pytest

from moorline.ledger import blocks, genesis, state, transactions
from moorline.ledger.state import Applied, Rejected
from moorline.ledger.verified import Verified
from moorline.wire import cbor

from .conftest import NOW
from .everything import World

EXECUTE = """
import datetime, sys, time
year = int(sys.argv[1])
if year:
    # Another year, for whatever asks for the time: nothing of the state machine may.
    class Other(datetime.datetime):
        @classmethod
        def now(cls, tz=None): return super().now(tz).replace(year=year)
        @classmethod
        def utcnow(cls): return super().now().replace(year=year)
    datetime.datetime = Other
    time.time = lambda: (year - 1970) * 31557600.0
    time.time_ns = lambda: (year - 1970) * 31557600 * 10**9
from moorline.ledger import blocks, genesis
from moorline.wire import cbor
found, batches = cbor.decode(sys.stdin.buffer.read(), max_bytes=1 << 24)
head = blocks.genesis_head(genesis.parse(found))
codes = []
for time_ms, batch in batches:
    block, head, outcomes = blocks.make(head, batch, time_ms=time_ms)
    codes += [getattr(one, "code", "-") for one in outcomes]
print(head.state.root.hex(), head.frontier.root().hex(), head.digest.hex(), " ".join(codes))
"""


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Every kind of transaction that there is, and odd ones, as blocks; with what this process makes of them."""
    world = World(tmp_path_factory.mktemp("world") / "c")
    batches = [[time_ms, [one]] for time_ms, one in world.history]
    bodies = [world.signed(label, body) for label, body in world.bodies()]
    batches += [[one[0], [one[1]]] for one in world.history[len(batches) :]]
    batches.append([world.consortium.now_ms + 1000, [*bodies, b"garbage", bodies[0], *bodies[-3:]]])
    head, codes = blocks.genesis_head(world.consortium.made.genesis), []
    for time_ms, batch in batches:
        _, head, outcomes = blocks.make(head, batch, time_ms=time_ms)
        codes += [getattr(one, "code", "-") for one in outcomes]
    assert {"-", "ledger.transaction_malformed", "ledger.nonce_used"} <= set(codes)
    expected = f"{head.state.root.hex()} {head.frontier.root().hex()} {head.digest.hex()} {' '.join(codes)}\n"
    return cbor.encode([world.consortium.made.genesis.encode(), batches]), expected, head


@pytest.mark.parametrize(
    ("year", "seed", "extra"),
    [
        (0, "0", {}),
        (0, "1", {"TZ": "Asia/Tokyo"}),
        (1999, "random", {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONUTF8": "0"}),
        (2061, "4242", {"TZ": "America/St_Johns", "LC_ALL": "C"}),
    ],
)
def test_every_process_comes_to_the_same_roots(history, year, seed, extra):
    """verifies that: hash seed, locale, time zone and year leave no trace in state root, log root, header and refusals."""
    given, expected, _ = history
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(year)],
        input=given,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": seed, **extra},
    )
    assert done.stdout.decode() == expected, done.stderr.decode()


def test_a_state_put_together_from_its_records_has_the_same_root(history):
    """verifies that: the order in which records come back from a database does not matter."""
    _, _, head = history
    found = dict(head.state.records)
    for order in (sorted(found), sorted(found, reverse=True)):
        again = state.restored(
            ledger_id=head.state.ledger_id, height=1, time_ms=1, records={key: found[key] for key in order}, nonces={}
        )
        assert again.root == head.state.root


def test_certificates_are_judged_at_block_time(tmp_path):
    """verifies that: one transaction, two block times: valid in the block of its year and expired in one of another."""
    world = World(tmp_path / "c")
    label, body = next((label, body) for label, body in world.bodies() if type(body) is transactions.RegisterIssuingCa)
    data = world.signed(label, body)
    for time_ms, expected in ((world.consortium.now_ms + 1000, None), ((NOW + 10 * 365 * 86400) * 1000, "certificate")):
        (outcome,) = state.execute(world.consortium.state, [data], time_ms=time_ms).outcomes
        if expected is None:
            assert isinstance(outcome, Applied)
        else:
            assert isinstance(outcome, Rejected)
            assert outcome.code in ("ledger.certificate_validity", "ledger.certificate_issuer")


def test_signatures_that_held_before_are_remembered_and_change_no_outcome(history):
    """verifies that: with a memory of signatures, empty or full, roots and refusals are the same; forged is refused."""
    given, expected, _ = history
    found, batches = cbor.decode(given, max_bytes=1 << 24)
    memory = Verified()
    for _ in range(2):
        head, codes = blocks.genesis_head(genesis.parse(found)), []
        for time_ms, batch in batches:
            before = head
            block, head, outcomes = blocks.make(before, batch, time_ms=time_ms, verified=memory)
            assert blocks.execute_again(before, block, verified=memory)[0].digest == head.digest
            codes += [getattr(one, "code", "-") for one in outcomes]
        assert f"{head.state.root.hex()} {head.frontier.root().hex()} {head.digest.hex()} {' '.join(codes)}\n" == expected
    first_time, (first, *_) = batches[0]
    forged = first[:-1] + bytes([first[-1] ^ 1])
    (outcome,) = state.execute(
        blocks.genesis_head(genesis.parse(found)).state, [forged], time_ms=first_time, verified=memory
    ).outcomes
    assert isinstance(outcome, Rejected)
    assert outcome.code == "ledger.signature_invalid"
