"""A verifier that is told to stop while others wait on it: each hears the end, nothing is lost, and the process says so."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from test_service import client, configured, silicon  # noqa: F401 - fixtures
from test_stream import change, store, stream  # noqa: F401 - fixtures

from moorline.wire import host as wire
from moorline.wire import schema

pytestmark = pytest.mark.story
READER = "spiffe://alpha.test/orchestrator/o1"


class Stopping:
    """A verifier's process, and everything it wrote to standard error."""

    async def start(self, configured):  # noqa: F811
        script = Path(__file__).parent / "stopping_verifier.py"
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(script), str(configured.identity_chain.parent / "verifier.toml")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.address = json.loads(await self.process.stdout.readline())["address"]

    async def stop(self):
        self.process.terminate()
        _, said = await asyncio.wait_for(self.process.communicate(), 20)
        return self.process.returncode, said.decode()


@pytest.fixture
async def verifier(configured, store):  # noqa: F811
    running = Stopping()
    await running.start(configured)
    yield running
    if running.process.returncode is None:
        running.process.kill()
        await running.process.wait()


async def waiting_host(address):
    """What a host that waits to be asked is told."""
    body = schema.encode(wire.AskWait(host="h1", known=0, wait_s=60))
    async with client(address) as host:
        return schema.decode(wire.Asked, await host.post_cbor("/v1/wait", body))


async def long_poll(address, after):
    async with client(address, READER) as reader:
        return await reader.get_json("/v1/events", {"after": str(after), "wait_s": "20"})


async def test_whoever_waits_on_a_verifier_that_stops_hears_the_end(verifier, store, configured):  # noqa: F811
    """verifies that: on SIGTERM a long poll, a stream and a waiting host end like answers, the process ends with 0 and
    without a traceback, and with the next process a reader goes on where it was."""
    change(store, 2)
    open_ones = [
        asyncio.create_task(long_poll(verifier.address, 2)),
        asyncio.create_task(stream(verifier.address, until=99)),
        asyncio.create_task(waiting_host(verifier.address)),
    ]
    await asyncio.sleep(1)
    assert not any(one.done() for one in open_ones)
    code, said = await verifier.stop()
    polled, streamed, asked = await asyncio.wait_for(asyncio.gather(*open_ones), 10)
    assert code == 0
    assert "Traceback" not in said
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["stopped"]
    assert polled == {"events": [], "next": 2, "newest": 2}
    assert [one[0] for one in streamed] == [1, 2]
    assert asked.number == 0

    change(store, 1)
    await verifier.start(configured)
    assert [one["cursor"] for one in (await long_poll(verifier.address, polled["next"]))["events"]] == [3]
    assert [one[0] for one in await stream(verifier.address, headers={"last-event-id": "2"}, until=1)] == [3]
