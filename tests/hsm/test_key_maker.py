"""The process that makes keys ahead: pairs for its seeds, when nobody else wants the processor, gone when the broker is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key

from moorline.hsm import key_pairs
from moorline.hsm.pool import KeyPool, Watermarks
from moorline.services.key_maker import KeyMaker
from moorline.wire import keys
from moorline.wire.session import KeyKind


@pytest.fixture
def maker():
    made = KeyMaker()
    yield made
    made.close()


def gone(pid, within_s=10.0):
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("kind", [kind for kind in KeyKind if key_pairs.seed_bytes(kind)])
def test_it_makes_the_pairs_that_the_seeds_say(maker, kind):
    """verifies that: nothing is decided in the child; the token's randomness alone says which keys there are."""
    seeds = [os.urandom(key_pairs.seed_bytes(kind)) for _ in range(3)]
    assert maker.make(kind, seeds) == [key_pairs.pair(kind, seed) for seed in seeds]


def test_it_runs_only_where_a_core_would_idle_and_shows_its_memory_to_nobody(maker):
    maker.make(KeyKind.P256, [bytes(40)])
    assert os.sched_getscheduler(maker.pid) == os.SCHED_IDLE
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            Path(f"/proc/{maker.pid}/environ").read_bytes()
    limits = Path(f"/proc/{maker.pid}/limits").read_text()
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]


def test_one_that_was_killed_is_replaced_and_nobody_waits_for_it(maker):
    """verifies that: a dead child costs no key: those asked for are made here, the next by a new child."""
    maker.make(KeyKind.P256, [bytes(40)])
    first = maker.pid
    os.kill(first, signal.SIGKILL)
    assert gone(first)
    seed = os.urandom(40)
    assert maker.make(KeyKind.P256, [seed]) == [key_pairs.pair(KeyKind.P256, seed)]
    maker.make(KeyKind.P256, [seed])
    assert maker.pid not in (None, first)


def test_a_child_that_answers_nonsense_is_not_believed():
    liar = KeyMaker((sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes(4)); sys.stdin.read()"))
    seed = os.urandom(40)
    try:
        assert liar.make(KeyKind.P256, [seed]) == [key_pairs.pair(KeyKind.P256, seed)]
        assert liar.pid is None
    finally:
        liar.close()


def test_a_broker_that_ends_does_not_wait_for_a_child_that_gets_no_time():
    """verifies that: closing ends a question that is under way, and what it would have answered is not made after all."""
    starved = KeyMaker((sys.executable, "-c", "import time; time.sleep(600)"))
    answers = []
    asking = threading.Thread(target=lambda: answers.append(starved.make(KeyKind.P256, [bytes(40)])))
    asking.start()
    while starved.pid is None:
        time.sleep(0.01)
    starved.close()
    asking.join(10)
    assert answers == [[]]
    assert starved.pid is None


def test_it_does_not_outlive_a_broker_that_was_killed():
    """verifies that: kill -9 of the broker leaves no process that holds key material."""
    script = (
        "import os, time; from moorline.services.key_maker import KeyMaker; m = KeyMaker();"
        "m.make('p-256', [bytes(40)]); print(m.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


def test_what_may_be_needed_later_is_made_there_and_what_is_needed_now_here(token, store):
    asked = []

    def ahead(profile, seeds):
        asked.append((profile, len(seeds)))
        return [key_pairs.pair(profile, seed) for seed in seeds]

    pool = KeyPool(token, store, Watermarks(low=2, high=6), ahead=ahead)
    pool.refill("records", "tls")  # empty: below the low mark, a launch waits for it
    assert asked == []
    assert store.pool_size("records", "tls") == 6
    store.take_from_pool("records", "tls", count=3, at=1_800_000_000)
    assert pool.top_up(at_most=8) == 3
    assert asked == [("tls", 3)]
    store.take_from_pool("records", "tls", count=5, at=1_800_000_000)
    assert pool.top_up(at_most=8) == 5
    assert asked == [("tls", 3)]
    taken = store.take_from_pool("records", "tls", count=6, at=1_800_000_000)
    for one in taken:
        private = load_der_private_key(pool.open(one, "records", "tls"), None)
        assert keys.public_bytes(private.public_key()) == one.public
