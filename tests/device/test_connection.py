"""A stranger's device and a function, both judged by chain, ledger and contract; every bad twin refused with its code."""

import asyncio
import json
import time
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.channel import device as channel
from moorline.clock import Instant, SystemClock
from moorline.device.connection import Wanted, judge_function, require_contract
from moorline.device.store import HIGHEST_FILE
from moorline.errors import MoorlineError
from moorline.ledger import fetching, peers, records, standing
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.records import ContractStatus, RevocationKind, Status
from moorline.verification.chains import verify_chain
from moorline.wire import cbor, guest


async def refusal(awaitable):
    with pytest.raises(MoorlineError) as caught:
        await awaitable
    return caught.value.code


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another process's stead and has no event
            await asyncio.sleep(0.02)


async def ask(connection, **request):
    return cbor.decode(await connection.request(cbor.encode(request)))


async def test_a_device_of_beta_stores_a_record_at_alpha_and_reads_it_back(running):
    async with await running.connect(running.device()) as connection:
        assert str(connection.peer.spiffe_id) == "spiffe://alpha.test/svc/records/i-1"
        assert await ask(connection, op="put", name="r1", data=b"personal data") == {"ok": True}
        assert await ask(connection, op="get", name="r1") == {"data": b"personal data"}
        assert await ask(connection, op="list") == {"names": ["r1"]}
        assert await refusal(ask(connection, op="get", name="other")) == "records.unknown"
        assert await refusal(ask(connection, op="nothing")) == "records.request"
        assert await refusal(connection.request(b"\xff")) == "cbor.undecodable"
    event = json.loads((running.guest / guest.STATUS_FILE).read_text().splitlines()[0])
    assert event["event"] == "active"
    assert event["spiffe_id"] == "spiffe://alpha.test/svc/records/i-1"


async def test_one_device_does_not_see_the_records_of_another(running):
    async with await running.connect(running.device()) as one:
        await ask(one, op="put", name="r1", data=b"mine")
    async with await running.connect(running.device(name="d-2", directory="second", serial=502)) as two:
        assert await ask(two, op="list") == {"names": []}
        assert await refusal(ask(two, op="get", name="r1")) == "records.unknown"


async def test_a_device_of_a_provider_without_a_contract_is_refused_by_both_hsms(running):
    stranger = running.device(running.gamma)
    assert await refusal(running.connect(stranger)) == "access.refused_by_home"
    for logged in (running.homes["gamma.test"], running.broker.hsm):
        assert logged.decisions() == [
            ("home gamma/hsm-1", False, "ledger.contract_other"),
            ("function alpha/hsm-1", False, "ledger.contract_other"),
        ]
    async with await running.connect(running.device(directory="good")) as connection:  # the control
        assert await ask(connection, op="list") == {"names": []}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda w: w.ledger.revoke(RevocationKind.DEVICE, "beta", "d-1"), "ledger.revoked"),
        (lambda w: w.ledger.revoke(RevocationKind.CERTIFICATE, "beta", f"{501:x}"), "ledger.revoked"),
        (lambda w: w.ledger.values.pop("provider/beta"), "ledger.provider_not_active"),
        (lambda w: w.ledger.values.pop("issuing-ca/beta/ca-1"), "ledger.issuing_ca_not_active"),
        (lambda w: w.ledger.contract(status=ContractStatus.WITHDRAWN), "access.refused_by_home"),
        (lambda w: w.ledger.contract(grantee="gamma"), "access.refused_by_home"),
    ],
)
async def test_the_function_refuses_a_device_that_the_ledger_does_not_carry(running, change, code):
    store = running.device()
    change(running)
    assert await refusal(running.connect(store)) == code


async def test_a_revoked_function_is_refused_by_the_device(running):
    running.ledger.revoke(RevocationKind.INSTANCE, "alpha", "i-1")
    assert await refusal(running.connect(running.device())) == "ledger.revoked"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda w: None, None),
        (lambda w: w.ledger.revoke(RevocationKind.INSTANCE, "alpha", "i-1"), "ledger.revoked"),
        (lambda w: w.ledger.revoke(RevocationKind.CERTIFICATE, "alpha", f"{77:x}"), "ledger.revoked"),
        (lambda w: w.ledger.service(status=Status.REMOVED), "ledger.service_not_active"),
        (lambda w: w.ledger.values.pop("provider/alpha"), "ledger.provider_not_active"),
        (lambda w: w.ledger.values.pop("issuing-ca/alpha/ca-1"), "ledger.issuing_ca_not_active"),
        (lambda w: w.ledger.contract(status=ContractStatus.OFFERED), "ledger.contract_not_active"),
        (lambda w: w.ledger.contract(grantee="gamma"), "ledger.contract_other"),
    ],
)
def test_what_a_device_demands_of_a_function(world, change, code):
    change(world)
    leaf = world.alpha.leaf("svc/records/i-1").public_bytes(Encoding.DER)
    now = SystemClock().now()
    chain = verify_chain(leaf, world.alpha.intermediates, world.alpha.roots, now)
    grantees = [standing.contract_keys("c1", provider="alpha", service="records", grantee=g) for g in ("beta", "gamma")]
    bundle = world.ledger.bundle((*peers.instance_keys(chain), *grantees[0], *grantees[1]))
    state = verify_bundle(bundle, world.ledger.trust, now=now)
    wanted = Wanted(provider="alpha", service="records", contract="c1")
    if code is None:
        judge_function(state, chain, wanted)
        require_contract(state, wanted, grantee="beta")
        return
    with pytest.raises(MoorlineError) as caught:  # noqa: PT012 - which of the two refuses is the code's to say
        judge_function(state, chain, wanted)
        require_contract(state, wanted, grantee="beta")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("wanted", "code"),
    [({"service": "others"}, "device.other_function"), ({"provider": "gamma"}, "device.other_function")],
)
async def test_a_device_takes_only_the_function_it_wants(running, wanted, code):
    assert await refusal(running.connect(running.device(), **wanted)) == code


async def test_a_device_needs_the_contract_proven(running):
    assert await refusal(running.connect(running.device(), contract="c9")) == "workload.device_not_authorised"


async def test_a_stale_or_thinly_signed_proof_is_refused(running):
    now = Instant(int(time.time()))

    async def stale(wanted, *, height=0):
        return running.ledger.bundle(wanted, at=Instant(now - 31))

    async def thin(wanted, *, height=0):
        return running.ledger.bundle(wanted, signers=("authority-1", "authority-2"))

    store = running.device()
    for prove, code in ((stale, "ledger.proof_stale"), (thin, "ledger.quorum_missing")):
        assert await refusal(running.connect(store, prove=prove)) == code  # the device will not even send it
        trust = store.trust()
        sent = await prove(await device_keys(store))

        async def bundle(sent=sent):
            return sent

        async def judge(_chain, _status, _secured):
            return None

        async def ask_home(_chain, _secured):
            return b""

        link = channel.connect(
            running.inbound,
            identity=store.identity(),
            roots=trust.roots,
            clock=SystemClock(),
            bundle=bundle,
            ask_home=ask_home,
            judge=judge,
            max_age_s=30,
        )
        assert await refusal(link) == code


async def test_a_device_never_goes_back_behind_what_it_has_seen(running, monkeypatch):
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.1)
    store = running.device()
    now = Instant(int(time.time()))

    async def older(wanted, *, height=0):
        return running.ledger.bundle(wanted, at=Instant(now - 10))

    async with await running.connect(store):
        pass
    assert await refusal(running.connect(store, prove=older)) == "ledger.rollback"
    (store.directory / HIGHEST_FILE).unlink()
    async with await running.connect(store, prove=older):
        pass  # a device that has seen nothing newer takes the same proof: it is fresh enough


async def device_keys(store):
    identity = store.identity()
    chain = verify_chain(identity.chain[0], identity.chain[1:], store.trust().roots, SystemClock().now())
    return peers.device_keys(chain)


async def test_a_proof_of_another_device_is_refused(running):
    other = running.device(name="d-2", directory="second", serial=502)
    wanted = await device_keys(other)

    async def prove(_wanted, *, height=0):
        return running.ledger.bundle(wanted)

    assert await refusal(running.connect(running.device(), prove=prove)) == "ledger.not_proven"


async def test_a_function_cannot_pose_as_a_device(running):
    store = running.device()
    leaf = running.beta.leaf("svc/records/i-9", key=store.key())
    issuers = (running.beta.ca, running.beta.provider, running.beta.authority)
    store.keep_chain(tuple(one.public_bytes(Encoding.DER) for one in (leaf, *(issuer.certificate for issuer in issuers))))
    assert await refusal(running.connect(store)) == "ledger.peer_role"


async def test_a_device_whose_ca_is_not_the_registered_one_is_refused(running):
    key = records.issuing_ca_key("beta", "ca-1")
    record = records.parse(records.IssuingCaRecord, running.ledger.values[key])
    other = running.gamma.ca.certificate.public_bytes(Encoding.DER)
    running.ledger.put(key, replace(record, certificate=other))
    assert await refusal(running.connect(running.device())) in {"ledger.issuer_retired", "ledger.peer_mismatch"}


async def test_a_live_device_is_judged_again_and_cut_off_when_revoked(make_world):
    world = make_world(max_age_s=2)
    world.hand_over()
    await world.start()
    try:
        connection = await world.connect(world.device())
        assert await ask(connection, op="list") == {"names": []}
        world.ledger.revoke(RevocationKind.DEVICE, "beta", "d-1")
        await until(lambda: connection.closed)
        assert await refusal(ask(connection, op="list")) == "ledger.revoked"
    finally:
        await world.stop()


async def test_a_device_that_does_not_renew_its_standing_is_cut_off(make_world):
    world = make_world(max_age_s=1)
    world.hand_over()
    await world.start()
    try:
        connection = await world.connect(world.device())
        connection._renewal.cancel()
        assert await ask(connection, op="list") == {"names": []}
        codes = set()
        async with asyncio.timeout(10):
            while not codes - {None}:
                codes.add(await code_or_none(connection))
        assert codes - {None} == {"device.status_stale"}
    finally:
        await world.stop()


async def code_or_none(connection):
    try:
        await ask(connection, op="list")
    except MoorlineError as error:
        return error.code
    return None


async def test_the_identity_is_renewed_and_used(make_world):
    world = make_world()
    world.broker.renew_after_s = 1
    world.hand_over()
    await world.start()
    try:
        await until(lambda: world.broker.asked.count("serial") >= 2)
        async with asyncio.timeout(10):
            serial = 0
            while serial < 1002:
                async with await world.connect(world.device()) as connection:
                    serial = connection.peer.serial
    finally:
        await world.stop()


async def test_without_its_broker_the_function_serves_nobody(running):
    store = running.device()
    await running.server.aclose()
    code = await refusal(running.connect(store))
    assert code in {"session.closed", "frame.truncated", "peer.gone", "peer.unreachable"}
