"""Broker processes race for one launch token, again and again: each time exactly one of them wins.

A few hundred races on each database in the ordinary suite, ten thousand with --long.
"""

from __future__ import annotations

import collections
import multiprocessing
import sys
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.errors import Refused
from moorline.storage.broker_pool import PoolEntry
from moorline.storage.broker_store import BrokerStore

sys.path.insert(0, str(Path(__file__).parent))
from test_consumption import LATER, LAUNCHER, NOW, launch_of, moved

BROKERS = 2


def _race(url, number, races, gate, said):
    """One broker: shows every token with session keys of its own, at the same moment as the others."""
    store = BrokerStore.open(url)
    won = []
    for race in range(races):
        wanted = launch_of(race, session=f"{number}-{race}", instance=f"i-{race}")
        gate.wait(60)
        try:
            won.append((race, store.consume(wanted, advance=moved, not_after=LATER, at=NOW).public))
        except Refused as error:
            assert error.code == "launch.token_consumed"
    store.close()
    said.put((number, won))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("races", [250, pytest.param(10_000, marks=pytest.mark.long)])
def test_of_two_brokers_exactly_one_wins_each_token(database_url, races):
    """verifies that: per token one winner, one key pair, one alarm that names both sessions; over all, no pair twice."""
    store = BrokerStore.open(database_url)
    store.admit_launcher(launcher=LAUNCHER, ticket=b"t" * 32, measurement=b"m", chip=b"c", session="l", at=NOW)
    store.open_epoch(epoch=1, opened=NOW, not_after=Instant(NOW + 100), grace_s=10, wrapped=b"w")
    store.grant_lease(launcher=LAUNCHER, epoch=1, count=races, not_after=LATER, counter=2, at=NOW)
    store.add_to_pool("records", "tls", [PoolEntry(public=b"%d" % n, wrapped=b"w") for n in range(races + 5)])
    store.close()
    context = multiprocessing.get_context("fork")
    gate, said = context.Barrier(BROKERS), context.Queue()
    processes = [context.Process(target=_race, args=(database_url, n, races, gate, said)) for n in range(BROKERS)]
    for process in processes:
        process.start()
    won = dict(said.get(timeout=3600) for _ in processes)
    for process in processes:
        process.join()
    winners = collections.Counter(race for one in won.values() for race, _ in one)
    assert winners == dict.fromkeys(range(races), 1)
    assert len({public for one in won.values() for _, public in one}) == races
    store = BrokerStore.open(database_url)
    assert store.pool_size("records", "tls") == 5
    alarms = store.alarms(limit=races + 1)
    assert len(alarms) == races
    for alarm in alarms:
        assert alarm.code == "launch.token_consumed"
        assert {alarm.first.split("-")[0], alarm.second.split("-")[0]} == {"0", "1"}
        assert alarm.first.split("-")[1] == alarm.second.split("-")[1]
    store.close()
