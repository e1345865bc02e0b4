"""A Debian kernel boots under OVMF with Secure Boot and a TPM, IMA on, and its agent attests to a real verifier.

verifies that: what firmware, boot loader and kernel really write is judged as it should be. The machine is QEMU's, its TPM a
swtpm; nothing of the boot log and the IMA list is made by us. Another kernel, another command line, Secure Boot switched off
and a file that nobody listed are each refused, by their own codes, and the same machine is affirmed again afterwards.
"""

import asyncio
import base64
import hashlib
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.tpm import Tpm
from moorline.clock import Instant, SystemClock
from moorline.errors import MoorlineError
from moorline.evidence.tpm_structures import parse_public
from moorline.ledger import transactions as tx
from moorline.policy import ear, reference_values
from moorline.rats import Outcome, Tier
from moorline.services import settings
from moorline.services.host import AttestationSettings, HostSettings
from moorline.services.verifier_settings import VerifierSettings
from moorline.simulators.tpm import SimulatedTpm, SimulatedTpmManufacturer
from moorline.verification.tpm_identity import endorsement_digest
from moorline.wire import keys
from moorline.wire.http import ClientIdentity, HttpClient

sys.path.insert(0, str(Path(__file__).parents[1] / "hsm"))
sys.path.insert(0, str(Path(__file__).parent))

import disk
from consortium import Consortium, Process, free_addresses
from machine import Machine

pytestmark = [
    pytest.mark.story,
    pytest.mark.long,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(disk.missing() is not None, reason=f"./dev test --long installs {disk.missing()}"),
]
NAME = "v1.verifier.alpha.test"
SECURITY = "/sys/kernel/security"
JUDGED_S = 300


class Site:
    """One provider with a verifier, and one machine of it."""

    def __init__(self, directory, consortium, provider):
        self.directory, self.consortium, self.provider = directory, consortium, provider
        self.signer = ec.generate_private_key(ec.SECP256R1())
        self.maker = SimulatedTpmManufacturer.create(directory / "maker", now=SystemClock().now())
        self.tpm = SimulatedTpm.manufacture(directory / "tpm", self.maker)
        self.machine = Machine(directory, self.tpm)
        self.workshop = disk.Workshop(directory / "disks")
        self.reader = None
        self.process = None

    @property
    def listen(self):
        return self.provider.settings.verifier_url.removeprefix("https://")

    async def register(self):
        """The location tag in the TPM, and the platform record on the ledger."""
        with self.tpm, Tpm.open(self.tpm.tcti) as tpm:
            ek_digest = endorsement_digest(parse_public(tpm.endorsement().public).key())
            tag = reference_values.LocationTag(
                host="h1", ek_digest=ek_digest, location="EU/DE", not_after=SystemClock().now() + 86400
            )
            signed = reference_values.sign_tag(tag, keys.KeySigner(self.signer))
            tpm.write_location(reference_values.tag_digest(signed))
        record = tx.RegisterPlatform(
            id="h1",
            chip_id=b"\x01" * 64,
            product="Milan",
            ek_digest=ek_digest,
            location="EU/DE",
            tag_digest=hashlib.sha256(signed).digest(),
            simulated=True,
        )
        await self.provider.submitter.send(record)
        return signed

    def root(self, tag):
        """The machine's root file system, with the agent's settings in it. The verifier is outside."""
        configured = HostSettings(
            provider="alpha",
            trust_domain="alpha.test",
            id="h1",
            listen="127.0.0.1:7300",
            state=Path("/run/moor"),
            silicon="unix:/run/none.sock",
            orchestrator="o1",
            roots=Path("/moor/roots.pem"),
            certificate_chain=None,
            private_key=None,
            broker=f"10.0.2.2:{self.provider.settings.listen_sessions.rpartition(':')[2]}",
            hsm="hsm-1",
            trust=Path("/moor/trust.cbor"),
            ledger_urls=tuple(url.replace("127.0.0.1", "10.0.2.2") for url in self.provider.settings.ledger_urls),
            attestation=AttestationSettings(
                tcti="device:/dev/tpmrm0",
                verifier_url=f"https://10.0.2.2:{self.listen.rpartition(':')[2]}",
                verifier_name=NAME,
                event_log=Path(f"{SECURITY}/tpm0/binary_bios_measurements"),
                ima=Path(f"{SECURITY}/ima/ascii_runtime_measurements"),
                tag=Path("/moor/tag.cose"),
                period_s=2.0,
            ),
        )
        settings.write(configured, self.directory / "host.toml")
        return self.workshop.root(
            {
                "moor/host.toml": (self.directory / "host.toml").read_bytes(),
                "moor/roots.pem": self.consortium.ceremony.roots_pem,
                "moor/trust.cbor": (self.consortium.directory / "ledger" / "trust.cbor").read_bytes(),
                "moor/tag.cose": tag,
            }
        )

    async def start_verifier(self):
        """As `moor` sets one up: reference values of the golden boot and of the golden disk, signed."""
        directory = self.directory / "v"
        self.reader = await self.issued("spiffe://alpha.test/orchestrator/o1", self.directory / "reader")
        await self.issued("spiffe://alpha.test/verifier/v1", directory)
        (directory / "signer.der").write_bytes(keys.public_bytes(self.signer.public_key()))
        configured = VerifierSettings(
            id="v1",
            listen=self.listen,
            provider="alpha",
            trust_domain="alpha.test",
            identity_chain=directory / "chain.pem",
            identity_key=directory / "key.pem",
            consortium_roots=self.consortium.directory / "ledger" / "roots.pem",
            database=directory / "verifier.db",
            ledger_trust=self.consortium.directory / "ledger" / "trust.cbor",
            ledger_urls=self.provider.settings.ledger_urls,
            broker_url=f"https://{self.provider.broker.said['https']}",
            broker_name=self.provider.server_name,
            anchors=("vendor", "simulated"),
            simulated_tpm_roots=(self.maker.root_path,),
            reference_values=(self.directory / "boot.cose", self.directory / "files.cose"),
            reference_signers=(directory / "signer.der",),
            pcrs=tuple(range(13)),
        )
        settings.write(configured, directory / "verifier.toml")
        self.process = Process(("verifier", "run", "--config", str(directory / "verifier.toml")), directory / "log")
        await self.process.start()

    async def issued(self, uri, directory):
        await self.provider.register(uri)
        key = ec.generate_private_key(ec.SECP256R1())
        public = base64.b64encode(keys.public_bytes(key.public_key())).decode()
        async with self.provider.admin() as admin:
            answer = await admin.post_json("/v1/svid", {"public_key": public, "spiffe_id": uri})
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        directory.mkdir()
        (directory / "chain.pem").write_text(answer["chain"])
        (directory / "key.pem").write_bytes(key.private_bytes(*form))
        return ClientIdentity(certificate_chain_pem=answer["chain"].encode(), private_key_pem=key.private_bytes(*form))

    async def sign_references(self, log):
        """A golden boot's log and a golden disk become what the verifier accepts, by the commands that operators use."""
        (self.directory / "boot.log").write_bytes(log)
        (self.directory / "signer.pem").write_bytes(
            self.signer.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        await self.moor("refs from-boot --event-log boot.log --set boot --serial 1 --until 2099-01-01 -o boot.bin")
        below = " ".join(f"--below {path}" for path in ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/moor"))
        await self.moor(f"refs from-host --root disks/root {below} --set files --release 1 --until 2099-01-01 -o files.json")
        await self.moor("refs values files.json -o files.bin")
        for name in ("boot", "files"):
            await self.moor(f"verifier sign-reference-values {name}.bin --key signer.pem -o {name}.cose")

    async def moor(self, line):
        words = ("-c", "from moorline.cli import main; main()", *line.split())
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, cwd=self.directory, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, (line, said)

    async def judged(self, since):
        """The newest result about the machine that was issued after `since`, verified."""
        async with HttpClient(
            f"https://{self.listen}", server_name=NAME, roots_pem=self.consortium.ceremony.roots_pem, identity=self.reader
        ) as asked:
            while True:
                try:
                    answer = await asked.get_json("/v1/results/h1")
                    result = ear.parse_verified(
                        answer["ear"], self.provider.hsm.keys.verifier, now=SystemClock().now(), audience="alpha.test"
                    )
                except MoorlineError as error:
                    assert error.code.startswith("result."), error
                else:
                    if result.issued > since:
                        return result
                await asyncio.sleep(0.5)

    async def boots(self, partition, root, *, secure_boot=True):
        """Boot, wait for a verdict on this very boot; the machine, still running, and the result."""
        since = Instant(SystemClock().now())
        running = await self.machine.boot(partition, root, secure_boot=secure_boot)
        try:
            return running, await asyncio.wait_for(self.judged(since), JUDGED_S)
        except BaseException:
            await running.off()
            raise


@pytest.fixture
async def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("b")
    made = await Consortium.found(directory, max_age_s=30)
    here = None
    try:
        url = f"https://{free_addresses(1)[0]}"
        provider = await made.admit("alpha", verifier="v1", verifier_url=url)
        here = Site(directory, made, provider)
        yield here
    finally:
        if here is not None and here.process is not None:
            await here.process.stop()
        await made.close()


def refusals(result):
    return {finding.code for finding in result.findings if finding.outcome is Outcome.NOT_MET}


async def test_a_real_boot_attests_and_each_change_to_it_is_refused(site):
    tag = await site.register()
    root, good = site.root(tag), site.workshop.partition("good")

    golden = await site.machine.boot(good, root)  # no verifier yet: its agent keeps trying
    try:
        log = base64.b64decode(await golden.say(f"base64 {SECURITY}/tpm0/binary_bios_measurements"))
        await site.sign_references(log)
        await site.start_verifier()
        began = SystemClock().now()
        result = await asyncio.wait_for(site.judged(began), JUDGED_S)
        assert (result.status, refusals(result)) == (Tier.AFFIRMING, set())
        assert {one.capability: one.value for one in result.capabilities}["kernel.lockdown"] == "integrity"
        assert result.bound["location"] == "EU/DE"

        await golden.say("cp /bin/busybox /moor/true && echo x >> /moor/true && /moor/true")
        changed = await asyncio.wait_for(site.judged(SystemClock().now() + 1), JUDGED_S)
        assert (changed.status, refusals(changed)) == (Tier.CONTRAINDICATED, {"host.file_not_in_reference_values"})
    finally:
        await golden.off()

    kernel = site.workshop.partition("kernel", kernel=site.workshop.changed_kernel())
    line = site.workshop.partition("line", command_line=f"{disk.COMMAND_LINE} init=/bin/sh")
    for partition, secure_boot, expected in (
        (kernel, True, {"host.kernel_not_in_reference_values"}),
        (line, True, {"host.command_line_not_in_reference_values"}),
        (good, False, {"host.secure_boot_off", "host.configuration_not_in_reference_values"}),
    ):
        running, refused = await site.boots(partition, root, secure_boot=secure_boot)
        await running.off()
        assert refused.status is Tier.CONTRAINDICATED
        assert expected <= refusals(refused)
        if secure_boot:  # without it, firmware and stub take another way, and measure other things as well
            assert refusals(refused) - {"host.boot_event_not_in_reference_values"} == expected

    running, again = await site.boots(good, root)
    await running.off()
    assert again.status is Tier.AFFIRMING
