"""Figures of the running system, measured on the demo's own processes: launches, identities through the broker, drift, suspension.

The physical limit stands beside each: a launch beside the same sandbox with the same interpreter doing nothing, an identity beside
the signatures it needs in the same library.
"""

import asyncio
import contextlib
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from moorline.channel.driver import new_kem
from moorline.channel.identity import TlsIdentity, settings
from moorline.channel.session import seal_to
from moorline.cli.demo import attack_tools, drifting, federating, founding, hosting, operating
from moorline.cli.demo.stage import Stage
from moorline.clock import Instant, Validity
from moorline.host_agent.silicon import SiliconClient
from moorline.simulators.silicon import GuestContext, Silicon, guest_policy
from moorline.wire import certificates, launch, schema
from moorline.wire.guest import FunctionConfiguration
from moorline.wire.silicon import LaunchGuest
from moorline.workload_agent.broker import attest
from moorline.workload_agent.launch import Launch

LAUNCHES = 8
IDENTITIES = 120
AT_ONCE = 8


class ChipReports:
    """Evidence of one launch, signed by the chip's firmware in this process instead of through a guest's descriptor."""

    def __init__(self, silicon, context):
        self._silicon, self._context = silicon, context

    def report(self, report_data):
        return self._silicon.report(self._context, report_data)


async def build(stage):
    world = await founding.found_consortium(stage)
    world.facts["hosts"] = {}
    for act in (
        founding.admit_providers,
        founding.start_brokers,
        hosting.start_hosts,
        operating.start_launcher,
        operating.onboard_package,
        operating.launch_function,
        operating.agree_contract,
        federating.use_function,
    ):
        await act(world)
    return world


async def bare_starts(world):
    """The same silicon, sandbox, image and interpreter, with an entry that ends at once."""
    client = SiliconClient(hosting.silicon_socket(world, "h1"))
    took = []
    for number in range(LAUNCHES):
        shared = world.stage.path("bench", f"bare-{number}")
        (shared / "report_data.bin").write_bytes(bytes(64))
        order = LaunchGuest(
            op="launch",
            name=f"bare-{number}",
            entry="moorline.attesters.collect",
            host_data=bytes(32),
            shared=str(shared),
            debug=False,
            memory_mib=256,
            pids=32,
        )
        started = time.perf_counter()
        await client.launch(order)
        while (await client.status(order.name)).state == "running":
            await asyncio.sleep(0.002)
        took.append(time.perf_counter() - started)
    return took[1:]


async def launches(world):
    """From the operator's request to the function's identity and open port, one after the other."""
    took = []
    async with operating.orchestrator(world) as client:
        for number in range(LAUNCHES):
            name = f"bench-{number}"
            body = {"service": "records", "package": world.facts["package"], "tenant": "bench", "id": name}
            started = time.perf_counter()
            await client.post_json("/v1/functions", body)
            while (await client.get_json(f"/v1/functions/{name}"))["state"] != "active":
                await asyncio.sleep(0.005)
            took.append(time.perf_counter() - started)
            await client.send("DELETE", f"/v1/functions/{name}", headers={})
    return took[1:]


async def identities(world):
    """Attested sessions with real tokens, each consumed, answered, confirmed and certified by alpha's broker process."""
    silicon = Silicon(hosting.host(world, "h1").chip)
    minted = [await attack_tools.mint(world, f"identity-{number}", life_s=300) for number in range(IDENTITIES)]
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(made):
        fields = made.fields
        configuration = schema.decode(FunctionConfiguration, made.configuration)
        request = Launch(
            encoded_fields=launch.encode_fields(fields),
            fields=fields,
            token=made.token,
            configuration=configuration,
            trust=world.consortium.trust,
            package=b"",
        )
        context = GuestContext(
            measurement=fields.measurement,
            host_data=launch.commitment(fields),
            policy=guest_policy(debug=False),
            report_id=os.urandom(32),
        )
        async with gate:
            link = await attest(world.alpha.sessions, request, ChipReports(silicon, context))
            await link.aclose()

    before, started = cpu_seconds(world.alpha.broker.pid), time.perf_counter()
    await asyncio.gather(*(one(made) for made in minted))
    return time.perf_counter() - started, cpu_seconds(world.alpha.broker.pid) - before


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bare_cryptography_s():
    """What one attested session needs: verify the report (P-384), sign the certificate (P-256), HPKE to
    the attester; and the server's half of a TLS 1.3 handshake with the same suites and certificates' sizes. Seconds of CPU each.
    """
    p384, p256 = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
    message = bytes(672)
    report, verifier = p384.sign(message, ec.ECDSA(hashes.SHA384())), p384.public_key()
    kem = new_kem()
    rounds = 300
    started = time.process_time()
    for _ in range(rounds):
        verifier.verify(report, message, ec.ECDSA(hashes.SHA384()))
        p256.sign(message, ec.ECDSA(hashes.SHA256()))
        seal_to(kem.public, message, info=b"")
    signatures = (time.process_time() - started) / rounds
    return signatures, server_handshake_s(p256, rounds)


def server_handshake_s(key, rounds):
    """The CPU of OpenSSL's server side alone, between a client and a server in memory."""
    validity = Validity(not_before=Instant(0), not_after=Instant(1 << 32))
    der = certificates.root_certificate(key, name="bare", validity=validity, serial=1).public_bytes(Encoding.DER)
    server_context = settings(TlsIdentity(key=key, chain=(der, der, der, der)))
    client_context = settings(None)
    spent = 0.0
    for _ in range(rounds):
        server, client = SSL.Connection(server_context, None), SSL.Connection(client_context, None)
        server.set_accept_state()
        client.set_connect_state()
        for _ in range(2):
            with contextlib.suppress(SSL.WantReadError):
                client.do_handshake()
            server.bio_write(client.bio_read(1 << 16))
            started = time.process_time()
            with contextlib.suppress(SSL.WantReadError):
                server.do_handshake()
            spent += time.process_time() - started
            with contextlib.suppress(SSL.WantReadError):
                client.bio_write(server.bio_read(1 << 16))
    return spent / rounds


async def measured(directory):
    stage = Stage(directory, keep=False)
    world = None
    try:
        world = await build(stage)
        bare, full = await bare_starts(world), await launches(world)
        wall, cpu = await identities(world)
        limit = bare_cryptography_s()
        drift = await drifting.drift(world)
        suspension = await federating.suspend_and_reinstate(world)
    finally:
        if world is not None:
            with contextlib.suppress(Exception):
                await world.aclose()
        stage.close()
    rows(bare, full, wall, cpu, limit)
    print(f"drift to halt                  {re.search(r'halted ([0-9.]+) s', drift).group(1)} s   ({drift})")
    print(f"suspension to refusal          {re.search(r'cut after ([0-9.]+) s', suspension).group(1)} s   ({suspension})")


def rows(bare, full, wall, cpu, limit):
    bare_ms, full_ms = statistics.median(bare) * 1000, statistics.median(full) * 1000
    print(f"bare sandboxed process         {bare_ms:8.0f} ms   1.00   start to end, median of {len(bare)}")
    print(
        f"launch to trusted identity     {full_ms:8.0f} ms   {full_ms / bare_ms:.2f}   overhead {full_ms - bare_ms:.0f} ms (target 100 ms)"
    )
    print(
        f"identities through the broker  {IDENTITIES / wall:8.0f} /s   {AT_ONCE} at once, client and broker on the same two cores"
    )
    per_core = IDENTITIES / cpu
    signatures, handshake = limit
    ratio = (signatures + handshake) * per_core
    print(
        f"the same in bare cryptography  {1 / (signatures + handshake):8.0f} /s   1.00   signatures and HPKE {signatures * 1000:.2f} ms,"
    )
    print(f"                                               the server's half of TLS {handshake * 1000:.2f} ms")
    print(f"identities per broker core     {per_core:8.0f} /s   {ratio:.2f}   (target 0.6)")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="moor-bench-") as folder:
        asyncio.run(measured(Path(folder)))
