"""A function whose session ends: it comes back and serves on, or it hears that it has to end and serves nobody any more."""

import asyncio
import json
import threading
import time

import pytest

from moorline.errors import MoorlineError, Refused
from moorline.wire import cbor, guest
from moorline.wire.session import SessionRole
from moorline.workload_agent import __main__ as entry

REVOKED = Refused("renewal.instance_revoked", "this instance was revoked")


def events(world):
    path = world.guest / guest.STATUS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - it has no event: a line in a file
            await asyncio.sleep(0.02)


async def said(world, event):
    await until(lambda: event in [one["event"] for one in events(world)])


async def ended(world):
    """The code the function ends with."""
    with pytest.raises(MoorlineError) as caught:
        async with asyncio.timeout(20):
            await world.task
    return caught.value.code


async def put(connection, name):
    return cbor.decode(await connection.request(cbor.encode({"op": "put", "name": name, "data": b"x"})))


async def test_a_restarted_broker_is_found_again_without_an_interruption(running):
    """verifies that: a device connection outlives the broker's restart, and the function resumes by its identity key."""
    async with await running.connect(running.device()) as connection:
        await put(connection, "before")
        await running.server.aclose()
        assert await put(connection, "meanwhile") == {"ok": True}
        running.server = await running.broker.serve(f"unix:{running.guest / guest.BROKER_SOCKET}")
        await said(running, "reconnected")
        assert await put(connection, "after") == {"ok": True}
    assert [claim.role for claim in running.broker.claims] == [SessionRole.FUNCTION, SessionRole.RESUME]
    first, again = running.broker.claims
    assert first.evidence != again.evidence  # bound to the new session
    async with await running.connect(running.device(name="d-2", directory="second", serial=502)):
        pass


async def test_one_broken_connection_is_resumed(running):
    """verifies that: a session that broke, by a relay say, is resumed at a broker that never went away."""
    running.server.end(running.broker.claims[0].nonce, Refused("test.relay_broke", "whatever it was"))
    await said(running, "reconnected")
    async with await running.connect(running.device()) as connection:
        assert await put(connection, "r") == {"ok": True}


@pytest.mark.parametrize("code", ["renewal.host_not_standing", "renewal.instance_revoked", "renewal.generation_behind"])
async def test_a_verdict_ends_the_function_at_once(running, code):
    """verifies that: when the broker says so, the device's connection is closed and the function ends, without a call."""
    connection = await running.connect(running.device())
    await put(connection, "r")
    running.server.end(running.broker.claims[0].nonce, Refused(code, "it is over"))
    assert await ended(running) == code
    with pytest.raises(MoorlineError) as caught:
        await put(connection, "too late")
    assert caught.value.code in {"peer.gone", "frame.truncated"}
    with pytest.raises(MoorlineError):
        await running.connect(running.device())
    await connection.aclose()
    assert not any(claim.role is SessionRole.RESUME for claim in running.broker.claims)


async def test_a_function_that_was_revoked_meanwhile_is_told_when_it_comes_back(running):
    running.broker.verdict = REVOKED
    await running.server.aclose()
    running.server = await running.broker.serve(f"unix:{running.guest / guest.BROKER_SOCKET}")
    assert await ended(running) == "renewal.instance_revoked"


async def test_a_refused_renewal_ends_the_function(make_world):
    world = make_world()
    world.broker.renew_after_s = 1

    async def refuse(claim, operation, body, answer=world.broker.call):
        if operation == "renew":
            raise REVOKED
        return await answer(claim, operation, body)

    world.broker.call = refuse
    world.hand_over()
    await world.start()
    try:
        assert await ended(world) == "renewal.instance_revoked"
    finally:
        await world.stop()


async def test_renewal_does_not_interrupt_anybody(make_world):
    """verifies that: the identity is renewed on schedule, and a device connected before is served after it."""
    world = make_world()
    world.broker.renew_after_s = 1
    world.hand_over()
    await world.start()
    try:
        async with await world.connect(world.device()) as connection:
            await put(connection, "before")
            await said(world, "renewed")
            assert await put(connection, "after") == {"ok": True}
    finally:
        await world.stop()


async def test_a_stranger_in_the_broker_s_place_is_not_believed(running):
    """verifies that: who cannot prove to be this broker gets no evidence, and the real one is found again after it."""
    address = f"unix:{running.guest / guest.BROKER_SOCKET}"
    await running.server.aclose()
    mine, running.broker.identity = running.broker.identity, running.gamma.identity("hsm/hsm-1", issuer=running.gamma.hsm)
    before = running.broker.bundles_made
    stranger = await running.broker.serve(address)
    await until(lambda: running.broker.bundles_made > before)
    await stranger.aclose()
    assert len(running.broker.claims) == 1
    running.broker.identity = mine
    running.server = await running.broker.serve(address)
    await said(running, "reconnected")


def test_the_host_reads_that_the_function_halted(world, monkeypatch):
    """verifies that: the process says `halted` with the reason, after `active`, and exits with 1."""
    world.hand_over()
    monkeypatch.setattr(entry, "_reports", lambda: world.reports)
    serving = threading.Thread(target=asyncio.run, args=(_serve_and_revoke(world),))
    serving.start()
    while not (world.guest / guest.BROKER_SOCKET).exists():
        time.sleep(0.01)
    assert entry.main(world.guest) == 1
    serving.join()
    assert [one["event"] for one in events(world)] == ["active", "halted"]
    assert events(world)[-1]["problem"]["code"] == "renewal.instance_revoked"


async def _serve_and_revoke(world):
    async with await world.broker.serve(f"unix:{world.guest / guest.BROKER_SOCKET}") as server:
        await said(world, "active")
        server.end(world.broker.claims[0].nonce, REVOKED)
        await said(world, "halted")
