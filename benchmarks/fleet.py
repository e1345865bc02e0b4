"""A fleet under continuous attestation: N hosts, each once a period, by one verifier process over TLS, HTTP and SQLite.

    ./dev bench fleet                                          1,000 hosts, 30 s
    .venv/bin/python benchmarks/fleet.py --hosts 10000 --seconds 600

The verifier is the service's own application in a process of its own, with its database on disk and a P-256 key for results.
The hosts are here: each has its own attestation key, which signs real TPM quotes over a real boot log and IMA list, and its
own TLS connection; they share this process, so what making quotes costs is on the same machine and is printed apart. Nobody
enrols over the wire (their keys are put into the database), and the ledger's platform records are at hand.

A deadline is met when the verdict is there before the host's next turn. The cold start is all hosts at once, with whole logs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from host_poll import Machine, authority_with, enrol, firmware_values

from moorline.clock import Instant, SystemClock, Validity
from moorline.nfv import SpiffeId
from moorline.services import http, http_connection, verifier
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.anchors import production_anchors
from moorline.wire import certificates, keys, schema
from moorline.wire import host as wire

NAME = "v1.verifier.alpha.test"
VERIFIER = "spiffe://alpha.test/verifier/v1"
PEM = serialization.Encoding.PEM
HZ = os.sysconf("SC_CLK_TCK")
OPEN_AT_ONCE = 64


# The verifier's process ------------------------------------------------------------------------------------------------


async def serve(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())

    async def sign(messages: tuple[bytes, ...]) -> tuple[bytes, ...]:
        signer = keys.KeySigner(key)
        return tuple(signer.sign(message) for message in messages)

    store = VerifierStore.open(directory / "verifier.db")
    served = authority_with(store, firmware_values(SystemClock().now()), sign=sign, clock=SystemClock())
    anchors = verifier.Anchors(tpm=(), snp=production_anchors(), simulated_allowed=True)
    app = verifier.application(served, anchors, trust_domain="alpha.test", clock=SystemClock())
    shown = http.TlsIdentity(chain_pem=(directory / "chain.pem").read_bytes(), key_pem=(directory / "key.pem").read_bytes())
    await http.serve(
        app,
        listen="127.0.0.1:0",
        identity=shown,
        client_roots_pem=(directory / "roots.pem").read_bytes(),
        ready=lambda address: print(json.dumps({"address": address}), flush=True),
        connections=http_connection.Connections(room=65536, idle_s=verifier.HOST_IDLE_S),
    )


def certify(directory: Path) -> None:
    now = SystemClock().now()
    life = Validity(not_before=Instant(now - 60), not_after=Instant(now + 3500))
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificates.root_certificate(root_key, name="root", validity=life, serial=1)
    leaf = certificates.leaf_certificate(
        key.public_key(),
        spiffe_id=SpiffeId.parse(VERIFIER),
        issuer=certificates.Issuer(certificate=root, key=root_key),
        validity=life,
        serial=2,
    )
    (directory / "roots.pem").write_bytes(root.public_bytes(PEM))
    (directory / "chain.pem").write_bytes(leaf.public_bytes(PEM))
    pem = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(pem)


# The hosts -------------------------------------------------------------------------------------------------------------


class Wire:
    """One kept TLS connection that asks and waits; as little HTTP as does it, since what it costs is not the verifier's."""

    def __init__(self, address: str, context: ssl.SSLContext) -> None:
        self._host, _, port = address.rpartition(":")
        self._port, self._context = int(port), context
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def again(self) -> Wire:
        """Another connection to the same place."""
        return Wire(f"{self._host}:{self._port}", self._context)

    async def open(self) -> None:
        self._streams = await asyncio.open_connection(
            self._host, self._port, ssl=self._context, server_hostname=NAME, ssl_handshake_timeout=120
        )

    async def post(self, path: str, body: bytes) -> bytes:
        if self._streams is None:
            await self.open()
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: v\r\ncontent-type: application/cbor\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        answer = await reader.readexactly(size)
        if not head.startswith(b"HTTP/1.1 200"):
            raise OSError(answer[:200])
        return answer


@dataclass
class Host:
    name: str
    machine: Machine
    wire: Wire
    next: wire.HostChallenge | None = None


@dataclass
class Seen:
    took: list[float] = field(default_factory=list)
    quoting: float = 0.0
    missed: int = 0
    failed: int = 0
    why: dict[str, int] = field(default_factory=dict)


async def poll(host: Host, seen: Seen) -> wire.HostVerdict:
    if host.next is None:
        asked = schema.encode(wire.ChallengeRequest(host=host.name))
        host.next = schema.decode(wire.HostChallenge, await host.wire.post(f"/v1/hosts/{host.name}/challenge", asked))
    challenge, host.next = host.next, None
    started = time.process_time()
    body = schema.encode(host.machine.evidence(challenge))
    seen.quoting += time.process_time() - started
    verdict = schema.decode(
        wire.HostVerdict, await host.wire.post(f"/v1/hosts/{host.name}/evidence", body), max_bytes=wire.MAX_EVIDENCE
    )
    host.next = verdict.next
    return verdict


async def live(host: Host, seen: Seen, *, first: float, period: float, until: float) -> None:
    due = first
    while due < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        sent = time.monotonic()
        try:
            verdict = await poll(host, seen)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            seen.failed += 1
            seen.why[str(error)[:80]] = seen.why.get(str(error)[:80], 0) + 1
            host.wire = host.wire.again()
        else:
            assert verdict.code is None, verdict.code
            seen.took.append(time.monotonic() - sent)
            seen.missed += time.monotonic() > due + period
        due += period


def usage(pid: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / HZ, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


async def run(count: int, seconds: float, period: float, directory: Path) -> None:
    certify(directory)
    store = VerifierStore.open(directory / "verifier.db")
    machines = [Machine() for _ in range(count)]
    names = [f"h{number}" for number in range(count)]
    for name, machine in zip(names, machines, strict=True):
        enrol(store, name, machine)
    store.close()
    process = subprocess.Popen(  # noqa: ASYNC220 - before anything else runs in this loop
        [sys.executable, __file__, "--serve", str(directory)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        await drive(process.pid, address, names, machines, seconds, period, directory)
    finally:
        process.terminate()
        process.wait(20)


async def drive(
    pid: int, address: str, names: list[str], machines: list[Machine], seconds: float, period: float, directory: Path
) -> None:
    context = ssl.create_default_context(cafile=str(directory / "roots.pem"))
    hosts = [Host(name, machine, Wire(address, context)) for name, machine in zip(names, machines, strict=True)]
    count, seen, room = len(hosts), Seen(), asyncio.Semaphore(OPEN_AT_ONCE)

    async def begin(host: Host) -> None:
        async with room:  # as a switch that comes back: everybody calls, the listen queue lets so many in at once
            await host.wire.open()
        await poll(host, seen)

    idle_cpu, idle_memory = usage(pid)
    started = time.monotonic()
    cold = await asyncio.gather(*(begin(host) for host in hosts), return_exceptions=True)
    settled, lost = time.monotonic() - started, [one for one in cold if isinstance(one, BaseException)]
    cold_cpu, _ = usage(pid)
    row(
        f"cold start of {count} hosts at once",
        f"{settled:.1f} s",
        f"{len(lost)} lost, {(cold_cpu - idle_cpu) / count * 1000:.2f} ms CPU a host",
    )
    warm = Seen()
    own, before, begun = time.process_time(), usage(pid)[0], time.monotonic()
    until = begun + seconds
    await asyncio.gather(
        *(
            live(host, warm, first=begun + index * period / count, period=period, until=until)
            for index, host in enumerate(hosts)
        )
    )
    after, memory = usage(pid)
    elapsed, polls = time.monotonic() - begun, len(warm.took)
    each = (after - before) / max(1, polls)
    took = sorted(warm.took) or [0.0]
    row(
        f"{count} hosts, one period {period:.0f} s, for",
        f"{elapsed:.0f} s",
        f"{polls} verdicts, {warm.missed} deadlines missed, {warm.failed} failed {warm.why or ''}",
    )
    row(
        "verifier CPU a verdict, with TLS, HTTP and SQLite",
        f"{each * 1000:.2f} ms",
        f"{each / bare():.1f} x bare P-256 verification; {(after - before) / elapsed:.2f} cores",
    )
    row(
        "from evidence sent to verdict read",
        f"{statistics.median(took) * 1000:.0f} ms",
        f"p99 {took[int(len(took) * 0.99)] * 1000:.0f} ms, longest {took[-1]:.2f} s",
    )
    row("verifier memory a host", f"{(memory - idle_memory) / count / 1024:.0f} KiB", "with its TLS connection")
    row(
        "the hosts' own CPU, in this process",
        f"{(time.process_time() - own) / elapsed:.2f} cores",
        f"{warm.quoting / max(1, polls) * 1000:.2f} ms a quote",
    )


def bare() -> float:
    key = ec.generate_private_key(ec.SECP256R1())
    scheme, public = ec.ECDSA(hashes.SHA256()), key.public_key()
    signature = key.sign(b"message", scheme)
    started = time.process_time()
    for _ in range(2000):
        public.verify(signature, b"message", scheme)
    return (time.process_time() - started) / 2000


def row(what: str, figure: str, more: str) -> None:
    print(f"{what:<52}{figure:>12}   {more}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--period", type=float, default=10.0)
    asked = parser.parse_args([] if arguments is None else arguments)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    with contextlib.suppress(KeyboardInterrupt):
        if asked.serve is not None:
            asyncio.run(serve(asked.serve))
            return 0
        with tempfile.TemporaryDirectory() as name:
            asyncio.run(run(asked.hosts, asked.seconds, asked.period, Path(name)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
