"""The silicon as a real process: what it starts is what it measures, and nobody else gets to say."""

# ruff: noqa: ASYNC110, ASYNC240 - a test waits for another process by looking, at files that are small and local

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import moorline
from moorline.clock import SystemClock
from moorline.errors import Conflict, Malformed, MoorlineError, Refused, Unavailable
from moorline.evidence.snp import parse_report
from moorline.host_agent.silicon import SiliconClient
from moorline.policy.match import AtLeast, Exact
from moorline.policy.snp import appraise_snp, require_snp, strict_policy
from moorline.rats import EvidenceRoot, Outcome
from moorline.simulators import guest_image
from moorline.simulators.manufacturer import create_manufacturer
from moorline.verification.anchors import AnchorSet, parse_anchor_file
from moorline.verification.snp import endorsements_from_table, verify_snp
from moorline.wire import frames, schema
from moorline.wire.silicon import GuestStatus, LaunchGuest, PlatformRequest, decode_answer

pytestmark = [
    pytest.mark.story,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]

ENTRY = "moorline.attesters.collect"
REPORT_DATA = bytes(reversed(range(64)))
HOST_DATA = b"\xc3" * 32


@dataclass
class Machine:
    """A silicon process, and what its host knows of it."""

    directory: Path
    process: asyncio.subprocess.Process
    client: SiliconClient
    anchors: AnchorSet
    published: bytes
    """The measurement of ENTRY as its publisher computes it, in another process and without silicon."""

    @property
    def socket(self) -> Path:
        return self.directory / "silicon.sock"

    def order(self, name: str, **changes: object) -> LaunchGuest:
        shared = self.directory / name
        shared.mkdir(exist_ok=True)
        defaults = {
            "entry": ENTRY,
            "host_data": HOST_DATA,
            "shared": str(shared),
            "debug": False,
            "memory_mib": 256,
            "pids": 32,
        }
        return LaunchGuest(op="launch", name=name, **{**defaults, **changes})

    async def ended(self, name: str) -> GuestStatus:
        async with asyncio.timeout(30):
            while (status := await self.client.status(name)).state == "running":
                await asyncio.sleep(0.01)
        return status

    async def report(self, name: str, **changes: object) -> tuple[GuestStatus, bytes, bytes]:
        """Start a guest that asks for one report, wait for its end."""
        order = self.order(name, **changes)
        (Path(order.shared) / "report_data.bin").write_bytes(REPORT_DATA)
        await self.client.launch(order)
        status = await self.ended(name)
        assert status.exit_code == 0, (Path(order.shared) / "guest.log").read_text()
        return status, *((Path(order.shared) / blob).read_bytes() for blob in ("outblob.bin", "auxblob.bin"))


@dataclass(frozen=True)
class Installation:
    """What all tests of this file share: a manufacturer, whose keys are slow to make, and an installation of moorline of its
    own, so that nothing changes the bytes between the publisher's measurement and the silicon's."""

    maker: Path
    environment: dict[str, str]
    published: bytes


@contextlib.asynccontextmanager
async def _started(directory: Path, installation: Installation):
    maker = create_manufacturer(directory / "maker", now=SystemClock().now())
    maker.make_chip("h1", now=SystemClock().now())
    config = directory / "silicon.toml"
    config.write_text('listen = "silicon.sock"\nchip = "maker/chips/h1"\nstate = "state"\n')
    command = (sys.executable, "-m", "moorline.cli", "simulate", "silicon", "--config", str(config))
    with (directory / "silicon.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=log, env=installation.environment
        )
    try:
        async with asyncio.timeout(60):
            ready = json.loads(await process.stdout.readline())
        anchors = parse_anchor_file(maker.anchors_path.read_bytes())
        assert ready["service"] == "silicon"
        yield Machine(directory, process, SiliconClient(ready["address"]), anchors, installation.published)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture(scope="session")
def installation(tmp_path_factory) -> Installation:
    directory = tmp_path_factory.mktemp("silicon")
    create_manufacturer(directory / "maker", now=SystemClock().now())
    package = Path(moorline.__file__).parent
    shutil.copytree(package, directory / "packages" / "moorline", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(directory / "packages")}
    command = (sys.executable, "-m", "moorline.cli", "simulate", "measure", "--entry", ENTRY)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return Installation(maker=directory / "maker", environment=environment, published=bytes.fromhex(done.stdout))


@pytest.fixture
async def machine(installation, tmp_path):
    shutil.copytree(installation.maker, tmp_path / "maker")
    async with _started(tmp_path, installation) as running:
        yield running


def _verified(machine: Machine, outblob: bytes, auxblob: bytes):
    return verify_snp(
        parse_report(outblob),
        endorsements_from_table(auxblob),
        report_data=REPORT_DATA,
        anchors=machine.anchors,
        now=SystemClock().now(),
    )


async def test_a_guest_reports_what_was_started(machine):
    """Verifies that: the report of a real guest carries the digest that a publisher computes offline and the HOST_DATA of
    its launch, verifies under the simulated anchors and meets the strict policy; and that a debug launch shows."""
    platform = await machine.client.platform(ENTRY)
    status, outblob, auxblob = await machine.report("g1")
    verified = _verified(machine, outblob, auxblob)
    claims = verified.value
    assert claims.measurement == machine.published == platform.measurement == status.measurement
    assert claims.host_data == HOST_DATA
    assert claims.chip_id == platform.chip_id
    assert verified.root is EvidenceRoot.TEST
    policy = strict_policy(
        measurement=Exact(machine.published),
        host_data=Exact(HOST_DATA),
        chip_id=Exact(platform.chip_id),
        product=Exact(claims.product),
        minimum_tcb=AtLeast(claims.reported_tcb),
    )
    require_snp(appraise_snp(verified, policy, simulated_allowed=True))

    _, outblob, auxblob = await machine.report("g2", debug=True)
    debug = _verified(machine, outblob, auxblob)
    findings = {finding.code: finding.outcome for finding in appraise_snp(debug, policy, simulated_allowed=True)}
    assert [code for code, outcome in findings.items() if outcome is Outcome.NOT_MET] == ["snp.debug"]
    assert debug.value.report.report_id != claims.report.report_id

    other = await machine.client.platform("moorline.attesters.reports")
    assert other.measurement != claims.measurement, "another entry is another measurement"


async def test_changed_bytes_are_reported_as_changed(machine):
    """Verifies that: somebody who changes the runtime that silicon starts gets a report that says so."""
    file = machine.directory / "state" / "image" / "moor" / "site" / "moorline" / "attesters" / "collect.py"
    file.chmod(0o644)
    file.write_text(file.read_text() + "\n# a comment is enough\n")
    _, outblob, auxblob = await machine.report("changed")
    assert _verified(machine, outblob, auxblob).value.measurement != machine.published
    (file.parent / "extra.py").write_text("")
    _, again, _ = await machine.report("changed-again")
    assert parse_report(again).measurement != parse_report(outblob).measurement


async def test_planted_bytecode_does_not_run(machine):
    """Verifies that: bytecode is no way around the measurement; planted bytecode is thrown away."""
    await machine.report("first")
    planted = list((machine.directory / "state" / "bytecode").rglob("reports*.pyc"))
    assert planted
    for path in planted:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:16] + b"\0" * 64)
    _, outblob, auxblob = await machine.report("second")
    assert _verified(machine, outblob, auxblob).value.measurement == machine.published


def _gone(pid: int) -> bool:
    """No such process, or a dead one that nobody collected yet."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


async def test_a_guest_lives_is_stopped_and_dies_with_its_silicon(machine):
    """Verifies that: status, stop and kill work on a guest that waits, a second of the same name is refused, and SIGKILL of
    the silicon takes the guests along."""

    async def waiting(name: str) -> GuestStatus:
        order = machine.order(name)
        os.mkfifo(Path(order.shared) / "report_data.bin")  # the guest waits for somebody to write
        return await machine.client.launch(order)

    status = await waiting("one")
    assert status.state == "running"
    with pytest.raises(Conflict) as refusal:
        await machine.client.launch(machine.order("one"))
    assert refusal.value.code == "silicon.guest_running"
    stopped = await machine.client.stop("one")
    assert (stopped.state, stopped.exit_code) == ("ended", 143)
    await waiting("two")
    assert (await machine.client.kill("two")).exit_code == 137
    last = await waiting("three")
    assert Path("/proc", str(last.pid)).exists()
    machine.process.send_signal(signal.SIGKILL)
    await machine.process.wait()
    async with asyncio.timeout(20):
        while not _gone(last.pid):
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable) as gone:
        await machine.client.status("three")
    assert gone.value.code == "peer.unreachable"


async def test_a_guest_cannot_outlive_its_silicon_even_when_it_dies_at_once(machine):
    """Verifies that: SIGKILL of the silicon in the first milliseconds of a guest leaves no guest behind."""
    started = []
    for name in ("a", "b", "c", "d"):
        order = machine.order(name)
        os.mkfifo(Path(order.shared) / "report_data.bin")
        started.append(machine.client.launch(order))
    guests = await asyncio.gather(*started)
    machine.process.send_signal(signal.SIGKILL)
    await machine.process.wait()
    async with asyncio.timeout(20):
        while not all(_gone(guest.pid) for guest in guests):
            await asyncio.sleep(0.01)


async def test_what_the_host_cannot_have_is_refused(machine, tmp_path):
    good = machine.order("good")
    for changes, code in (
        ({"entry": "moorline.cli"}, "silicon.entry_unknown"),
        ({"entry": "os"}, "silicon.entry_unknown"),
        ({"entry": "moorline.attesters.collect; import os"}, "silicon.entry_unknown"),
        ({"shared": "relative"}, "silicon.shared"),
        ({"shared": str(tmp_path / "absent")}, "silicon.shared"),
        ({"memory_mib": 1}, "silicon.limits"),
        ({"pids": 1}, "silicon.limits"),
        ({"name": "../up"}, "name.malformed"),
    ):
        order = LaunchGuest(**{**{field: getattr(good, field) for field in LaunchGuest.__dataclass_fields__}, **changes})
        with pytest.raises(MoorlineError) as refusal:
            await machine.client.launch(order)
        assert refusal.value.code == code
    link = Path(good.shared) / "guest.log"
    link.symlink_to(tmp_path / "host-file")
    with pytest.raises(Refused):
        await machine.client.launch(good)
    assert not (tmp_path / "host-file").exists(), "the log never goes through a link that a guest left"
    with pytest.raises(Refused):
        await machine.client.status("nobody")


async def test_garbage_gets_a_typed_answer_and_the_silicon_goes_on(machine):
    async def sent(body: bytes) -> str:
        reader, writer = await asyncio.open_unix_connection(machine.socket)
        writer.write(body)
        writer.write_eof()
        answer = await frames.read_frame(reader, deadline_s=20)
        writer.close()
        with pytest.raises(MoorlineError) as refusal:
            decode_answer(GuestStatus, answer)
        return refusal.value.code

    request = schema.encode(PlatformRequest(op="platform", entry=ENTRY))
    assert await sent(b"GET / HTTP/1.1\r\n\r\n") == "frame.too_large"
    assert await sent(b"\0\0\0\x09abc") == "frame.truncated"
    assert await sent(frames.frame(b"\xff\xff")) == "cbor.undecodable"
    assert await sent(frames.frame(b"\x01")) == "silicon.request_unknown"
    assert await sent(frames.frame(request.replace(b"platform", b"platfort"))) == "silicon.request_unknown"
    assert await sent(frames.frame(schema.encode(machine.order("x")).replace(b"debug", b"debuh"))) == "message.fields"
    assert await sent(frames.frame(b"")) == "cbor.undecodable"
    assert (await machine.client.platform(ENTRY)).product == "Milan"


def test_a_guest_image_has_everything_and_nothing_more():
    paths = {source.path for source in guest_image.sources()}
    assert f"{guest_image.SITE}/moorline/attesters/collect.py" in paths
    assert any(path.endswith("cryptography/hazmat/bindings/_rust.abi3.so") for path in paths)
    assert not any("__pycache__" in path or path.endswith(".pyc") for path in paths)
    assert not any(
        path.startswith(f"{guest_image.SITE}/moorline/{room}/") for path in paths for room in guest_image.ROOMS_LEFT_OUT
    )
    assert not any(f"/{name}/" in path for path in paths for name in ("sqlalchemy", "httpx", "pytest"))


def test_an_entry_that_is_no_module_of_the_image_has_no_measurement():
    with pytest.raises(Refused):
        guest_image.measure("moorline.nothing")


def test_silicon_without_a_chip_does_not_start(tmp_path):
    from moorline.errors import Misconfigured
    from moorline.simulators.manufacturer import open_chip, open_manufacturer

    with pytest.raises(Misconfigured):
        open_chip(tmp_path)
    with pytest.raises(Misconfigured):
        open_manufacturer(tmp_path)
    with pytest.raises(Malformed):
        create_manufacturer(tmp_path / "maker", now=SystemClock().now()).make_chip("../up", now=SystemClock().now())
