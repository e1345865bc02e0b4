"""How sessions end from the broker's side: the attester hears why at once, also in the middle of a call or a handshake."""

import asyncio
import sys
from pathlib import Path

from moorline.channel.driver import open_session
from moorline.errors import Refused

sys.path.insert(0, str(Path(__file__).parent))

from test_driver import Broker, attester, broker, refusal  # noqa: F401 - a fixture

REVOKED = Refused("renewal.instance_revoked", "this instance was revoked")


async def test_the_attester_hears_at_once_why_its_session_ends(broker):  # noqa: F811
    """verifies that: ending one session tells its peer the reason, without a call, and no other session notices."""
    async with await broker.serve() as server:
        session = await open_session(server.address, **attester(broker))
        other = await open_session(server.address, **attester(broker))
        first = broker.claims[0]
        assert server.end(first.nonce, REVOKED)
        async with asyncio.timeout(5):
            assert (await session.ended()).code == "renewal.instance_revoked"
            assert (await broker.over.get()) == first.judged()
        assert session.closed
        assert await refusal(session.call("time", b"")) == "renewal.instance_revoked"
        assert not server.end(first.nonce, REVOKED)
        assert not server.end(bytes(32), REVOKED)
        assert await other.call("time", b"x") == b"time:x"
        await session.aclose()
        await other.aclose()
        assert (await other.ended()).code == "session.closed"


class Slow(Broker):
    """Answers nothing until it is told to."""

    def __init__(self, consortium):
        super().__init__(consortium)
        self.asked = asyncio.Event()

    async def call(self, claim, operation, body):
        self.asked.set()
        await asyncio.Event().wait()


class SlowToActivate(Slow):
    async def activate(self, claim):
        self.asked.set()
        await asyncio.Event().wait()


async def test_a_session_ends_in_the_middle_of_a_call(consortium):
    slow = Slow(consortium)
    async with await slow.serve() as server:
        session = await open_session(server.address, **attester(slow))
        calling = asyncio.create_task(refusal(session.call("time", b"")))
        await slow.asked.wait()
        server.end(slow.claims[0].nonce, REVOKED)
        assert await calling == "renewal.instance_revoked"


async def test_a_session_ends_before_it_is_active(consortium):
    """verifies that: what was revoked between its launch and its activation does not become active."""
    slow = SlowToActivate(consortium)
    async with await slow.serve() as server:
        opening = asyncio.create_task(refusal(open_session(server.address, **attester(slow))))
        await slow.asked.wait()
        server.end(slow.claims[0].nonce, REVOKED)
        assert await opening == "renewal.instance_revoked"


async def test_a_broker_that_dies_is_noticed_without_a_call(broker):  # noqa: F811
    server = await broker.serve()
    session = await open_session(server.address, **attester(broker))
    await server.aclose()
    async with asyncio.timeout(5):
        assert (await session.ended()).code in {"session.closed", "peer.gone"}
    assert await refusal(session.call("time", b"")) in {"session.closed", "peer.gone"}
