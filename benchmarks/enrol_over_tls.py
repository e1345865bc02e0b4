"""Enrolments over HTTPS, a new connection each: our broker process by EST, and step-ca by its own API, in turns in one run.

The client is the same: the standard library's HTTPS in threads, requests made before the clock starts. What differs: our key is
in a SoftHSM token and theirs in a file; ours writes two durable transactions in SQLite (the code, the certificate), theirs its
own database (used tokens, certificates) as it does by default; ours issues under a look at the ledger. Server CPU is of the
whole process, from the kernel's account.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import os
import ssl
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from peers import step_ca

from moorline.cli.demo import founding
from moorline.cli.demo.stage import Stage
from moorline.cli.demo.world import HSM
from moorline.nfv import Role

ROUNDS = 3
EACH = 100
AT_ONCE = 4


@dataclass(frozen=True)
class Side:
    """A server, and requests that it takes: path, headers, body."""

    name: str
    pid: int
    address: str
    server_name: str
    roots_pem: bytes
    requests: list[tuple[str, dict[str, str], bytes]]


@dataclass
class Figures:
    """What one server did."""

    done: int = 0
    seconds: float = 0.0
    cpu: float = 0.0


class Dialled(http.client.HTTPConnection):
    """Dials an address and checks another name."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, name: str) -> None:
        super().__init__(host, port, timeout=20)
        self._tls, self._name = context, name

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def enrol(side: Side, asked: tuple[str, dict[str, str], bytes]) -> None:
    """One enrolment on a connection of its own; raises unless a certificate came."""
    context = ssl.create_default_context(cadata=side.roots_pem.decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    host, _, port = side.address.rpartition(":")
    connection = Dialled(host, int(port), context, side.server_name)
    path, headers, body = asked
    connection.request("POST", path, body=body, headers=headers)
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    if answer.status not in (200, 201):
        message = f"{side.name} answered {answer.status}: {said[:300]!r}"
        raise RuntimeError(message)


def measure(sides: list[Side]) -> list[Figures]:
    found = [Figures() for _ in sides]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for turn in range(ROUNDS):
            for side, figures in zip(sides, found, strict=True):
                part = side.requests[turn * EACH : (turn + 1) * EACH]
                before, started = cpu_seconds(side.pid), time.perf_counter()
                list(threads.map(lambda asked, side=side: enrol(side, asked), part))
                figures.seconds += time.perf_counter() - started
                figures.cpu += cpu_seconds(side.pid) - before
                figures.done += len(part)
    return found


async def ours(stage: Stage) -> Side:
    """The broker of provider beta, with a code for each device."""
    world = await founding.found_consortium(stage)
    await founding.admit_providers(world)
    await founding.start_brokers(world)
    beta = world.beta
    requests = []
    async with beta.admin() as admin:
        for number in range(ROUNDS * EACH):
            device = f"bench-{number}"
            code = (await admin.post_json("/v1/enrolment-codes", {"device": device}))["code"]
            basic = base64.b64encode(f"{device}:{code}".encode()).decode()
            headers = {"authorization": f"Basic {basic}", "content-type": "application/pkcs10"}
            requests.append(("/.well-known/est/simpleenroll", headers, base64.b64encode(_csr(device))))
    await world.aclose()
    return Side(
        name="Moorline",
        pid=beta.broker.pid,
        address=beta.https,
        server_name=beta.name_of(Role.HSM, HSM),
        roots_pem=world.roots_pem,
        requests=requests,
    )


def theirs(peer: step_ca.StepCa) -> Side:
    names = (f"bench-{number}.test" for number in range(ROUNDS * EACH))
    headers = {"content-type": "application/json"}
    return Side(
        name="step-ca",
        pid=peer.pid,
        address=peer.address,
        server_name="localhost",
        roots_pem=peer.roots_pem,
        requests=[("/1.0/sign", headers, peer.body(name, step_ca.csr(name))) for name in names],
    )


def _csr(name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


async def compare(folder: Path, peer: step_ca.StepCa | None) -> None:
    with contextlib.closing(Stage(folder / "ours", keep=False)) as stage:
        sides = [await ours(stage)] + ([] if peer is None else [theirs(peer)])
        found = await asyncio.to_thread(measure, sides)
    for side, figures in zip(sides, found, strict=True):
        label = f"{side.name} over HTTPS, a connection each, {AT_ONCE} at once"
        rate, cpu = figures.done / figures.seconds, 1000 * figures.cpu / figures.done
        print(f"{label:52} {rate:10.0f} /s   {cpu:5.2f} ms of the server's CPU")
    if peer is not None:
        mine, other = (figures.done / figures.seconds for figures in found)
        print(
            f"rate against step-ca {step_ca.VERSION}: {mine / other:.2f}; CPU against it: {found[0].cpu / found[1].cpu:.2f}"
        )


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mb") as name:
        folder = Path(name)
        (folder / "peer").mkdir()
        peer = None
        try:
            peer = step_ca.StepCa(folder / "peer")
        except (OSError, subprocess.SubprocessError) as error:
            print(f"peer in the same run: step-ca {step_ca.VERSION} skipped: {type(error).__name__}")
        try:
            asyncio.run(compare(folder, peer))
        finally:
            if peer is not None:
                peer.close()


if __name__ == "__main__":
    main()
