"""The profile without forward secrecy, end to end: a device, a function, and two brokers' key code over one SoftHSM token.

What is left out is the brokers' processes: ledger proofs, TLS, HPKE, pair keys in the token, stores and the agent are real.
"""

import asyncio
import contextlib
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moorline.channel import tls
from moorline.channel.messages import pack, unpack, unpack_any
from moorline.channel.records import Direct
from moorline.clock import Instant, SystemClock
from moorline.device import no_pfs
from moorline.device.connection import Wanted
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.hsm.ceremony import initialise
from moorline.hsm.exchange import Party
from moorline.hsm.pair import Ends, PairKeys
from moorline.hsm.token import open_token
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.records import ContractStatus, RevocationKind
from moorline.nfv import SpiffeId
from moorline.services import broker_access, broker_device_keys
from moorline.storage.broker_pairs import PairStore
from moorline.storage.broker_revocations import RevocationStore
from moorline.storage.broker_store import BrokerStore
from moorline.wire import cbor, keys, schema
from moorline.wire.device import Request
from moorline.wire.frames import read_frame, write_frame
from moorline.wire.nopfs import Direction, FunctionKeyCall, FunctionKeyReply, KeyContext, NoPfsHello, NoPfsOffer, NoPfsRecord
from moorline.wire.session import Problem

home_door, recorded = sys.modules["device_world"].home_door, sys.modules["device_world"].recorded

WANTED = Wanted(provider="alpha", service="records", contract="c1")
BOTH = ("tls", "no-pfs")


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    if shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM is not installed")
    made = initialise(tmp_path_factory.mktemp("hsm") / "token", label="pairs")
    with open_token(made.location) as opened:
        yield opened


class Hsm:
    """What broker_device_keys needs of a broker: settings, ledger, stores, pair keys."""

    def __init__(self, world, token, consortium, name, directory):
        self.settings = SimpleNamespace(provider=name, hsm="hsm-1", trust_domain=consortium.trust_domain)
        self.world, self.trust, self.clock = world, world.ledger.trust, SystemClock()
        self.store = BrokerStore.open(f"sqlite:///{directory / f'{name}.db'}")
        self.pairs = PairStore(self.store)
        self.revocations = RevocationStore(self.store)
        self.signer = keys.KeySigner(consortium.hsm.key)
        self.pair_keys = PairKeys(token, self.pairs, lambda: self.signer)
        self.ledger = self
        self.party = Party(provider=name, hsm="hsm-1")

    async def proven(self, wanted):
        bundle = self.world.ledger.bundle(wanted)
        return bundle, verify_bundle(bundle, self.trust, now=self.clock.now())

    async def state(self, wanted):
        return (await self.proven(wanted))[1]

    def meet(self, other):
        """Agree on a pair key, as broker_pairs does it over a session."""
        now = self.clock.now()

        def ends(one, two):
            public = two.signer.public_key()
            return Ends(ledger_id=self.trust.ledger_id, own=one.party, peer=two.party, peer_key=public)

        mine, theirs = ends(self, other), ends(other, self)
        row, offer = self.pair_keys.offer(mine, theirs=other.pair_keys.newest_epoch(theirs), at=now)
        reply = other.pair_keys.answer(theirs, offer, at=now)
        row, confirm = self.pair_keys.agree(mine, row, reply)
        other.pair_keys.confirm(theirs, confirm, at=now)
        self.pair_keys.activate(mine, row, peer_signed=reply.statement, at=now)

    def log(self, event):
        from moorline.audit.log import LogEntry

        entries = (schema.decode(LogEntry, data) for data in self.store.audit())
        return [one.details for one in entries if one.event == event]


class Stage:
    def __init__(self, world, token, directory):
        self.world = world
        self.alpha = Hsm(world, token, world.alpha, "alpha", directory)
        self.beta = Hsm(world, token, world.beta, "beta", directory)
        for epoch in range(1, 200):  # the token outlives this test: go on above what is in it
            if not token.has_secret(f"pair/beta/hsm-1/{epoch}"):
                break
        for one in (self.alpha, self.beta):
            for kind in ("beta", "alpha"):
                for old in range(1, epoch):
                    token.destroy_secret(f"pair/{kind}/hsm-1/{old}")
                    token.destroy_key(f"pair-ephemeral/{kind}/hsm-1/{old}")
            del one
        world.ledger.service(profiles=BOTH)
        world.ledger.contract(profiles=BOTH)
        world.broker.keys = lambda fields, body: broker_device_keys.for_function(self.alpha, fields, body)

    @contextlib.asynccontextmanager
    async def home(self):
        """Beta's HTTPS door."""
        async with home_door(self.world.beta, self.routes) as door:
            yield door

    def routes(self, app):
        """Both profiles, at the same home."""
        broker_device_keys.add_routes(app, self.beta)
        broker_access.add_routes(app, self.world.homes["beta.test"])

    def device(self, home, **how):
        store = self.world.device(**how)
        store.keep_home(home)
        recorded(self.beta.store, store.chain()[0], self.beta.clock.now())
        return store

    async def connect(self, store, wanted=WANTED):
        return await no_pfs.connect(store, self.world.inbound, wanted, clock=SystemClock())


@pytest.fixture
async def stage(running, token, tmp_path):
    made = Stage(running, token, tmp_path)
    made.alpha.meet(made.beta)
    yield made
    for one in (made.alpha, made.beta):
        one.store.close()


async def refusal(awaitable):
    with pytest.raises(MoorlineError) as caught:
        await awaitable
    return caught.value.code


def put(name, data):
    return cbor.encode({"op": "put", "name": name, "data": data})


async def test_a_device_and_a_function_talk_and_both_hsms_log_it(stage):
    async with stage.home() as home:
        store = stage.device(home)
        async with await stage.connect(store) as connection:
            for number in range(3):
                await connection.request(put(f"r{number}", b"one"))
            answer = cbor.decode(await connection.request(cbor.encode({"op": "get", "name": "r2"})))
            assert answer["data"] == b"one"
            with pytest.raises(MoorlineError):  # an error of the application leaves the connection open
                await connection.request(cbor.encode({"op": "get", "name": "nothing"}))
            await connection.request(cbor.encode({"op": "list"}))
        # The forward-secret profile serves at the same port.
        async with await stage.world.connect(store) as connection:
            assert cbor.decode(await connection.request(cbor.encode({"op": "list"})))["names"] == ["r0", "r1", "r2"]
    (claimed,), (sealed,) = stage.alpha.log("no-pfs-key-claimed"), stage.beta.log("no-pfs-key-sealed")
    assert claimed["key_id"] == sealed["key_id"]
    assert claimed["device"] == sealed["device"] == "spiffe://beta.test/device/d-1"


async def test_every_connection_has_another_key(stage):
    async with stage.home() as home:
        store = stage.device(home)
        for _ in range(2):
            async with await stage.connect(store) as connection:
                await connection.request(put("r", b"x"))
    assert len({one["key_id"] for one in stage.alpha.log("no-pfs-key-claimed")}) == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda world: world.ledger.contract(profiles=("tls",)), "nopfs.not_allowed"),
        (lambda world: world.ledger.service(profiles=("tls",)), "nopfs.not_allowed"),
        (lambda world: world.ledger.contract(profiles=BOTH, status=ContractStatus.WITHDRAWN), "ledger.contract_not_active"),
        (lambda world: world.ledger.contract(profiles=BOTH, grantee="gamma"), "ledger.contract_other"),
        (lambda world: world.ledger.contract(profiles=BOTH, service="other"), "ledger.contract_other"),
        (
            lambda world: world.ledger.contract(
                profiles=BOTH, conditions='permit(principal,action,resource) when {context.profile == "tls"};'
            ),
            "access.not_granted",
        ),
        (lambda world: world.ledger.revoke(RevocationKind.DEVICE, "beta", "d-1"), "ledger.revoked"),
    ],
    ids=["contract", "service", "withdrawn", "grantee", "other-service", "conditions", "revoked"],
)
async def test_what_is_not_allowed_gets_no_key_from_either_hsm(stage, change, code):
    """verifies that: the function's broker refuses, and the home HSM refuses too when it is asked alone."""
    async with stage.home() as home:
        store = stage.device(home)
        change(stage.world)
        found = await refusal(stage.connect(store))
        assert found in {code, "ledger.service_not_active"}
        asked = replace_request(stage)
        found = await refusal(
            broker_device_keys.for_device(stage.beta, SpiffeId.parse("spiffe://beta.test/device/d-1"), asked)
        )
        assert found in {code, "ledger.service_not_active"}
    assert stage.alpha.log("no-pfs-key-claimed") == stage.beta.log("no-pfs-key-sealed") == []


def replace_request(stage, **changes):
    from moorline.channel.driver import new_kem
    from moorline.wire.nopfs import DeviceKeyRequest

    made = DeviceKeyRequest(
        function_provider="alpha",
        function_hsm="hsm-1",
        service="records",
        contract="c1",
        pair_epoch=stage.beta.pairs.newest("alpha", "hsm-1").epoch,
        device_nonce=b"d" * 32,
        function_nonce=b"f" * 32,
        kem_public=new_kem().public,
    )
    return schema.encode(replace(made, **changes))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"function_hsm": "hsm-2"}, "ledger.hsm_not_active"),
        ({"function_provider": "gamma"}, "ledger.service_not_active"),
        ({"pair_epoch": 99}, "pair.none"),
        ({"kem_public": b"k" * 65}, "session.kem"),
    ],
)
async def test_the_home_hsm_refuses_what_does_not_fit(stage, changes, code):
    device = SpiffeId.parse("spiffe://beta.test/device/d-1")
    asked = replace_request(stage, **changes)
    found = await refusal(broker_device_keys.for_device(stage.beta, device, asked))
    assert found in {code, "ledger.contract_other", "ledger.not_proven"}
    await broker_device_keys.for_device(stage.beta, device, replace_request(stage))


async def test_another_device_of_the_same_provider_has_other_keys(stage):
    """verifies that: a key names its device: d-2 cannot say it is d-1, and the function never hears its request."""
    async with stage.home() as home:
        thief = stage.device(home, name="d-2", directory="thief", serial=502)
        hello, offer, stream = await greeted(stage, device="spiffe://beta.test/device/d-1")
        asked = replace_request(stage, device_nonce=hello.nonce, function_nonce=offer.nonce, pair_epoch=offer.pair_epoch)
        from moorline.channel.driver import new_kem
        from moorline.channel.session import open_sealed
        from moorline.wire.nopfs import DeviceKeyRequest, DeviceKeys, sealing_info

        kem = new_kem()
        asked = schema.encode(replace(schema.decode(DeviceKeyRequest, asked), kem_public=kem.public))
        sealed = await broker_device_keys.for_device(stage.beta, SpiffeId.parse("spiffe://beta.test/device/d-2"), asked)
        got = schema.decode(DeviceKeys, open_sealed(kem, sealed, info=sealing_info(asked)))
        with pytest.raises(NotAuthentic):
            open_sealed(kem, sealed, info=sealing_info(asked + b"x"))
        sealing = Direct(got.to_function, got.key_id, Direction.TO_FUNCTION, count=9, not_after=Instant(got.not_after))
        record = sealing.seal(schema.encode(Request(id=0, body=put("r", b"x"))), now=SystemClock().now())
        assert await told(stream, record) == "nopfs.record"
        del thief


async def greeted(stage, **changes):
    """A hello sent and the function's offer, by hand."""
    hello = NoPfsHello(
        **{
            "version": 1,
            "device": "spiffe://beta.test/device/d-1",
            "home_provider": "beta",
            "home_hsm": "hsm-1",
            "contract": "c1",
            "nonce": b"d" * 32,
            **changes,
        }
    )
    stream = await tls.dial(stage.world.inbound)
    await write_frame(stream, pack(hello), deadline_s=5)
    return hello, unpack(NoPfsOffer, await read_frame(stream, deadline_s=5)), stream


async def told(stream, record):
    """What the function says to a record: an error's code, or the record it sent back."""
    await write_frame(stream, pack(record), deadline_s=5)
    kind, item = unpack_any(await read_frame(stream, deadline_s=5))
    await stream.aclose()
    if kind == "problem":
        return cbor.decode(schema.from_item(Problem, item).problem)["code"]
    return schema.from_item(NoPfsRecord, item)


def context(stage, hello, offer):
    return KeyContext(
        ledger_id=stage.alpha.trust.ledger_id,
        device_provider="beta",
        device_hsm="hsm-1",
        function_provider="alpha",
        function_hsm="hsm-1",
        pair_epoch=offer.pair_epoch,
        device=hello.device,
        service="records",
        device_nonce=hello.nonce,
        function_nonce=offer.nonce,
    )


def sealing(stage, hello, offer, direction=Direction.TO_FUNCTION):
    made = context(stage, hello, offer)
    key = stage.beta.pair_keys.mac(stage.alpha.party, offer.pair_epoch, made.message(direction))
    return Direct(key, made.key_id(), direction, count=1 << 16, not_after=Instant(offer.not_after))


def first_request():
    return schema.encode(Request(id=0, body=put("r", b"x")))


async def test_records_that_are_replayed_reordered_reflected_or_changed_end_the_connection(stage):
    now = SystemClock().now()
    hello, offer, stream = await greeted(stage)
    good = sealing(stage, hello, offer).seal(first_request(), now=now)
    assert isinstance(await told(stream, good), NoPfsRecord)  # the control

    async def with_fresh(make):
        hello, offer, stream = await greeted(stage)
        return await told(stream, make(hello, offer))

    def skipped(hello, offer):
        direct = sealing(stage, hello, offer)
        direct.seal(first_request(), now=now)
        return direct.seal(first_request(), now=now)

    def changed(hello, offer):
        record = sealing(stage, hello, offer).seal(first_request(), now=now)
        return replace(record, sealed=record.sealed[:-1] + bytes([record.sealed[-1] ^ 1]))

    assert await with_fresh(lambda *_: good) == "nopfs.record"  # of another connection
    assert await with_fresh(skipped) == "nopfs.record"
    assert await with_fresh(changed) == "nopfs.record"
    reflected = lambda h, o: sealing(stage, h, o, Direction.TO_DEVICE).seal(first_request(), now=now)  # noqa: E731
    assert await with_fresh(reflected) == "nopfs.record"

    hello, offer, stream = await greeted(stage)
    record = sealing(stage, hello, offer).seal(first_request(), now=now)
    await write_frame(stream, pack(record), deadline_s=5)
    await read_frame(stream, deadline_s=5)
    assert await told(stream, record) == "nopfs.record"  # the same record again


async def test_a_key_is_claimed_by_one_instance_for_good(stage):
    """verifies that: another instance, or a restarted one that lost its counter, gets no key that was given before."""
    call = FunctionKeyCall(
        service="records",
        device="spiffe://beta.test/device/d-1",
        home_provider="beta",
        home_hsm="hsm-1",
        contract="c1",
        device_nonce=b"d" * 32,
        function_nonce=b"f" * 32,
    )
    fields = stage.world.fields(b"")
    first = schema.decode(FunctionKeyReply, await broker_device_keys.for_function(stage.alpha, fields, schema.encode(call)))
    for again in (fields, replace(fields, instance="i-2"), replace(fields, generation=2)):
        assert await refusal(broker_device_keys.for_function(stage.alpha, again, schema.encode(call))) == "nopfs.key_claimed"
    assert len(stage.alpha.store.alarms()) == 3
    fresh = schema.encode(replace(call, function_nonce=b"n" * 32))
    second = schema.decode(FunctionKeyReply, await broker_device_keys.for_function(stage.alpha, fields, fresh))
    assert first.to_function != second.to_function
    other = schema.encode(replace(call, service="other", function_nonce=b"o" * 32))
    assert await refusal(broker_device_keys.for_function(stage.alpha, fields, other)) == "broker.other_service"


async def test_a_device_revoked_while_it_talks_gets_no_further_than_its_keys(stage):
    """verifies that: keys end after max_age, and the next ones are refused by both HSMs."""
    async with stage.home() as home:
        store = stage.device(home)
        async with await stage.connect(store) as connection:
            await connection.request(put("r", b"x"))
            stage.world.ledger.revoke(RevocationKind.DEVICE, "beta", "d-1")
            connection._clock = SimpleNamespace(now=lambda: Instant(SystemClock().now() + stage.world.max_age_s + 1))
            assert await refusal(connection.request(put("r", b"x"))) == "nopfs.key_ended"
        assert await refusal(stage.connect(store)) == "ledger.revoked"


async def test_a_function_of_another_service_is_not_talked_to(stage):
    async with stage.home() as home:
        store = stage.device(home)
        other = Wanted(provider="alpha", service="other", contract="c1")
        assert await refusal(stage.connect(store, other)) == "device.other_function"


async def test_without_a_pair_key_there_is_none_for_the_device(running, token, tmp_path):
    stage = Stage(running, token, tmp_path)
    async with stage.home() as home:
        assert await refusal(stage.connect(stage.device(home))) == "pair.none"


@pytest.mark.parametrize("garbage", [b"\x00\x00\x00\x05hello", b"\xff" * 64, b"\x00\x00\x00\x00", b"GET / HTTP/1.1\r\n\r\n"])
async def test_garbage_at_the_port_is_refused_and_the_function_serves_on(stage, garbage):
    stream = await tls.dial(stage.world.inbound)
    stream.write(garbage)
    await stream.drain()
    with contextlib.suppress(MoorlineError, asyncio.IncompleteReadError, ConnectionError):
        await read_frame(stream, deadline_s=5)
    await stream.aclose()
    async with await stage.world.connect(stage.world.device()) as connection:
        await connection.request(cbor.encode({"op": "list"}))


# The records alone ------------------------------------------------------------------------------------------------------

KEY, NAME, END = b"k" * 32, b"i" * 32, Instant(100)


def both(count=3):
    return (Direct(KEY, NAME, Direction.TO_DEVICE, count=count, not_after=END) for _ in range(2))


def test_a_key_ends_with_its_counters():
    out, into = both(count=2)
    for number in range(2):
        assert into.open(out.seal(bytes([number]), now=Instant(1)), now=Instant(1)) == bytes([number])
    with pytest.raises(Refused, match="nopfs.key_ended"):
        out.seal(b"x", now=Instant(1))


def test_a_key_ends_with_its_time_on_both_ends():
    out, into = both()
    record = out.seal(b"x", now=Instant(99))
    with pytest.raises(Refused, match="nopfs.key_ended"):
        into.open(record, now=Instant(100))
    with pytest.raises(Refused, match="nopfs.key_ended"):
        out.seal(b"x", now=Instant(100))


FIELDS = {
    "ledger_id": b"l" * 32,
    "device_provider": "beta",
    "device_hsm": "hsm-1",
    "function_provider": "alpha",
    "function_hsm": "hsm-1",
    "pair_epoch": 1,
    "device": "spiffe://beta.test/device/d-1",
    "service": "records",
    "device_nonce": b"d" * 32,
    "function_nonce": b"f" * 32,
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_changes_key_and_name(name):
    one = KeyContext(**FIELDS)
    value = FIELDS[name]
    other = value + 1 if isinstance(value, int) else value[:-1] + (b"x" if isinstance(value, bytes) else "x")
    two = KeyContext(**{**FIELDS, name: other})
    assert one.key_id() != two.key_id()
    for direction in Direction:
        assert one.message(direction) != two.message(direction)
    assert one.message(Direction.TO_DEVICE) != one.message(Direction.TO_FUNCTION)
