"""Relays and guests on one host, with a silicon that runs nothing: what is on disk, what is relayed, what survives."""

import asyncio
import contextlib
import json
import os
import stat

import pytest

from moorline.errors import Conflict, Malformed, Refused
from moorline.host_agent import relay
from moorline.host_agent.guests import Guests, active_event, order_digest, parse_order, refused_event
from moorline.wire import schema
from moorline.wire.orchestration import GuestOrder
from moorline.wire.silicon import GuestStatus


class Silicon:
    """Keeps the names of guests as the real one does, without running them."""

    def __init__(self):
        self.launched, self.guests = [], {}

    def _status(self, name, state, code=None):
        return GuestStatus(name=name, state=state, pid=1, exit_code=code, measurement=bytes(48))

    async def launch(self, request):
        if self.guests.get(request.name, self._status("", "ended")).state == "running":
            raise Conflict("silicon.guest_running", "running")
        self.launched.append(request)
        self.guests[request.name] = self._status(request.name, "running")
        return self.guests[request.name]

    async def status(self, name):
        if name not in self.guests:
            raise Refused("silicon.no_guest", "none")
        return self.guests[name]

    async def stop(self, name):
        await self.status(name)
        self.guests[name] = self._status(name, "ended", 143)
        return self.guests[name]


def order(**changes):
    fields = {
        "instance": "records-1",
        "entry": "moorline.workload_agent",
        "host_data": bytes(32),
        "launch": b"launch",
        "package": b"package",
        "configuration": b"configuration",
        "memory_mib": 256,
        "pids": 64,
        "relays": {"broker": "127.0.0.1:1"},
        "publish": True,
    }
    return GuestOrder(**(fields | changes))


@contextlib.asynccontextmanager
async def echo(listening):
    """A peer that gives back what it gets, and closes when it is told to."""

    async def serve(reader, writer):
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, sock=listening)
    try:
        yield
    finally:
        server.close()


@pytest.fixture
async def silicon():
    return Silicon()


@pytest.fixture
async def guests(tmp_path, silicon):
    made = Guests(tmp_path / "guests", silicon, publish="127.0.0.1")
    yield made
    await made.aclose()


async def connected(address):
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_files_are_private_and_complete(guests, silicon):
    state = await guests.start(order())
    shared = guests.shared("records-1")
    for name, content in {"launch.cbor": b"launch", "package.csar": b"package", "config.cbor": b"configuration"}.items():
        assert (shared / name).read_bytes() == content
        assert stat.S_IMODE((shared / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700
    assert stat.S_ISSOCK((shared / "out-broker").stat().st_mode)
    assert state.state == "running"
    assert silicon.launched[0].shared == str(shared)
    assert silicon.launched[0].debug is False


async def says(guests, event, **facts):
    with (guests.shared("records-1") / "status.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, **facts}) + "\n")


async def test_whoever_waits_for_a_guest_is_told_when_it_serves(guests):
    """verifies that: other words of the guest end no wait, its word that it serves does."""
    await guests.start(order())
    waiting = asyncio.ensure_future(guests.decided("records-1", wait_s=3600))
    await says(guests, "starting")
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await says(guests, "active", spiffe_id="spiffe://alpha.test/svc/records/records-1")
    told = await waiting
    assert told == await guests.decided("records-1", wait_s=3600)
    assert [event["event"] for event in told.events] == ["starting", "active"]


async def test_whoever_waits_for_a_guest_is_told_that_it_gave_up_or_ended(guests, silicon):
    await guests.start(order())
    waiting = asyncio.ensure_future(guests.decided("records-1", wait_s=3600))
    await silicon.stop("records-1")  # without a word in its file
    assert (await waiting).state == "ended"
    silicon.guests["records-1"] = silicon._status("records-1", "running")
    waiting = asyncio.ensure_future(guests.decided("records-1", wait_s=3600))
    await says(guests, "refused", problem={"kind": "refused", "code": "launch.token", "says": "no"})
    assert (await waiting).events[-1]["event"] == "refused"


async def test_a_guest_that_says_nothing_keeps_nobody_longer_than_asked(guests):
    """verifies that: a wait ends undecided, also when the guest puts a link where its words should be."""
    await guests.start(order())
    (guests.shared("records-1") / "status.jsonl").symlink_to("/dev/zero")
    state = await guests.decided("records-1", wait_s=0.02)
    assert (state.state, state.events) == ("running", ())
    with pytest.raises(Refused) as caught:
        await guests.decided("records-2", wait_s=3600)
    assert caught.value.code == "host.no_such_guest"


async def test_the_same_order_is_one_guest_and_another_is_refused(guests, silicon):
    first = await guests.start(order())
    again = await guests.start(order())
    assert (again.address, len(silicon.launched)) == (first.address, 1)
    with pytest.raises(Conflict) as caught:
        await guests.start(order(launch=b"other"))
    assert caught.value.code == "host.guest_differs"


async def test_bytes_pass_both_ways_from_the_published_port(guests):
    state = await guests.start(order())
    inbound = relay.listen_in(guests.shared("records-1"), "in")
    async with echo(inbound):
        reader, writer = await connected(state.address)
        payload = os.urandom(300_000)
        writer.write(payload)
        writer.write_eof()  # a half-closed connection still carries the answer
        assert await reader.readexactly(len(payload)) == payload
        assert await reader.read() == b""
        writer.close()


async def test_the_guest_reaches_its_broker_and_nothing_else(guests):
    outside = relay.listen_tcp("127.0.0.1", 0)
    address = "{}:{}".format(*outside.getsockname())
    async with echo(outside):
        await guests.start(order(relays={"broker": address}))
        reader, writer = await relay.to_guest(guests.shared("records-1"), "out-broker")()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()
    names = {path.name for path in guests.shared("records-1").iterdir() if path.is_socket()}
    assert names == {"out-broker"}


async def test_a_connection_to_a_guest_that_does_not_listen_is_closed(guests):
    state = await guests.start(order())
    reader, writer = await connected(state.address)
    assert await reader.read() == b""
    writer.close()


async def test_connections_are_capped_and_idle_ones_dropped():
    target, front = relay.listen_tcp("127.0.0.1", 0), relay.listen_tcp("127.0.0.1", 0)
    async with echo(target):
        made = await relay.relay(
            front, relay.to_address("{}:{}".format(*target.getsockname())), max_connections=2, idle_s=0.3
        )
        first, second, third = [await connected(made.address) for _ in range(3)]
        for reader, writer in (first, second):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
        with contextlib.suppress(ConnectionResetError):
            assert await third[0].read() == b""
        assert await first[0].read() == b""  # dropped for idleness
        fourth = await connected(made.address)  # and its place is free again
        fourth[1].write(b"y")
        assert await fourth[0].readexactly(1) == b"y"
        for _, writer in (first, second, third, fourth):
            writer.close()
        await made.aclose()


async def test_a_silent_connection_makes_room_for_one_that_speaks():
    target, front = relay.listen_tcp("127.0.0.1", 0), relay.listen_tcp("127.0.0.1", 0)
    async with echo(target):
        made = await relay.relay(front, relay.to_address("{}:{}".format(*target.getsockname())), max_connections=2)
        silent = [await connected(made.address) for _ in range(2)]
        async with asyncio.timeout(10):
            answer = b""
            while answer != b"y":  # until the others have been silent for a while
                reader, writer = await connected(made.address)
                with contextlib.suppress(ConnectionError):
                    writer.write(b"y")
                    answer = await reader.read(1)
                writer.close()
        for _, writer in silent:
            writer.close()
        await made.aclose()


async def test_state_reports_what_the_guest_said(guests):
    await guests.start(order())
    status = guests.shared("records-1") / "status.jsonl"
    status.write_text('not json\n{"event": "active", "spiffe_id": "spiffe://alpha.test/svc/records/1"}\n{"half')
    assert active_event(await guests.state("records-1"))["spiffe_id"].endswith("records/1")
    problem = {"kind": "Refused", "code": "launch.token_used", "says": "used"}
    status.write_text(json.dumps({"event": "refused", "problem": problem}) + "\n")
    assert refused_event(await guests.state("records-1")).code == "launch.token_used"


async def test_a_guest_cannot_make_the_host_read_its_own_files(guests, tmp_path):
    await guests.start(order())
    secret = tmp_path / "secret"
    secret.write_text('{"event": "active", "spiffe_id": "secret"}\n')
    status = guests.shared("records-1") / "status.jsonl"
    status.symlink_to(secret)
    assert (await guests.state("records-1")).events == ()
    status.unlink()
    os.mkfifo(status)
    assert (await guests.state("records-1")).events == ()
    status.unlink()
    status.write_text('{"event": "noise"}\n' * 20_000)
    assert len((await guests.state("records-1")).events) == 64


async def test_stop_forgets_everything_and_the_name_is_free(guests, silicon):
    state = await guests.start(order())
    assert (await guests.stop("records-1")).state == "ended"
    assert not guests.shared("records-1").exists()
    with pytest.raises(ConnectionRefusedError):
        await connected(state.address)
    with pytest.raises(Refused) as caught:
        await guests.state("records-1")
    assert caught.value.code == "host.no_such_guest"
    await guests.start(order(launch=b"other"))
    assert len(silicon.launched) == 2


async def test_a_restarted_agent_adopts_its_guests(guests, silicon, tmp_path):
    state = await guests.start(order())
    await guests.aclose()
    later = Guests(tmp_path / "guests", silicon, publish="127.0.0.1")
    assert await later.adopt() == ("records-1",)
    assert (await later.state("records-1")).address == state.address
    async with echo(relay.listen_in(later.shared("records-1"), "in")):
        reader, writer = await connected(state.address)
        writer.write(b"still")
        assert await reader.readexactly(5) == b"still"
        writer.close()
    assert (await later.start(order())).address == state.address
    assert len(silicon.launched) == 1
    await later.aclose()


async def test_an_order_repeated_after_a_crash_before_the_silicon_was_asked(guests, silicon):
    await guests.start(order())
    silicon.guests.clear()
    silicon.launched.clear()
    await guests.start(order())
    assert len(silicon.launched) == 1


async def test_deep_directories_work(tmp_path, silicon):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    made = Guests(deep, silicon, publish="127.0.0.1")
    assert (await made.start(order())).state == "running"
    await made.aclose()


@pytest.mark.parametrize("changes", [{"memory_mib": 1}, {"memory_mib": 1 << 20}, {"pids": 0}, {"pids": 1 << 20}])
async def test_limits(guests, changes):
    with pytest.raises(Refused) as caught:
        await guests.start(order(**changes))
    assert caught.value.code == "host.limits"


@pytest.mark.parametrize("instance", ["../x", "a/b", "", "A", "x" * 64])
async def test_names_cannot_leave_the_directory(guests, instance):
    with pytest.raises(Malformed):
        await guests.start(order(instance=instance))
    with pytest.raises(Malformed):
        await guests.state(instance)


def test_orders_travel():
    assert parse_order(schema.encode(order())) == order()
    assert order_digest(order()) != order_digest(order(publish=False))
    with pytest.raises(Malformed):
        parse_order(b"\xa0")
