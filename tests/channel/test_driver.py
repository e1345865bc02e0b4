"""Sessions over real TLS on loopback: good ones, refused ones, stalled ones, and a service that goes on."""

import asyncio
import functools

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.channel import session_port, tls
from moorline.channel.driver import Collected, answered, new_kem, open_session
from moorline.channel.messages import pack, reported
from moorline.channel.session import SessionFacts
from moorline.channel.session_port import serve_sessions
from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.services import launcher
from moorline.verification.chains import verify_chain
from moorline.wire import cbor, keys, schema
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Activation, EvidenceFormat, Hello, LauncherSecrets, SessionRole

FACTS = SessionFacts(ledger_id=bytes(32), provider="alpha", hsm="hsm-1")
SIGNING = keys.public_bytes(ec.derive_private_key(7, ec.SECP256R1()).public_key())


class Broker:
    """A real session port whose appraisal is simple: evidence must be the binding itself."""

    def __init__(self, consortium):
        self.consortium = consortium
        self.identity = consortium.identity("hsm/hsm-1", issuer=consortium.hsm)
        self.claims, self.active, self.over = [], [], asyncio.Queue()

    async def serve(self, where="127.0.0.1:0", **bounds):
        return await serve_sessions(
            where,
            identity=lambda: self.identity,
            facts=FACTS,
            bundle=self.bundle,
            appraise=self.appraise,
            activate=self.activate,
            call=self.call,
            ended=self.over.put,
            **bounds,
        )

    async def bundle(self):
        return b"bundle"

    async def appraise(self, claim):
        self.claims.append(claim)
        if claim.evidence != claim.binding:
            raise NotAuthentic("snp.report_data_mismatch", "the evidence is over something else")
        return b"secrets of " + claim.fields

    async def activate(self, claim):
        self.active.append(claim)
        return Activation(
            spiffe_id="spiffe://alpha.test/svc/records/i-1", certificate=b"", chain=(), now=1, renew_after_s=9, body=b""
        )

    async def call(self, claim, operation, body):
        if operation == "fail":
            raise Refused("test.no", "no")
        if operation == "crash":
            raise RuntimeError
        return operation.encode() + b":" + body


def attester(broker, **changes):
    async def verify_broker(challenge, certificates):
        assert challenge.bundle == b"bundle"
        consortium = broker.consortium
        verify_chain(certificates[0], certificates[1:], consortium.roots, Instant(consortium.now))

    async def prove(challenge, digest):
        return b"proof"

    async def collect(binding, challenge):
        return Collected(format=EvidenceFormat.SNP, evidence=binding, endorsements=b"")

    arguments = {
        "role": SessionRole.FUNCTION,
        "formats": (EvidenceFormat.SNP,),
        "fields": b"i-1",
        "signing_public": SIGNING,
        "verify_broker": verify_broker,
        "prove": prove,
        "collect": collect,
        "deadline_s": 5,
    }
    return {**arguments, **changes}


@pytest.fixture
async def broker(consortium):
    return Broker(consortium)


async def refusal(awaitable):
    with pytest.raises(MoorlineError) as caught:
        await awaitable
    return caught.value.code


async def test_a_session_is_opened_carries_calls_and_ends(broker, tmp_path):
    for where in ("127.0.0.1:0", f"unix:{tmp_path}/broker"):
        async with await broker.serve(where) as server:
            async with await open_session(server.address, **attester(broker)) as session:
                assert session.secrets == b"secrets of i-1"
                assert session.activation.spiffe_id.endswith("/i-1")
                assert await session.call("time", b"x") == b"time:x"
                big = bytes(900_000)
                assert await session.call("big", big) == b"big:" + big
                assert await refusal(session.call("fail", b"")) == "test.no"
                answers = await asyncio.gather(*(session.call("n", bytes([n])) for n in range(20)))
                assert answers == [b"n:" + bytes([n]) for n in range(20)]
            assert session.closed
            assert await refusal(session.call("time", b"")) == "session.closed"
            ended = await asyncio.wait_for(broker.over.get(), 5)
            assert ended == broker.claims[-1].judged()  # evidence is not kept for as long as the session is open
            assert (ended.proof, ended.evidence) == (b"proof", b"")
    assert len(broker.active) == 2


async def test_two_sessions_never_share_a_binding(broker):
    async with await broker.serve() as server:
        for _ in range(2):
            async with await open_session(server.address, **attester(broker)):
                pass
    assert broker.claims[0].binding != broker.claims[1].binding
    assert broker.claims[0].nonce != broker.claims[1].nonce


async def test_a_relay_with_a_tls_end_of_its_own_is_refused(broker, consortium):
    """The relay holds a good broker certificate even; it passes every frame on unchanged. The exporters differ."""
    async with await broker.serve() as server:

        async def relay(victim):
            onward = await tls.connect(server.address, identity=None, verify=lambda _: None)
            while True:
                await onward.write_frame(await victim.read_frame(deadline_s=5), deadline_s=5)
                await victim.write_frame(await onward.read_frame(deadline_s=5), deadline_s=5)

        identity = consortium.identity("hsm/hsm-1", issuer=consortium.hsm)
        async with await tls.listen("127.0.0.1:0", identity=lambda: identity, verify=None, accept=relay) as middle:
            assert await refusal(open_session(middle.address, **attester(broker))) == "snp.report_data_mismatch"
        assert broker.active == []


async def test_a_broker_that_is_not_trusted_gets_no_evidence(broker, stranger):
    broker.identity = stranger.identity("hsm/hsm-1", issuer=stranger.hsm)
    async with await broker.serve() as server:
        assert (await refusal(open_session(server.address, **attester(broker)))).startswith("chain.")
    assert broker.claims == []


async def test_a_fault_in_the_broker_is_not_told_and_not_contagious(broker):
    async with await broker.serve() as server:
        async with await open_session(server.address, **attester(broker)) as session:
            assert await refusal(session.call("crash", b"")) == "session.internal"
            assert session.closed
        async with await open_session(server.address, **attester(broker)) as session:
            assert await session.call("time", b"") == b"time:"


@pytest.mark.parametrize("step", ["bundle", "appraise", "activate"])
async def test_a_broker_that_does_not_decide_says_so_in_time(broker, monkeypatch, step):
    """verifies that: a step of the broker's own has a deadline, after which the attester is told and the session is gone."""
    monkeypatch.setattr(session_port, "_CALL_DEADLINE_S", 0.2)

    async def never(*_asked):
        await asyncio.Event().wait()

    monkeypatch.setattr(broker, step, never)
    async with await broker.serve() as server:
        assert await refusal(open_session(server.address, **attester(broker))) == "session.timeout"


async def test_a_call_that_is_not_answered_in_time_ends_no_session(broker, monkeypatch):
    answer = broker.call

    async def slow(claim, operation, body):
        if operation == "never":
            await asyncio.Event().wait()
        return await answer(claim, operation, body)

    monkeypatch.setattr(broker, "call", slow)
    async with await broker.serve() as server, await open_session(server.address, **attester(broker)) as session:
        monkeypatch.setattr(session_port, "_CALL_DEADLINE_S", 0.2)
        assert await refusal(session.call("never", b"")) == "session.timeout"
        assert await session.call("time", b"x") == b"time:x"


async def knock(server, *frames):
    """Send raw frame bodies and return the code of the Problem that comes back."""
    stream = await tls.connect(server.address, identity=None, verify=lambda _: None)
    try:
        for raw in frames:
            stream.write(raw)
        await stream.drain()
        kind, message = cbor.decode(await stream.read_frame(deadline_s=5))
        assert kind == "problem"
        return reported(message["problem"]).code
    finally:
        await stream.aclose()


def framed(body):
    return len(body).to_bytes(4, "big") + body


def a_hello(**changes):
    fields = {
        "version": 1,
        "role": SessionRole.FUNCTION,
        "formats": (EvidenceFormat.SNP,),
        "kem_public": bytes(1216),
        "signing_public": SIGNING,
        "profile": ChannelProfile.TLS,
        "fields": b"",
    }
    return pack(Hello(**{**fields, **changes}))


async def test_garbage_gets_a_typed_refusal_and_the_service_goes_on(broker):
    async with await broker.serve() as server:
        assert await knock(server, (1 << 30).to_bytes(4, "big")) == "frame.too_large"
        assert await knock(server, (300 * 1024).to_bytes(4, "big") + bytes(300 * 1024)) == "frame.too_large"
        assert await knock(server, framed(b"")) == "cbor.undecodable"
        assert await knock(server, framed(b"\xff" * 100)) == "cbor.undecodable"
        assert await knock(server, framed(cbor.encode(["hello"]))) == "session.malformed"
        assert await knock(server, framed(cbor.encode(["evidence", {}]))) == "session.unexpected_message"
        assert await knock(server, framed(a_hello(profile=ChannelProfile.HPKE_ONLY))) == "session.profile_not_offered"
        assert await knock(server, framed(a_hello(version=9))) == "session.version"
        async with await open_session(server.address, **attester(broker)) as session:
            assert await session.call("time", b"") == b"time:"
    assert len(broker.claims) == 1


async def test_stalled_peers_are_dropped_while_others_are_served(broker):
    async with await broker.serve(step_deadline_s=0.5, max_handshakes=8) as server:
        silent = [await tls.connect(server.address, identity=None, verify=lambda _: None) for _ in range(6)]
        async with await open_session(server.address, **attester(broker)) as session:
            assert await session.call("time", b"") == b"time:"
            for stream in silent:
                kind, message = cbor.decode(await stream.read_frame(deadline_s=10))
                assert (kind, reported(message["problem"]).code) == ("problem", "peer.timeout")
                await stream.aclose()
            assert await session.call("time", b"") == b"time:"  # an active session may be silent


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
async def test_sessions_that_stall_within_a_record_keep_nobody_from_being_served(broker, count):
    """verifies that: open sessions that announced a record and send no more of it cost others nothing, old ones and new."""
    serving = broker.serve(max_sessions=count + 8)
    async with await serving as server, await open_session(server.address, **attester(broker)) as before:
        stalled = [await open_session(server.address, **attester(broker)) for _ in range(count)]
        for session in stalled:
            session._stream.write((1000).to_bytes(4, "big") + bytes(500))
            await session._stream.drain()
        assert await before.call("time", b"") == b"time:"
        async with await open_session(server.address, **attester(broker)) as after:
            assert await after.call("time", b"") == b"time:"
        for session in stalled:
            await session._stream.aclose()


async def test_the_most_silent_of_too_many_handshakes_makes_room(broker):
    async with await broker.serve(max_handshakes=3) as server:
        silent = [await tls.connect(server.address, identity=None, verify=lambda _: None) for _ in range(8)]
        async with await open_session(server.address, **attester(broker)) as session:
            assert await session.call("time", b"") == b"time:"
        kind, message = cbor.decode(await silent[0].read_frame(deadline_s=10))
        assert (kind, reported(message["problem"]).code) == ("problem", "session.busy")
        for stream in silent:
            await stream.aclose()


async def test_an_attester_refuses_an_oversized_broker(broker, consortium):
    async def accept(stream):
        await stream.read_frame(deadline_s=5)
        stream.write((1 << 31).to_bytes(4, "big"))
        await stream.drain()
        await stream.linger()

    identity = broker.identity
    async with await tls.listen("127.0.0.1:0", identity=lambda: identity, verify=None, accept=accept) as server:
        assert await refusal(open_session(server.address, **attester(broker))) == "frame.too_large"


async def test_a_broker_that_goes_away_leaves_a_closed_session(broker):
    server = await broker.serve()
    session = await open_session(server.address, **attester(broker))
    await server.aclose()
    with pytest.raises((Unavailable, Malformed)):
        await session.call("time", b"")
    assert session.closed


# A broker that dies and comes back ---------------------------------------------------------------------------------------


async def test_the_same_keys_are_shown_again_when_nobody_answered(broker):
    """The broker dies in its appraisal; the attester asks the next one under the KEM key and signing key of before."""
    kem, decide = new_kem(), broker.appraise

    async def die(claim):
        broker.claims.append(claim)
        broker.appraise = decide
        await asyncio.Event().wait()

    broker.appraise = die
    server = await broker.serve()
    ask = functools.partial(open_session, server.address, **attester(broker, kem=kem))
    asking = asyncio.ensure_future(answered(ask, within_s=20))
    async with asyncio.timeout(10):
        while not broker.claims:  # noqa: ASYNC110 - until it decides
            await asyncio.sleep(0.01)
    await server.aclose()
    async with await broker.serve(server.address), await asking as session:
        assert await session.call("time", b"") == b"time:"
    first, second = broker.claims
    assert (first.kem_public, first.signing_public) == (second.kem_public, second.signing_public) == (kem.public, SIGNING)
    assert first.binding != second.binding


async def test_a_refusal_is_an_answer(broker):
    async def elsewhere(_binding, _challenge):
        return Collected(format=EvidenceFormat.SNP, evidence=b"of another session", endorsements=b"")

    async with await broker.serve() as server:
        with pytest.raises(NotAuthentic, match="snp.report_data_mismatch"):
            await answered(
                functools.partial(open_session, server.address, **attester(broker, collect=elsewhere)), within_s=60
            )
    assert len(broker.claims) == 1


async def test_a_launcher_comes_back_to_its_broker_and_takes_the_new_lease(broker, monkeypatch):
    monkeypatch.setattr(launcher, "_judge_clock", lambda _told: None)  # this broker lives at second 1
    lease = LauncherSecrets(
        launch_key=bytes(32), epoch=1, epoch_not_after=10, lease_first=7, lease_count=1, lease_not_after=10
    )

    async def admit(claim):
        broker.claims.append(claim)
        return schema.encode(lease)

    broker.appraise = admit
    server = await broker.serve()
    taken = []
    async with await launcher._Link.open(functools.partial(open_session, server.address, **attester(broker))) as link:
        link.readmitted = lambda secrets, _activation: taken.append(secrets)
        assert await link.call("time", b"") == b"time:"
        await server.aclose()
        async with await broker.serve(server.address):
            assert await link.call("time", b"") == b"time:"
            with pytest.raises(Refused, match="test.no"):
                await link.call("fail", b"")
            assert not link.closed
    assert taken == [lease]
    assert len(broker.claims) == 2
    assert broker.claims[0].signing_public == broker.claims[1].signing_public
