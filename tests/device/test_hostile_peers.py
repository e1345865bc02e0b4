"""Peers that hold a good certificate and speak anything but the protocol; the others are served all the while."""

import asyncio
import functools

import pytest

from moorline.channel import device as channel
from moorline.channel import tls
from moorline.channel.messages import pack, reported
from moorline.clock import SystemClock
from moorline.device.home import connection_of
from moorline.errors import MoorlineError
from moorline.ledger import peers
from moorline.verification.chains import verify_chain
from moorline.wire import cbor
from moorline.wire.access import AccessQuestion
from moorline.wire.device import Request, Response, Status
from moorline.wire.frames import frame


async def refusal(awaitable):
    with pytest.raises(MoorlineError) as caught:
        await awaitable
    return caught.value.code


async def served(world):
    async with await world.connect(world.device(directory="good", name="d-9", serial=509)) as connection:
        assert await connection.request(cbor.encode({"op": "list"}))


def own_bundle(world, store):
    identity = store.identity()
    chain = verify_chain(identity.chain[0], identity.chain[1:], store.trust().roots, SystemClock().now())
    return world.ledger.bundle(peers.device_keys(chain))


async def good_status(world, stream):
    """What a good device sends first on this stream, with its home HSM's word."""
    store = world.device()
    own, peer = (
        verify_chain(chain[0], chain[1:], store.trust().roots, SystemClock().now())
        for chain in (store.identity().chain, stream.peer_certificates)
    )
    made = connection_of(own, peer, channel.secured(stream), provider="alpha", service="records", contract="c1")
    word = await world.home(store).ask(AccessQuestion(connection=made))
    return frame(pack(Status(bundle=own_bundle(world, store), access=word)))


async def say(world, *raw):
    """Send raw bytes, or what is made of the stream, over a good device's TLS; the code of the Problem that comes back."""
    stream = await tls.connect(world.inbound, identity=world.device().identity(), verify=lambda _: None)
    try:
        for one in raw:
            stream.write(one if isinstance(one, bytes) else await one(stream))
            await stream.drain()
        while True:
            kind, item = cbor.decode(await stream.read_frame(deadline_s=15))
            if kind == "problem":
                return reported(item["problem"]).code
    finally:
        await stream.aclose()


async def test_anything_but_a_status_first_is_refused(running):
    assert await say(running, (1 << 30).to_bytes(4, "big")) == "frame.too_large"
    assert await say(running, frame(b"\xff" * 50)) == "cbor.undecodable"
    assert await say(running, frame(pack(Request(id=0, body=b"")))) == "session.unexpected_message"
    assert await say(running, frame(pack(Status(bundle=b"", access=b"")))) == "cbor.undecodable"
    assert await say(running, frame(pack(Status(bundle=cbor.encode({}), access=b"")))) == "message.fields"
    await served(running)


async def test_garbage_after_a_good_status_is_refused(running):
    status = functools.partial(good_status, running)
    assert await say(running, status, frame(b"\xff")) == "cbor.undecodable"
    assert await say(running, status, frame(cbor.encode(["nothing", {}]))) == "device.message_unexpected"
    assert await say(running, status, (1 << 31).to_bytes(4, "big")) == "frame.too_large"
    assert await say(running, status, frame(pack(Response(id=0, body=b"", problem=None)))) == "device.message_unexpected"
    await served(running)


async def test_peers_that_stall_take_nothing_from_others(running):
    identity = running.device().identity()
    silent = [await tls.connect(running.inbound, identity=identity, verify=lambda _: None) for _ in range(8)]
    await served(running)
    for stream in silent:
        await stream.aclose()


async def test_a_device_of_no_provider_learns_why(running, make_world):
    stranger = type(running.beta)(trust_domain="beta.test")
    stream = await tls.connect(running.inbound, identity=stranger.identity("device/d-1"), verify=lambda _: None)
    kind, item = cbor.decode(await stream.read_frame(deadline_s=10))
    assert kind == "problem"
    assert reported(item["problem"]).code.startswith("chain.")
    await stream.aclose()
    await served(running)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (lambda _: frame(pack(Response(id=7, body=b"", problem=None))), "device.response_mismatch"),
        (lambda _: frame(pack(Response(id=0, body=b"", problem=b"\xff"))), "peer.problem_malformed"),
        (lambda _: frame(b"\xff"), "cbor.undecodable"),
        (lambda _: (1 << 31).to_bytes(4, "big"), "frame.too_large"),
    ],
)
async def test_a_device_does_not_take_a_hostile_functions_answer(world, answer, code):
    async def accept(stream):
        await stream.read_frame(deadline_s=5)
        await stream.write_frame(pack(Status(bundle=b"", access=b"")), deadline_s=5)
        await stream.read_frame(deadline_s=5)
        stream.write(answer(stream))
        await stream.drain()
        await stream.linger()

    async def judge(_chain, _status, _secured):
        return None

    async def ask_home(_chain, _secured):
        return b""

    async def bundle():
        return b""

    identity = world.alpha.identity("svc/records/i-1")
    roots = world.alpha.roots

    def verify(certificates):
        verify_chain(certificates[0], certificates[1:], roots, SystemClock().now())

    where = f"unix:{world.directory}/hostile"
    async with await tls.listen(where, identity=lambda: identity, verify=verify, accept=accept):
        connection = await channel.connect(
            where,
            identity=world.device().identity(),
            roots=roots,
            clock=SystemClock(),
            bundle=bundle,
            ask_home=ask_home,
            judge=judge,
            max_age_s=30,
        )
        async with asyncio.timeout(10):
            assert await refusal(connection.request(b"")) == code
        await connection.aclose()
