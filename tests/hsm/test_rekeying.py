"""Fresh keys made together: each stands for itself, nobody waits for company, nobody is forgotten."""

from __future__ import annotations

import asyncio
import threading

import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key
from cryptography.x509 import load_der_x509_certificate

from moorline.audit import log
from moorline.clock import Instant
from moorline.errors import Refused, Unavailable
from moorline.nfv import Role, SpiffeId
from moorline.services.broker_batches import BATCH_MAX, Batches
from moorline.services.broker_rekeying import Rekey, rekeyed
from moorline.storage import broker_generations as generations
from moorline.storage.broker_facts import AUDIT_DOMAIN
from moorline.storage.broker_generations import Generation
from moorline.storage.broker_instances import InstanceStore
from moorline.wire.session import KeyKind, RekeyReply

NOW = Instant(1_800_000_000)


class Parts:
    """The parts of a broker that make keys: the real ones, without its doors."""

    class settings:  # noqa: N801 - as the broker's field is called
        renew_after_s = 600

    def __init__(self, store, pool, ca):
        self.store, self.pool, self.ca, self.instances = store, pool, ca, InstanceStore(store)
        self.clock, self.refill = self, asyncio.Event()

    def now(self):
        return NOW


def generation(store, instance, state=generations.LIVE):
    made = Generation(
        instance=instance,
        generation=1,
        service="records",
        host="h1",
        state=state,
        code="",
        commitment=b"",
        destroyed="",
        at=NOW,
    )
    with store.transaction() as c:
        generations.begin(c, made, storage=b"")


def wanted(instance):
    name = SpiffeId(trust_domain="alpha.test", role=Role.SERVICE, segments=("records", f"{instance}.g1"))
    return Rekey(instance=instance, generation=1, service="records", spiffe_id=name, kind=KeyKind.P256)


def test_each_of_a_batch_gets_its_own_recorded_key_and_an_ended_one_gets_none(store, pool, ca):
    """verifies that: no two get one key, every certificate is recorded, and the refused takes nothing along."""
    for name in ("a", "b", "c"):
        generation(store, name)
    generation(store, "ended", generations.RETIRED)
    pool.refill("records", "p256")
    before = store.pool_size("records", "p256")
    outcomes = rekeyed(Parts(store, pool, ca), [wanted(name) for name in ("a", "ended", "b", "unknown", "c", "a")])
    assert [type(one) for one in outcomes] == [RekeyReply, Refused, RekeyReply, Refused, RekeyReply, RekeyReply]
    assert (outcomes[1].code, outcomes[3].code) == ("renewal.instance_revoked", "renewal.not_known")
    made = [one for one in outcomes if isinstance(one, RekeyReply)]
    publics = set()
    for one in made:
        private = load_der_private_key(one.private_key, None)
        certificate = load_der_x509_certificate(one.activation.certificate)
        assert private.public_key() == certificate.public_key()
        publics.add(private.public_key().public_numbers())
    assert len(publics) == 4
    recorded = {one.der for one in store.certificates(valid_at=NOW)}
    assert recorded == {one.activation.certificate for one in made}
    entries = [log.parse_entry(data) for data in store.audit()]
    assert [one.event for one in entries].count("function-renewed") == 4
    log.verify(store.audit(), domain=AUDIT_DOMAIN)
    assert before - store.pool_size("records", "p256") <= 32


def test_a_generation_that_ends_between_look_and_record_is_refused_in_the_transaction(store, pool, ca, monkeypatch):
    """verifies that: what is judged counts in the transaction; a retirement in between leaves no certificate."""
    generation(store, "a")
    generation(store, "b")
    parts = Parts(store, pool, ca)
    take = pool.take

    def retires_meanwhile(service, kind, now):
        taken = take(service, kind, now)
        parts.instances.retire("a", 1, by="test", reason="over", at=NOW)
        return taken

    monkeypatch.setattr(pool, "take", retires_meanwhile)
    ended, alive = rekeyed(parts, [wanted("a"), wanted("b")])
    assert isinstance(ended, Refused)
    assert isinstance(alive, RekeyReply)
    assert [one.der for one in store.certificates(valid_at=NOW)] == [alive.activation.certificate]


def test_a_token_that_fails_for_one_fails_for_that_one(store, pool, ca, monkeypatch):
    for name in ("a", "b"):
        generation(store, name)
    issue, calls = ca.issue, []

    def fails_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise Unavailable("token.failed", "the token could not do it")
        return issue(*arguments)

    monkeypatch.setattr(ca, "issue", fails_once)
    first, second = rekeyed(Parts(store, pool, ca), [wanted("a"), wanted("b")])
    assert isinstance(first, Unavailable)
    assert isinstance(second, RekeyReply)


def test_a_database_that_fails_gives_nobody_a_key(store, pool, ca, monkeypatch):
    """verifies that: what is not recorded does not leave."""
    generation(store, "a")
    parts = Parts(store, pool, ca)
    rekeyed(parts, [wanted("a")])

    def gone(_work):
        raise Unavailable("storage.unavailable", "the database cannot do this now")

    monkeypatch.setattr(store, "write", gone)
    with pytest.raises(Unavailable):
        rekeyed(parts, [wanted("a")])


def test_those_who_come_meanwhile_are_one_batch_and_nobody_is_forgotten():
    """verifies that: one batch runs at a time, those who wait go together, and every one is answered with its own."""

    async def story():
        batches, sizes, let = Batches(), [], threading.Event()

        def answer(some):
            sizes.append(len(some))
            assert let.wait(30)
            return [Refused("test.no", "no", got=one) if one % 7 == 0 else one for one in some]

        asked = [asyncio.ensure_future(batches.ask(number, answer)) for number in range(1, 101)]
        await asyncio.sleep(0.05)
        assert len(sizes) == 1
        let.set()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [int(one.got) if isinstance(one, Refused) else one for one in outcomes] == list(range(1, 101))
        assert max(sizes) <= BATCH_MAX
        assert len(sizes) < 10
        for number in range(1, 50):  # again and again from rest, also in the step in which a batch ends
            assert await batches.ask(50 * 7 + 1, answer) == 351, number

    asyncio.run(story())


def test_what_an_answer_raises_is_told_to_all_of_its_batch_and_the_next_are_answered():
    async def story():
        batches = Batches()

        def fails(_some):
            raise Unavailable("storage.unavailable", "gone")

        said = await asyncio.gather(*(batches.ask(n, fails) for n in range(5)), return_exceptions=True)
        assert {type(one) for one in said} == {Unavailable}
        assert await batches.ask(1, list) == 1

    asyncio.run(story())


def test_one_who_left_does_not_keep_the_others_from_their_answers():
    async def story():
        batches, let = Batches(), threading.Event()

        def answer(some):
            assert let.wait(30)
            return list(some)

        leaves, stays = (asyncio.ensure_future(batches.ask(n, answer)) for n in (1, 2))
        await asyncio.sleep(0.01)
        leaves.cancel()
        let.set()
        assert await stays == 2
        assert await batches.ask(3, answer) == 3

    asyncio.run(story())
