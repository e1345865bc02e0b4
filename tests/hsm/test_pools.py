"""Pools: keys of every kind, taken once, lost and never doubled by a crash, made ahead by what was taken lately."""

from __future__ import annotations

import os
import signal

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from moorline.clock import Instant
from moorline.errors import NotAuthentic
from moorline.hsm import pool as pools
from moorline.hsm.pool import Demand, KeyPool, Watermarks
from moorline.storage.broker_pool import PoolEntry
from moorline.storage.broker_store import BrokerStore
from moorline.wire import keys
from moorline.wire.session import KeyKind
from statements import before_each

NOW = Instant(1_800_000_000)
KINDS = {
    KeyKind.P256: (ec.EllipticCurvePrivateKey, 256),
    KeyKind.P384: (ec.EllipticCurvePrivateKey, 384),
    KeyKind.ED25519: (ed25519.Ed25519PrivateKey, None),
    KeyKind.RSA2048: (rsa.RSAPrivateKey, 2048),
    KeyKind.ML_DSA_65: (mldsa.MLDSA65PrivateKey, None),
}


@pytest.mark.parametrize("kind", KeyKind)
def test_a_key_of_each_kind_is_whole_and_certified(pool, store, ca, kind):
    """verifies that: a pair fits together, is of its kind, is bound to its place at rest, and can stand in a certificate."""
    from moorline.nfv import Role, SpiffeId

    store.add_to_pool("records", kind.value, [pool.make("records", kind.value)])
    public, private = pool.take("records", kind, NOW)
    key = load_der_private_key(private, None)
    family, bits = KINDS[kind]
    assert isinstance(key, family)
    assert bits is None or key.key_size == bits
    assert key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == public
    assert store.pools() == {}
    name = SpiffeId(trust_domain="alpha.test", role=Role.SERVICE, segments=("records", "r-1"))
    leaf = ca.issue(public, name, NOW)
    certified = leaf.certificate.public_key()
    assert certified.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == public
    made = pool.make("records", kind.value)
    with pytest.raises(NotAuthentic):
        pool.open(_taken(made), "records", "another")


def _taken(made: PoolEntry):
    from moorline.storage.broker_pool import Taken

    return Taken(public=made.public, wrapped=made.wrapped, again=False)


def test_an_empty_pool_makes_the_key_now(pool, store):
    public, private = pool.take("records", KeyKind.P256, NOW)
    assert keys.public_bytes(load_der_private_key(private, None).public_key()) == public


def test_what_is_reserved_is_gone_before_it_is_used(token, store, database_url):
    """verifies that: of two brokers none ever gets a key of the other, also when one dies with what it had reserved."""
    maker = KeyPool(token, store, Watermarks(low=1, high=4))
    made = [maker.make("records", "p-256") for _ in range(pools.RESERVED + 5)]
    store.add_to_pool("records", "p-256", made)
    first, second = (KeyPool(token, BrokerStore.open(database_url), Watermarks(low=1, high=4)) for _ in range(2))
    one = first.take("records", KeyKind.P256, NOW)
    assert store.pool_size("records", "p-256") == 5
    del first  # died: what it had reserved is lost
    others = [second.take("records", KeyKind.P256, NOW) for _ in range(6)]
    assert len({public for public, _ in (one, *others)}) == 7
    reserved = {entry.public for entry in made[: pools.RESERVED]}
    assert not reserved & {public for public, _ in others}


def _die_at(url: str, step: int) -> tuple[int, bytes]:
    """Take a key in a process that is killed before its statement number `step`: how it ended, and what it got."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        other = BrokerStore.open(url)
        seen = 0

        def count(*_):
            nonlocal seen
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        before_each(other._engine, count)
        os.write(write, other.take_from_pool("records", "p-256", count=1, at=NOW)[0].public)
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    got = os.read(read, 100)
    os.close(read)
    return status, got


def test_killed_while_taking_a_key_is_taken_or_there(store, database_url):
    """verifies that: SIGKILL at any statement leaves each key in the pool or gone; none is in the pool and with somebody."""
    step = 0
    while True:
        store.add_to_pool("records", "p-256", [PoolEntry(public=b"%d" % step, wrapped=b"w")])
        before = store.pool_size("records", "p-256")
        status, got = _die_at(database_url, step)
        assert store.pool_size("records", "p-256") in (before, before - 1)
        assert not got or got not in {e.public for e in store.take_from_pool("records", "p-256", count=100, at=NOW)}
        if not os.WIFSIGNALED(status):
            assert got
            break
        step += 1
    assert step > 4


def test_demand_is_measured_and_forgotten():
    """verifies that: a steady rate is found, and half of it forgotten in a half-life."""
    demand = Demand()
    for tenth in range(1200):
        demand.taken(2, tenth / 10)
    assert demand.rate(119.9) == pytest.approx(20, rel=0.05)
    assert demand.rate(119.9 + pools.HALF_LIFE_S) == pytest.approx(10, rel=0.05)


def test_a_pool_holds_what_is_taken_lately(token, store):
    """verifies that: the busiest pool is topped up first, to its horizon, within its bound, a few keys at a time."""
    now = [0.0]
    pool = KeyPool(token, store, Watermarks(low=2, high=4, most=30), elapsed=lambda: now[0])
    pool.refill("quiet", "tls")
    pool.refill("busy", "tls")
    for _ in range(40):
        pool.took("busy", "tls")
    assert store.pools() == {("quiet", "tls"): 4, ("busy", "tls"): 4}
    assert pool.top_up(at_most=8) == 8
    while pool.top_up(at_most=8):
        pass
    filled = store.pools()
    assert filled["quiet", "tls"] == 4
    assert 20 < filled["busy", "tls"] <= 30
    for _ in range(400):
        pool.took("busy", "tls")
    while pool.top_up(at_most=100):
        pass
    filled = store.pools()
    assert filled["busy", "tls"] == 30
    now[0] = 1000.0  # nobody asks any more
    store.take_from_pool("busy", "tls", count=filled["busy", "tls"], at=NOW)
    assert pool.low()
    while pool.top_up(at_most=8):
        pass
    assert store.pools()["busy", "tls"] == 4
    assert not pool.low()
