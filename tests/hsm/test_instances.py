"""How an instance ends: its host loses its verdict, it is retired, a later generation is launched; and how one comes back.

The stories run a real broker process on a real token and ledger, and kill it at each step it makes durable.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.ledger import records
from moorline.ledger import transactions as tx
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.records import RevocationKind, RevocationRecord
from moorline.rats import Tier
from moorline.storage.broker_generations import HOST_LOST, RETIRED, SUPERSEDED
from moorline.storage.broker_instances import InstanceStore
from moorline.storage.broker_store import BrokerStore
from moorline.storage.steps import VARIABLE
from moorline.storage.verifier_events import LOST, VerdictEvent
from moorline.storage.verifier_store import VerifierStore
from moorline.wire import keys, launch, schema
from moorline.wire.session import Activation, FunctionFields, FunctionSecrets, SessionRole, resume_message
from statements import before_each

sys.path.insert(0, str(Path(__file__).parent))

from test_consumption import LATER, NOW, issued, launch_of, moved, ready, refused  # noqa: F401 - a fixture
from test_sessions import FUNCTION_CODE, spki, svid, world  # noqa: F401 - a fixture

WRAPPED = b"the wrapped storage key of one generation" * 3


# The store -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def instances(ready):  # noqa: F811
    """One instance, live and confirmed, in its first generation on h1."""
    ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW, storage=WRAPPED, commitment=b"c" * 32)
    ready.confirm(launch_of(), issued(), at=NOW)
    return InstanceStore(ready)


def loss(cursor=1, host="h1"):
    return VerdictEvent(cursor=cursor, host=host, at=NOW, kind=LOST, code="host.kernel", result_expires=NOW)


def code_of(asked, *arguments, **named):
    with pytest.raises(MoorlineError) as caught:
        asked(*arguments, **named)
    return caught.value.code


def on_disk(directory, needle):
    return [path.name for path in directory.glob("store.db*") if needle in path.read_bytes()]


def test_a_lost_verdict_ends_what_runs_on_the_host(instances):
    """verifies that: nothing of it is renewed any more, its revocation is intended, and the cursor moved with it."""
    instances.require_live("r-1", 1)
    assert instances.act_on_loss(loss(host="h2"), at=NOW) == ()
    (ended,) = instances.act_on_loss(loss(2), at=NOW)
    assert (ended.instance, instances.cursor()) == ("r-1", 2)
    assert code_of(instances.require_live, "r-1", 1) == "renewal.host_not_standing"
    assert code_of(instances.renew, "r-1", 1, issued("2"), kind="function-renewed", at=NOW) == "renewal.host_not_standing"
    assert code_of(instances.storage_key, "r-1", 1) == "renewal.storage_destroyed"
    assert [(one.id, one.code) for one in instances.pending()] == [("r-1", "host.kernel")]
    assert instances.act_on_loss(loss(3), at=NOW) == ()
    assert len(instances.pending()) == 1


def test_a_loss_just_before_consumption_refuses_it(ready):  # noqa: F811
    """verifies that: between the look at a host and the consumption no lost verdict slips through."""
    InstanceStore(ready).act_on_loss(loss(7), at=NOW)
    assert refused(ready, launch_of()) == "launch.host_not_standing"
    assert ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW, verdicts_seen=7)


def test_the_storage_key_is_withheld_from_a_retry_after_the_loss(ready):  # noqa: F811
    """verifies that: a function that was launched and lost its host before it confirmed gets no key any more."""
    taken = ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW, storage=WRAPPED)
    assert (
        taken.storage
        == ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW, storage=b"another").storage
        == WRAPPED
    )
    InstanceStore(ready).act_on_loss(loss(), at=NOW)
    assert refused(ready, launch_of()) == "renewal.host_not_standing"
    assert code_of(ready.confirm, launch_of(), issued(), at=NOW) == "renewal.host_not_standing"


def test_retirement_erases_the_key_from_every_file(instances, database_url, tmp_path):
    """verifies that: after retirement neither database nor log hold the wrapped key; PostgreSQL claims no such thing."""
    if database_url.startswith("postgresql"):
        assert instances.retire("r-1", 1, by="o1", reason="drift", at=NOW).destroyed == "storage-key"
        assert not instances.erase()  # so the answer to the orchestrator names its log as not proven
        return
    assert on_disk(tmp_path, WRAPPED)
    first = instances.retire("r-1", 1, by="spiffe://alpha.test/orchestrator/o1", reason="drift", at=NOW)
    assert instances.erase()
    assert on_disk(tmp_path, WRAPPED) == []
    assert (first.state, first.destroyed) == (RETIRED, "storage-key")
    assert instances.retire("r-1", 1, by="somebody", reason="again", at=NOW) == first
    assert code_of(instances.require_live, "r-1", 1) == "renewal.instance_revoked"
    assert len(instances.pending()) == 1


def test_the_key_of_a_function_that_never_confirmed_goes_too(ready):  # noqa: F811
    ready.consume(launch_of(), advance=moved, not_after=LATER, at=NOW, storage=WRAPPED)
    retired = InstanceStore(ready).retire("r-1", 1, by="o1", reason="drift", at=NOW)
    assert retired.destroyed == "storage-key,function-key"
    assert refused(ready, launch_of()) == "launch.token_consumed"


def test_a_generation_retired_before_its_launch_is_never_launched(ready):  # noqa: F811
    """verifies that: a token that is under way when its launch is given up opens nothing later; the next generation does."""
    retired = InstanceStore(ready).retire("r-1", 1, by="o1", reason="the host drifted meanwhile", at=NOW)
    assert (retired.state, retired.destroyed) == (RETIRED, "")
    assert refused(ready, launch_of()) == "launch.generation_behind"
    ready.consume(launch_of(generation=2), advance=moved, not_after=LATER, at=NOW)


def test_a_later_generation_ends_the_earlier_one(instances, ready):  # noqa: F811
    """verifies that: two generations of an instance never live at once, and each has a name of its own to revoke."""
    ready.consume(launch_of(1, session="b", generation=2), advance=moved, not_after=LATER, at=NOW, storage=b"new" * 20)
    assert [(one.generation, one.state) for one, _ in instances.rows()] == [(2, "live"), (1, SUPERSEDED)]
    assert code_of(instances.require_live, "r-1", 1) == "renewal.generation_behind"
    assert instances.require_live("r-1", 2).identity == "r-1-g2"
    assert [one.id for one in instances.pending()] == ["r-1"]
    assert refused(ready, launch_of(2, session="c", generation=2)) == "launch.generation_behind"
    instances.act_on_loss(loss(), at=NOW)
    assert {one.id for one in instances.pending()} == {"r-1", "r-1-g2"}
    assert {one.state for one, _ in instances.rows()} == {HOST_LOST, SUPERSEDED}


def test_names_of_generations_do_not_collide():
    assert launch.identity_name("a", 1) == "a"
    assert launch.identity_name("a", 12) == "a-g12"
    with pytest.raises(Malformed):
        launch.require_instance_name("a-g12")
    launch.require_instance_name("a-g")


def _die_at(url, step, act) -> int:
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
        act(InstanceStore(other))
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.retire("r-1", 1, by="o1", reason="drift", at=NOW),
        lambda store: store.act_on_loss(loss(5), at=NOW),
    ],
    ids=["retire", "loss"],
)
def test_sigkill_anywhere_leaves_all_or_nothing(instances, ready, database_url, act):  # noqa: F811
    """verifies that: key, state, intention, cursor and audit entry change together, and going on makes one intention."""
    before = len(ready.audit())
    step = 0
    while _die_at(database_url, step, act) == signal.SIGKILL:
        step += 1
        ended = bool(instances.pending())
        assert ended == (len(ready.audit()) > before)
        (row, revocation) = instances.rows()[0]
        assert ended == (row.state != "live") == (revocation is not None)
        if row.state == HOST_LOST or not ended:
            assert (instances.cursor() == 5) == ended
    assert step > 8
    act(instances)
    assert len(instances.pending()) == 1


# A broker process ------------------------------------------------------------------------------------------------------

story = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


def marked(test):
    for mark in story:
        test = mark(test)
    return test


class Function:
    """A launched function, with what it was given."""

    def __init__(self, world, fields, session):  # noqa: F811
        self.world, self.fields, self.session = world, fields, session
        self.secrets = schema.decode(FunctionSecrets, session.secrets)
        self.key = serialization.load_der_private_key(self.secrets.private_key, None)

    @classmethod
    async def launched(cls, world, **changes):  # noqa: F811
        fields = world.fields(**changes)
        return cls(world, fields, await world.function(fields))

    @property
    def spiffe_id(self):
        return self.session.activation.spiffe_id

    def resume(self, *, fields=None, key=None, signing=None, **guest):
        fields, key = fields or self.fields, key or self.key
        return self.world.open(
            SessionRole.RESUME,
            schema.encode(FunctionFields(launch_fields=launch.encode_fields(fields))),
            guest={"measurement": FUNCTION_CODE, "host_data": launch.commitment(fields), **guest},
            proof=lambda digest: keys.KeySigner(key).sign(resume_message(digest)),
            signing=signing or keys.public_bytes(self.key.public_key()),
        )

    async def ended(self):
        async with asyncio.timeout(20):
            return (await self.session.ended()).code


async def revoked(world, identity):  # noqa: F811
    """Waits until the ledger proves the revocation; its record."""
    key = records.revocation_key(RevocationKind.INSTANCE, "alpha", identity)
    async with asyncio.timeout(30):
        while True:
            bundle = await world.consortium.client.prove((key,))
            state = verify_bundle(bundle, world.consortium.ceremony.trust, now=world.now)
            try:
                return records.parse(RevocationRecord, state.record(key))
            except Refused:
                await asyncio.sleep(0.1)


async def rows(world):  # noqa: F811
    async with world.alpha.admin() as admin:
        found = (await admin.get_json("/v1/instances"))["instances"]
    return {(row["instance"], row["generation"]): row for row in found}


async def audited(world, event):  # noqa: F811
    first, found = 0, []
    async with world.alpha.admin() as admin:
        while True:
            page = (await admin.get_json("/v1/audit", {"first": str(first)}))["entries"]
            found += [entry for entry in page if entry["kind"] == event]
            if not page:
                return found
            first += len(page)


@marked
async def test_renewal_and_a_lost_verdict(world):  # noqa: F811
    """verifies that: while its host stands a function is renewed; when it does not, it is told, revoked, and never back."""
    one = await Function.launched(world)
    renewed = schema.decode(Activation, await one.session.call("renew", b""))
    assert renewed.spiffe_id == one.spiffe_id
    world.tell("h1", "host.file_not_in_reference_values")
    assert await one.ended() == "renewal.host_not_standing"
    await revoked(world, one.fields.instance)
    world.tell("h1")
    assert await world.refused(one.resume()) == "renewal.host_not_standing"
    again = replace(one.fields, generation=2, sequence=world.fields().sequence, not_after=world.now + 60)
    two = Function(world, again, await world.function(again))
    assert two.spiffe_id == f"{one.spiffe_id}-g2"
    assert two.secrets.storage_key != one.secrets.storage_key
    assert schema.decode(Activation, await two.session.call("renew", b"")).spiffe_id == two.spiffe_id
    late = replace(again, sequence=world.fields().sequence)
    assert await world.refused(world.function(late)) == "launch.generation_behind"
    await two.session.aclose()


@marked
async def test_without_a_standing_result_nothing_is_renewed(world):  # noqa: F811
    """verifies that: a host that fell silent is refused at renewal, also before anybody told of an event."""
    one = await Function.launched(world)
    before = world.results.pop("h1")
    try:
        with pytest.raises(MoorlineError) as caught:
            await one.session.call("renew", b"")
        assert caught.value.code == "renewal.host_not_standing"
        assert (await audited(world, "renewal-refused"))[-1]["body"]["code"] == "renewal.host_not_standing"
    finally:
        world.results["h1"] = before
    assert await one.session.call("renew", b"")  # the control: the same request, once the host stands
    await one.session.aclose()


@marked
async def test_a_function_comes_back_after_the_broker_was_killed(world):  # noqa: F811
    """verifies that: the identity key and fresh evidence resume a session; another key, launch or guest does not."""
    one = await Function.launched(world)
    await world.alpha.broker.stop(signal.SIGKILL)
    assert await one.ended() in {"session.closed", "peer.gone"}
    await world.alpha.broker.start()
    stranger = ec.generate_private_key(ec.SECP256R1())
    assert await world.refused(one.resume(key=stranger)) == "renewal.proof_invalid"
    assert await world.refused(one.resume(signing=spki())) == "renewal.proof_invalid"
    other = replace(one.fields, configuration_digest=b"\x45" * 32)
    assert await world.refused(one.resume(fields=other)) == "renewal.not_known"
    assert await world.refused(one.resume(fields=replace(one.fields, epoch=2**40))) == "renewal.not_known"
    assert await world.refused(one.resume(fields=replace(one.fields, sequence=2**63))) == "launch.number_range"
    assert await world.refused(one.resume(host_data=b"z" * 32)) == "launch.commitment_mismatch"
    assert await world.refused(one.resume(measurement=b"z" * 48)) == "launch.measurement_mismatch"
    back = await one.resume()
    assert back.secrets == b""
    assert back.activation.spiffe_id == one.spiffe_id
    newer = await one.resume()
    async with asyncio.timeout(10):
        assert (await back.ended()).code == "session.superseded"
    assert schema.decode(Activation, await newer.call("renew", b"")).spiffe_id == one.spiffe_id
    await newer.aclose()


@marked
async def test_an_orchestrator_retires_an_instance(world):  # noqa: F811
    """verifies that: the key is gone from the broker's files, the session closed, the identity revoked; repeatably."""
    one = await Function.launched(world)
    path, body = f"/v1/instances/{one.fields.instance}/retire", {"generation": 1, "reason": "drift of h1"}
    for name, code in (("verifier/v1", "http.not_authorised"), ("device/d", "http.not_authorised")):
        async with world.alpha.https(await svid(world.alpha, f"spiffe://alpha.test/{name}")) as client:
            with pytest.raises(Refused) as caught:
                await client.post_json(path, body)
            assert caught.value.code == code
    async with world.alpha.https() as client:
        with pytest.raises(NotAuthentic):
            await client.post_json(path, body)
    orchestrator = await svid(world.alpha, "spiffe://alpha.test/orchestrator/o1")
    async with world.alpha.https(orchestrator) as client:
        for wrong in ({}, {**body, "more": 1}, {**body, "generation": 0}, {**body, "reason": ""}, {**body, "reason": "\n"}):
            with pytest.raises(Malformed):
                await client.post_json(path, wrong)
        answer = await client.post_json(path, body)
        assert answer == await client.post_json(path, body)
        assert (answer["destroyed"], answer["not_proven"]) == (["storage-key"], ["enclave-memory", "database-copies"])
        assert answer["revoked_at_height"] > 0
        assert await one.ended() == "renewal.instance_revoked"
        assert await world.refused(one.resume()) == "renewal.instance_revoked"
        never = await client.post_json("/v1/instances/never-launched/retire", body)
        assert (never["destroyed"], never["not_proven"]) == ([], [])
    assert await world.refused(world.function(world.fields(instance="never-launched"))) == "ledger.revoked"
    entry = next(one for one in await audited(world, "instance-retired") if one["body"]["reason"] == "drift of h1")
    assert entry["body"]["by"] == "spiffe://alpha.test/orchestrator/o1"


@marked
async def test_a_revoked_orchestrator_ends_nobody(world):  # noqa: F811
    """verifies that: after RevokeOrchestrator its certificate, as good as ever by chain and serial number, opens nothing."""
    revoked_one = await svid(world.alpha, "spiffe://alpha.test/orchestrator/o2")
    path, body = "/v1/instances/never-launched/retire", {"generation": 1, "reason": "drift of h1"}
    async with world.alpha.https(revoked_one) as client, asyncio.timeout(20):
        assert (await client.post_json(path, body))["destroyed"] == []
        await world.alpha.submitter.send(tx.RevokeOrchestrator(id="o2"))
        while True:  # proofs are used again for a thirtieth of max_age
            try:
                await client.post_json(path, body)
            except Refused as refused_now:
                assert refused_now.code == "ledger.orchestrator_not_active"
                break
            await asyncio.sleep(0.05)


@marked
async def test_a_restored_verifier_makes_the_broker_look_for_itself(world, tmp_path):  # noqa: F811
    """verifies that: cursors the verifier does not know cost nobody who stands, and nobody who does not is overlooked."""
    world.tell("h1")
    one = await Function.launched(world)
    before, world.verdicts = world.verdicts, VerifierStore.open(tmp_path / "restored.db")
    before._engine.dispose()
    world.changed.set()  # the long poll that is under way ends
    world.tell("h1")
    assert await one.session.call("renew", b"")
    world.tell("h1", "host.kernel")
    assert await one.ended() == "renewal.host_not_standing"
    world.tell("h1")
    two = await Function.launched(world)
    world.verdicts, before = VerifierStore.open(tmp_path / "restored-again.db"), world.verdicts
    before._engine.dispose()
    world.results["h1"] = {"vector": {"executables": Tier.CONTRAINDICATED}}
    world.changed.set()
    assert await two.ended() == "renewal.host_not_standing"
    world.tell("h1")


STEPS = ["broker.loss.recorded", "broker.revocation.signed", "broker.revocation.committed", "broker.instance.retired"]


@marked
@pytest.mark.parametrize("step", STEPS)
async def test_a_broker_killed_at_each_step_goes_on(world, tmp_path, monkeypatch, step):  # noqa: F811
    """verifies that: SIGKILL behind each durable step; after the restart the instance is ended and revoked once."""
    order = tmp_path / "kill"
    monkeypatch.setenv(VARIABLE, str(order))
    await world.alpha.broker.stop()
    await world.alpha.broker.start()
    one = await Function.launched(world)
    orchestrator = await svid(world.alpha, "spiffe://alpha.test/orchestrator/o1")
    path, body = f"/v1/instances/{one.fields.instance}/retire", {"generation": 1, "reason": step}
    order.write_text(step)
    if step == "broker.instance.retired":
        async with world.alpha.https(orchestrator) as client:
            with pytest.raises(MoorlineError):
                await client.post_json(path, body)
    else:
        world.tell("h1", "host.kernel")
    async with asyncio.timeout(20):
        await world.alpha.broker.running.wait()
    assert not order.exists()
    await world.alpha.broker.start()
    await revoked(world, one.fields.instance)
    assert await world.refused(one.resume()) in {"renewal.host_not_standing", "renewal.instance_revoked"}
    async with world.alpha.https(orchestrator) as client:
        answer = await client.post_json(path, body)
        assert answer["revoked_at_height"] > 0
        assert answer["destroyed"] == ["storage-key"]
    committed = await audited(world, "identity-revoked")
    assert len([entry for entry in committed if entry["body"]["id"] == one.fields.instance]) == 1
    world.tell("h1")
