"""The launcher enclave for real: a ledger, a broker over SoftHSM, a silicon process, and the enclave measured by it."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from moorline.clock import SystemClock
from moorline.errors import MoorlineError, Unavailable
from moorline.hsm.provider import sign_launcher_ticket
from moorline.ledger import transactions as tx
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.records import PackageRule
from moorline.orchestration import grant as grants
from moorline.orchestration import intent as intents
from moorline.services.orchestrator_peers import LauncherLink
from moorline.simulators import guest_image
from moorline.simulators.manufacturer import create_manufacturer
from moorline.wire import keys, launch, schema
from moorline.wire.frames import read_frame
from moorline.wire.launch import ChannelProfile
from moorline.wire.orchestration import LaunchIntent, LaunchReply, LaunchRequest
from moorline.wire.session import LauncherTicket

sys.path.insert(0, str(Path(__file__).parents[1] / "hsm"))
from canaries import command_lines, dumps_core, family, forms, runs
from consortium import Consortium, Process

pytestmark = [
    pytest.mark.story,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(shutil.which("softhsm2-util") is None, reason="SoftHSM is not installed"),
]

PACKAGE = b"p" * 32
ENTRY = "moorline.services.launcher"


class Alpha:
    """A provider with a broker, a silicon and what its launcher and orchestrator need."""

    def __init__(self, directory):
        self.directory = directory
        self.intent_signer = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
        self.reply_key = x25519.X25519PrivateKey.generate()
        self.launchers = []

    async def begin(self):
        now = SystemClock().now()
        self.maker = create_manufacturer(self.directory / "maker", now=now)
        self.maker.make_chip("m0", now=now)
        (self.directory / "silicon.toml").write_text('listen = "silicon.sock"\nchip = "maker/chips/m0"\nstate = "silicon"\n')
        self.silicon = Process(
            ("simulate", "silicon", "--config", str(self.directory / "silicon.toml")), self.directory / "silicon.log"
        )
        self.consortium, _ = await asyncio.gather(Consortium.found(self.directory), self.silicon.start())
        self.provider = await self.consortium.admit(
            "alpha", snp_anchors=self.maker.anchors_path, snp_minimum_tcb=(4, 0, 24, 219)
        )
        self.trust = self.consortium.ceremony.trust
        from moorline.host_agent.silicon import SiliconClient

        self.platform = await SiliconClient(self.silicon.said["address"]).platform(ENTRY)
        for body in (
            tx.RegisterOrchestrator(id="o1", public_key=keys.public_bytes(self.intent_signer.public_key())),
            tx.RegisterPlatform(
                id="h1",
                chip_id=self.platform.chip_id,
                product="Milan",
                ek_digest=bytes(32),
                location="EU/DE",
                tag_digest=bytes(32),
                simulated=True,
            ),
            tx.RegisterService(
                name="records",
                use_case="4.7",
                packages=(PackageRule(package_digest=PACKAGE, measurement=guest_image.measure("moorline.workload_agent")),),
                profiles=("tls",),
                callers=("beta",),
            ),
        ):
            await self.provider.submitter.send(body)
        return self

    def ticket(self, number, **changes):
        fields = {
            "ledger_id": self.trust.ledger_id,
            "provider": "alpha",
            "ticket": bytes([number]) * 32,
            "measurement": guest_image.measure(ENTRY),
            "chip": self.platform.chip_id,
            "not_after": SystemClock().now() + 600,
        }
        return sign_launcher_ticket(self.provider.issuer.key, LauncherTicket(**(fields | changes)))

    def launcher(self, name, ticket):
        folder = self.directory / name
        folder.mkdir()
        (folder / "ticket.cose").write_bytes(ticket)
        (folder / "launcher.toml").write_text(
            'provider = "alpha"\nhsm = "hsm-1"\n'
            f'name = "{name}"\nlisten = "127.0.0.1:0"\nstate = "state"\n'
            f'silicon = "{self.silicon.said["address"]}"\nbroker = "{self.provider.settings.listen_sessions}"\n'
            f'ticket = "ticket.cose"\ntrust = "{self.directory / "ledger" / "trust.cbor"}"\n'
        )
        process = Process(("launcher", "run", "--config", str(folder / "launcher.toml")), folder / "log")
        self.launchers.append(process)
        return process

    async def request(self, **changes):
        now = SystemClock().now()
        fields = {
            "ledger_id": self.trust.ledger_id,
            "provider": "alpha",
            "orchestrator": "o1",
            "tenant": "tenant-1",
            "service": "records",
            "package_digest": PACKAGE,
            "configuration_digest": bytes(32),
            "measurement": guest_image.measure("moorline.workload_agent"),
            "instance": "records-1",
            "generation": 1,
            "host": "h1",
            "chip": self.platform.chip_id,
            "hsm": "hsm-1",
            "profile": ChannelProfile.TLS,
            "not_after": now + 300,
            "reply_key": self.reply_key.public_key().public_bytes_raw(),
        }
        intent = LaunchIntent(**(fields | changes))
        bundle = await self.consortium.client.prove(intents.keys_to_prove(intent))
        return intent, LaunchRequest(intent=intents.sign(intent, self.intent_signer), bundle=bundle)

    def verify(self, reply, request, intent):
        return grants.verify_reply(
            reply,
            request.intent,
            intent,
            self.reply_key,
            roots=self.trust.roots,
            trust_domain="alpha.test",
            now=SystemClock().now(),
        )

    async def end(self):
        for launcher in self.launchers:
            await launcher.stop()
        await self.silicon.stop()
        await self.consortium.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alpha(tmp_path_factory):
    made = Alpha(tmp_path_factory.mktemp("launcher"))
    try:
        yield await made.begin()
    finally:
        await made.end()


async def test_an_admitted_enclave_grants_what_the_ledger_permits(alpha):
    """Verifies that: a launcher with a ticket attests, receives key and lease, and answers a registered orchestrator's
    intent with a grant that verifies against roots and ledger; that its ticket admits nobody else; and that garbage at
    its door changes nothing."""
    process = alpha.launcher("launcher-1", alpha.ticket(1))
    await process.start()
    link = LauncherLink(process.said["address"])
    intent, request = await alpha.request()
    granted = alpha.verify(await link.exchange(schema.encode(request)), request, intent)
    state = verify_bundle(
        await alpha.consortium.client.prove(grants.keys_to_prove(granted, "alpha")), alpha.trust, now=SystemClock().now()
    )
    grants.judge_issuer(granted, state, "alpha")
    assert granted.fields.sequence == 0
    assert granted.fields.launcher.hex() == process.said["launcher"]
    assert launch.commitment(granted.fields)

    for garbage in (b"\x00\x00\x00\x04junk", b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n"):
        host, _, port = process.said["address"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        writer.write_eof()
        reply = schema.decode(LaunchReply, await read_frame(reader, deadline_s=10))
        assert reply.grant is None
        writer.close()

    refused_intent, refused = await alpha.request(package_digest=b"q" * 32)
    with pytest.raises(MoorlineError) as caught:
        alpha.verify(await link.exchange(schema.encode(refused)), refused, refused_intent)
    assert caught.value.code == "launch.package_not_registered"

    again = alpha.launcher("launcher-2", alpha.ticket(1))
    await refused_to_run(again, "ticket")
    intent, request = await alpha.request(instance="records-2")
    assert alpha.verify(await link.exchange(schema.encode(request)), request, intent).fields.sequence == 1


async def test_the_enclave_keeps_its_secrets_from_whoever_started_it(alpha):
    """Verifies that: the token of a launch is in no file that the guest, its parent, the broker or the silicon wrote, and in
    no command line; and the kernel would write no core of the guest's processes, nor of its parent."""
    link = LauncherLink(alpha.launchers[0].said["address"])
    intent, request = await alpha.request(instance="records-7")
    reply = await link.exchange(schema.encode(request))
    token = alpha.verify(reply, request, intent).token
    files = [path for path in alpha.directory.rglob("*") if path.is_file() and path.stat().st_size < 4 << 20]
    held = {str(path): path.read_bytes() for path in files} | {"ps": command_lines(), "reply": reply}
    assert any("status.jsonl" in place and b"active" in content for place, content in held.items())
    leaks = [(place, form) for form, sought in forms(token).items() for place, content in held.items() if sought in content]
    assert leaks == []
    started = family(alpha.silicon.running.pid)
    assert any(runs(pid, ENTRY) for pid in started)
    assert [pid for pid in (*started, alpha.launchers[0].running.pid) if dumps_core(pid)] == []


async def test_a_ticket_for_other_code_admits_nobody(alpha):
    """Verifies that: the broker compares the ticket with what the silicon measured, and the refusal reaches the operator."""
    process = alpha.launcher("launcher-3", alpha.ticket(3, measurement=bytes(48)))
    await refused_to_run(process, "measurement")


async def test_a_launcher_that_is_not_there(alpha):
    with pytest.raises(Unavailable) as caught:
        await LauncherLink(f"unix:{alpha.directory / 'nothing.sock'}").exchange(b"")
    assert caught.value.code == "peer.unreachable"


async def refused_to_run(process, word):
    """The parent process ends with the broker's typed refusal in its log."""
    with pytest.raises(AssertionError):
        await process.start()
    assert await asyncio.wait_for(process.running.wait(), 20) != 0
    assert word in process.log.read_text().splitlines()[-1]
